"""Criteria beyond norms, by hand and by brute force; activations are those of a run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.criteria import CRITERIA, WEIGHTS, Evidence, median
from prune_onnx.graph_ops.criteria.loss import selection
from prune_onnx.graph_ops.criteria.median import mixed_order
from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.importance import importance

from .builder import Net, analysed, run_ort

FILTERS = np.asarray([[0, 0], [1, 0], [0, 1], [4, 4], [0.1, 0]], np.float32)
SUMS = [7.756854, 8.314214, 8.419201, 21.243446, 7.591579]


class OneRun:
    """Taps of a single batch."""

    def __init__(self, model: onnx.ModelProto, x: np.ndarray) -> None:
        self.model, self.x = model, x

    def __call__(self, names: Sequence[str], images: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
        yield from zip(names, run_ort(self.model, {"x": self.x[:images]}, list(names)), strict=True)


def scored(model: onnx.ModelProto, criterion: str, x: np.ndarray, *, scope: str = "layer") -> list[np.ndarray]:
    analysis = analysed(model)[0]
    found = importance(analysis, criterion, scope=scope, taps=OneRun(model, x))
    return [found[group.units] for group in analysis.groups]


def passed_on(net: Net, channels: int, *sizes: int) -> str:
    """A 1 x 1 convolution that gives its input back: the maps of the channels are the input's."""
    weight = np.eye(channels, dtype=np.float32).reshape(channels, channels, *[1] * len(sizes))
    return net.conv(net.input("n", channels, *sizes), channels, weight=weight, bias=False, name="first")


# -- filters ----------------------------------------------------------------------------------------------------------
def filters_net(*others: np.ndarray) -> Analysis:
    net = Net()
    y = net.conv(net.input(1, 2, 4, 4), 5, weight=FILTERS.reshape(5, 2, 1, 1), name="filters")
    for weight in others:
        y = net.op("Add", y, net.conv("x", 5, weight=weight.reshape(5, 2, 1, 1)))
    return analysed(net.model(net.head(y)))[0]


def test_fpgm_is_the_sum_of_distances() -> None:
    analysis = filters_net()
    np.testing.assert_allclose(importance(analysis, "fpgm", scope="layer")[analysis.groups[0].units], SUMS, rtol=1e-6)


def test_fpgm_takes_coupled_filters_for_one_long_filter() -> None:
    rng = np.random.default_rng(0)
    other = rng.standard_normal((5, 2)).astype(np.float32)
    analysis = filters_net(other)
    both = np.concatenate([FILTERS, other], 1)
    expected = np.linalg.norm(both[:, None] - both[None], axis=2).sum(1)
    np.testing.assert_allclose(
        importance(analysis, "fpgm", scope="layer")[analysis.groups[0].units], expected, rtol=1e-5
    )


def test_fpgm_of_near_filters_does_not_cancel() -> None:
    rng = np.random.default_rng(1)
    near = (100 + 1e-3 * rng.standard_normal((6, 4))).astype(np.float32)
    net = Net()
    analysis = analysed(net.model(net.head(net.conv(net.input(1, 4, 3, 3), 6, weight=near.reshape(6, 4, 1, 1)))))[0]
    expected = np.linalg.norm(near.astype(float)[:, None] - near[None], axis=2).sum(1)
    np.testing.assert_allclose(
        importance(analysis, "fpgm", scope="layer")[analysis.groups[0].units], expected, rtol=1e-4
    )


def test_fpgm_mix_goes_by_norm_first_and_then_by_distance_to_what_is_left() -> None:
    distance = np.linalg.norm(FILTERS[:, None] - FILTERS[None], axis=2)
    order = mixed_order(np.linalg.norm(FILTERS, axis=1), distance)
    assert order.tolist() == [0, 1, 2, 4, 3]
    analysis = filters_net()
    found = importance(analysis, "fpgm-mix", scope="layer")[analysis.groups[0].units]
    assert np.argsort(found).tolist() == order.tolist()
    np.testing.assert_allclose(np.sort(found), np.sort(SUMS), rtol=1e-6)


# -- maps -------------------------------------------------------------------------------------------------------------
def test_hrank_is_the_mean_rank_over_the_full_rank() -> None:
    rng = np.random.default_rng(2)
    x = np.stack([_of_rank(rng, rank) for rank in (1, 4, 2, 0, 6, 3)]).reshape(2, 3, 6, 6)
    net = Net()
    model = net.model(net.head(passed_on(net, 3, 6, 6)))
    np.testing.assert_allclose(scored(model, "hrank", x)[0], np.asarray([1 + 0, 4 + 6, 2 + 3]) / 2 / 6)


def _of_rank(rng: np.random.Generator, rank: int) -> np.ndarray:
    return (rng.standard_normal((6, rank)) @ rng.standard_normal((rank, 6))).astype(np.float32)


def test_maps_are_those_in_front_of_pooling_and_flattening() -> None:
    """A 1 x 1 map has rank 1 whatever it holds; the map before the pooling is what counts."""
    rng = np.random.default_rng(3)
    x = np.stack([_of_rank(rng, rank) for rank in (1, 6)])[None]
    net = Net()
    y = passed_on(net, 2, 6, 6)
    flat = net.op("Flatten", net.op("MaxPool", y, kernel_shape=[3, 3], strides=[3, 3]))
    np.testing.assert_allclose(scored(net.model(net.gemm(flat, 4)), "hrank", x)[0], [1 / 6, 1])


def test_apoz_is_the_share_of_zeros() -> None:
    x = np.asarray([[1, 1, 1, 1], [-1, 2, -3, 4], [-1, -1, -1, 1]], np.float32).reshape(1, 3, 2, 2)
    net = Net()
    model = net.model(net.head(net.relu(passed_on(net, 3, 2, 2))))
    np.testing.assert_allclose(scored(model, "apoz", x)[0], [1, 0.5, 0.25])


def test_apoz_says_when_nothing_is_ever_zero() -> None:
    net = Net()
    model = net.model(net.head(net.op("Sigmoid", passed_on(net, 3, 2, 2))))
    with pytest.raises(ConfigError, match="no activation of this model is ever zero"):
        scored(model, "apoz", np.ones((1, 3, 2, 2), np.float32))


# -- readers ----------------------------------------------------------------------------------------------------------
def test_activation_is_the_energy_that_reaches_the_readers() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((7, 3, 5, 5)).astype(np.float32) * np.asarray([1, 3, 0.2], np.float32).reshape(3, 1, 1)
    weight = rng.standard_normal((4, 3, 1, 1)).astype(np.float32)
    net = Net()
    y = net.conv(passed_on(net, 3, 5, 5), 4, weight=weight, name="reader")
    energy = [np.square(weight[:, c, 0, 0][:, None] * x[:, c].reshape(1, -1)).sum() for c in range(3)]
    np.testing.assert_allclose(scored(net.model(net.head(y)), "activation", x)[0], energy / np.sum(energy), rtol=1e-5)


def test_activation_gathers_the_positions_of_a_flattened_map() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((6, 2, 3, 3)).astype(np.float32)
    net = Net()
    model = net.model(net.gemm(net.op("Flatten", passed_on(net, 2, 3, 3)), 4, name="fc"))
    weight = onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == net.nodes[-1].input[1]))
    each = np.square(x.reshape(6, 18)).mean(0) * np.square(weight).sum(1)
    np.testing.assert_allclose(scored(model, "activation", x)[0], each.reshape(2, 9).sum(1) / each.sum(), rtol=1e-5)


def test_nnrelief_of_a_linear_layer_is_the_papers() -> None:
    """X = [[1, 2], [3, -4]], w = (2, -1), b = 0.5: shares .53333 and .4, and .06667 of the bias."""
    net = Net()
    first = net.op("MatMul", net.input("n", 2), np.eye(2, dtype=np.float32), name="first")
    y = net.op("Gemm", first, np.asarray([[2], [-1]], np.float32), np.asarray([0.5], np.float32))
    found = scored(net.model(y), "nnrelief", np.asarray([[1, 2], [3, -4]], np.float32))[0]
    np.testing.assert_allclose(found / 2, [0.53333, 0.4], atol=1e-5)


def test_nnrelief_of_a_convolution_is_the_papers() -> None:
    x = np.asarray([[[1, 0, -1], [2, 1, 0], [0, -2, 1]], [[0, 1, 0], [1, 0, 1], [-1, 0, 2]]], np.float32)[None]
    kernels = np.asarray([[[1, -1], [0, 2]], [[0, 0], [0, -3]]], np.float32)[None]
    net = Net()
    y = net.op("Conv", passed_on(net, 2, 3, 3), kernels, np.asarray([0.5], np.float32))
    found = scored(net.model(y), "nnrelief", x)[0]
    np.testing.assert_allclose(found / 2, [0.516861, 0.420461], atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"pads": [1, 1, 1, 1], "strides": [2, 2]}, {"dilations": [2, 2]}, {"group": 2}], ids=str
)
def test_nnrelief_sees_what_the_convolution_sees(options: dict) -> None:
    """Against the definition: each kernel's own convolution of absolute values, run by ONNX Runtime."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((3, 4, 7, 7)).astype(np.float32)
    group = options.get("group", 1)
    weight = rng.standard_normal((6, 4 // group, 3, 3)).astype(np.float32)
    net = Net()
    model = net.model(net.head(net.conv(passed_on(net, 4, 7, 7), 6, weight=weight, name="reader", **options)))
    bias = onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == net.nodes[1].input[2]))
    signals = np.zeros((6, 4 // group))
    for i in range(4 // group):
        only = np.zeros_like(weight)
        only[:, i] = np.abs(weight[:, i])
        one = Net()
        names = one.op("Conv", one.input("n", 4, 7, 7), only, **{"group": 1, **options})
        y = run_ort(one.model(names), {"x": np.abs(x)}, [names])[0]
        signals[:, i] = np.linalg.norm(y.reshape(3, 6, -1), axis=2).mean(0)
        positions = y[0, 0].size
    shares = signals / (signals.sum(1) + np.abs(bias) * positions**0.5)[:, None]
    expected = shares.reshape(group, 6 // group, -1).mean(1).sum(0) * (4 // group)
    np.testing.assert_allclose(scored(model, "nnrelief", x)[0], expected, rtol=1e-5)


# -- loss -------------------------------------------------------------------------------------------------------------
class Pairs:
    """A loss that is high unless one of each pair of units is left; single units cost their own price."""

    def __init__(self, prices: np.ndarray) -> None:
        self.prices, self.calls = prices, 0

    def __call__(self, keep: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        self.calls += len(candidates)
        losses = []
        for unit in candidates:
            left = keep[: len(self.prices)].copy()
            left[unit] = False
            pairs = left.reshape(-1, 2)
            losses.append(self.prices[~left].sum() + 100 * (~pairs.any(1)).sum())
        return np.asarray(losses)


@pytest.mark.parametrize(("rounds", "again"), [(100, 0), (8, 2)])
def test_loss_takes_what_went_before_into_account(rounds: int, again: int) -> None:
    net = Net()
    analysis = analysed(net.model(net.head(net.conv(net.input(1, 2, 4, 4), 8))))[0]
    units = analysis.groups[0].units
    assert units.tolist() == list(range(8))
    prices = np.asarray([1, 2, 3, 4, 5, 6, 7, 8.0])
    found = selection(Evidence(analysis, loss=Pairs(prices)), rounds, again)[units]
    assert np.argsort(found, kind="stable")[:4].tolist() == [0, 2, 4, 6]
    assert (found <= 1).all()
    assert found[7] == 1


def test_loss_stops_when_enough_is_gone() -> None:
    net = Net()
    analysis = analysed(net.model(net.head(net.conv(net.input(1, 2, 4, 4), 64))))[0]
    units = analysis.groups[0].units
    prices = np.random.default_rng(0).permutation(64) + 1.0
    whole, part = Pairs(prices), Pairs(prices)
    every = selection(Evidence(analysis, loss=whole), 16)[units]
    some = selection(Evidence(analysis, loss=part, enough=lambda keep: keep[units].sum() <= 48), 16)[units]
    assert part.calls < whole.calls
    assert np.argsort(some)[:16].tolist() == np.argsort(every)[:16].tolist()
    assert sorted(some) == sorted(every)


def test_loss_looks_at_few_candidates_again() -> None:
    net = Net()
    analysis = analysed(net.model(net.head(net.conv(net.input(1, 2, 4, 4), 64))))[0]
    quick, exact = Pairs(np.arange(64.0)), Pairs(np.arange(64.0))
    selection(Evidence(analysis, loss=quick), 16)
    selection(Evidence(analysis, loss=exact), 64, 0)
    assert quick.calls < 4 * 64
    assert exact.calls == sum(range(2, 65))


# -- all --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CRITERIA.names())
def test_a_criterion_says_what_it_needs_and_how_it_compares_layers(name: str) -> None:
    chosen = CRITERIA.get(name)
    first, _, rest = chosen.__doc__.partition("\n")
    assert first.endswith((".", ";")), "one line for the list of criteria"
    assert "Global:" in rest
    assert ("--calibration" in first) == (chosen.needs != WEIGHTS)


@pytest.mark.parametrize("name", [n for n in CRITERIA if CRITERIA.get(n).needs != WEIGHTS])
def test_what_looks_at_activations_asks_for_calibration(name: str) -> None:
    with pytest.raises(ConfigError, match=f"criterion '{name}' looks at activations.*--calibration"):
        importance(filters_net(), name)


def test_loss_asks_for_labels() -> None:
    with pytest.raises(ConfigError, match="criterion 'loss' needs labels"):
        importance(filters_net(), "loss", taps=lambda names, images=None: iter(()))


def test_fpgm_takes_long_filters_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    filters = rng.standard_normal((6, 5, 3, 3)).astype(np.float32)
    net = Net()
    analysis = analysed(net.model(net.head(net.conv(net.input(1, 5, 6, 6), 6, weight=filters))))[0]
    whole = importance(analysis, "fpgm")
    monkeypatch.setattr(median, "AT_ONCE", 24)
    np.testing.assert_allclose(importance(analysis, "fpgm"), whole, rtol=1e-6)
