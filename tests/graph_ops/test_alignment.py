"""Parts of groups, and the widths that they lead to."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops.alignment import SMALLEST_PART, Part, alignment_step, parts
from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.importance import importance
from prune_onnx.graph_ops.plan import Budget, Planner

from .builder import Net, analysed

PAD = {"pads": [1, 1, 1, 1]}


def padded_stream() -> onnx.ModelProto:
    """Two stages of a residual net whose shortcut is padded with zero channels in between (option A)."""
    net = Net()
    y = net.relu(net.conv(net.input(1, 3, 8, 8), 16, name="stem", **PAD))
    y = net.relu(net.op("Add", y, net.conv(net.relu(net.conv(y, 16, **PAD)), 16, name="early", **PAD)))
    short = net.op("Pad", y, [0, 8, 0, 0, 0, 8, 0, 0])
    y = net.relu(net.op("Add", short, net.conv(net.relu(net.conv(y, 32, **PAD)), 32, name="late", **PAD)))
    return net.model(net.head(net.conv(y, 24, 1)))


def heads() -> onnx.ModelProto:
    """Attention whose head width is pinned by a softmax: a unit is a whole head of four channels."""
    net = Net()
    y = net.op("Reshape", net.matmul(net.input(1, 7, 6), 48, name="values"), [1, 7, 12, 4])
    y = net.op("Reshape", net.op("Softmax", y, axis=3), [1, 7, 48])
    return net.model(net.matmul(y, 5, name="head"))


def stream(analysis: Analysis) -> int:
    return next(i for i, g in enumerate(analysis.groups) if {"stem", "late"} <= set(g.nodes))


def test_units_of_a_part_occur_in_the_same_layers() -> None:
    analysis, _ = analysed(padded_stream())
    every = parts(analysis)
    assert [len(part.units) for part in every[stream(analysis)]] == [16, 16]
    for group, pieces in zip(analysis.groups, every, strict=True):
        assert sorted(np.concatenate([p.units for p in pieces])) == sorted(group.units)
        for part in pieces:
            for producer in analysis.producers:
                found = np.isin(part.units, producer.labels)
                assert found.all() or not found.any()


@pytest.mark.parametrize("align", ["auto", 2, 4, 8])
@pytest.mark.parametrize("fraction", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_layer_gets_an_aligned_width(align: int | str, fraction: float, scope: str) -> None:
    """Not only the group: 16 + 16 units cut to 24 in all may leave 11 in the early layers."""
    analysis, _ = analysed(padded_stream())
    budget = Budget("keep_macs", fraction, scope, align, min_keep=0.0)
    keep = Planner(analysis, importance(analysis, "l2", scope=scope), np.ones(analysis.units, bool), budget).solve()
    step = 4 if align == "auto" else align
    cut = [p for p in analysis.producers if p.weight is not None and not keep[p.labels].all()]
    assert cut
    assert all(keep[p.labels].sum() % step == 0 for p in cut)


def test_a_unit_of_several_channels_takes_smaller_steps() -> None:
    """Twelve heads of four channels: 48 channels step by 8, which is two heads."""
    analysis, _ = analysed(heads())
    (part,) = parts(analysis)[0]
    assert (len(part.units), part.channels) == (12, 4)
    assert part.step("auto") == 2
    assert part.step(16) == 4
    assert part.step(4) == part.step(2) == part.step(1) == 1


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 64])
@pytest.mark.parametrize("align", ["auto", 1, 3, 8, 16])
def test_steps_of_units_are_the_smallest_that_align_channels(channels: int, align: int | str) -> None:
    part = Part(np.arange(40), channels)
    wanted = alignment_step(40 * channels, align)
    fitting = [n for n in range(1, wanted + 1) if n * channels % wanted == 0]
    assert part.step(align) == fitting[0] == wanted // math.gcd(wanted, channels)


def test_small_parts_stay_together() -> None:
    net = Net()
    x = net.input(1, 3, 8, 8)
    whole = net.conv(x, 12, name="whole")
    first = net.op("Concat", net.conv(x, 9, name="left"), net.conv(x, 3, name="right"), axis=1)
    analysis, _ = analysed(net.model(net.head(net.conv(net.op("Add", whole, first), 16, 1))))
    index = next(i for i, g in enumerate(analysis.groups) if "whole" in g.nodes)
    assert sorted(len(part.units) for part in parts(analysis)[index]) == [3, 9]
    assert SMALLEST_PART == 8
