"""Which filters go together: known networks, each rule by a small one, and that what is dropped can be cut out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.trainers.batches import Batches
from prune_onnx.trainers.coupling import Coupling, couple
from prune_onnx.trainers.export import export_onnx
from prune_onnx.trainers.methods.backward_selection import BackwardSelection
from prune_onnx.trainers.methods.feature_maps import HRank, Taylor
from prune_onnx.trainers.methods.filters import (
    FilterPruning,
    GeometricMedian,
    L1Filters,
    MixedMedian,
    SoftFilters,
)
from prune_onnx.trainers.models import build_model
from prune_onnx.trainers.trace import trace

from .pruning_runs import attached


def coupled(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> Coupling:
    inputs = torch.randn(2, *shape)
    return couple(model, trace(model, inputs), inputs)


@pytest.mark.parametrize(("name", "sizes"), [
    ("resnet20", [16, 16, 16, 32, 32, 32, 64, 64, 64, 64]),  # one residual stream for all stages: option A pads it
    ("resnet20-b", [16] * 4 + [32] * 4 + [64] * 4),
    ("vgg11", [64, 128, 256, 256, 512, 512, 512, 512]),
])  # fmt: skip
def test_residual_streams_are_one(name: str, sizes: list[int]) -> None:
    found = coupled(build_model(name, 10, (3, 16, 16)), (3, 16, 16))
    assert sorted(map(len, found.components)) == sizes


class Net(nn.Module):
    """Two convolutions of six filters, ``meet`` of their outputs, and a convolution on that."""

    def __init__(self, meet: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], channels: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.meet = meet
        self.last = nn.Conv2d(channels, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.meet(self.a(x), self.b(x))).mean((2, 3))


@pytest.mark.parametrize(("meet", "channels", "sizes"), [
    (lambda a, b: F.relu(a) + b, 6, [6]),
    (lambda a, b: a * torch.sigmoid(F.adaptive_avg_pool2d(b, 1)), 6, [6]),
    (lambda a, b: a + 2 * b.abs() - 1, 6, [6]),
    (lambda a, b: torch.cat([a, b], 1), 12, [6, 6]),
    (lambda a, b: F.pad(a, (0, 0, 0, 0, 2, 1)) + F.pad(b, (0, 0, 0, 0, 1, 2)), 9, [7]),
    (lambda a, b: a[:, :, ::2, ::2] + F.max_pool2d(b, 2), 6, [6]),
    (lambda a, b: a + b[:, [5, 4, 3, 2, 1, 0]], 6, []),
    (lambda a, b: torch.cat([a, a.new_ones(2, 1, 8, 8)], 1) + torch.cat([b.new_ones(2, 1, 8, 8), b], 1), 7, []),
    (lambda a, b: a.view(2, 2, 3, 8, 8).transpose(1, 2).reshape(2, 6, 8, 8), 6, [6]),
    (lambda a, b: torch.cat([a, b], 2), 6, []),
], ids=["sum", "gate", "arithmetic", "concatenation", "padding", "subsampling", "permutation", "constants", "shuffle",
        "other axis"])  # fmt: skip
def test_rules(meet: Callable, channels: int, sizes: list[int]) -> None:
    found = coupled(Net(meet, channels))
    assert sorted(map(len, found.components)) == sizes


def test_depthwise_filters_go_with_what_they_read_and_grouped_ones_stay() -> None:
    depthwise = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 6), nn.Flatten())
    grouped = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 2, 6), nn.Flatten())
    assert [len(part) for part in coupled(depthwise).components] == [6]
    assert coupled(grouped).components == []


def test_scores_are_means_over_a_groups_filters() -> None:
    net = Net(lambda a, b: F.pad(a, (0, 0, 0, 0, 2, 0)) + F.pad(b, (0, 0, 0, 0, 0, 2)), 8)
    found = coupled(net)
    means = found.mean({net.a: torch.arange(6.0), net.b: torch.full((6,), 10.0)})
    assert means[found.units[net.a]].tolist() == [5, 5.5, 6, 6.5, 4, 5]
    assert means[found.units[net.b]].tolist() == [10, 10, 5, 5.5, 6, 6.5]


def pictures(side: int = 8) -> Batches:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, side, side), generator=draws, dtype=torch.uint8).numpy()
    labels = torch.randint(0, 5, (40,), generator=draws).numpy()
    return Batches(images, labels, mean=(0.5,) * 3, std=(0.3,) * 3)


@pytest.mark.parametrize(("kind", "name"), [
    (L1Filters, "resnet20"), (Taylor, "resnet20"), (HRank, "resnet20"), (L1Filters, "preresnet110"),
    (L1Filters, "densenet40"),
], ids=lambda value: getattr(value, "name", value))  # fmt: skip
def test_dropped_groups_are_silent_and_no_layer_is_empty(kind: type[FilterPruning], name: str) -> None:
    """What reads a dropped channel may have any weights for it."""
    torch.manual_seed(0)
    model = build_model(name, 5, (3, 8, 8), width=0.25)
    method = attached(kind(prune_ratio=0.5, coupled=True), model, pictures())
    method.after_epoch(0.1, epoch=1)
    method.finish(model)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    dead = {name: (m.weight == 0).flatten(1).all(1) for name, m in convolutions.items()}
    assert not any(each.all() for each in dead.values())
    share = sum(int(each.sum()) for each in dead.values()) / sum(map(len, dead.values()))
    assert 0.3 < share < 0.55
    inputs, _ = next(pictures().in_order(8))
    maps: list[torch.Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: maps.append(args[0])) for m in convolutions.values()]
    model.eval()(inputs)
    for hook in hooks:
        hook.remove()
    silent = sum(int((x == 0).movedim(1, 0).flatten(1).all(1).sum()) for x in maps[1:])
    assert silent >= 0.3 * sum(x.shape[1] for x in maps[1:])


def live_filters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return which filters of each convolution are not zero."""
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return {name: (module.weight != 0).flatten(1).any(1) for name, module in convolutions.items()}


@pytest.mark.parametrize("kind", [SoftFilters, GeometricMedian, MixedMedian])
@pytest.mark.parametrize("name", ["resnet20", "resnet20-b", "densenet40", "vgg11"])
def test_after_an_epoch_coupled_filters_are_zero_together(kind: type[SoftFilters], name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 5, (3, 16, 16), width=0.25)
    shown = pictures(16)
    method = attached(kind(prune_ratio=0.5, coupled=True), model, shown)
    method.after_epoch(0.1)
    layers = {layer.name: layer.module for layer in trace(model, next(shown.in_order(2))[0])}
    live = live_filters(model)
    found = couple(model, trace(model, next(shown.in_order(2))[0]), next(shown.in_order(2))[0])
    alive_groups, dead_groups = set(), set()
    for layer, own in live.items():
        groups = found.units[layers[layer]]
        alive_groups |= set(groups[own].tolist())
        dead_groups |= set(groups[~own].tolist())
        assert own.any()
    assert not alive_groups & dead_groups
    for part in found.components:
        assert len(dead_groups & set(part.tolist())) in (len(part) // 2, len(part) // 2 - 1)
    if kind is SoftFilters:  # what comes back is judged anew
        with torch.no_grad():
            for module in layers.values():
                module.weight.add_(torch.randn_like(module.weight))
        method.after_epoch(0.1)
        again = live_filters(model)
        assert any((again[layer] != live[layer]).any() for layer in live)


@pytest.mark.parametrize("kind", [L1Filters, SoftFilters, GeometricMedian, MixedMedian, BackwardSelection])
def test_slim_cuts_out_what_was_dropped(kind: type[FilterPruning | SoftFilters], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("resnet20-b", 5, (3, 8, 8), width=0.25)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.3)  # BatchNorm makes a constant of a filter that is zero
        nn.init.normal_(norm.bias, 0, 0.3)
    options = {"samples": 20, "rewind": False} if kind is BackwardSelection else {}
    ratio = 0.1 if kind is BackwardSelection else 0.5
    method = attached(kind(prune_ratio=ratio, coupled=True, **options), model, pictures())
    method.after_epoch(0.1, epoch=1)
    method.finish(model)
    left = {name: int(live.sum()) for name, live in live_filters(model).items()}
    export_onnx(model, (3, 8, 8), tmp_path / "in.onnx", Preprocessing((0.5,) * 3, (0.3,) * 3, size=(8, 8)), {})
    result = slim(SlimConfig(input=tmp_path / "in.onnx", output=tmp_path / "out.onnx", exact=True, align=1))
    assert result.verification.reference == "original"
    graph = onnx.load(tmp_path / "out.onnx").graph
    sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 4}
    # Of filters without their BatchNorm constants are left, which zero padding ends: a channel or two carry them.
    spare = 2 if issubclass(kind, SoftFilters) else 0
    assert all(0 <= size - left[name.removesuffix(".weight")] <= spare for name, size in sizes.items())
    assert len(sizes) == len(left)
