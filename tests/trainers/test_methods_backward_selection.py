"""Backward selection: the same choice as brute force, on chains and with shortcuts; limits, rewinding, resuming."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.methods.backward_selection import BackwardSelection
from prune_onnx.trainers.suffixes import Suffixes, Unit
from prune_onnx.trainers.trace import trace

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


@pytest.mark.parametrize("model", [chain(), Shortcut()], ids=["chain", "shortcut"])
def test_suffix_gives_what_a_whole_pass_without_the_channel_would(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_onnx.trainers.suffixes.STACKED", 5000)  # a few channels at a time
    inputs, _ = next(images(6).in_order(6))
    suffixes = Suffixes(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(suffixes.refresh(), copy.deepcopy(model).eval()(inputs))
        for layer in trace(model, inputs)[:-1]:
            channels = list(range(len(layer.module.weight)))[::-1]
            units = [((layer.norm or layer.module, (channel,)),) for channel in channels]
            for channel, found in zip(channels, suffixes.without(units), strict=True):
                other = copy.deepcopy(model).eval()
                names = {module: name for name, module in model.named_modules()}
                norm = names[layer.norm] if layer.norm else None
                _zero(dict(other.named_modules()), layer.name, norm, channel)
                torch.testing.assert_close(found, other(inputs), rtol=1e-5, atol=1e-6)
    assert model.training


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
