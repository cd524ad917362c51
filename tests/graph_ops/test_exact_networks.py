"""Exact removal in whole networks: in both directions, and what must not be taken for a constant."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops.constants import Constants
from prune_onnx.graph_ops.exact import removable, weight_grid, write_grid

from .builder import Net, analysed
from .dying import PAD, TYPES, check_exact, dead_mask, dying, living


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
