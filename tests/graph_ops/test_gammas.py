"""BatchNorm scales that outlive folding and cutting."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops import gammas
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.fold import fold_batch_norm
from prune_onnx.graph_ops.importance import importance

from .builder import Net, analysed


def net_with_bn() -> onnx.ModelProto:
    net = Net()
    y = net.relu(net.bn(net.conv(net.input(1, 3, 6, 6), 8, pads=[1, 1, 1, 1])))
    return net.model(net.head(net.relu(net.bn(net.conv(y, 6)))))


def scores(model: onnx.ModelProto) -> list[np.ndarray]:
    analysis = analysed(model)[0]
    found = importance(analysis, "bn-gamma")
    return [found[group.units] for group in analysis.groups]


def test_a_folded_graph_ranks_as_the_graph_with_bn_does() -> None:
    model = net_with_bn()
    folded = fold_batch_norm(model)[0]
    for before, after in zip(scores(model), scores(folded), strict=True):
        np.testing.assert_array_equal(before, after)


def test_another_programs_folding_leaves_what_was_noted_at_export() -> None:
    model = net_with_bn()
    gammas.keep_present(model)
    expected = scores(model)
    folded = fold_batch_norm(model)[0]
    assert gammas.read(folded).keys() == gammas.read(model).keys()
    noted = next(prop for prop in model.metadata_props if prop.key == gammas.KEY)
    next(prop for prop in folded.metadata_props if prop.key == gammas.KEY).value = noted.value
    for before, after in zip(expected, scores(folded), strict=True):
        np.testing.assert_array_equal(before, after)


def test_scales_in_the_graph_count_once() -> None:
    model = net_with_bn()
    before = scores(model)
    gammas.keep_present(model)
    for one, two in zip(before, scores(model), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_cut_takes_the_scales_of_what_it_removes() -> None:
    folded = fold_batch_norm(net_with_bn())[0]
    analysis = analysed(folded)[0]
    keep = np.ones(analysis.units, bool)
    gone = analysis.groups[0].units[[1, 4]]
    keep[gone] = False
    before, after = scores(folded), scores(cut(analysis, keep))
    np.testing.assert_array_equal(after[0], np.delete(before[0], [1, 4]))
    np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"conv0_out": "?"}', '{"conv0_out": 3}'])
def test_an_entry_that_cannot_be_read_is_no_entry(text: str) -> None:
    model = net_with_bn()
    folded = fold_batch_norm(model)[0]
    next(prop for prop in folded.metadata_props if prop.key == gammas.KEY).value = text
    assert gammas.read(folded) == {}
    with pytest.raises(ConfigError, match="nor scales in its metadata"):
        scores(folded)


def test_scales_of_another_width_are_not_used() -> None:
    folded = fold_batch_norm(net_with_bn())[0]
    gammas.write(folded, {tensor: scale[:-1] for tensor, scale in gammas.read(folded).items()})
    with pytest.raises(ConfigError, match="bn-gamma"):
        scores(folded)
