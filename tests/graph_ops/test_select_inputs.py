"""Per-consumer pruning of shared tensors: pre-activation and dense nets."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from prune_onnx.graph_ops.plan import Budget, Planner
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig

from .builder import Net, analysed, check_cut


def gammas(net: Net, n: int, dead: int) -> np.ndarray:
    """Scales of which the first ``dead`` of a random order are zero."""
    values = net.positive(n)
    values[net.rng.permutation(n)[:dead]] = 0
    return values


def preactivation(net: Net, dead: int = 3, *, positive: bool = False) -> onnx.ModelProto:
    """A stem and three pre-activation blocks (BN, ReLU, 1x1, BN, ReLU, 1x1, add); every BN has ``dead`` zero scales."""
    x = net.conv(net.input(1, 3, 6, 6), 8, pads=[1, 1, 1, 1], bias=False, name="stem")
    for i in range(3):
        beta = np.abs(net.random(8)) if positive else -np.abs(net.random(8))
        y = net.relu(net.bn(x, gamma=gammas(net, 8, dead), beta=beta))
        y = net.conv(y, 6, 1, bias=False, name=f"block{i}.conv1")
        y = net.relu(net.bn(y, gamma=gammas(net, 6, dead), beta=net.random(6)))
        x = net.op("Add", x, net.conv(y, 8, 1, bias=False, name=f"block{i}.conv2"))
    return net.model(net.head(net.relu(net.bn(x, gamma=gammas(net, 8, dead)))))


def dense(net: Net, dead: int) -> onnx.ModelProto:
    """A dense block of three layers that each append four channels."""
    x = net.conv(net.input(1, 3, 6, 6), 6, pads=[1, 1, 1, 1], bias=False, name="stem")
    for i in range(3):
        n = net.dims(x)[1]
        y = net.relu(net.bn(x, gamma=gammas(net, n, dead), beta=-np.abs(net.random(n))))
        x = net.op("Concat", x, net.conv(y, 4, pads=[1, 1, 1, 1], bias=False, name=f"layer{i}"), axis=1)
    n = net.dims(x)[1]
    return net.model(net.head(net.relu(net.bn(x, gamma=gammas(net, n, dead), beta=-np.abs(net.random(n))))))


def widths(model: onnx.ModelProto) -> list[int]:
    """Channels of every BatchNormalization."""
    stored = {t.name: t for t in model.graph.initializer}
    return [stored[n.input[1]].dims[0] for n in model.graph.node if n.op_type == "BatchNormalization"]


def run_slim(model: onnx.ModelProto, tmp_path, **options: object) -> tuple[object, onnx.ModelProto]:
    onnx.save(model, tmp_path / "in.onnx")
    result = slim(SlimConfig(input=tmp_path / "in.onnx", output=tmp_path / "out.onnx", select_inputs=True, **options))
    return result, onnx.load(tmp_path / "out.onnx")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [preactivation, dense], ids=["pre-activation", "dense"])
def test_random_selection_equals_masking(make, seed):
    check_cut(make(Net(seed=seed), 0), seed=seed, select=True)


@pytest.mark.parametrize("positive", [False, True], ids=["zero constants", "live constants"])
def test_every_zero_scale_of_a_preactivation_net_goes(tmp_path, positive):
    # All convolutions are unpadded 1x1, so every constant can be absorbed and none has to stay for merging.
    result, smaller = run_slim(preactivation(Net(), positive=positive), tmp_path)
    assert result.verification.reference == "original"
    assert widths(smaller) == [5, 3] * 3 + [5]
    assert sum(n.op_type == "Gather" for n in smaller.graph.node) == 4


def test_without_selection_the_stream_stays_whole(tmp_path):
    onnx.save(preactivation(Net()), tmp_path / "in.onnx")
    slim(SlimConfig(input=tmp_path / "in.onnx", output=tmp_path / "out.onnx"))
    assert widths(onnx.load(tmp_path / "out.onnx")) == [8, 3] * 3 + [8]


def test_every_zero_scale_of_a_dense_net_goes(tmp_path):
    model = dense(Net(), 3)
    before = widths(model)
    _, smaller = run_slim(model, tmp_path)
    assert widths(smaller) == [n - 3 for n in before]


def test_producer_goes_when_every_reader_dropped_it(tmp_path):
    net = Net(seed=3)
    model = dense(net, 0)
    # Channel 2 of the stem is dead in every BatchNormalization that sees the concatenation.
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            for i, value in ((1, 0.0), (2, -1.0)):
                tensor = next(t for t in model.graph.initializer if t.name == node.input[i])
                array = numpy_helper.to_array(tensor).copy()
                array[2] = value
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    _, smaller = run_slim(model, tmp_path)
    stem = next(n for n in smaller.graph.node if n.name == "stem")
    assert next(t for t in smaller.graph.initializer if t.name == stem.input[1]).dims[0] == 5
    # What everybody keeps needs no Gather.
    assert not any(n.op_type == "Gather" for n in smaller.graph.node)


def test_selecting_again_composes_gathers(tmp_path):
    _, once = run_slim(preactivation(Net()), tmp_path)
    assert any(n.op_type == "Gather" for n in once.graph.node)
    result = check_cut(once, select=True, predict=())
    depth = {}
    for node in result.model.graph.node:
        depth[node.output[0]] = 1 + depth.get(node.input[0], 0) if node.op_type == "Gather" else 0
    assert max(depth.values()) == 1, "a Gather of a Gather"


def test_plan_keeps_what_any_reader_keeps():
    analysis, _ = analysed(preactivation(Net(), 0), select=True)
    scores = np.random.default_rng(0).random(analysis.units)
    keep = Planner(analysis, scores, np.ones(analysis.units, bool), Budget("keep_channels", 0.6, align=1)).solve()
    for fork in analysis.forks:
        assert keep[fork.source[keep[fork.labels]]].all()
