"""Networks that are cut per reader, from torch to the smaller file: the scales that died are removed, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.trainers.export import export_onnx
from prune_onnx.trainers.models.densenet import DenseNet
from prune_onnx.trainers.models.preresnet import PreResNet

from ..graph_ops.builder import distance, outputs_of

SHAPE = (3, 16, 16)


def dying(model: nn.Module, seed: int, *, voice: bool) -> dict[str, int]:
    """Give every BatchNorm random values and kill a third of its scales; return how many stay, by layer.

    With ``voice`` the dead channels are constants that ReLU lets pass, else zero behind it.
    """
    draws = torch.Generator().manual_seed(seed)
    left = {}
    for name, norm in model.named_modules():
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        n = norm.num_features
        with torch.no_grad():
            norm.weight.copy_(torch.rand(n, generator=draws) + 0.5)
            norm.bias.copy_(torch.rand(n, generator=draws) - 0.2)
            norm.running_mean.copy_(torch.randn(n, generator=draws) * 0.1)
            norm.running_var.copy_(torch.rand(n, generator=draws) + 0.5)
            dead = torch.randperm(n, generator=draws)[: n // 3]
            norm.weight[dead] = 0
            norm.bias[dead] = norm.bias[dead].abs() * (1 if voice else -1)
        left[name] = n - n // 3
    return left


def widths(path: Path) -> dict[str, int]:
    """Return the channels of every BatchNormalization, by node."""
    graph = onnx.load(path).graph
    dims = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    return {node.name: dims[node.input[1]] for node in graph.node if node.op_type == "BatchNormalization"}


def slimmed(model: nn.Module, tmp_path: Path) -> tuple[dict[str, int], float]:
    """Export and slim exactly; return the widths, and how far the outputs are apart."""
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    export_onnx(model, SHAPE, source, Preprocessing((0.5,) * 3, (0.5,) * 3, size=SHAPE[1:]), {})
    result = slim(SlimConfig(input=source, output=target, select_inputs=True))
    assert result.verification.reference == "original"
    feed = {"input": np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)}
    old, new = (outputs_of(onnx.load(path), feed)[0] for path in (source, target))
    return widths(target), distance(old, new)


@pytest.mark.parametrize("make", [
    lambda: DenseNet(4, 5, SHAPE, 0.5), lambda: PreResNet(2, 5, SHAPE, 0.5),
], ids=["densenet", "preresnet"])  # fmt: skip
@pytest.mark.parametrize("voice", [False, True], ids=["silent", "constant"])
def test_exactly_the_dead_scales_go(tmp_path, make, voice):
    torch.manual_seed(1)
    model = make()
    expected = dying(model, 2, voice=voice)
    if voice:  # a padded convolution needs one channel that carries the constants of all
        for name in expected:
            owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
            reader = {"bn": "conv", "bn2": "conv2"}.get(name.rpartition(".")[2])
            expected[name] += bool(reader and getattr(owner, reader, None) and owner.get_submodule(reader).padding[0])
    found, apart = slimmed(model, tmp_path)
    assert found == expected
    assert apart <= 1e-5
