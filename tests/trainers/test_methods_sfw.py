"""Stochastic Frank-Wolfe: vertices, feasibility, step lengths, the cut at the end, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.masks import prunable
from prune_onnx.trainers.methods.stochastic_frank_wolfe import (
    AVERAGE,
    BOUND,
    StochasticFrankWolfe,
    shifted_inside,
    sparse_vertex,
)

from .pruning_runs import attached, images, network, resumed_equals_uninterrupted, train


def inside(weight: torch.Tensor, count: int, bound: float) -> bool:
    return bool(weight.abs().max() <= bound * 1.0001 and weight.abs().sum() <= bound * count * 1.0001)


@given(st.integers(1, 12), st.integers(0, 100))
def test_vertex_minimises_over_the_polytope(count: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    direction, bound = torch.randn(3, 4, generator=draws), torch.tensor(0.7)
    vertex = sparse_vertex(direction, count, bound)
    assert inside(vertex, count, 0.7)
    assert int((vertex != 0).sum()) == count
    for _ in range(20):
        other = shifted_inside(torch.randn(3, 4, generator=draws) * 3, count, bound)
        assert inside(other, count, 0.7)
        assert (direction * vertex).sum() <= (direction * other).sum() + 1e-5


def test_what_is_inside_stays_where_it_is() -> None:
    weight = torch.tensor([0.5, -0.5, 0.0])
    assert torch.equal(shifted_inside(weight, 2, torch.tensor(0.5)), weight)
    assert shifted_inside(weight, 1, torch.tensor(0.5)).tolist() == [0.25, -0.25, 0.0]


def step(method: StochasticFrankWolfe, model: nn.Module, lr: float) -> None:
    inputs, labels = next(images().in_order(20))
    nn.functional.cross_entropy(model(inputs), labels).backward()
    method.before_step()
    assert all(layer.weight.grad is None for layer in prunable(model))
    assert any(parameter.grad is not None for parameter in model.parameters())
    method.after_step(lr)


@pytest.mark.parametrize("variant", ["gradient", "diameter"])
def test_steps_have_the_length_they_say_and_stay_inside(variant: str) -> None:
    model = network()
    method = attached(StochasticFrankWolfe(prune_ratio=0.75, rho=0.5, variant=variant), model)
    layer = model[4]
    count = round(layer.weight.numel() * 0.25)
    for number in range(1, 4):
        before = layer.weight.detach().clone()
        step(method, model, 0.1)
        average, bound = getattr(layer, AVERAGE), getattr(layer, BOUND)
        way = sparse_vertex(average, count, bound) - before
        moved = (layer.weight - before).norm().item()
        expected = 0.1 * average.norm() if variant == "gradient" else 0.1 * way.norm() / (2 * bound * count**0.5)
        assert moved == pytest.approx(expected.item(), rel=1e-3), number
        assert inside(layer.weight.detach(), count, bound.item())
    step(method, model, 1e9)  # no step goes past the vertex
    assert inside(layer.weight.detach(), count, getattr(layer, BOUND).item())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exactly_so_many_weights_are_zero_in_the_end(tmp_path: Path, scope: str) -> None:
    model, method, history = train(tmp_path / "run", "sfw", prune_ratio=0.7, scope=scope, epochs=8)
    assert history[-1]["loss"] < history[0]["loss"]
    facts = method.finish(model)
    assert facts["zero_weights"] == pytest.approx(0.7 * facts["weights"], abs=0.5 if scope == "global" else 4)
    assert not [name for name, _ in model.named_buffers() if name.split(".")[-1] in (AVERAGE, BOUND)]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    resumed_equals_uninterrupted(tmp_path, "sfw", stop_before=15)


def test_unknown_variant_and_network_without_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="gradient, diameter"):
        attached(StochasticFrankWolfe(variant="x"), network())
    with pytest.raises(ConfigError, match="convolutions and linear layers"):
        StochasticFrankWolfe.check(nn.ReLU())
