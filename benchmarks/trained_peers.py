"""Torch-Pruning 1.6 on the trained CIFAR-10 ResNets of the accuracy benchmark.

The file's weights go into the torch module that it came from. As in the library's own CIFAR-10 scripts, pruning is
global and goes on in small steps until the budget is met; nothing is repaired afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.pipeline.sessions import create_session
from prune_onnx.trainers.export import export_onnx
from prune_onnx.trainers.models import build_model

SHAPE = (3, 32, 32)
CLASSES = 10
STEPS = 400
"""In which all channels would go."""
CLOSE = 1e-4
"""Logits of the module may differ from those of its file by this much."""
TENSORS = ("weight", "bias", "running_mean", "running_var")
OPERATORS = {"Conv": nn.Conv2d, "BatchNormalization": nn.BatchNorm2d, "Gemm": nn.Linear}


def layers(network: nn.Module) -> list[nn.Module]:
    """Return the modules with weights, in the order of their definition, which is that of the file's nodes."""
    return [module for module in network.modules() if isinstance(module, tuple(OPERATORS.values()))]


def as_module(name: str, file: Path) -> nn.Module:
    """Build a listed ResNet with the weights of a file.

    Raises:
        ValueError: the file is another network's.
    """
    model = onnx.load(file)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    network = build_model(name, CLASSES, SHAPE).eval()
    nodes = [node for node in model.graph.node if node.op_type in OPERATORS]
    with torch.no_grad():
        for module, node in zip(layers(network), nodes, strict=True):
            if not isinstance(module, OPERATORS[node.op_type]):
                raise ValueError(f"{file}: {node.name} is no {type(module).__name__}")
            for tensor, value in zip(TENSORS, node.input[1:], strict=False):
                getattr(module, tensor).copy_(torch.from_numpy(values[value].copy()))
        x = torch.randn(2, *SHAPE)
        session = create_session(model, "cpu")
        expected = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        gap = float(np.abs(network(x).numpy() - expected).max())
    if gap > CLOSE:
        raise ValueError(f"{file}: the module's logits differ by {gap:g}")
    return network


def macs(network: nn.Module) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image."""
    total = 0

    def count(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    with ExitStack() as hooks, torch.no_grad():
        for module in layers(network):
            if not isinstance(module, nn.BatchNorm2d):
                hooks.enter_context(module.register_forward_hook(count))
        network(torch.zeros(1, *SHAPE))
    return total


def streams(network: nn.Module) -> Iterator[nn.Module]:
    """Convolutions that write to the residual streams.

    Torch-Pruning does not follow the streams through the padding of channels (the option A shortcut): the network no
    longer runs when it cuts them. So they stay, and the blocks are cut inside.
    """
    yield network.conv1
    yield from (block.conv2 for stage in network.stages for block in stage)


def prune(name: str, file: Path, out: Path, importance: str, share: float, recipe: Preprocessing) -> None:
    """Prune to a share of the MACs, and write the result.

    Args:
        name: of the network, ``resnet20`` or ``resnet56``.
        file: its weights.
        out: where the pruned network goes.
        importance: ``l1`` (group magnitude) or ``bn`` (scales of the BatchNorms).
        share: of the MACs that may stay.
        recipe: goes into the file.
    """
    import torch_pruning as tp

    network = as_module(name, file)
    score = tp.importance.MagnitudeImportance(p=1) if importance == "l1" else tp.importance.BNScaleImportance()
    pruner = tp.pruner.BasePruner(
        network, torch.zeros(1, *SHAPE), importance=score, pruning_ratio=1.0, global_pruning=True,
        iterative_steps=STEPS, ignored_layers=[network.fc, *streams(network)], in_channel_groups={},
        out_channel_groups={},
    )  # fmt: skip
    budget = share * macs(network)
    for _ in range(STEPS):
        if macs(network) <= budget:
            break
        pruner.step()
    network.zero_grad()
    export_onnx(network, SHAPE, out, recipe, {})
