"""Criteria by hand on tiny weights."""

from __future__ import annotations

import numpy as np
import pytest

from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.importance import CRITERIA, importance

from .builder import Net, analysed


def analysis_of(net: Net, *outputs: str) -> Analysis:
    return analysed(net.model(*outputs))[0]


def scores(analysis: Analysis, criterion: str, group: int = 0, scope: str = "layer") -> np.ndarray:
    return importance(analysis, criterion, scope=scope)[analysis.groups[group].units]


def relative(values: object) -> np.ndarray:
    """Values divided by their mean."""
    values = np.asarray(values, float)
    return values / values.mean()


def tiny() -> tuple[Net, str]:
    """Three 1 x 1 filters on two channels: (3, -4), (0, 1), (2, 2)."""
    net = Net()
    weight = np.asarray([[3, -4], [0, 1], [2, 2]], np.float32).reshape(3, 2, 1, 1)
    return net, net.conv(net.input(1, 2, 4, 4), 3, weight=weight, name="tiny")


def test_l1_and_l2() -> None:
    net, y = tiny()
    analysis = analysis_of(net, net.head(y))
    np.testing.assert_allclose(scores(analysis, "l1"), relative([7, 1, 4]))
    np.testing.assert_allclose(scores(analysis, "l2"), relative([5, 1, 8**0.5]))


def test_a_group_gathers_all_its_producers() -> None:
    """Coupled channels are scored together: the mean of what each layer says, relative to the layer's own mean."""
    net, y = tiny()
    other = net.conv("x", 3, weight=np.asarray([[1, 0], [0, 5], [1, -1]], np.float32).reshape(3, 2, 1, 1), name="other")
    analysis = analysis_of(net, net.head(net.op("Add", y, other)))
    assert analysis.groups[0].nodes == ("tiny", "other")
    np.testing.assert_allclose(scores(analysis, "l1"), (relative([7, 1, 4]) + relative([1, 5, 2])) / 2)
    both = relative([5, 1, 8**0.5]) + relative([1, 5, 2**0.5])
    np.testing.assert_allclose(scores(analysis, "l2"), both / 2, rtol=1e-6)


def test_units_with_many_members_are_not_favoured() -> None:
    """Half of a stream is added to once more: its channels must not all outlive those of the other half."""
    net = Net()
    x = net.input(1, 2, 8, 8)
    left, right = net.conv(x, 32, name="left"), net.conv(x, 32, name="right")
    left = net.op("Add", left, net.conv(x, 32, name="again"))
    analysis = analysis_of(
        net, net.head(net.conv(net.op("Add", net.op("Concat", left, right, axis=1), net.conv(x, 64, name="whole")), 5))
    )
    (group,) = [g for g in analysis.groups if "whole" in g.nodes]
    assert len(group.units) == 64
    score = importance(analysis, "l2", scope="layer")
    whole = next(p.labels for p in analysis.producers if p.node.name == "whole")
    kept = np.argsort(-score[whole])[:32] < 32
    assert 8 <= kept.sum() <= 24


def test_transposed_grouped_and_gemm_weights() -> None:
    """Output channels lie on another axis in a transposed convolution; position j of all its groups is one unit."""
    net = Net()
    y = net.conv(net.input(1, 3, 4, 4), 4, 1)
    y = net.op(
        "ConvTranspose",
        y,
        np.asarray([[1, 2], [3, 4], [5, 6], [7, -8]], np.float32).reshape(4, 2, 1, 1),
        group=2,
        name="transposed",
    )
    analysis = analysis_of(
        net, net.gemm(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", y)), 3, transB=1, name="fc"), 2)
    )
    names = [g.name for g in analysis.groups]
    group = names.index("transposed")
    assert len(analysis.groups[group].units) == 2
    np.testing.assert_allclose(scores(analysis, "l1", group), relative([1 + 3 + 5 + 7, 2 + 4 + 6 + 8]))
    fc = analysis.value(net.nodes[-2].input[1])
    expected = relative(np.sqrt(np.square(fc).sum(1)))
    np.testing.assert_allclose(scores(analysis, "l2", names.index("fc")), expected, rtol=1e-6)


def test_fan_out_units_are_channels() -> None:
    """A channel that feeds nine columns of a matrix is one unit, scored by the filter that makes it."""
    net, y = tiny()
    analysis = analysis_of(net, net.gemm(net.op("Flatten", y), 2))
    np.testing.assert_allclose(scores(analysis, "l1"), relative([7, 1, 4]))


def test_bn_gamma() -> None:
    net, y = tiny()
    y = net.bn(y, gamma=np.asarray([0.5, -2.0, 0.0]))
    analysis = analysis_of(net, net.head(y))
    np.testing.assert_allclose(scores(analysis, "bn-gamma"), [0.5, 2.0, 0.0])


def test_bn_gamma_of_coupled_layers_adds_up() -> None:
    net, y = tiny()
    y = net.bn(y, gamma=np.asarray([0.5, -2.0, 0.0]))
    other = net.bn(net.conv("x", 3, 1), gamma=np.asarray([0.25, 1.0, -3.0]))
    analysis = analysis_of(net, net.head(net.op("Add", y, other)))
    np.testing.assert_allclose(scores(analysis, "bn-gamma"), [0.75, 3.0, 3.0])


def test_bn_gamma_says_nothing_about_layers_without_one() -> None:
    net, y = tiny()
    y = net.conv(net.bn(y), 4, 1, name="bare")
    analysis = analysis_of(net, net.head(y))
    assert np.isnan(scores(analysis, "bn-gamma", [g.name for g in analysis.groups].index("bare"))).all()


def test_bn_gamma_needs_batch_norm() -> None:
    net, y = tiny()
    with pytest.raises(ConfigError, match="needs BatchNormalization nodes"):
        importance(analysis_of(net, net.head(y)), "bn-gamma")


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_global_scores_are_relative_to_their_group(criterion: str) -> None:
    """A layer whose weights are a hundred times as large is not a hundred times as important."""
    net = Net()
    y = net.conv(net.input(1, 2, 6, 6), 4, weight=net.random(4, 2, 1, 1))
    y = net.conv(y, 4, weight=100 * net.random(4, 4, 1, 1))
    analysis = analysis_of(net, net.head(y))
    for group in (0, 1):
        ranked = scores(analysis, criterion, group, scope="global")
        assert ranked.mean() == pytest.approx(1.0)
        raw = scores(analysis, criterion, group)
        np.testing.assert_allclose(ranked, raw / raw.mean())


def test_comparable_scores_stay_as_they_are() -> None:
    net, y = tiny()
    analysis = analysis_of(net, net.head(net.bn(y, gamma=np.asarray([0.5, -2.0, 0.0]))))
    np.testing.assert_allclose(scores(analysis, "bn-gamma", scope="global"), [0.5, 2.0, 0.0])


def test_random_follows_the_seed() -> None:
    net, y = tiny()
    analysis = analysis_of(net, net.head(y))
    one, two, other = (importance(analysis, "random", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).all()
    assert ((one >= 0) & (one < 1)).all()


def test_unknown_criterion_names_the_closest() -> None:
    net, y = tiny()
    with pytest.raises(ConfigError, match=r"unknown criterion 'bn-gama'.*'bn-gamma'"):
        importance(analysis_of(net, net.head(y)), "bn-gama")


def test_every_criterion_says_what_it_is() -> None:
    for name in CRITERIA:
        assert len(CRITERIA.get(name).__doc__ or "") > 10
