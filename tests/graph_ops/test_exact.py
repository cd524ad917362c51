"""Exact removal: what goes leaves the output as it is, everything that must go does, and nothing else.

A zero BatchNorm scale leaves the constant bias: dead is not zero. The nets here hold many dead channels with biases
that do not vanish, in front of everything that treats a constant in a way of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.constants import Constants, constant_units
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.exact import Edits, carry, removable, weight_grid, write_grid

from .builder import Net, analysed, check_valid, distance, outputs_of, run_ort, run_reference

PAD = {"pads": [1, 1, 1, 1]}
TYPES = [np.float32, np.float64]


@dataclass
class Exact:
    """Result of an exact removal: group name to (channels, kept channels), and what became of the constants."""

    analysis: Analysis
    counts: dict[str, tuple[int, int]]
    edits: Edits
    model: onnx.ModelProto
    naive: float
    """How far the output moves when the same channels go and their constants are forgotten."""

    def kept(self, name: str) -> int:
        return self.counts[name][1]


def check_exact(model: onnx.ModelProto, *, select: bool = False) -> Exact:
    """Remove what can go exactly; the output must stay what it was, at every size that is tried."""
    double = model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    runner = run_reference if double else run_ort  # ONNX Runtime's convolutions know no float64
    analysis, feeds = analysed(model, reference=double, select=select)
    known = Constants(analysis)
    keep = ~removable(analysis, known)
    edits = carry(analysis, known, keep)
    result, forgetful = cut(analysis, keep, edits), cut(analysis, keep)
    check_valid(result, model)
    naive = 0.0
    before, other = (outputs_of(model, inputs, runner)[0] for inputs in feeds[:2])
    assert distance(before, other) > 1e-2, "an output that does not follow the input proves nothing"
    for inputs in feeds:
        want = outputs_of(model, inputs, runner)
        for a, b in zip(want, outputs_of(result, inputs, runner), strict=True):
            assert np.isfinite(a).all()
            assert distance(a, b) <= (1e-10 if double else 1e-5)
        naive = max(naive, *(distance(a, b) for a, b in zip(want, outputs_of(forgetful, inputs, runner), strict=True)))
    counts = {g.name: (len(g.units), int(keep[g.units].sum())) for g in analysis.groups}
    return Exact(analysis, counts, edits, result, naive)


@dataclass
class Dead:
    """Which channels of a layer are dead, and what they hold behind the activation."""

    mask: np.ndarray
    values: np.ndarray

    @property
    def speaking(self) -> int:
        """Number of dead channels that are not zero."""
        return int((self.mask & (self.values != 0)).sum())

    def left(self, padded: bool) -> int:
        """Channels that stay: the living, and one dead one where constants must be merged."""
        return int((~self.mask).sum()) + int(padded and self.speaking > 0)


def dead_mask(net: Net, n: int, share: float = 0.6) -> np.ndarray:
    mask = np.zeros(n, bool)
    mask[net.rng.permutation(n)[: round(share * n)]] = True
    return mask


def dying(
    net: Net,
    x: str,
    channels: int,
    *,
    folded: bool = False,
    relu: bool = True,
    name: str = "",
    mask: np.ndarray | None = None,
    **attributes: object,
) -> tuple[str, Dead]:
    """A conv whose output is constant on most channels: zero scales in a BatchNorm, or folded into zero filters."""
    mask = dead_mask(net, channels) if mask is None else mask
    beta = net.random(channels, scale=0.3)
    beta = np.where(mask, beta, np.abs(beta))  # the living live
    if folded:
        weight = net.random(channels, net.dims(x)[1], 3, 3, scale=(9 * net.dims(x)[1]) ** -0.5)
        weight[mask] = 0
        y = net.op("Conv", x, weight, beta, name=name or net.unique("conv"), **attributes)
    else:
        y = net.conv(x, channels, bias=False, name=name, **attributes)
        y = net.bn(y, gamma=np.where(mask, 0, net.positive(channels)), beta=beta)
    values = np.where(mask, np.maximum(beta, 0) if relu else beta, np.nan)
    return (net.relu(y) if relu else y), Dead(mask, values)


def living(
    net: Net, x: str, channels: int = 6, kernel: int = 3, *, name: str = "consumer", **attributes: object
) -> str:
    return net.conv(x, channels, kernel, name=name, **attributes)


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


# -- the other direction ---------------------------------------------------------------------------
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_channels_that_nobody_reads(dtype: type, padded: bool) -> None:
    net = Net(dtype=dtype)
    y = net.relu(net.bn(net.conv(net.input(1, 3, 7, 7), 12, name="producer")))
    mask = dead_mask(net, 12)
    weight = net.random(6, 12, 3, 3, scale=0.1)
    weight[:, mask] = 0
    y = net.op("Conv", y, weight, net.random(6), name="consumer", **(PAD if padded else {}))
    exact = check_exact(net.model(net.head(y)))
    assert exact.kept("producer") == int((~mask).sum())
    assert exact.naive < 1e-5


@pytest.mark.parametrize("dtype", TYPES)
def test_chains_die_in_both_directions(dtype: type) -> None:
    """Backwards: what only dead outputs read goes. Forwards: what reads only constants is a constant."""
    net = Net(dtype=dtype)
    x = net.input(1, 3, 9, 9)
    y = net.relu(net.bn(net.conv(x, 12, name="first")))
    # Channels 0-5 of the second layer read 0-5 of the first only, and nobody reads them: both go.
    weight = net.random(12, 12, 3, 3, scale=0.1)
    weight[:6, 6:] = 0
    weight[6:, :6] = 0
    y = net.relu(net.op("Conv", y, weight, net.random(12, scale=0.3), name="second"))
    weight = net.random(8, 12, 3, 3, scale=0.1)
    weight[:, :6] = 0
    y = net.op("Conv", y, weight, net.random(8, scale=0.3), name="third")
    # Channels 0-3 of the third layer die; 0-2 of the fourth read nothing but those: constants.
    gamma = np.where(np.arange(8) < 4, 0, net.positive(8))
    y = net.relu(net.bn(y, gamma=gamma, beta=net.positive(8)))
    weight = net.random(9, 8, 1, 1, scale=0.3)
    weight[:3, 4:] = 0
    y = net.relu(net.op("Conv", y, weight, net.positive(9), name="fourth"))
    exact = check_exact(net.model(net.head(y)))
    assert {name: exact.kept(name) for name in ("first", "second", "third", "fourth")} == {
        "first": 6,
        "second": 6,
        "third": 4,
        "fourth": 6,
    }
    assert exact.naive > 1e-3


def test_a_layer_that_dies_altogether_keeps_one_channel() -> None:
    net = Net()
    y, _ = dying(net, net.input(1, 3, 7, 7), 8, mask=np.ones(8, bool), name="dying")
    beside = net.conv("x", 6, name="beside")
    exact = check_exact(net.model(net.head(net.op("Add", living(net, y, 6, 1), beside))))
    assert exact.kept("dying") == 1


def test_living_nets_lose_nothing() -> None:
    net = Net()
    y = net.relu(net.bn(net.conv(net.input(1, 3, 9, 9), 12)))
    y = net.relu(net.bn(net.conv(y, 10, **PAD)))
    exact = check_exact(net.model(net.head(y)))
    assert all(channels == kept for channels, kept in exact.counts.values())
    assert not exact.edits.operands
    assert not exact.edits.shifts


def test_what_is_constant_on_the_probe_only_stays() -> None:
    """A channel far below zero is dead on the inputs tried, but not by proof."""
    net = Net()
    y = net.bn(net.conv(net.input(1, 3, 7, 7), 10), beta=np.full(10, -50.0))
    y = net.op("Add", net.relu(y), net.conv("x", 10))
    exact = check_exact(net.model(net.head(net.relu(y))))
    assert all(channels == kept for channels, kept in exact.counts.values())


@pytest.mark.parametrize("op", ["Softmax", "LayerNormalization", "ReduceMean"])
def test_dead_channels_under_statistics_stay(op: str) -> None:
    """A mean over channels counts the dead ones too."""
    net = Net()
    y, _ = dying(net, net.input(1, 3, 7, 7), 8, name="dying")
    y = net.op("Transpose", y, perm=[0, 2, 3, 1])
    if op == "LayerNormalization":
        y = net.op(op, y, net.positive(8), net.random(8), axis=-1)
    elif op == "ReduceMean":
        y = net.op("Sub", y, net.op(op, y, axes=[-1]))
    else:
        y = net.op(op, y, axis=-1)
    model = net.model(net.matmul(net.matmul(y, 6), 5))
    for release in (False, True):
        analysis, _ = analysed(model, release=release)
        gone = removable(analysis, Constants(analysis))
        assert not gone[analysis.groups[0].units].any()


def test_zeros_under_a_released_mean_stay() -> None:
    """A dead channel that is zero behind the mean still counts in it: it stays, also when released."""
    net = Net()
    y, dead = dying(net, net.input(1, 3, 7, 7), 12, name="dying")
    y = net.op("Mul", y, net.op("ReduceMean", y, axes=[1]))
    model = net.model(net.head(living(net, y)))
    assert dead.mask.sum() > dead.speaking
    for release in (False, True):
        analysis, _ = analysed(model, release=release)
        assert bool(analysis.released) == release
        assert not removable(analysis, Constants(analysis)).any()


def test_not_a_number_is_no_constant() -> None:
    net = Net()
    y, _ = dying(net, net.input(1, 3, 7, 7), 10, relu=False, name="dying")
    y = net.relu(net.op("Log", y))  # some of the constants are negative: NaN, which no bias can carry
    analysis, _ = analysed(net.model(net.head(living(net, y))))
    known = Constants(analysis)
    line = analysis.probe.lines[net.nodes[2].output[0]][1]
    assert np.isnan(line).any()
    assert not known.flags(net.nodes[2].output[0], 1)[np.isnan(line)].any()


# -- random nets -----------------------------------------------------------------------------------
def random_net(seed: int, dtype: type) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Layers padded or not, most scales zero; the model, and what must be left of each layer."""
    net = Net(seed=seed, dtype=dtype)
    y, layers = net.input(1, 3, 14, 14), []
    for i in range(4):
        padded = bool(net.rng.integers(2))
        y, dead = dying(
            net,
            y,
            int(net.rng.integers(8, 17)),
            folded=bool(net.rng.integers(2)),
            name=f"layer{i}",
            **(PAD if padded else {}),
        )
        layers.append((dead, padded))
        if net.rng.integers(2):
            y = net.op("MaxPool", y, kernel_shape=[2, 2])
    paddings = [padded for _, padded in layers[1:]] + [True]
    left = {f"layer{i}": dead.left(padded) for i, ((dead, _), padded) in enumerate(zip(layers, paddings, strict=True))}
    return net.model(living(net, y, **PAD)), left


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(8))
def test_random_nets(seed: int, dtype: type) -> None:
    model, left = random_net(seed, dtype)
    exact = check_exact(model)
    assert {name: exact.kept(name) for name in left} == left
    assert exact.naive > 1e-3


# -- views of weights ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "build",
    [
        lambda net, y: net.conv(y, 6, group=2, name="sum"),
        lambda net, y: net.conv_transpose(y, 8, group=4, name="sum"),
        lambda net, y: net.conv_transpose(y, 6, name="sum"),
        lambda net, y: net.gemm(net.op("Flatten", y), 6, name="sum"),
        lambda net, y: net.gemm(net.op("Flatten", y), 6, transB=1, name="sum"),
        lambda net, y: net.matmul(net.op("Flatten", y), 6, name="sum"),
    ],
    ids=["conv", "grouped_transpose", "transpose", "gemm", "gemm_transposed", "matmul"],
)
def test_grid_and_back(build: Callable[[Net, str], str]) -> None:
    net = Net()
    y = build(net, net.conv(net.input(1, 3, 6, 6), 8))
    analysis, _ = analysed(net.model(net.op("Identity", y)))
    contraction = next(c for c in analysis.contractions if c.node.name == "sum")
    weight = analysis.value(contraction.node.inputs[1])
    grid = weight_grid(analysis, contraction, weight)
    assert grid.ndim == 4
    assert grid.shape[0] == contraction.groups
    assert grid.shape[0] * grid.shape[2] == len(contraction.labels)
    np.testing.assert_array_equal(write_grid(contraction, grid, weight), weight)
