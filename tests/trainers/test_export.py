"""Export: BatchNorm kept, the same numbers as torch, and a file that names its origin but not its author's disk."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops import gammas, preprocessing
from prune_onnx.graph_ops.errors import ModelError, OutputError
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.trainers.config import Schedule
from prune_onnx.trainers.export import export_onnx
from prune_onnx.trainers.methods.proximal_ns import ProximalNS
from prune_onnx.trainers.models import build_model

RECIPE = Preprocessing(mean=(0.25,), std=(0.5,), size=(12, 12))
METADATA = {"model": "mixed", "seed": "3", "version": "1.2.3"}


class Mixed(nn.Module):
    """What the exporter would rather change: BatchNorm after each kind of layer, dropout, a padded shortcut, xi."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.Dropout(0.5))
        self.pre = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * 3 * 3, 20)
        self.hidden_norm = nn.BatchNorm1d(20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = self.body(x) + shortcut
        x = F.relu(self.up_norm(self.up(F.relu(self.pre(x)))))
        x = F.max_pool2d(x, 4).flatten(1)
        return self.head(F.relu(self.hidden_norm(self.hidden(x))))


def lively(model: nn.Module) -> nn.Module:
    """Give BatchNorm statistics, scales and shifts that are not those of an identity."""
    draws = torch.Generator().manual_seed(7)
    for name, value in model.state_dict().items():
        if "norm" in name or (value.ndim == 1 and value.is_floating_point()):
            value.copy_(torch.rand(value.shape, generator=draws).add(0.5))
    return model


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, onnx.ModelProto]:
    torch.manual_seed(0)
    model = Mixed()
    ProximalNS(lambda_=1.0, penalty=1.0).prepare(model, Schedule(lr=0.1, steps_per_epoch=9, epochs=1))
    model = lively(model).train()
    return model, export_onnx(model, (1, 12, 12), None, RECIPE, METADATA)


def run(model: onnx.ModelProto | str, inputs: np.ndarray) -> np.ndarray:
    source = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": inputs})[0]


def assert_same(model: nn.Module, proto: onnx.ModelProto | str, in_shape: tuple[int, int, int]) -> None:
    for batch in (1, 5):
        inputs = torch.randn(batch, *in_shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model.eval()(inputs).numpy()
        actual = run(proto, inputs.numpy())
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


def test_every_batchnorm_is_kept_with_its_names(mixed: tuple[nn.Module, onnx.ModelProto]) -> None:
    model, proto = mixed
    norms = {name for name, module in model.named_modules() if "norm" in name or name in ("pre", "body.1")}
    nodes = {node.name: node for node in proto.graph.node if node.op_type == "BatchNormalization"}
    assert nodes.keys() == norms
    for name, node in nodes.items():
        assert list(node.input[1:]) == [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        assert len(node.output) == 1  # training mode has more


def test_weights_are_torchs_parameters_under_their_names(mixed: tuple[nn.Module, onnx.ModelProto]) -> None:
    model, proto = mixed
    written = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for name, value in model.state_dict().items():
        if name.endswith(("num_batches_tracked", "xi")):
            assert name not in written
        else:
            assert np.array_equal(written[name], value.numpy()), name
    assert all(array.dtype == np.int64 for name, array in written.items() if name not in model.state_dict())


def test_outputs_are_torchs(mixed: tuple[nn.Module, onnx.ModelProto]) -> None:
    assert_same(*mixed, (1, 12, 12))


def test_graph_is_an_inference_graph_without_leftovers(mixed: tuple[nn.Module, onnx.ModelProto]) -> None:
    _, proto = mixed
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert not kinds.keys() & {"Dropout", "Identity", "Shape", "Expand", "CastLike", "Gather", "Concat"}
    assert kinds["Slice"] == 2  # one for each sliced axis
    names = [node.name for node in proto.graph.node]
    assert len(names) == len(set(names))
    assert {"stem", "body.0", "up", "hidden", "head"} <= set(names)
    used = {name for node in proto.graph.node for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= used
    assert len(next(node for node in proto.graph.node if node.name == "stem").input) == 2  # no bias of zeros


def test_interface_is_fixed_and_the_batch_is_free(mixed: tuple[nn.Module, onnx.ModelProto]) -> None:
    _, proto = mixed
    described = [
        (value.name, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*proto.graph.input, *proto.graph.output)
    ]
    assert described == [("input", ["batch", 1, 12, 12]), ("logits", ["batch", 5])]
    assert proto.ir_version <= 10  # onnxruntime 1.20
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]


def test_metadata_tells_recipe_scales_and_provenance_only(mixed: tuple[nn.Module, onnx.ModelProto]) -> None:
    model, proto = mixed
    assert preprocessing.read(proto) == RECIPE
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    scales = [m.weight.detach().numpy().tobytes() for m in norms]
    assert sorted(scale.tobytes() for scale in gammas.read(proto).values()) == sorted(scales)
    own = (preprocessing.KEY, gammas.KEY)
    assert {prop.key: prop.value for prop in proto.metadata_props if prop.key not in own} == {
        "prune_onnx.model": "mixed",
        "prune_onnx.seed": "3",
        "prune_onnx.version": "1.2.3",
    }
    assert (proto.producer_name, proto.producer_version) == ("prune-onnx", "1.2.3")
    text = proto.SerializeToString()
    for trace in (b"stack_trace", b"pkg.torch", b".py", b"site-packages", str(Path(__file__).parents[2]).encode()):
        assert trace not in text


def test_network_is_left_as_it_is(mixed: tuple[nn.Module, onnx.ModelProto]) -> None:
    model = lively(Mixed()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.body[2].eval()
    modes = [module.training for module in model.modules()]
    export_onnx(model, (1, 12, 12), None, RECIPE, {})
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "in_shape"), [("resnet20", (3, 32, 32)), ("lenet5", (1, 28, 28))])
def test_listed_networks_are_exported_whole(tmp_path: Path, name: str, in_shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10, in_shape, width=0.5)
    path = tmp_path / "model.onnx"
    proto = export_onnx(model, in_shape, path, RECIPE, {})
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert onnx.load(path) == proto
    assert_same(model, str(path), in_shape)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(node.op_type == "BatchNormalization" for node in proto.graph.node) == norms


def test_network_with_channels_last_gives_the_same_graph() -> None:
    recipe = Preprocessing(mean=(0.5,), std=(0.5,), size=(32, 32))
    network = build_model("vgg11", 10, (3, 32, 32), width=0.125)
    graphs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        graph = export_onnx(network.to(memory_format=layout), (3, 32, 32), None, recipe, {}).graph
        graphs.append([(node.op_type, list(node.input), list(node.output)) for node in graph.node])
    assert graphs[0] == graphs[1]
    assert next(network.parameters()).is_contiguous(memory_format=torch.channels_last)


def test_exporter_is_silent(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2), None, RECIPE, {})
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


def test_layer_used_twice_gives_nodes_of_different_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x)).flatten(1)

    model = Twice()
    proto = export_onnx(model, (1, 4, 4), None, RECIPE, {})
    names = [node.name for node in proto.graph.node if node.op_type == "Conv"]
    assert len(set(names)) == 2
    assert "conv" in names
    assert_same(model, proto, (1, 4, 4))


class Undecided(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_network_that_torch_cannot_export_is_an_error_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError) as caught:
        export_onnx(Undecided(), (1, 2, 2), None, RECIPE, {})
    message = str(caught.value)
    assert message.startswith("torch cannot export this network to ONNX: ")
    assert "\n" not in message
    assert "data-dependent" in message
    assert not re.search(r"\x1b|\.py", message)
    assert capfd.readouterr() == ("", "")


def test_unwritable_path_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2), tmp_path / "file" / "m.onnx", RECIPE, {})
