"""Exact removal: what goes leaves the output as it is, everything that must go does, and nothing else.

A zero BatchNorm scale leaves the constant bias: dead is not zero. The nets here hold many dead channels with biases
that do not vanish, in front of everything that treats a constant in a way of its own.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops.constants import Constants, constant_units
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.exact import carry

from .builder import Net, analysed, distance, outputs_of
from .dying import PAD, TYPES, check_exact, dead_mask, dying, living


# -- one dying layer, then a consumer --------------------------------------------------------------
@pytest.mark.parametrize("folded", [False, True], ids=["bn", "folded"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("padded", [False, True], ids=["valid", "padded"])
@pytest.mark.parametrize("dtype", TYPES)
def test_conv(dtype: type, padded: bool, relu: bool, folded: bool) -> None:
    net = Net(dtype=dtype)
    y, dead = dying(net, net.input(1, 3, 7, 7), 20, folded=folded, relu=relu, name="dying", **PAD)
    y = living(net, y, strides=[2, 1], **(PAD if padded else {}))
    exact = check_exact(net.model(net.head(net.relu(y))))
    assert dead.speaking >= 4
    assert exact.kept("dying") == dead.left(padded)
    assert exact.naive > 1e-3
    assert (exact.edits.merged, exact.edits.absorbed) == ((dead.speaking - 1, 0) if padded else (0, dead.speaking))
    assert exact.edits.dropped == dead.mask.sum() - dead.speaking


@pytest.mark.parametrize("pads", [[0, 0, 1, 0], "SAME_UPPER"], ids=["one_side", "auto_pad"])
def test_padding_of_any_kind_merges(pads: object) -> None:
    net = Net()
    y, dead = dying(net, net.input(1, 3, 7, 7), 12, name="dying")
    y = living(net, y, auto_pad=pads) if isinstance(pads, str) else living(net, y, pads=pads)
    exact = check_exact(net.model(net.head(y)))
    assert exact.kept("dying") == dead.left(True)
    assert exact.naive > 1e-3


def test_absorbing_a_constant_under_padding_would_be_wrong() -> None:
    """Why constants are merged: the borders of a padded convolution see fewer of them."""
    net = Net()
    y, _ = dying(net, net.input(1, 3, 7, 7), 12, name="dying")
    model = net.model(living(net, y, **PAD))
    analysis, feeds = analysed(model)
    known = Constants(analysis)
    group = next(g for g in analysis.groups if g.name == "dying")
    keep = np.ones(analysis.units, bool)
    keep[group.units[constant_units(known)[group.units]]] = False
    contraction = next(c for c in analysis.contractions if c.node.name == "consumer")
    object.__setattr__(contraction, "padded", False)
    wrong = cut(analysis, keep, carry(analysis, known, keep))
    a, b = (outputs_of(m, feeds[0])[0] for m in (model, wrong))
    assert distance(a[..., 1:-1, 1:-1], b[..., 1:-1, 1:-1]) < 1e-5
    assert distance(a, b) > 1e-2


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("op", "attributes", "constant"),
    [
        ("MaxPool", {"kernel_shape": [2, 2]}, True),
        ("MaxPool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, True),
        ("AveragePool", {"kernel_shape": [3, 3]}, True),
        ("AveragePool", {"kernel_shape": [3, 3], "count_include_pad": 1}, True),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 0}, True),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, False),
        ("LpPool", {"kernel_shape": [2, 2]}, False),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_pools(op: str, attributes: dict, constant: bool, dtype: type) -> None:
    """Pools pass constants on, except where padding counts or the window's size becomes part of the value."""
    net = Net(dtype=dtype)
    y, dead = dying(net, net.input(1, 3, 9, 9), 12, name="dying")
    exact = check_exact(net.model(net.head(living(net, net.op(op, y, **attributes), **PAD))))
    silent = int(dead.mask.sum()) - dead.speaking
    assert exact.kept("dying") == (dead.left(True) if constant else 12 - silent)
    assert not constant or exact.naive > 1e-3


@pytest.mark.parametrize(
    ("mode", "fill", "constant"),
    [("constant", None, False), ("constant", 0.3, True), ("reflect", None, True), ("edge", None, True)],
)
def test_padding_as_a_node_of_its_own(mode: str, fill: float | None, constant: bool) -> None:
    """A border of another value ends a constant; one of the same value, or taken from the map, does not."""
    net = Net()
    y = net.conv(net.input(1, 3, 7, 7), 10, bias=False, name="dying")
    mask = dead_mask(net, 10)
    y = net.relu(net.bn(y, gamma=np.where(mask, 0, net.positive(10)), beta=np.full(10, 0.3)))
    y = net.op("Pad", y, [0, 0, 1, 2, 0, 0, 1, 0], *([] if fill is None else [net.const(fill)]), mode=mode)
    exact = check_exact(net.model(net.head(living(net, y))))
    assert exact.kept("dying") == 10 - constant * int(mask.sum())
    assert exact.naive > 1e-3 or not constant


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tail", ["Flatten", "GlobalAveragePool", "GlobalMaxPool", "Reshape", "ReduceMean", "MatMul"])
def test_tails(tail: str, dtype: type) -> None:
    """A fully connected layer sees every position: all constants go into its bias."""
    net = Net(dtype=dtype)
    y, dead = dying(net, net.input(1, 3, 5, 6), 15, name="dying")
    if tail == "Reshape":
        y = net.gemm(net.op("Reshape", y, [0, -1]), 5, transB=1, alpha=0.7, beta=1.4)
    elif tail == "Flatten":
        y = net.gemm(net.op("Flatten", y), 5, bias=False)
    elif tail == "MatMul":
        y = net.matmul(net.op("Flatten", y), 5)
    elif tail == "ReduceMean":
        y = net.gemm(net.op("ReduceMean", y, axes=[2, -1], keepdims=0), 5)
    else:
        y = net.gemm(net.op("Flatten", net.op(tail, y)), 5, beta=0.0)
    exact = check_exact(net.model(y))
    assert exact.kept("dying") == dead.left(False)
    assert exact.naive > 1e-3
    assert exact.edits.absorbed >= dead.speaking


# ONNX's own interpreter does not group transposed convolutions, so float64 is tried without groups only.
@pytest.mark.parametrize(("group", "dtype"), [(1, np.float32), (1, np.float64), (2, np.float32)])
def test_conv_transpose(group: int, dtype: type) -> None:
    """A transposed convolution spreads a constant unevenly, like padding: it is merged, group by group."""
    net = Net(dtype=dtype)
    half = dead_mask(net, 8)
    mask = np.tile(half, group)
    y, dead = dying(net, net.input(1, 3, 5, 5), len(mask), mask=mask, relu=False, name="dying")
    y = net.conv_transpose(y, 6, 3, group=group, strides=[2, 2], name="consumer")
    exact = check_exact(net.model(net.head(net.relu(y))))
    # Equal counts in every group: the kept one's partner stays with it.
    assert exact.kept("dying") == int((~half).sum()) + 1
    assert exact.edits.merged == dead.speaking - group
    assert exact.naive > 1e-3


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_grouped_conv(alike: bool, padded: bool, dtype: type) -> None:
    """Position j goes if it is dead in all groups; every group needs a representative of its own."""
    net = Net(dtype=dtype)
    masks = [dead_mask(net, 8, 0.75) for _ in range(2)]
    masks = [masks[0], masks[0]] if alike else masks
    y, _ = dying(net, net.input(1, 3, 6, 6), 16, mask=np.concatenate(masks), relu=False, name="dying")
    y = living(net, y, 8, group=2, **(PAD if padded else {}))
    exact = check_exact(net.model(net.head(net.relu(y))))
    both = masks[0] & masks[1]
    # A dead channel whose partner lives stays anyway, and serves as the representative of its group.
    served = all((mask & ~both).any() for mask in masks)
    assert served == (not alike)
    assert exact.kept("dying") == int((~both).sum()) + int(padded and not served)
    assert exact.naive > 1e-3


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_depthwise(padded: bool, dtype: type) -> None:
    """Behind a valid depthwise layer a constant is another constant; behind a padded one only zero is."""
    net = Net(dtype=dtype)
    y, dead = dying(net, net.input(1, 3, 8, 8), 15, name="dying")
    y = net.conv(y, 15, group=15, name="depthwise", **(PAD if padded else {}))
    exact = check_exact(net.model(net.head(net.conv(y, 6, 1, name="pointwise"))))
    bias = onnx.numpy_helper.to_array(net.initializers[net.nodes[3].input[2]])
    assert net.nodes[3].name == "depthwise"
    assert (bias != 0).all()
    silent = dead.mask & (dead.values == 0)
    assert exact.kept("dying") == 15 - int((silent if padded else dead.mask).sum())
    assert exact.naive > 1e-3


@pytest.mark.parametrize("dtype", TYPES)
def test_depthwise_that_dies_itself(dtype: type) -> None:
    """A BatchNorm behind the depthwise layer kills: what the padding did in front of it does not matter."""
    net = Net(dtype=dtype)
    y = net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 12, 1, name="expand")))
    mask = dead_mask(net, 12)
    y = net.conv(y, 12, group=12, bias=False, name="depthwise", **PAD)
    y = net.relu(net.bn(y, gamma=np.where(mask, 0, net.positive(12))))
    exact = check_exact(net.model(net.head(net.conv(y, 6, 1, name="project"))))
    assert exact.kept("expand") == int((~mask).sum())
    assert exact.naive > 1e-3
