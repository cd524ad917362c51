"""Tables of layer times, and what they predict for a cut."""

from __future__ import annotations

import numpy as np
import pytest

from prune_onnx.graph_ops.allocate import Curve, FractionalCost, allocate, uniform
from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.errors import PlanError
from prune_onnx.graph_ops.importance import importance
from prune_onnx.graph_ops.latency_model import LatencyModel, Layer, Table, places, traffic_layer
from prune_onnx.graph_ops.plan import Budget, Planner

from ..step_times import StepTimer, step_time, total_time
from .builder import Net, analysed, random_keep

PAD = {"pads": [1, 1, 1, 1]}


def conv(inputs: int, outputs: int, *, group: int = 1, cuts: tuple[str, ...] = ("in", "out")) -> Layer:
    return Layer("Conv", 1, (8, 8), (), (3, 3), group, inputs, outputs, cuts)


def table(layer: Layer, block: int = 16, noise: float = 0.0) -> Table:
    times = StepTimer(block, noise).times(layer, layer.points)
    return Table(layer, dict(zip(layer.points, times, strict=True)))


def net() -> Analysis:
    """A plain, a depthwise, a grouped and a transposed convolution, a residual sum, a matrix product."""
    made = Net()
    x = made.relu(made.conv(made.input(1, 3, 8, 8), 32, **PAD))
    y = made.relu(made.bn(made.conv(x, 96, 1)))
    y = made.relu(made.conv(y, 96, group=96, **PAD))
    x = made.relu(made.op("Add", made.conv(y, 32, 1), x))
    x = made.relu(made.conv(x, 64, group=4, **PAD))
    x = made.relu(made.conv_transpose(x, 48))
    return analysed(made.model(made.head(x)))[0]


def model_of(analysis: Analysis, block: int = 16) -> LatencyModel:
    timer = StepTimer(block)
    layers = [traffic_layer(1), *(p.layer for p in places(analysis)[0])]
    tables = {layer.key: Table(layer, dict(zip(layer.points, timer.times(layer, layer.points), strict=True)))
              for layer in layers}  # fmt: skip
    return LatencyModel(analysis, tables, 1, total_time(analysis, block))


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("layer", [conv(64, 64), conv(32, 256), conv(48, 24), conv(512, 96), conv(16, 12)], ids=str)
def test_a_table_knows_widths_that_were_not_measured(layer: Layer, block: int) -> None:
    found = table(layer, block)
    assert len(layer.points) < 40
    for inputs in {4, 12, 16, 28, 40, 48, 64, 100, 208, layer.inputs}:
        for outputs in {4, 8, 20, 44, 80, 160, layer.outputs}:
            if inputs <= layer.inputs and outputs <= layer.outputs and min(inputs, outputs) >= 8:
                expected = step_time(layer, (inputs, outputs), block)
                assert found.seconds(inputs, outputs) == pytest.approx(expected, rel=1e-6), (inputs, outputs)


@pytest.mark.parametrize("cuts", [("in",), ("out",), ("in", "out")])
def test_odd_widths_cost_what_they_were_measured_to(cuts: tuple[str, ...]) -> None:
    found = table(conv(64, 64, cuts=cuts))
    if "in" in cuts:
        assert found.seconds(33, 64) == pytest.approx(1.5 * found.seconds(36, 64), rel=1e-6)
    if "out" in cuts:
        assert found.seconds(64, 50) == pytest.approx(1.5 * found.seconds(64, 52), rel=1e-6)


def test_a_noisy_table_is_monotone_at_aligned_widths() -> None:
    for layer in (conv(128, 96), conv(96, 96, group=96, cuts=("groups",)), conv(64, 64, cuts=("in",))):
        for cut_name in layer.cuts:
            found = table(layer, noise=0.2)
            counts = range(4, layer.size(cut_name) + 1, 4)
            times = [found.seconds(*layer.at(cut_name, c)) for c in counts]
            assert np.all(np.diff(times) >= -1e-12)


def test_groups_that_stay_may_get_slower_with_fewer_channels() -> None:
    layer = conv(64, 64, group=4)
    times = {p: step_time(layer, p) * (2.0 if p[0] in (48, 32) else 1.0) for p in layer.points}
    assert Table(layer, times).seconds(48, 64) > Table(layer, times).seconds(64, 64)


def test_the_prediction_is_the_time_of_the_cut_models_layers() -> None:
    analysis = net()
    model = model_of(analysis)
    everything = np.ones(analysis.units, bool)
    assert model.cost.latency(everything) == pytest.approx(total_time(analysis), rel=1e-9)
    # Without the traffic's share the layers' own times must come out, for every aligned cut.
    scale = model.scale
    for seed in range(8):
        keep = everything.copy()
        rng = np.random.default_rng(seed)
        for group in analysis.groups:
            if not analysis.pinned[group.units].any() and len(group.units) % 8 == 0:
                keep[rng.permutation(group.units)[: 8 * rng.integers(0, len(group.units) // 8)]] = False
        small, _ = analysed(cut(analysis, keep))
        layers = scale * (total_time(analysis) - total_time(small))
        predicted = model.cost.latency(everything) - model.cost.latency(keep)
        assert predicted == pytest.approx(layers, rel=0.15, abs=3e-6)


def test_more_units_cost_what_the_totals_differ_by() -> None:
    analysis = net()
    fixed, tally = model_of(analysis).cost.tally("latency")
    for seed in range(5):
        keep = random_keep(analysis, seed, 0.4)
        back = np.flatnonzero(~keep)[::3]
        counts = tally.counts(keep)
        growth, vectors, each = tally.more(counts, back)
        grown = counts.copy()
        grown[vectors] += each
        keep[back] = True
        np.testing.assert_array_equal(grown, tally.counts(keep))
        assert tally.total(grown) - tally.total(counts) == pytest.approx(growth, abs=1e-12)
        assert fixed >= 0


def test_fractions_give_the_units_cost() -> None:
    analysis = net()
    model = model_of(analysis)
    cost = FractionalCost(analysis, "latency", model.cost)
    for seed in range(5):
        keep = random_keep(analysis, seed, 0.3)
        shares = np.asarray([keep[g.units].mean() for g in analysis.groups])
        assert cost.total(shares) == pytest.approx(model.cost.latency(keep), rel=1e-9)
        for g in range(len(shares)):
            other = shares.copy()
            other[g] = 0.5
            assert cost.along(shares, g, np.asarray([shares[g], 0.5])) == pytest.approx(
                [cost.total(shares), cost.total(other)], rel=1e-9
            )


@pytest.mark.parametrize("block", [8, 16])
def test_steps_are_where_the_time_falls(block: int) -> None:
    analysis = net()
    steps = dict(zip((g.name for g in analysis.groups), model_of(analysis, block).steps, strict=True))
    wide = [s for s in steps.values() if s[-1] == 96]
    assert wide
    assert wide[0] == list(range(block, 97, block))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5])
def test_plans_meet_the_budget_in_steps(scope: str, fraction: float) -> None:
    analysis = net()
    model = model_of(analysis)
    scores = importance(analysis, "l2", scope=scope)
    base = np.ones(analysis.units, bool)

    def solve() -> np.ndarray:
        return Planner(analysis, scores, base, Budget("keep_latency", fraction, scope), model).solve()

    keep = solve()
    np.testing.assert_array_equal(keep, solve())
    share = model.cost.latency(keep) / model.cost.latency(base)
    assert share <= fraction
    assert share >= fraction - 0.25
    for g, group in enumerate(analysis.groups):
        if not analysis.pinned[group.units].any():
            assert int(keep[group.units].sum()) in model.steps[g]


def test_allocation_meets_the_budget_in_steps() -> None:
    analysis = net()
    model = model_of(analysis)
    cost = FractionalCost(analysis, "latency", model.cost)
    sizes = {g: len(x.units) for g, x in enumerate(analysis.groups) if not analysis.pinned[x.units].any()}
    curves = {
        g: Curve(n, np.linspace(0, 1, n + 1) ** 2 * (g + 1), np.asarray([3 * n // 4, n // 2, n // 4, 0]),
                 (g + 1) * np.asarray([0.1, 0.3, 0.7, 1.0]))
        for g, n in sizes.items()
    }  # fmt: skip
    steps = {g: model.steps[g] for g in sizes}
    floors = dict.fromkeys(sizes, 1)
    full = cost.total(np.ones(cost.groups))
    for share in (0.8, 0.6):
        for counts in (
            allocate(curves, cost, share * full, steps, floors),
            uniform(sizes, cost, share * full, steps, floors),
        ):
            kept = np.ones(cost.groups)
            for g, count in counts.items():
                assert count in model.steps[g]
                kept[g] = count / sizes[g]
            assert cost.total(kept) <= share * full
    with pytest.raises(PlanError):
        allocate(curves, cost, 0.01 * full, steps, floors)
