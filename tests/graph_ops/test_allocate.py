"""Sharing a budget out over groups."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prune_onnx.graph_ops.allocate import Curve, FractionalCost, allocate, uniform
from prune_onnx.graph_ops.cost import CostModel
from prune_onnx.graph_ops.errors import PlanError

from .builder import Net, analysed, random_keep


def net() -> Net:
    made = Net()
    x = made.relu(made.conv(made.input(1, 3, 8, 8), 8, pads=[1, 1, 1, 1]))
    x = made.relu(made.conv(x, 8, group=8, pads=[1, 1, 1, 1]))
    x = made.relu(made.conv(x, 12, 1))
    made.end = made.head(made.relu(made.conv(x, 8)))
    return made


def curves(sizes: dict[int, int], seed: int = 0) -> dict[int, Curve]:
    rng = np.random.default_rng(seed)
    result = {}
    for g, n in sizes.items():
        error = np.cumsum(np.r_[0, np.sort(rng.random(n))])
        kept = np.asarray([3 * n // 4, n // 2, n // 4, 0])
        result[g] = Curve(n, error, kept, rng.uniform(0.5, 2) * error[n - kept] ** 1.5)
    return result


@pytest.mark.parametrize("name", ["macs", "params"])
def test_fractions_give_the_counted_cost(name):
    made = net()
    analysis, _ = analysed(made.model(made.end))
    cost, model = FractionalCost(analysis, name), CostModel(analysis)
    for seed in range(5):
        keep = random_keep(analysis, seed, 0.2 * seed)
        shares = np.asarray([keep[g.units].mean() for g in analysis.groups])
        assert cost.total(shares) == pytest.approx(getattr(model, name)(keep), rel=1e-12)


def test_curve_passes_through_what_was_measured_and_grows():
    curve = curves({0: 16})[0]
    np.testing.assert_allclose(curve.at(curve.kept), curve.damage, rtol=1e-9)
    every = curve.at(np.arange(16, -1, -1))
    assert every[0] == 0
    assert (np.diff(every) >= 0).all()


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.35])
def test_budget_is_met_and_close_to_the_best(fraction):
    made = net()
    analysis, _ = analysed(made.model(made.end))
    sizes = {g: len(group.units) for g, group in enumerate(analysis.groups) if not analysis.pinned[group.units].any()}
    found = curves(sizes)
    cost = FractionalCost(analysis, "macs")
    target = fraction * cost.total(np.ones(cost.groups))
    options = {g: list(range(2, n + 1, 2)) for g, n in sizes.items()}

    def price(counts):
        kept = np.ones(cost.groups)
        for g, count in counts.items():
            kept[g] = count / sizes[g]
        return cost.total(kept)

    def damage(counts):
        return sum(float(found[g].at(np.asarray([count]))[0]) for g, count in counts.items())

    counts = allocate(found, cost, target, dict.fromkeys(sizes, 2), dict.fromkeys(sizes, 2))
    assert price(counts) <= target
    assert all(count % 2 == 0 for count in counts.values())
    every = (dict(zip(sizes, choice, strict=True)) for choice in itertools.product(*options.values()))
    best = min(damage(c) for c in every if price(c) <= target)
    assert damage(counts) <= 1.35 * best + 1e-9


def test_uniform_keeps_the_same_share_everywhere():
    made = net()
    analysis, _ = analysed(made.model(made.end))
    sizes = {g: len(group.units) for g, group in enumerate(analysis.groups) if not analysis.pinned[group.units].any()}
    cost = FractionalCost(analysis, "macs")
    full = cost.total(np.ones(cost.groups))
    counts = uniform(sizes, cost, 0.5 * full, dict.fromkeys(sizes, 1), dict.fromkeys(sizes, 1))
    shares = [counts[g] / n for g, n in sizes.items()]
    assert max(shares) - min(shares) <= max(1 / n for n in sizes.values())
    kept = np.ones(cost.groups)
    kept[list(sizes)] = shares
    assert 0.35 * full <= cost.total(kept) <= 0.5 * full
    with pytest.raises(PlanError, match="reach"):
        uniform(sizes, cost, 1.0, dict.fromkeys(sizes, 1), dict.fromkeys(sizes, 1))


def test_unreachable_budget_is_refused():
    made = net()
    analysis, _ = analysed(made.model(made.end))
    sizes = {g: len(group.units) for g, group in enumerate(analysis.groups) if not analysis.pinned[group.units].any()}
    cost = FractionalCost(analysis, "macs")
    with pytest.raises(PlanError, match="reach"):
        allocate(curves(sizes), cost, 1.0, dict.fromkeys(sizes, 1), dict.fromkeys(sizes, 1))


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5])
def test_more_of_a_budget_is_used_where_that_is_asked_for(fraction):
    made = net()
    analysis, _ = analysed(made.model(made.end))
    parts = [group.units for group in analysis.groups if not analysis.pinned[group.units].any()]
    cost = FractionalCost(analysis, "macs", parts=parts)
    target = fraction * cost.total(np.ones(len(parts)))
    found = curves({g: len(units) for g, units in enumerate(parts)})
    steps, floors = dict.fromkeys(found, 4), dict.fromkeys(found, 4)

    def used(counts: dict[int, int]) -> float:
        return cost.total(np.asarray([counts[g] / found[g].units for g in found])) / target

    without = used(allocate(found, cost, target, steps, floors))
    assert without <= used(allocate(found, cost, target, steps, floors, 0.98)) <= 1
