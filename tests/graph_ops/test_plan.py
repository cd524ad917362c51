"""Budgets: met, as close as the steps allow, monotone, replayable."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops import plan
from prune_onnx.graph_ops.alignment import alignment_step
from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.cost import CostModel
from prune_onnx.graph_ops.errors import PlanError
from prune_onnx.graph_ops.importance import importance
from prune_onnx.graph_ops.plan import Budget, Planner

from .builder import Net, analysed, check_cut, removed_units

PAD = {"pads": [1, 1, 1, 1]}
BUDGETS = ("keep_macs", "keep_params", "keep_channels")


def residual_net() -> onnx.ModelProto:
    """A stem, two residual blocks of different widths, a head."""
    net = Net()
    y = net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 16, bias=False, name="stem", **PAD)))
    for i, (width, stride) in enumerate(((16, 1), (40, 2))):
        z = net.relu(net.bn(net.conv(y, 24, strides=[stride] * 2, name=f"inner{i}", **PAD)))
        z = net.bn(net.conv(z, width, name=f"outer{i}", **PAD))
        short = y if stride == 1 else net.conv(y, width, 1, strides=[2, 2], name="projection")
        y = net.relu(net.op("Add", z, short))
    return net.model(net.head(y))


@functools.cache
def setting() -> tuple[Analysis, np.ndarray]:
    analysis, _ = analysed(residual_net())
    return analysis, np.ones(analysis.units, bool)


def cost(name: str, keep: np.ndarray) -> float:
    """Share of the cost that is left."""
    model = CostModel(setting()[0])
    count = {"keep_macs": model.macs, "keep_params": model.params, "keep_channels": model.channels}[name]
    return count(keep) / count(np.ones_like(keep))


def solve(name: str = "keep_macs", fraction: float = 0.5, criterion: str = "l2", **options: object) -> np.ndarray:
    analysis, base = setting()
    budget = Budget(name, fraction, **{"align": 1, **options})
    return Planner(analysis, importance(analysis, criterion, scope=budget.scope), base, budget).solve()


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5, 0.3])
def test_the_budget_is_met_and_used_up(name: str, scope: str, fraction: float) -> None:
    keep = solve(name, fraction, scope=scope)
    left = cost(name, keep)
    assert fraction - 0.02 <= left <= fraction
    # One more unit of any group would not fit.
    analysis, _ = setting()
    for group in analysis.groups:
        gone = group.units[~keep[group.units]]
        for unit in gone[:1]:
            more = keep.copy()
            more[unit] = True
            assert cost(name, more) > fraction


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("align", [4, 8, "auto"])
def test_aligned_budgets_are_met_within_a_step(name: str, align: int | str) -> None:
    analysis, _ = setting()
    keep = solve(name, 0.6, align=align)
    left = cost(name, keep)
    assert left <= 0.6
    for group in analysis.groups:
        n, kept = len(group.units), int(keep[group.units].sum())
        step = alignment_step(n, align)
        # What a budget has left over is used up in finer steps, where the width decides about them.
        assert kept == n or kept % (min(step, plan.FINE) if align == "auto" else step) == 0
        if kept < n:  # one step more is too much
            more = keep.copy()
            more[group.units[~keep[group.units]][:step]] = True
            assert cost(name, more) > 0.6


def test_what_the_steps_leave_of_a_budget_is_used_up_in_finer_ones() -> None:
    net = Net()
    x = net.relu(net.conv(net.input(1, 3, 8, 8), 128, 1))
    analysis, _ = analysed(net.model(net.head(net.relu(net.conv(x, 128, 1)))))
    base, full = np.ones(analysis.units, bool), CostModel(analysis).total_macs
    for fraction in (0.42, 0.55, 0.68, 0.83):
        keep = Planner(analysis, importance(analysis, "l2"), base, Budget("keep_macs", fraction)).solve()
        assert 0.95 * fraction <= CostModel(analysis).macs(keep) / full <= fraction
        assert all(int(keep[g.units].sum()) % plan.FINE == 0 for g in analysis.groups[:2])


def test_alignment_follows_the_width() -> None:
    assert [alignment_step(n, "auto") for n in (4, 7, 8, 31, 32, 127, 128, 512)] == [1, 1, 4, 4, 8, 8, 16, 16]
    assert alignment_step(512, 3) == 3


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_larger_budget_keeps_at_least_as_much(name: str, scope: str) -> None:
    left = [cost(name, solve(name, fraction, scope=scope)) for fraction in (0.2, 0.35, 0.5, 0.65, 0.8, 1.0)]
    assert left == sorted(left)
    assert left[-1] == 1.0


def test_the_least_important_go_first() -> None:
    analysis, _ = setting()
    scores = importance(analysis, "l2", scope="layer")
    keep = solve(fraction=0.5, scope="layer")
    for group in analysis.groups:
        if not keep[group.units].all():
            assert scores[group.units[keep[group.units]]].min() >= scores[group.units[~keep[group.units]]].max()


def test_layer_scope_takes_the_same_share_of_every_group() -> None:
    analysis, _ = setting()
    keep = solve(fraction=0.4, scope="layer")
    shares = [keep[g.units].mean() for g in analysis.groups if not analysis.pinned[g.units].any()]
    assert max(shares) - min(shares) <= 1 / 16 + 1e-9


def test_global_scope_follows_the_ranking() -> None:
    """A group of worthless channels loses them before any other group loses one."""
    net = Net()
    x = net.input(1, 3, 6, 6)
    y = net.bn(net.conv(x, 12, name="worthless"), gamma=np.full(12, 0.001))
    y = net.relu(net.bn(net.conv(y, 12, 1, name="good")))
    analysis, _ = analysed(net.model(net.head(y)))
    base = np.ones(analysis.units, bool)
    keep = Planner(analysis, importance(analysis, "bn-gamma"), base, Budget("keep_channels", 0.7, align=1)).solve()
    kept = {g.name: int(keep[g.units].sum()) for g in analysis.groups}
    assert kept["good"] == 12
    assert kept["worthless"] == 12 - 8  # 24 channels, 7 fewer fit into 0.7 of them; 16.8 stay


@pytest.mark.parametrize("min_keep", [0.0, 0.25, 0.5])
def test_every_group_keeps_its_share(min_keep: float) -> None:
    analysis, base = setting()
    scores = np.arange(analysis.units, dtype=float)  # the first groups are worth nothing
    keep = Planner(analysis, scores, base, Budget("keep_channels", 0.6, align=1, min_keep=min_keep)).solve()
    least = {g.name: keep[g.units].mean() for g in analysis.groups}
    assert min(least.values()) == pytest.approx(max(min_keep, 1 / 16), abs=1 / 16)
    assert all(share >= min_keep for share in least.values())
    assert all(keep[g.units].any() for g in analysis.groups)


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("align", [1, "auto"])
def test_an_unreachable_budget_names_the_best_value_and_that_one_is_reachable(name: str, align: int | str) -> None:
    with pytest.raises(PlanError) as caught:
        solve(name, 0.01, align=align, min_keep=0.3)
    assert f"--{name.replace('_', '-')} 0.01 cannot be reached" in str(caught.value)
    reachable = float(re.search(r"has ([0-9.]+)\.$", str(caught.value)).group(1))
    assert cost(name, solve(name, reachable, align=align, min_keep=0.3)) <= reachable
    with pytest.raises(PlanError):
        solve(name, reachable - 2e-4, align=align, min_keep=0.3)


def test_pinned_units_stay() -> None:
    analysis, _ = setting()
    keep = solve(fraction=0.3)
    assert analysis.pinned.any()
    assert keep[analysis.pinned].all()


def test_units_without_a_score_stay() -> None:
    net = Net()
    y = net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 16, name="scored")))
    y = net.conv(y, 16, name="unscored")
    analysis, _ = analysed(net.model(net.head(y)))
    scores = importance(analysis, "bn-gamma")
    keep = Planner(analysis, scores, np.ones(analysis.units, bool), Budget("keep_macs", 0.6, align=1)).solve()
    kept = {g.name: int(keep[g.units].sum()) for g in analysis.groups}
    assert kept["unscored"] == 16
    assert kept["scored"] < 16


def test_what_exact_removal_takes_counts_towards_the_budget() -> None:
    net = Net()
    y = net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 16), gamma=np.arange(16) % 2 * 1.0, beta=np.full(16, -0.1)))
    analysis, _ = analysed(net.model(net.head(net.conv(y, 16))))
    base = ~removed_units(analysis)
    assert (~base).sum() == 8
    planner = Planner(analysis, importance(analysis, "l2"), base, Budget("keep_macs", 0.7, align=1))
    np.testing.assert_array_equal(planner.solve(), base)  # it is met already
    keep = Planner(analysis, importance(analysis, "l2"), base, Budget("keep_macs", 0.3, align=1)).solve()
    assert not keep[~base].any()


def test_a_planned_cut_is_right_and_costs_what_the_plan_says() -> None:
    keep = solve(fraction=0.45, align="auto")
    assert check_cut(residual_net(), keep=keep, predict=("macs", "params")).moved > 1e-3


class TestJson:
    def test_round_trip(self) -> None:
        analysis, _ = setting()
        keep = solve(fraction=0.5)
        text = plan.to_json(analysis, keep, {"budget": "keep_macs", "fraction": 0.5})
        assert json.loads(text)["fraction"] == 0.5
        np.testing.assert_array_equal(plan.from_json(analysis, text), keep)

    def other(self) -> Analysis:
        net = Net()
        y = net.conv(net.input(1, 3, 8, 8), 12, name="stem")
        return analysed(net.model(net.head(net.conv(y, 8))))[0]

    def test_the_plan_of_another_model_is_refused(self) -> None:
        text = plan.to_json(self.other(), np.ones(self.other().units, bool), {})
        with pytest.raises(PlanError, match=r"p\.json was made for another model: the groups differ at '.+'"):
            plan.from_json(setting()[0], text, "p.json")

    @pytest.mark.parametrize("text", ["", "{}", "[1]", "not json", '{"schema_version": 1, "groups": [{"name": "a"}]}'])
    def test_what_is_no_plan_is_refused(self, text: str) -> None:
        with pytest.raises(PlanError, match=r"p\.json is not a plan"):
            plan.from_json(setting()[0], text, "p.json")

    def edited(self, change: object) -> str:
        analysis, base = setting()
        raw = json.loads(plan.to_json(analysis, base, {}))
        change(raw)
        return json.dumps(raw)

    def test_a_future_version_is_refused(self) -> None:
        text = self.edited(lambda raw: raw.update(schema_version=99))
        with pytest.raises(PlanError, match="schema version 99"):
            plan.from_json(setting()[0], text)

    @pytest.mark.parametrize("index", [-1, 16])
    def test_indices_must_exist(self, index: int) -> None:
        text = self.edited(lambda raw: raw["groups"][0]["kept"].append(index))
        with pytest.raises(PlanError, match="out of range"):
            plan.from_json(setting()[0], text)

    def test_pinned_channels_cannot_be_planned_away(self) -> None:
        text = self.edited(lambda raw: raw["groups"][-1]["kept"].clear())
        with pytest.raises(PlanError, match="pinned here"):
            plan.from_json(setting()[0], text)


@pytest.mark.parametrize("fraction", [1.0, 0.8, 0.75, 0.7, 0.6, 0.5])
def test_what_is_left_of_a_group_with_dead_channels_is_aligned(fraction: float) -> None:
    """Dead channels fill up the steps also where a whole group fits in: 17 of 24 would leave the fast path."""
    analysis, base = setting()
    dead = base.copy()
    for group in analysis.groups[:-1]:
        dead[group.units[::4][1:]] = False
    budget = Budget("keep_macs", fraction, align=8, min_keep=0.0)
    keep = Planner(analysis, importance(analysis, "l2"), dead, budget).solve()
    for group in analysis.groups[:-1]:
        assert keep[group.units].sum() % 8 == 0, group.name


def test_network_slimming_removes_as_many_as_asked_for() -> None:
    """Of |gamma| = .1 .2 .2 .3 a quarter is one. The official rule keeps what is above sorted[1], and removes three."""
    net = Net()
    y = net.bn(net.conv(net.input(1, 3, 4, 4), 4), gamma=np.asarray([0.2, 0.1, 0.3, 0.2]))
    analysis, _ = analysed(net.model(net.head(net.relu(y))))
    scores = importance(analysis, "bn-gamma")
    budget = Budget("keep_channels", 0.75, "global", 1, 0.0)
    kept = Planner(analysis, scores, np.ones(analysis.units, bool), budget).solve()
    group = next(g for g in analysis.groups if len(g.units) == 4)
    assert kept[group.units].tolist() == [True, False, True, True]
