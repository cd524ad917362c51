"""Bias correction and new statistics, against what the cut network really computes on the calibration inputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from prune_onnx.graph_ops.analysis import Analysis, analyse
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.exact import Edits
from prune_onnx.graph_ops.fold import fold_batch_norm
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.pipeline import posttraining
from prune_onnx.pipeline.compensate import correct_means, match_statistics
from prune_onnx.pipeline.probing import probe
from prune_onnx.pipeline.runner import Runner
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig

from ..graph_ops.builder import Net
from .test_posttraining import images, residual_net


def plain() -> onnx.ModelProto:
    return fold_batch_norm(residual_net(bn=True))[0]


def kinds_of_layers() -> onnx.ModelProto:
    """Padding, stride, groups, a depthwise and a transposed convolution, layers without bias, Gemm and MatMul."""
    net = Net()
    x = net.relu(net.conv(net.input("n", 3, 8, 8), 12, pads=[1, 1, 1, 1], bias=False))
    x = net.relu(net.conv(x, 12, group=2, pads=[1, 1, 1, 1], strides=[2, 2]))
    x = net.relu(net.conv(x, 12, group=12, pads=[1, 1, 1, 1], bias=False))
    x = net.relu(net.conv_transpose(x, 8, 2, strides=[2, 2], bias=False))
    x = net.relu(net.conv_transpose(x, 6, 2, group=2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[3, 3])
    x = net.relu(net.gemm(net.op("Flatten", x), 10, transB=1))
    x = net.relu(net.matmul(x, 7))
    return net.model(net.gemm(x, 4, bias=False))


def shared_weights() -> onnx.ModelProto:
    """Two layers in a row with one weight and one bias between them, as exporters merge equal initializers."""
    net = Net()
    x = net.relu(net.conv(net.input("n", 3, 8, 8), 6, pads=[1, 1, 1, 1]))
    weight, bias = net.const(net.random(6, 6, 3, 3, scale=0.2)), net.const(net.random(6))
    for _ in range(2):
        x = net.relu(net.op("Conv", x, weight, bias, pads=[1, 1, 1, 1]))
    return net.model(net.head(x))


def prepared(model: onnx.ModelProto, seed: int = 0) -> tuple[Analysis, np.ndarray, list[dict[str, np.ndarray]]]:
    """Analysis, a random half of the units, and calibration inputs in two batches of different sizes."""
    graph = Graph(model)
    analysis = analyse(graph, probe(graph)[0])
    rng = np.random.default_rng(seed)
    keep = np.ones(analysis.units, bool)
    for group in analysis.groups:
        free = group.units[~analysis.pinned[group.units]]
        keep[rng.permutation(free)[: len(free) // 2]] = False
    assert not keep.all()
    x = images(40)
    return analysis, keep, [{"x": x[:24]}, {"x": x[24:]}]


def moments(model: onnx.ModelProto, name: str, axis: int, chunks: list) -> tuple[np.ndarray, np.ndarray]:
    runner = Runner(model, expose=[name])
    y = np.concatenate([runner.run([name], chunk)[0] for chunk in chunks]).astype(np.float64)
    rows = np.moveaxis(y, axis, 0).reshape(y.shape[axis], -1)
    return rows.mean(1), rows.var(1)


def outputs_of(analysis: Analysis, *ops: str) -> list[tuple[str, int]]:
    """Outputs of the layers, and the axis of their channels."""
    return [
        (n.outputs[0], len(analysis.probe.shapes[n.outputs[0]]) - 1 if n.op_type == "MatMul" else 1)
        for n in analysis.graph.nodes
        if n.op_type in ops
    ]


def left(analysis: Analysis, keep: np.ndarray, name: str, axis: int) -> np.ndarray:
    vector = analysis.axes.get(name, {}).get(axis)
    return np.ones(analysis.probe.shapes[name][axis], bool) if vector is None else keep[vector]


@pytest.mark.parametrize("build", [plain, kinds_of_layers, shared_weights])
@pytest.mark.parametrize("seed", [0, 1])
def test_bias_keeps_the_mean_of_every_layer(build, seed) -> None:
    analysis, keep, chunks = prepared(build(), seed)
    edits = correct_means(analysis, keep, chunks)
    small = cut(analysis, keep, edits)
    compared = 0
    for name, axis in outputs_of(analysis, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        mean, var = moments(analysis.graph.model, name, axis, chunks)
        kept = left(analysis, keep, name, axis)
        got = moments(small, name, axis, chunks)[0]
        np.testing.assert_allclose(got, mean[kept], atol=2e-5 * max(1.0, np.sqrt(var.max())), err_msg=name)
        compared += 1
    assert compared >= 3
    bare = cut(analysis, keep)
    name, axis = outputs_of(analysis, "Gemm", "Conv")[-1]
    wrong = (
        moments(bare, name, axis, chunks)[0]
        - moments(analysis.graph.model, name, axis, chunks)[0][left(analysis, keep, name, axis)]
    )
    assert np.abs(wrong).max() > 0.01, "there was nothing to correct"


def test_bias_of_a_single_layer_is_what_the_removed_channels_contributed() -> None:
    net = Net()
    x = net.relu(net.conv(net.input("n", 3, 8, 8), 8))
    y = net.conv(x, 4, 1, name="reader")
    analysis, keep, chunks = prepared(net.model(y))
    reader = next(n for n in analysis.graph.nodes if n.name == "reader")
    mean = moments(analysis.graph.model, x, 1, chunks)[0]
    gone = ~left(analysis, keep, x, 1)
    weight, bias = (analysis.value(reader.inputs[i]).astype(np.float64) for i in (1, 2))
    edits = correct_means(analysis, keep, chunks)
    assert set(edits.operands) == {(reader.index, 2)}
    np.testing.assert_allclose(edits.operands[reader.index, 2], bias + weight[:, gone, 0, 0] @ mean[gone], atol=1e-5)


def test_layers_that_no_removed_channel_reaches_are_left_alone() -> None:
    analysis, keep, chunks = prepared(plain())
    assert not correct_means(analysis, np.ones(analysis.units, bool), chunks).operands
    first = analysis.graph.nodes[0]
    assert (first.index, 2) not in correct_means(analysis, keep, chunks).operands


@pytest.mark.parametrize("seed", [0, 1])
def test_norms_get_the_statistics_of_the_cut_network(seed) -> None:
    analysis, keep, chunks = prepared(residual_net(bn=True), seed)
    small = cut(analysis, keep, match_statistics(analysis, keep, chunks))
    graph = Graph(small)
    norms = [n for n in graph.nodes if n.op_type == "BatchNormalization"]
    assert len(norms) == 5
    for norm in norms[1:]:
        mean, var = moments(small, norm.inputs[0], 1, chunks)
        np.testing.assert_allclose(graph.constant(norm.inputs[3]), mean, atol=1e-4)
        np.testing.assert_allclose(graph.constant(norm.inputs[4]), var, rtol=1e-3)


@pytest.mark.parametrize("build", [plain, kinds_of_layers, shared_weights])
def test_folded_layers_get_the_dense_means_and_variances(build) -> None:
    analysis, keep, chunks = prepared(build())
    small = cut(analysis, keep, match_statistics(analysis, keep, chunks))
    names = outputs_of(analysis, "Conv", "ConvTranspose")
    assert len(names) >= 3
    for name, axis in names:
        kept = left(analysis, keep, name, axis)
        mean, var = (m[kept] for m in moments(analysis.graph.model, name, axis, chunks))
        got, spread = moments(small, name, axis, chunks)
        np.testing.assert_allclose(got, mean, atol=1e-3 * np.sqrt(var.max()), err_msg=name)
        np.testing.assert_allclose(spread, var, rtol=5e-3, err_msg=name)


def calibrated(tmp_path, model: onnx.ModelProto, **options):
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=images(96))
    given = {"input": tmp_path / "in.onnx", "output": tmp_path / "out.onnx", "calibration": str(tmp_path / "data.npz"),
             "keep_macs": 0.6, "align": 1, **options}  # fmt: skip
    return slim(SlimConfig(**given))


def divergence_of(result) -> tuple[float, float]:
    note = next(note for note in result.notes if "without compensation" in note)
    words = note.replace(",", "").split()
    return float(words[words.index("without") - 1]), float(words[words.index("with") - 1])


@pytest.mark.parametrize("criterion", ["obs", "l2"])
@pytest.mark.parametrize("compensate", ["bias", "bn"])
def test_stage_compensates_and_says_what_it_brought(tmp_path, compensate, criterion) -> None:
    result = calibrated(tmp_path, residual_net(bn=True), compensate=compensate, criterion=criterion)
    assert result.after.macs <= 0.6 * result.before.macs
    assert result.verification.passed
    without, with_it = divergence_of(result)
    left_out = any("left out" in note for note in result.notes)
    assert left_out == (with_it > without)
    kept = [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node].count("BatchNormalization")
    assert kept == (5 if compensate == "bn" else 0)


def test_norms_can_be_folded_after_their_statistics_are_new(tmp_path) -> None:
    calibrated(tmp_path, residual_net(bn=True), compensate="bn", fold_bn=True)
    assert "BatchNormalization" not in [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]


@pytest.mark.parametrize("compensate", ["bias", "bn"])
def test_compensation_that_makes_it_worse_is_left_out(tmp_path, monkeypatch, compensate) -> None:
    def spoil(analysis, keep, chunks, progress) -> Edits:
        node = next(n for n in analysis.graph.nodes if n.op_type == "Gemm")
        bias = analysis.value(node.inputs[2])
        return Edits(operands={(node.index, 2): bias + 50 * np.arange(len(bias), dtype=np.float32)})

    monkeypatch.setitem(posttraining.CORRECTIONS, compensate, spoil)
    model = plain()
    result = calibrated(tmp_path, model, compensate=compensate)
    assert any("left out" in note for note in result.notes)
    head = next(n for n in model.graph.node if n.op_type == "Gemm")
    biases = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    smaller = onnx.load(tmp_path / "out.onnx")
    last = next(n for n in smaller.graph.node if n.op_type == "Gemm")
    found = {t.name: numpy_helper.to_array(t) for t in smaller.graph.initializer}
    np.testing.assert_array_equal(found[last.input[2]], biases[head.input[2]])
