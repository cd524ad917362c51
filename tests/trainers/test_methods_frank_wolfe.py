"""Frank-Wolfe over masks (vectors, brute force, invariants, rate) and the methods that prune by it."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.config import Schedule, TrainConfig
from prune_onnx.trainers.masks import prunable
from prune_onnx.trainers.methods.frank_wolfe import FrankWolfe, FrankWolfeMomentum
from prune_onnx.trainers.methods.magnitude import prune_lowest
from prune_onnx.trainers.methods.mask_polytope import MaskPolytope, frank_wolfe

from .pruning_runs import attached, images, network, resumed_equals_uninterrupted, train

SLOPES = torch.tensor([-3.0, 1.0, -1.0, 2.0])


# The set and its vertices


@pytest.mark.parametrize("keep", [2, 3])
def test_vertex_of_the_hand_checked_vector(keep: int) -> None:
    assert MaskPolytope(((4, keep),)).minimiser(SLOPES).tolist() == [1, 0, 1, 0]


def test_first_steps_of_the_hand_checked_vector() -> None:
    start = torch.full((4,), 0.5)
    polytope = MaskPolytope(((4, 2),))
    point, gaps = frank_wolfe(lambda _: SLOPES, polytope, start, 1)
    assert gaps == [pytest.approx(3.5)]
    assert point.tolist() == [1, 0, 1, 0]  # 2 / (0 + 2) is the whole way
    vertex = polytope.minimiser(SLOPES)
    assert start.lerp(vertex, 2 / 3).tolist() == pytest.approx([0.83333, 0.16667, 0.83333, 0.16667], abs=1e-5)
    assert start.tolist() == [0.5] * 4


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7), st.integers(0, 7))
def test_vertex_minimises_over_all_masks(slopes: list[int], keep: int) -> None:
    keep = min(keep, len(slopes))
    vertex = MaskPolytope(((len(slopes), keep),)).minimiser(torch.tensor(slopes, dtype=torch.float64))
    masks = (mask for mask in itertools.product((0, 1), repeat=len(slopes)) if sum(mask) <= keep)
    best = min(sum(s * m for s, m in zip(slopes, mask, strict=True)) for mask in masks)
    assert vertex.sum() <= keep
    assert set(vertex.tolist()) <= {0.0, 1.0}
    assert torch.dot(vertex, torch.tensor(slopes, dtype=torch.float64)) == best


def test_blocks_have_constraints_of_their_own() -> None:
    polytope = MaskPolytope(((3, 1), (2, 2)))
    vertex = polytope.minimiser(torch.tensor([-5.0, -9.0, -8.0, -1.0, 4.0]))
    assert vertex.tolist() == [0, 1, 0, 1, 0]
    assert polytope.middle(torch.tensor([True, False, True, True, True])).tolist() == [0.5, 0, 0.5, 1, 1]
    assert polytope.contains(vertex)
    assert not polytope.contains(torch.tensor([1.0, 0.5, 0, 0, 0]))
    assert not polytope.contains(torch.tensor([-0.1, 0.5, 0, 0, 0]))


def test_rounding_keeps_exactly_k_and_breaks_ties_by_magnitude() -> None:
    point = torch.tensor([0.5, 0.0, 0.5, 0.0, 0.9])
    ties = torch.tensor([1.0, 7.0, 2.0, 6.0, 0.0])
    kept = [MaskPolytope(((5, k),)).rounded(point, ties).nonzero().flatten().tolist() for k in range(6)]
    assert kept == [[], [4], [2, 4], [0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]


# Convergence


def quadratic(seed: int, size: int = 12):
    """Return value, gradient and smoothness of a convex quadratic."""
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(8, size, generator=draws, dtype=torch.float64)
    offset = torch.randn(8, generator=draws, dtype=torch.float64)

    def value(m: torch.Tensor) -> float:
        return 0.5 * (rows @ m - offset).square().sum().item()

    return value, lambda m: rows.T @ (rows @ m - offset), torch.linalg.matrix_norm(rows, 2).item() ** 2


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 11))
def test_points_stay_feasible_gaps_never_negative_and_fall_like_one_over_t(seed: int, keep: int) -> None:
    value, gradient, lipschitz = quadratic(seed)
    polytope = MaskPolytope(((12, keep),))
    start = polytope.middle(torch.ones(12, dtype=torch.bool)).double()
    seen: list[torch.Tensor] = []

    def watched(m: torch.Tensor) -> torch.Tensor:
        seen.append(m.clone())
        return gradient(m)

    _, gaps = frank_wolfe(watched, polytope, start, 300)
    assert all(polytope.contains(point, 1e-6) for point in seen)
    assert min(gaps) >= -1e-12
    diameter = min(2 * keep, 12)  # squared
    lowest = max(value(m) - gap for m, gap in zip(seen, gaps, strict=True))  # each gap certifies this much
    for t, point in enumerate(seen[1:], 1):  # Jaggi (2013), Theorem 1: f(m_t) - f* <= 2 C / (t + 2)
        assert value(point) - lowest <= 2 * lipschitz * diameter / (t + 2) + (gaps[-1] if gaps[-1] > 0 else 0) + 1e-9
    assert min(gaps) <= 27 / 4 * lipschitz * diameter / (300 + 2)  # Theorem 2


@given(st.integers(0, 1000))
def test_gap_bounds_the_distance_to_the_best_mask(seed: int) -> None:
    value, gradient, _ = quadratic(seed, 6)
    polytope = MaskPolytope(((6, 3),))
    start = polytope.middle(torch.ones(6, dtype=torch.bool)).double()
    _, gaps = frank_wolfe(gradient, polytope, start, 1)
    masks = (torch.tensor(m, dtype=torch.float64) for m in itertools.product((0, 1), repeat=6) if sum(m) <= 3)
    assert value(start) - gaps[0] <= min(map(value, masks)) + 1e-9


def test_no_momentum_is_plain_and_momentum_averages_gradients() -> None:
    _, gradient, _ = quadratic(3)
    polytope = MaskPolytope(((12, 4),))
    start = polytope.middle(torch.ones(12, dtype=torch.bool)).double()
    seen: list[torch.Tensor] = []

    def watched(m: torch.Tensor) -> torch.Tensor:
        seen.append(m.clone())
        return gradient(m)

    point, _ = frank_wolfe(watched, polytope, start, 6, rho=0.7)
    average, at = None, start.clone()
    for t in range(6):
        assert torch.allclose(seen[t], at, atol=1e-14)
        average = gradient(at) if average is None else 0.7 * average + 0.3 * gradient(at)
        at += 2 / (t + 2) * (polytope.minimiser(average) - at)
    assert torch.allclose(point, at, atol=1e-14)
    assert not torch.equal(point, frank_wolfe(gradient, polytope, start, 6)[0])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_method_without_momentum_is_frank_wolfe(scope: str) -> None:
    plain, momentum = network(), network()
    attached(FrankWolfe(prune_ratio=0.6, samples=30, fw_steps=5, scope=scope), plain).after_epoch(0.1, 1)
    attached(FrankWolfeMomentum(prune_ratio=0.6, samples=30, fw_steps=5, scope=scope, rho=0.0), momentum).after_epoch(
        0.1, 1
    )
    for one, two in zip(prunable(plain), prunable(momentum), strict=True):
        assert torch.equal(one.weight, two.weight)


# The methods


def trained() -> torch.nn.Sequential:
    model, shown = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        for inputs, labels in shown.shuffled(epoch, 10, 6):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model


@cache
def _trained() -> torch.nn.Sequential:
    return trained()


def trained_copy() -> torch.nn.Sequential:
    return copy.deepcopy(_trained())


def loss(model: torch.nn.Module) -> float:
    """By the statistics of the batch, as after retraining."""
    inputs, labels = next(images().in_order(60))
    return F.cross_entropy(model.train()(inputs), labels).item()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_what_is_left_is_as_trained_and_exactly_so_much(scope: str) -> None:
    model = trained()
    before = [layer.weight.detach().clone() for layer in prunable(model)]
    statistics = {name: value.clone() for name, value in model[1].named_buffers()}
    attached(FrankWolfe(prune_ratio=0.7, samples=60, scope=scope), model).after_epoch(0.1, 1)
    assert all(torch.equal(value, statistics[name]) for name, value in model[1].named_buffers())
    assert (model[1].momentum, model[1].training) == (0.1, True)
    sizes = [weight.numel() for weight in before]
    dead = [int((layer.weight == 0).sum()) for layer in prunable(model)]
    assert sum(dead) == round(0.7 * sum(sizes)) if scope == "global" else dead == [round(0.7 * size) for size in sizes]
    for layer, old in zip(prunable(model), before, strict=True):
        assert ((layer.weight == old) | (layer.weight == 0)).all()
        assert layer.weight.grad is None


def test_the_mask_is_better_than_any_of_many_random_ones() -> None:
    chosen = trained()
    attached(FrankWolfe(prune_ratio=0.7, samples=60), chosen).after_epoch(0.1, 1)
    draws = torch.Generator().manual_seed(0)
    others = []
    for _ in range(30):
        model = trained_copy()
        scores = [torch.rand(layer.weight.shape, generator=draws) for layer in prunable(model)]
        with torch.no_grad():
            for layer, dead in zip(prunable(model), prune_lowest(scores, 0.7, "global"), strict=True):
                layer.weight[dead] = 0
        others.append(loss(model))
    assert loss(chosen) < min(others)


@pytest.mark.parametrize("variant", ["printed", "printed-gradient"])
def test_printed_score_is_the_summed_gradient_of_all_samples(variant: str) -> None:
    model = trained()
    inputs, labels = next(images().in_order(60))
    model.eval().zero_grad()
    F.cross_entropy(model(inputs), labels, reduction="sum").backward()
    slopes = [layer.weight.grad.clone() for layer in prunable(model)]
    weights = [layer.weight.detach().clone() for layer in prunable(model)]
    scores = [s.abs() if variant == "printed-gradient" else (s * w).abs() for s, w in zip(slopes, weights, strict=True)]
    limit = torch.cat([score.flatten() for score in scores]).median()
    attached(FrankWolfe(prune_ratio=0.5, samples=60, variant=variant), model).after_epoch(0.1, 1)
    for layer, score, old in zip(prunable(model), scores, weights, strict=True):
        clear = (score - limit).abs() > 1e-5 * limit  # sums in another order
        assert torch.equal(layer.weight[clear], torch.where(score > limit, old, 0)[clear])


@pytest.mark.parametrize(("rounds", "pruned"), [(4, [2, 4]), (5, [5]), (1, [1])])
def test_algorithm_3_prunes_twice_or_once(tmp_path: Path, rounds: int, pruned: list[int]) -> None:
    options = {"rounds": rounds, "retrain_epochs": 1, "variant": "printed", "samples": 20, "prune_ratio": 0.5}
    _, method, history = train(tmp_path, "frank-wolfe", epochs=rounds + 1, **options)
    count = round(0.5 * method.sparsity(method._model)["weights"])
    assert [entry["zero_weights"] for entry in history] == [
        count if e >= pruned[0] else 0 for e in range(1, rounds + 2)
    ]


@pytest.mark.parametrize("variant", FrankWolfeMomentum.VARIANTS)
def test_ratios_rise_by_the_corrected_schedule_to_the_last(tmp_path: Path, variant: str) -> None:
    options = {"rounds": 5, "retrain_epochs": 1, "prune_ratio": 0.8, "prune_ratio_start": 0.1}
    _, method, history = train(
        tmp_path, "frank-wolfe-momentum", epochs=6, variant=variant, samples=20, fw_steps=2, **options
    )
    assert [method.ratio(i) for i in range(1, 6)] == pytest.approx([0.24, 0.38, 0.52, 0.66, 0.80])
    total = method.sparsity(method._model)["weights"]
    assert [entry["zero_weights"] for entry in history][:5] == [round(method.ratio(i) * total) for i in range(1, 6)]


@pytest.mark.parametrize(("name", "variant"), [("frank-wolfe", "sound"), ("frank-wolfe-momentum", "printed")])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, name: str, variant: str) -> None:
    options = {"prune_ratio": 0.8, "rounds": 2, "retrain_epochs": 1, "samples": 20, "variant": variant}
    model = resumed_equals_uninterrupted(tmp_path, name, stop_before=14, **options)
    assert model.state_dict().keys() == network().state_dict().keys()


def test_printed_average_weighs_gradients_of_all_rounds() -> None:
    model = trained()
    method = attached(FrankWolfeMomentum(rounds=3, rho=0.6, variant="printed", samples=60), model)
    method.prune(1)
    first = model[9].weight_average.clone()
    with torch.no_grad():
        model[9].weight.mul_(1.5)
    slopes = method._gradients()[-1]
    method.prune(2)
    torch.testing.assert_close(model[9].weight_average, 0.6 * first + 0.4 * slopes)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no variant 'literal'; it has sound, printed, printed-gradient"):
        attached(FrankWolfe(variant="literal"), network())
    config = TrainConfig(
        model="x", dataset="x", method="frank-wolfe-momentum", output="x", epochs=20, prune_ratio_start=0.6
    )
    with pytest.raises(ConfigError, match=r"prune_ratio_start 0\.6 lies above prune_ratio 0\.5"):
        FrankWolfeMomentum.defaults(config, Schedule(0.1, 5, 20))
