"""Exact removal where several tensors meet: sums, concatenations, gates, splits."""

from __future__ import annotations

import numpy as np
import pytest

from .builder import Net, distance, outputs_of
from .dying import PAD, TYPES, check_exact, dead_mask, dying, living


# -- several tensors -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_addition(padded: bool, dtype: type) -> None:
    """A sum is constant where both summands are."""
    net = Net(dtype=dtype)
    x = net.input(1, 3, 7, 7)
    left, a = dying(net, x, 20, relu=False, name="left")
    right, b = dying(net, x, 20, relu=False, name="right")
    y = living(net, net.relu(net.op("Add", left, right)), **(PAD if padded else {}))
    exact = check_exact(net.model(net.head(y)))
    both = a.mask & b.mask
    assert both.sum() >= 4
    speaks = bool(((a.values + b.values)[both] > 0).any())
    assert exact.kept("left") == 20 - int(both.sum()) + int(padded and speaks)
    assert exact.naive > 1e-3


@pytest.mark.parametrize(("op", "gone"), [("Add", False), ("Sub", False), ("Max", False), ("Mul", True)])
def test_zero_beside_something_alive(op: str, gone: bool) -> None:
    """Zero times anything is zero; with anything else it is what stands beside it."""
    net = Net()
    x = net.input(1, 3, 7, 7)
    mask = dead_mask(net, 12)
    y = net.bn(net.conv(x, 12, name="left"), gamma=np.where(mask, 0, net.positive(12)), beta=np.where(mask, 0, 0.3))
    y = net.op(op, y, net.op("Add", net.conv(x, 12, name="right"), net.const(2.0)))
    exact = check_exact(net.model(net.head(living(net, net.op("Tanh", y), **PAD))))
    assert exact.kept("left") == 12 - gone * int(mask.sum())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_concatenation(padded: bool, dtype: type) -> None:
    """One tensor needs one representative, whichever part it lies in."""
    net = Net(dtype=dtype)
    x = net.input(1, 3, 7, 7)
    (left, a), (right, b) = dying(net, x, 10, name="left"), dying(net, x, 12, name="right")
    y = living(net, net.op("Concat", left, right, axis=1), **(PAD if padded else {}))
    exact = check_exact(net.model(net.head(y)))
    assert a.speaking
    assert b.speaking
    assert exact.kept("left") + exact.kept("right") == a.left(False) + b.left(False) + padded * 1
    assert exact.naive > 1e-3


def test_a_constant_beside_a_token_is_none() -> None:
    """Joined over space with stored values, a dead channel holds two different numbers."""
    net = Net()
    y, _ = dying(net, net.input(1, 3, 7, 7), 12, name="dying")
    y = net.op("Concat", y, net.random(1, 12, 1, 5), axis=2)
    exact = check_exact(net.model(net.head(living(net, y))))
    assert exact.kept("dying") == 12


@pytest.mark.parametrize("other", ["dead", "input"])
def test_two_maps_side_by_side(other: str) -> None:
    """A channel that is dead in both halves of a map holds two numbers, or one and whatever lies beside it."""
    net = Net()
    x = net.input(1, 10, 7, 7)
    mask = dead_mask(net, 10)
    y, dead = dying(net, x, 10, mask=mask, name="dying", **PAD)
    z = dying(net, x, 10, mask=mask, name="other", **PAD)[0] if other == "dead" else x
    y = net.relu(net.op("Concat", y, z, axis=2))
    exact = check_exact(net.model(net.head(living(net, y))))
    assert dead.speaking
    assert exact.kept("dying") == 10


def test_a_selection_is_dead_only_where_all_its_sources_are() -> None:
    """Per-consumer selection: position j of both groups goes together, but only the second one's source is dead."""
    net = Net()
    mask = np.arange(8) >= 4
    y, _ = dying(net, net.input(1, 3, 7, 7), 8, mask=mask, relu=False, name="dying")
    y = net.op("Gather", y, np.asarray([1, 0, 3, 2, 5, 4, 7, 6]), axis=1, name="selection")
    exact = check_exact(net.model(net.head(living(net, y, 8, group=2))), select=True)
    assert exact.counts["selection"] == (4, 4)


def test_a_view_with_two_constants_at_a_position() -> None:
    """Both halves of the channels go through one matrix: position j holds the constants of channels j and j + 8."""
    net = Net()
    mask = np.tile(dead_mask(net, 8), 2)
    y, dead = dying(net, net.input(1, 3, 7, 7), 16, mask=mask, relu=False, name="dying")
    y = net.op("Transpose", net.op("Reshape", y, [1, 2, 8, 25]), perm=[0, 1, 3, 2])
    y = net.op("Reshape", net.op("Transpose", net.matmul(y, 6), perm=[0, 1, 3, 2]), [1, 12, 5, 5])
    exact = check_exact(net.model(net.head(living(net, y))))
    assert dead.speaking == mask.sum()
    assert exact.counts["dying"] == (8, 8)


def test_stored_channels_are_constants_if_they_are() -> None:
    """Constant maps that are concatenated as channels are dead weight like any other."""
    net = Net()
    y = net.relu(net.conv(net.input(1, 3, 7, 7), 6, name="living"))
    stored = net.random(1, 5, 5, 5)
    stored[:, :3] = np.asarray([0.5, 0.0, -2.0]).reshape(1, 3, 1, 1)
    y = net.op("Concat", net.const(stored, name="stored"), y, axis=1, name="joined")
    exact = check_exact(net.model(net.head(living(net, y))))
    assert exact.kept("joined") == 2
    assert exact.kept("living") == 6
    assert exact.naive > 1e-3


@pytest.mark.parametrize("dtype", TYPES)
def test_gate(dtype: type) -> None:
    """A gate multiplies a constant by something that is none; zero stays zero."""
    net = Net(dtype=dtype)
    y, dead = dying(net, net.input(1, 3, 7, 7), 15, name="dying")
    gate = net.relu(net.conv(net.op("GlobalAveragePool", y), 4, 1, name="squeeze"))
    gate = net.op("Sigmoid", net.conv(gate, 15, 1, name="excite"))
    exact = check_exact(net.model(net.head(living(net, net.op("Mul", y, gate), **PAD))))
    assert exact.kept("dying") == 15 - (int(dead.mask.sum()) - dead.speaking)


@pytest.mark.parametrize("dtype", TYPES)
def test_two_readers(dtype: type) -> None:
    """One reader is padded, the other is not: the representative serves the one, the other takes it in its stride."""
    net = Net(dtype=dtype)
    y, dead = dying(net, net.input(1, 3, 7, 7), 15, name="dying")
    one, two = living(net, y, 6, 1, name="valid"), living(net, y, 6, name="padded", **PAD)
    exact = check_exact(net.model(net.head(net.op("Add", one, two))))
    assert exact.kept("dying") == dead.left(True)
    assert exact.edits.merged == exact.edits.absorbed == dead.speaking - 1
    assert exact.naive > 1e-3


def test_shuffle_and_split() -> None:
    """Constants survive every way of moving data."""
    net = Net()
    y, dead = dying(net, net.input(1, 3, 7, 7), 16, relu=False, name="dying")
    y = net.op("Transpose", net.op("Reshape", y, [1, 2, 8, 5, 5]), perm=[0, 2, 1, 3, 4])
    left, right = net.op("Split", net.op("Reshape", y, [1, 16, 5, 5]), [6, 10], outputs=2, axis=1)
    y = net.op("Concat", net.op("Transpose", right, perm=[0, 1, 3, 2]), left, axis=1)
    exact = check_exact(net.model(net.head(living(net, y))))
    pairs = dead.mask[:8] & dead.mask[8:]  # the view (2, 8) is cut along its second axis
    assert pairs.any()
    assert exact.counts["dying"] == (8, 8 - int(pairs.sum()))
    assert exact.naive > 1e-3


def test_matmul_without_a_bias_gets_an_addition() -> None:
    net = Net()
    y, dead = dying(net, net.input("N", 3, 5, 5), 12, name="dying")
    y = net.matmul(net.op("Transpose", y, perm=[0, 2, 3, 1]), 7, name="product")
    exact = check_exact(net.model(net.matmul(net.relu(y), 5)))
    assert exact.kept("dying") == dead.left(False)
    assert "Add" in {n.op_type for n in exact.model.graph.node}
    assert exact.naive > 1e-3


@pytest.mark.parametrize("size", ["N", 1])
def test_dynamic_sizes(size: object) -> None:
    """Neither merging nor absorbing fixes the size of the image."""
    net = Net()
    y, dead = dying(net, net.input(size, 3, "H", "W"), 20, name="dying", **PAD)
    y, more = dying(net, living(net, y, 8, **PAD), 16, name="later")
    exact = check_exact(net.model(net.head(y)))
    assert exact.kept("dying") == dead.left(True)
    assert exact.kept("later") == more.left(False)
    assert exact.naive > 1e-3
    for height, width in ((5, 9), (12, 6)):
        feeds = {"x": np.random.default_rng(height).standard_normal((1, 3, height, width)).astype(np.float32)}
        for a, b in zip(outputs_of(exact.analysis.graph.model, feeds), outputs_of(exact.model, feeds), strict=True):
            assert distance(a, b) <= 1e-5
