"""Criteria that look at a running network: taps, the loss of the masked network, and the whole stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops.analysis import analyse
from prune_onnx.graph_ops.criteria import CRITERIA, Evidence
from prune_onnx.graph_ops.criteria.loss import selection
from prune_onnx.graph_ops.errors import ConfigError, DataError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.importance import importance
from prune_onnx.graph_ops.masked import masked_reference
from prune_onnx.pipeline.masking import MaskedLoss
from prune_onnx.pipeline.probing import probe
from prune_onnx.pipeline.runner import Runner
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.pipeline.taps import Taps

from ..graph_ops.builder import Net
from .test_posttraining import images, residual_net


def small_net() -> onnx.ModelProto:
    net = Net()
    x = net.relu(net.conv(net.input("n", 3, 8, 8), 4, pads=[1, 1, 1, 1]))
    y = net.relu(net.conv(x, 3, pads=[1, 1, 1, 1]))
    x = net.relu(net.op("Add", net.conv(y, 4, 1), x))
    return net.model(net.head(x, 4))


@pytest.fixture(scope="module")
def setting():
    graph = Graph(small_net())
    analysis = analyse(graph, probe(graph)[0])
    x, labels = images(48), np.random.default_rng(0).integers(0, 4, 48)
    return analysis, [{"x": x[:32]}, {"x": x[32:]}], [labels[:32], labels[32:]]


# -- taps -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [1, 40_000, 2**28])
def test_taps_show_every_tensor_of_every_input_whatever_the_limit(setting, limit) -> None:
    analysis, chunks, _ = setting
    names = [n.outputs[0] for n in analysis.graph.nodes if n.op_type in ("Conv", "Relu")]
    found: dict[str, list[np.ndarray]] = {}
    largest = 0
    for name, value in Taps(analysis.graph, analysis.probe, chunks, limit=limit)(names):
        found.setdefault(name, []).append(value)
        largest = max(largest, value.nbytes)
    runner = Runner(analysis.graph.model, expose=names)
    for name in names:
        expected = np.concatenate([runner.run([name], chunk)[0] for chunk in chunks])
        np.testing.assert_allclose(np.concatenate(found[name]), expected, atol=1e-6)
    one = max(np.prod(analysis.probe.shapes[name]) * 4 for name in names)
    assert largest <= max(limit, one)


def test_taps_of_a_fixed_batch_take_the_tensors_in_turns() -> None:
    graph = Graph(residual_net(dynamic=False))
    chunks = [{"x": images(8)[i : i + 4]} for i in (0, 4)]
    names = [n.outputs[0] for n in graph.nodes if n.op_type == "Conv"]
    seen = [(name, len(value)) for name, value in Taps(graph, probe(graph)[0], chunks, limit=1)(names)]
    assert seen == [(name, 4) for name in names] * 2


def test_taps_stop_at_the_number_of_images(setting) -> None:
    analysis, chunks, _ = setting
    name = analysis.graph.nodes[0].outputs[0]
    assert sum(len(v) for _, v in Taps(analysis.graph, analysis.probe, chunks, limit=8192)([name], images=10)) < 20


# -- loss -------------------------------------------------------------------------------------------------------------
def cross_entropy(analysis, keep, chunks, labels) -> float:
    runner = Runner(masked_reference(analysis, keep))
    z = np.concatenate([runner.run(None, chunk)[0] for chunk in chunks]).astype(np.float64)
    return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), np.concatenate(labels)]).mean())


def test_masked_loss_is_that_of_the_masked_reference(setting) -> None:
    analysis, chunks, labels = setting
    free = np.flatnonzero(~analysis.pinned)
    keep = np.ones(analysis.units, bool)
    keep[free[1]] = False
    candidates = np.delete(free, 1)[::-1]
    found = MaskedLoss(analysis, chunks, labels)(keep, candidates)
    for unit, value in zip(candidates, found, strict=True):
        without = keep.copy()
        without[unit] = False
        assert value == pytest.approx(cross_entropy(analysis, without, chunks, labels), rel=1e-5)


def test_backward_selection_is_algorithm_1(setting) -> None:
    analysis, chunks, labels = setting
    found = selection(Evidence(analysis, loss=MaskedLoss(analysis, chunks, labels)), 10**6, 0)
    keep = np.ones(analysis.units, bool)
    order = []
    for _ in range(4):
        losses = {}
        for unit in np.flatnonzero(keep & ~analysis.pinned):
            group = analysis.groups[analysis.group_of[unit]].units
            if keep[group].sum() > 1:
                without = keep.copy()
                without[unit] = False
                losses[unit] = cross_entropy(analysis, without, chunks, labels)
        best = min(losses, key=losses.get)
        keep[best] = False
        order.append(best)
    assert np.argsort(np.where(np.isnan(found), 2, found), kind="stable")[:4].tolist() == order


def test_loss_of_chances_is_that_of_logits(setting) -> None:
    analysis, chunks, labels = setting
    net = small_net()
    net.graph.node.append(onnx.helper.make_node("Softmax", [net.graph.output[0].name], ["chances"], axis=1))
    net.graph.output[0].name = "chances"
    graph = Graph(net)
    other = analyse(graph, probe(graph)[0])
    every = np.ones(analysis.units, bool)
    units = np.flatnonzero(~analysis.pinned)[:3]
    np.testing.assert_allclose(
        MaskedLoss(other, chunks, labels)(every, units), MaskedLoss(analysis, chunks, labels)(every, units), rtol=1e-4
    )


def test_loss_refuses_labels_beyond_the_classes_and_outputs_that_are_no_scores(setting) -> None:
    analysis, chunks, labels = setting
    every, units = np.ones(analysis.units, bool), np.flatnonzero(~analysis.pinned)[:1]
    with pytest.raises(DataError, match="label 9; the model has 4 classes"):
        MaskedLoss(analysis, chunks, [np.full(32, 9), np.full(16, 9)])(every, units)
    net = Net()
    y = net.conv(net.relu(net.conv(net.input("n", 3, 8, 8), 4)), 4)
    graph = Graph(net.model(y))
    maps = analyse(graph, probe(graph)[0])
    with pytest.raises(ConfigError, match="needs class scores"):
        MaskedLoss(maps, chunks, labels)(np.ones(maps.units, bool), np.flatnonzero(~maps.pinned)[:1])


# -- the stage --------------------------------------------------------------------------------------------------------
def run(tmp_path: Path, *, labels: bool = True, model: onnx.ModelProto | None = None, **options):
    onnx.save(model or residual_net(bn=True), tmp_path / "in.onnx")
    arrays = {"x": images(64)} | ({"y": np.arange(64) % 5} if labels else {})
    np.savez(tmp_path / "data.npz", **arrays)
    given = {"input": tmp_path / "in.onnx", "output": tmp_path / "out.onnx", "calibration": str(tmp_path / "data.npz"),
             "keep_macs": 0.5, "align": 1, **options}  # fmt: skip
    return slim(SlimConfig(**given))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("criterion", CRITERIA.names())
def test_every_criterion_meets_the_budget(tmp_path, criterion, scope) -> None:
    result = run(tmp_path, criterion=criterion, scope=scope, compensate="none")
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.criterion == criterion
    if scope == "layer" and criterion != "obs":
        shares = [g.kept / g.channels for g in result.groups if g.kept < g.channels]
        assert max(shares) - min(shares) < 0.25
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)


@pytest.mark.parametrize("criterion", [n for n in CRITERIA if CRITERIA.get(n).needs != "weights"])
def test_without_calibration_it_is_one_clear_error(tmp_path, criterion) -> None:
    onnx.save(residual_net(), tmp_path / "in.onnx")
    options = {"input": tmp_path / "in.onnx", "output": tmp_path / "out.onnx", "criterion": criterion, "keep_macs": 0.5}
    with pytest.raises((ConfigError, ValueError), match="calibration"):
        slim(SlimConfig(**options))
    assert not (tmp_path / "out.onnx").exists()


def test_loss_without_labels_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="needs labels"):
        run(tmp_path, labels=False, criterion="loss")
    assert not (tmp_path / "out.onnx").exists()


def test_compensation_follows_every_criterion(tmp_path) -> None:
    result = run(tmp_path, criterion="activation")
    assert any("without compensation" in note for note in result.notes)


def test_bn_gamma_works_where_calibration_folds_the_norms(tmp_path) -> None:
    model = residual_net(bn=True)
    result = run(tmp_path, model=model, criterion="bn-gamma", compensate="none", keep_macs=0.8)
    assert result.criterion == "bn-gamma"
    assert result.after.macs <= 0.8 * result.before.macs


def test_coupled_channels_score_as_one(setting) -> None:
    analysis, chunks, labels = setting
    for name in [n for n in CRITERIA if n not in ("obs", "bn-gamma")]:
        found = importance(
            analysis, name, taps=Taps(analysis.graph, analysis.probe, chunks), loss=MaskedLoss(analysis, chunks, labels)
        )
        assert found.shape == (analysis.units,)
        stream = analysis.groups[0]
        assert len(stream.nodes) == 2
        assert np.isfinite(found[stream.units]).all(), name
