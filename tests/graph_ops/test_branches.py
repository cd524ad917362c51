"""Branches that are a constant are replaced by it, exactly."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops.branches import fold_constant_branches
from prune_onnx.graph_ops.constants import Constants

from .builder import Net, analysed, distance, outputs_of


def residual(op: str, gamma: float, beta: float, *, swap: bool = False) -> onnx.ModelProto:
    """A stream and a branch that is dead when ``gamma`` is 0: then it is ``max(beta, 0)`` everywhere."""
    net = Net()
    x = net.conv(net.input("n", 3, 6, 6), 8, pads=[1, 1, 1, 1], name="stem")
    y = net.conv(x, 4, name="branch1", pads=[1, 1, 1, 1])
    y = net.conv(net.relu(y), 8, 1, name="branch2")
    y = net.relu(net.bn(y, gamma=np.full(8, gamma), beta=np.full(8, beta) * np.arange(1, 9)))
    joined = net.op(op, y, x) if swap else net.op(op, x, y)
    return net.model(net.head(net.conv(joined, 5)))


def fold(model: onnx.ModelProto) -> tuple[onnx.ModelProto | None, list]:
    analysis, feeds = analysed(model)
    return fold_constant_branches(analysis, Constants(analysis)), feeds


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Max"])
def test_constant_branch_becomes_an_initializer(op, swap):
    model = residual(op, 0.0, 0.5, swap=swap)
    smaller, feeds = fold(model)
    names = [n.name for n in smaller.graph.node]
    assert "branch1" not in names
    assert "branch2" not in names
    assert op in ops(smaller)
    for inputs in feeds:
        for a, b in zip(outputs_of(model, inputs), outputs_of(smaller, inputs), strict=True):
            assert distance(a, b) <= 1e-6


def test_addition_of_zero_disappears():
    model = residual("Add", 0.0, -0.5)
    smaller, feeds = fold(model)
    assert "Add" not in ops(smaller)
    assert len(smaller.graph.node) == len(model.graph.node) - 6
    for inputs in feeds:
        for a, b in zip(outputs_of(model, inputs), outputs_of(smaller, inputs), strict=True):
            assert np.array_equal(a, b)


def test_live_branch_stays():
    assert fold(residual("Add", 1.0, 0.5))[0] is None


def test_partly_dead_branch_stays():
    net = Net()
    x = net.conv(net.input(1, 3, 6, 6), 8, pads=[1, 1, 1, 1])
    y = net.bn(net.conv(x, 8, 1), gamma=np.r_[np.zeros(7), 1.0])
    assert fold(net.model(net.head(net.op("Add", x, y))))[0] is None


def test_branch_that_sets_the_shape_stays():
    # The constant operand is the larger one: replacing it by (1, C, 1, 1) would change the output's shape.
    net = Net()
    x = net.conv(net.input(1, 3, 6, 6), 8, pads=[1, 1, 1, 1])
    dead = net.bn(x, gamma=np.zeros(8))
    gate = net.op("GlobalAveragePool", x)
    assert fold(net.model(net.head(net.op("Add", dead, gate))))[0] is None
