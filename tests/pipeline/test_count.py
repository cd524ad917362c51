"""Parameters and MACs of a model in memory."""

from __future__ import annotations

import onnx
import pytest

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.pipeline.count import count

from ..graph_ops.builder import Net


def costs(model: onnx.ModelProto, *options: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    found = count(model, *options)
    return found.params, found.macs


def test_by_hand() -> None:
    net = Net()
    y = net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 6, pads=[1, 1, 1, 1])))
    assert costs(net.model(net.head(y))) == (6 * 27 + 6 + 24 + 30 + 5, 64 * 6 * 27 + 30)


def test_dynamic_sizes_can_be_chosen() -> None:
    net = Net()
    model = net.model(net.head(net.conv(net.input("N", 3, "H", "W"), 6, pads=[1, 1, 1, 1])))
    assert costs(model, {"x": (1, 3, 10, 12)}) == (6 * 27 + 6 + 35, 120 * 6 * 27 + 30)
    assert costs(model)[1] == 64 * 64 * 6 * 27 + 30
    with pytest.raises(ConfigError, match="no input 'y'"):
        count(model, {"y": (1, 3, 10, 12)})


def test_depthwise_costs_its_groups_only() -> None:
    net = Net()
    y = net.conv(net.input(1, 8, 6, 6), 8, group=8, bias=False)
    assert costs(net.model(net.relu(y))) == (72, 16 * 72)
