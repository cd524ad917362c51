"""Channel groups: who goes with whom, in which order, and what a choice of axes is judged by."""

from __future__ import annotations

import numpy as np
import pytest

from prune_onnx.graph_ops import cost
from prune_onnx.graph_ops.analysis import Analysis, Context, _pass, _resolve
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.rules import rule_for, table
from prune_onnx.graph_ops.rules.base import RULES
from prune_onnx.pipeline.probing import probe

from .builder import Net, analysed, check_cut, random_keep
from .cases.networks import attention
from .cases.reshape import shuffle


def groups(net: Net, *outputs: str, **options: object) -> dict[str, tuple[tuple[str, ...], int]]:
    """Name to (producing nodes, number of units)."""
    analysis, _ = analysed(net.model(*outputs), **options)
    return {g.name: (g.nodes, len(g.units)) for g in analysis.groups}


def test_a_chain_has_a_group_for_every_layer() -> None:
    net = Net()
    y = net.conv(net.relu(net.conv(net.input(1, 3, 8, 8), 8, name="one")), 6, name="two")
    assert groups(net, net.head(y)) == {"one": (("one",), 8), "two": (("two",), 6), "head": (("head",), 5)}


def test_a_residual_stage_is_one_group() -> None:
    net = Net()
    stem = net.conv(net.input(1, 3, 8, 8), 8, 1, name="stem")
    y = net.op("Add", stem, net.conv(net.conv(stem, 6, 1, name="inner"), 8, 1, name="outer"))
    y = net.op("Add", y, net.conv(y, 8, 1, name="block"))
    found = groups(net, net.head(y))
    assert found["stem"] == (("stem", "outer", "block"), 8)
    assert found["inner"] == (("inner",), 6)


def test_depthwise_belongs_to_its_producer() -> None:
    net = Net()
    y = net.conv(net.conv(net.input(1, 3, 8, 8), 8, name="expand"), 16, group=8, name="depthwise")
    assert groups(net, net.head(y))["expand"] == (("expand", "depthwise"), 8)


def test_units_are_in_channel_order_and_belong_to_one_group() -> None:
    net = Net()
    x = net.input(1, 3, 8, 8)
    y = net.op(
        "Add",
        net.conv(x, 8, name="left"),
        net.op("Gather", net.conv(x, 8, name="right"), np.arange(8)[::-1].copy(), axis=1),
    )
    analysis, _ = analysed(net.model(net.head(y)))
    np.testing.assert_array_equal(analysis.groups[0].units, analysis.axes["left_out"][1])
    np.testing.assert_array_equal(analysis.axes["right_out"][1], analysis.axes["left_out"][1][::-1])
    for i, group in enumerate(analysis.groups):
        assert (analysis.group_of[group.units] == i).all()
    assert (analysis.group_of >= 0).all()


def test_one_channel_is_never_labelled() -> None:
    net = Net()
    y = net.conv(net.conv(net.input(1, 3, 8, 8), 1, name="single"), 6, name="wide")
    assert set(groups(net, net.head(y))) == {"wide", "head"}


def test_every_axis_has_a_vector_of_its_length() -> None:
    net = Net()
    x = net.op("Add", net.matmul(net.input(1, 5, 6), 8, name="embed"), net.random(1, 5, 8))
    analysis, _ = analysed(net.model(net.matmul(attention(net, x, 12, 3, "gather"), 5)))
    for name, axes in analysis.axes.items():
        for axis, vector in axes.items():
            assert analysis.probe.shapes[name][axis] == len(vector)
            assert (vector >= 0).all()
            assert (vector < analysis.units).all()


def pass_with(net_model: object, options: dict[tuple[str, int], int]) -> tuple[Analysis, Context]:
    graph = Graph(net_model)
    ctx = _pass(Context(graph, probe(graph)[0], options=options), ())
    return _resolve(ctx), ctx


class TestChoices:
    """Where a tensor could be cut along several axes, every choice is right; the best is taken."""

    def fused(self) -> object:
        net = Net()
        x = net.op("Add", net.matmul(net.input(1, 5, 6), 8, name="embed"), net.random(1, 5, 8))
        return net.model(net.matmul(attention(net, x, 12, 3, "gather"), 5, name="head"))

    def test_the_axis_that_is_dead_is_not_taken(self) -> None:
        """(3, heads, width): the first axis holds q, k and v, and is read position by position."""
        analysis, _ = analysed(self.fused())
        units = next(g.units for g in analysis.groups if g.name == "qkv")
        assert len(units) in (4, 8)  # the width of q and k joined across heads, with v's of its own or not
        assert not analysis.pinned[units].any()

    @pytest.mark.parametrize("build", ["fused", "shuffle"])
    @pytest.mark.parametrize("option", [0, 1, 2])
    def test_every_option_is_exact(self, build: str, option: int) -> None:
        if build == "fused":
            model = self.fused()
        else:
            net = Net()
            model = net.model(shuffle(3)(net))
        _, ctx = pass_with(model, {})
        forced = {key: min(option, count - 1) for key, (count, _) in ctx.choices.items()}
        assert forced
        analysis, _ = pass_with(model, forced)
        keep = random_keep(analysis, 1, 0.5)
        check_forced(analysis, keep)

    def test_whole_groups_are_cut_where_positions_are_pinned(self) -> None:
        """The graph's input is one of four groups: position by position it would pin the other three."""
        net = Net()
        x = net.input(1, 3, 6, 6)
        y = net.op("Concat", x, net.conv(x, 9, 1, name="stem"), axis=1)
        y = net.conv(y, 8, group=4, name="grouped")
        result = check_cut(net.model(net.head(net.conv(net.relu(y), 6, 1))), fraction=0.6)
        group = result.analysis.groups[0]
        assert group.nodes == ("stem", "grouped")
        assert len(group.units) == 4
        assert int(result.analysis.pinned[group.units].sum()) == 1
        grouped = next(n for n in result.model.graph.node if n.name == "grouped")
        assert next(a.i for a in grouped.attribute if a.name == "group") == 2


def check_forced(analysis: Analysis, keep: np.ndarray) -> None:
    from prune_onnx.graph_ops.cut import cut
    from prune_onnx.graph_ops.exact import Edits
    from prune_onnx.graph_ops.masked import masked_reference

    from .builder import Result, compare

    _, feeds, other = probe(analysis.graph)
    result = Result(analysis, keep, Edits(), cut(analysis, keep), [feeds] + ([other] if other else []))
    compare(result, masked_reference(analysis, keep))


class TestCost:
    def test_by_hand(self) -> None:
        net = Net()
        y = net.conv(net.input(1, 3, 8, 8), 6, 3, name="conv")  # 6 x 6 positions x 6 x 27
        y = net.conv_transpose(y, 4, 2, strides=[2, 2], bias=False)  # 36 inputs x 6 x 4 x 4
        y = net.conv(y, 8, 3, group=4, bias=False)  # 10 x 10 x 8 x 9
        y = net.gemm(net.op("Flatten", net.op("GlobalAveragePool", net.bn(y))), 5)  # 40
        graph = Graph(net.model(net.matmul(y, 7)))  # 35
        shapes = probe(graph)[0].shapes
        assert cost.macs(graph, shapes) == 36 * 6 * 27 + 36 * 6 * 16 + 100 * 8 * 9 + 40 + 35
        assert cost.params(graph) == 6 * 27 + 6 + 6 * 16 + 8 * 9 + 32 + 45 + 35

    def test_sizes_and_indices_are_no_parameters(self) -> None:
        net = Net()
        y = net.op("Reshape", net.conv(net.input(1, 3, 4, 4), 4, 1, bias=False), [1, 4, 16])
        graph = Graph(
            net.model(net.op("Where", np.ones((1, 4, 16), bool), y, net.op("Gather", y, [0, 1, 2, 3], axis=1)))
        )
        assert cost.params(graph) == 12

    def test_batch_counts_once(self) -> None:
        net = Net()
        model = net.model(net.head(net.conv(net.input("N", 3, 8, 8), 6)))
        graph = Graph(model)
        assert cost.macs(graph, probe(graph)[0].shapes) == 36 * 6 * 27 + 30


def test_every_rule_has_a_line_of_description() -> None:
    rows = table()
    assert sorted(" ".join(names for names, _ in rows).split()) == sorted(RULES)
    for _, what in rows:
        assert what.endswith(".")
        assert len(what) > 15


@pytest.mark.parametrize(("domain", "known"), [("", True), ("ai.onnx", True), ("com.microsoft", False)])
def test_operators_are_known_by_domain(domain: str, known: bool) -> None:
    net = Net()
    net.relu(net.input(1, 2))
    model = net.model("relu0_out")
    model.graph.node[0].domain = domain
    assert (rule_for(Graph(model).nodes[0]) is RULES.get("Relu")) == known
