"""Backward selection: the same choice as brute force, on chains and with shortcuts; limits, rewinding, resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.deltas import Change
from prune_onnx.trainers.from_onnx import OnnxModule
from prune_onnx.trainers.methods.backward_selection import BackwardSelection
from prune_onnx.trainers.models import build_model
from prune_onnx.trainers.models.densenet import DenseNet
from prune_onnx.trainers.models.preresnet import PreResNet
from prune_onnx.trainers.suffixes import Suffixes, Unit
from prune_onnx.trainers.trace import evaluating, trace

from .pruning_runs import attached, images, resumed_equals_uninterrupted


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.LeakyReLU(0.5, inplace=True), nn.Conv2d(5, 4, 3, bias=False),
        nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(12, 3),
    )  # fmt: skip


class Shortcut(nn.Module):
    """A residual block whose inner channels may go, and functional calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.inner, self.outer = (
            nn.Conv2d(1, 4, 3),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.Conv2d(5, 4, 3, padding=1),
        )
        self.norm, self.last, self.fc = nn.BatchNorm2d(5), nn.Conv2d(4, 3, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = self.outer(F.relu(self.norm(self.inner(x))))
        y += x * self.scale
        x = F.relu(y)
        return self.fc(self.last(x).mean((2, 3)))


def brute_force(model: nn.Module, places: list[tuple[str, str | None]], rounds: int) -> list[tuple[str, int]]:
    """Mask every filter in turn with a whole pass each, and keep the best, as Algorithm 1 is written."""
    inputs, labels = next(images().in_order(60))
    model = copy.deepcopy(model).eval().double()
    modules = dict(model.named_modules())
    gone: list[tuple[str, int]] = []
    with torch.no_grad():
        for _ in range(rounds):
            losses = {}
            for place, norm in places:
                layer = modules[place]
                left = [c for c in range(len(layer.weight)) if (place, c) not in gone]
                for channel in left if len(left) > 1 else []:
                    kept = copy.deepcopy(model.state_dict())
                    _zero(modules, place, norm, channel)
                    losses[place, channel] = F.cross_entropy(model(inputs.double()), labels).item()
                    model.load_state_dict(kept)
            best = min(losses, key=lambda one: losses[one])
            _zero(modules, best[0], dict(places)[best[0]], best[1])
            gone.append(best)
    return gone


def _zero(modules: dict[str, nn.Module], place: str, norm: str | None, channel: int) -> None:
    for module in (modules[place], modules[norm] if norm else None):
        if module is not None:
            module.weight[channel] = 0
            if module.bias is not None:
                module.bias[channel] = 0


def selected(model: nn.Module, ratio: float, **options: object) -> set[tuple[str, int]]:
    method = attached(BackwardSelection(prune_ratio=ratio, samples=60, rewind=False, **options), model)
    method.after_epoch(0.1, 1)
    names = {layer.name: layer for layer in method._taken}
    return {
        (name, channel)
        for name, layer in names.items()
        for channel in range(len(layer.module.weight))
        if channel not in method.alive(layer)
    }


@pytest.mark.parametrize("count", [1, 4, 7])
def test_exact_choice_is_brute_forces_on_a_chain(count: int) -> None:
    model = chain()
    expected = brute_force(model, [("0", "1"), ("3", None)], count)  # the last convolution is no candidate
    assert selected(model, count / 9) == set(expected)
    assert all((model[0].weight[c] == 0).all() and model[1].bias[c] == 0 for name, c in expected if name == "0")


def test_exact_choice_is_brute_forces_beside_a_shortcut() -> None:
    model = Shortcut()
    expected = brute_force(model, [("inner", "norm")], 3)
    assert selected(model, 0.6) == set(expected)


def test_lazy_choice_is_the_exact_one_here_and_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    original = Suffixes.without

    def counted(self: Suffixes, units: list[Unit]) -> Iterator[torch.Tensor]:
        looked.append(len(units))
        return original(self, units)

    monkeypatch.setattr(Suffixes, "without", counted)
    module = "prune_onnx.trainers.methods.backward_selection"
    monkeypatch.setattr(f"{module}.LAZY", 3)
    exact = selected(chain(), 0.5)
    every, looked[:] = sum(looked), []
    assert selected(chain(), 0.5, variant="lazy") == exact
    assert every == 9 + 8 + 7 + 6
    assert sum(looked) < every
    monkeypatch.setattr(f"{module}.MARGIN", 1.0)
    looked.clear()
    assert selected(chain(), 0.5, variant="lazy") == exact
    assert sum(looked) == 9 + 3 + 3 + 3


class Stream(nn.Module):
    """Two layers write a stream of four channels, one reads it behind a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem, self.branch = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.reader = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last, self.fc = nn.Conv2d(4, 3, 3), nn.Linear(3, 3)
        nn.init.normal_(self.reader.bias)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = x + self.norm(self.branch(x))
        return self.fc(F.relu(self.last(F.relu(self.reader(x)))).mean((2, 3)))


@pytest.mark.parametrize("variant", ["exact", "lazy"])
def test_coupled_filters_are_one_candidate(variant: str) -> None:
    """The same as brute force over the channels of the stream: what writes and what reads them is zero together."""
    model = Stream()
    inputs, labels = next(images().in_order(60))
    brute, gone = copy.deepcopy(model).eval(), []

    def drop(net: nn.Module, channel: int) -> None:
        with torch.no_grad():
            for layer, norm in (("stem", None), ("branch", "norm"), ("reader", None)):
                _zero(dict(net.named_modules()), layer, norm, channel)

    for _ in range(3):
        losses = {}
        for channel in set(range(4)) - set(gone):
            other = copy.deepcopy(brute)
            drop(other, channel)
            losses[channel] = F.cross_entropy(other(inputs), labels).item()
        gone.append(min(losses, key=lambda one: losses[one]))
        drop(brute, gone[-1])
    found = selected(model, 0.99, coupled=True, variant=variant)
    assert found == {(name, channel) for name in ("stem", "branch") for channel in gone}
    assert all((model.get_submodule(name).bias[gone] == 0).all() for name in ("stem", "branch", "norm", "reader"))


def test_estimates_of_the_lazy_search_are_first_order_exact() -> None:
    """The loss's derivative when a filter is faded out, at the beginning of it."""
    model = chain().eval()
    inputs, labels = next(images(20).in_order(20))
    suffixes = Suffixes(model, inputs)
    loss, slopes = suffixes.slopes(lambda logits: F.cross_entropy(logits, labels))
    assert loss == pytest.approx(F.cross_entropy(model(inputs), labels).item())
    for module in (model[1], model[3]):
        for channel in range(len(slopes[module])):
            fade = torch.ones(len(slopes[module]), requires_grad=True)
            hook = module.register_forward_hook(lambda _m, _x, y, f=fade: y * f.view(1, -1, 1, 1))
            (slope,) = torch.autograd.grad(F.cross_entropy(model(inputs), labels), fade)
            hook.remove()
            assert slopes[module][channel].item() == pytest.approx(-slope[channel].item(), abs=1e-6)


def test_every_layer_keeps_one_filter() -> None:
    model = chain()
    assert len(selected(model, 0.99)) == 7
    assert ((model[0].weight != 0).flatten(1).any(1).sum(), (model[3].weight != 0).flatten(1).any(1).sum()) == (1, 1)


class Block(nn.Module):
    """Pre-activation, depthwise convolution, concatenation, overwriting calls, and a layer that runs twice."""

    def __init__(self, *, joined: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.deep = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, 2, 1, groups=4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (4, 4, 4, 12))
        self.twice, self.paired = nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.Conv2d(4, 4, 2, groups=2)
        self.last, self.fc = nn.Conv2d(12, 3, 1), nn.Linear(3 * 9, 3)
        self.joined = joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.norms[0](self.stem(x)), inplace=True)
        x = self.norms[1](self.deep(x))
        y = F.silu(self.twice(F.relu(x)))
        y = self.twice(y) - 0.5 * y
        if self.joined:
            y.add_(x)
            F.leaky_relu_(y, 0.1)
        x, y = F.max_pool2d(x, 2, 1), F.avg_pool2d(self.norms[2](y), 2, 1)
        x = torch.cat([y, x, self.paired(F.pad(x, (0, 1, 0, 1)))], 1)
        x = self.last(F.hardswish(self.norms[3](x)))
        return self.fc(x.view(x.size(0), -1))


def onnx_network() -> nn.Module:
    """Return a network from an ONNX file: padding on one side, a residual sum, a mean over the map, a product."""
    draws = np.random.default_rng(4)
    shapes = {"a": (4, 1, 3, 3), "b": (4, 4, 3, 3), "c": (3, 4, 1, 1), "w": (3, 3), "bias": (3,), "s": (4, 1, 1)}
    shapes |= dict.fromkeys(("scale", "shift", "mean", "var"), (4,))
    weights = [onnx.numpy_helper.from_array(draws.random(shape, np.float32), n) for n, shape in shapes.items()]
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "a"], ["1"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", ["1", "scale", "shift", "mean", "var"], ["2"]),
        node("Relu", ["2"], ["3"]), node("PRelu", ["1", "s"], ["1p"]),
        node("MaxPool", ["3"], ["4"], kernel_shape=[2, 2], strides=[1, 1], pads=[0, 0, 1, 1]),
        node("Conv", ["4", "b"], ["5"], auto_pad="SAME_UPPER"), node("Add", ["5", "1p"], ["6"]),
        node("Sigmoid", ["6"], ["7"]), node("Conv", ["7", "c"], ["8"]), node("GlobalAveragePool", ["8"], ["9"]),
        node("Flatten", ["9"], ["10"]), node("Gemm", ["10", "w", "bias"], ["y"], transB=1),
    ]  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    ends = value("x", 1, ["n", 1, 8, 8]), value("y", 1, ["n", 3])
    graph = onnx.helper.make_graph(nodes, "g", [ends[0]], [ends[1]], weights)
    return OnnxModule(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9))


def lively(model: nn.Module) -> nn.Module:
    """Give BatchNorms numbers of their own."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.weight.data, module.bias.data, module.running_mean):
                nn.init.normal_(value)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


class Sequence(nn.Module):
    """Convolutions of one axis and of three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.one, self.other = nn.Conv1d(1, 4, 3, 2, 1), nn.Conv1d(4, 5, 3, 2, dilation=2)
        self.solid, self.norm, self.end = nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.Conv3d(4, 2, (2, 1, 1))
        self.fc = nn.Linear(5 + 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        line = self.other(torch.tanh(self.one(x.flatten(2)))).mean(-1)
        cube = self.end(self.norm(self.solid(x.reshape(-1, 1, 4, 4, 4)))).mean(dim=(2, 3, 4))
        return self.fc(torch.cat((line, cube), dim=1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain, "shortcut": Shortcut, "stream": Stream, "block": Block, "onnx": onnx_network,
    "in place": lambda: Block(joined=True), "one and three axes": Sequence,
    "resnet20": lambda: build_model("resnet20", 3, (1, 8, 8)),
    "densenet": lambda: DenseNet(2, 3, (1, 8, 8), 0.34), "preresnet": lambda: PreResNet(1, 3, (1, 8, 8), 0.25),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_suffix_gives_what_a_whole_pass_without_the_channels_would(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_onnx.trainers.suffixes.STACKED", 5000)  # a few channels at a time
    model = lively(NETWORKS[name]()).double()
    inputs = next(images(6).in_order(6))[0].double()
    suffixes = Suffixes(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(suffixes.refresh(), copy.deepcopy(model).eval()(inputs), rtol=1e-10, atol=1e-11)
        for layer in trace(model, inputs)[:-1]:
            width = min(len(layer.module.weight), 6)
            place = layer.norm or layer.module
            pairs = [(0, width - 1)] * (width > 1)
            units = [((place, channels),) for channels in [(c,) for c in range(width)][::-1] + pairs]
            found = torch.cat(list(suffixes.without(units)))
            for ((_, channels),), output in zip(units, found, strict=True):
                torch.testing.assert_close(output, masked(model, inputs, place, channels), rtol=1e-10, atol=1e-11)
    assert model.training


def masked(model: nn.Module, inputs: torch.Tensor, place: nn.Module, channels: tuple[int, ...]) -> torch.Tensor:
    """Return what the whole network gives where channels of a module's output are zero."""

    def mask(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(1, torch.tensor(channels), 0)

    hook = place.register_forward_hook(mask)
    with evaluating(model):
        output = model(inputs)
    hook.remove()
    return output


@pytest.mark.parametrize("name", ["chain", "block", "densenet", "one axis"])
def test_only_what_changes_is_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No map is copied for a channel that meets nothing but channels of its own."""
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 62, 3))
    last = {"chain": ["1", "3"], "block": ["norms.3", "norms.2"], "densenet": ["blocks.13.conv"], "one axis": ["0"]}
    model = model if name == "one axis" else lively(NETWORKS[name]())
    inputs, _ = next(images(6).in_order(6))
    suffixes = Suffixes(model, inputs.flatten(2) if name == "one axis" else inputs)
    suffixes.refresh()
    monkeypatch.setattr(Change, "whole", lambda _change: pytest.fail("a whole map was made"))
    for place in last[name]:
        outputs = list(suffixes.without([((model.get_submodule(place), (channel,)),) for channel in (0, 2)]))
        assert [len(output) for output in outputs] == [2]


@pytest.mark.parametrize("rewind", [True, False])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, rewind: bool) -> None:
    options = {"rounds": 2, "retrain_epochs": 1, "prune_ratio": 0.5, "samples": 20, "rewind": rewind}
    model = resumed_equals_uninterrupted(tmp_path, "backward-selection", stop_before=14, **options)
    assert int((model[0].weight == 0).flatten(1).all(1).sum()) == 3  # of six; the other convolution is the last one


def test_a_forward_pass_that_depends_on_data_is_refused() -> None:
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else -self.conv(x)

    with pytest.raises(ConfigError, match="Try --method taylor"):
        Suffixes(Depends(), torch.ones(2, 1, 4, 4))
