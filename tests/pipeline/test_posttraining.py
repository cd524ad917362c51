"""Pruning with calibration data: streams, reconstruction and the whole stage."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from pydantic import ValidationError

from prune_onnx.graph_ops.analysis import analyse
from prune_onnx.graph_ops.exact import Edits
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.masked import masked_reference
from prune_onnx.pipeline.divergence import divergence, outputs
from prune_onnx.pipeline.posttraining import held_out
from prune_onnx.pipeline.probing import probe
from prune_onnx.pipeline.reconstruct import Reconstruction
from prune_onnx.pipeline.runner import Runner
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.pipeline.streams import Stream
from prune_onnx.pipeline.survey import Survey

from ..graph_ops.builder import Net


def residual_net(*, dynamic: bool = True, bn: bool = False) -> onnx.ModelProto:
    """A stem, two residual blocks, a depthwise layer and a classifier."""
    net = Net()

    def block(x, channels):
        x = net.conv(x, channels, pads=[1, 1, 1, 1], bias=not bn)
        return net.bn(x) if bn else x

    x = net.relu(block(net.input("n" if dynamic else 4, 3, 8, 8), 12))
    for _ in range(2):
        y = block(net.relu(block(x, 10)), 12)
        x = net.relu(net.op("Add", y, x))
    x = net.relu(net.conv(x, 12, group=12, pads=[1, 1, 1, 1]))
    x = net.relu(net.conv(x, 16, 1))
    return net.model(net.head(x, 5))


def images(n: int, seed: int = 0) -> np.ndarray:
    """Smooth random inputs: neighbouring positions and channels are correlated, as in images."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((n, 3, 3, 3)).repeat(3, 2).repeat(3, 3)[:, :, :8, :8]
    return (coarse + 0.2 * rng.standard_normal((n, 3, 8, 8))).astype(np.float32)


@pytest.fixture(scope="module")
def setting():
    graph = Graph(residual_net())
    analysis = analyse(graph, probe(graph)[0])
    x = images(96)
    return graph, analysis, [{"x": x[i : i + 32]} for i in range(0, 96, 32)]


def test_stream_computes_what_the_whole_network_does(setting):
    graph, analysis, chunks = setting
    stream = Stream(graph, analysis.probe, chunks)
    names = [n.outputs[0] for n in graph.nodes if n.op_type == "Conv"]
    runner = Runner(graph.model, expose=names)
    for node in graph.nodes:
        stream.advance(node.index + 1, node.outputs)
        if node.outputs[0] in names:
            for chunk, feeds in zip(stream.chunks, chunks, strict=True):
                np.testing.assert_allclose(chunk[node.outputs[0]], runner.run([node.outputs[0]], feeds)[0], atol=1e-5)
    assert set(stream.chunks[0]) == set(graph.outputs), "tensors that nobody reads any more are kept"


def index_net() -> onnx.ModelProto:
    """A network that flattens as torch's as_strided does: positions are computed from the batch size, at the end."""
    net = Net(opset=18)
    x = net.relu(net.conv(net.input("n", 3, 8, 8), 12, pads=[1, 1, 1, 1]))
    x = net.op("GlobalAveragePool", net.relu(net.conv(x, 16, pads=[1, 1, 1, 1])))
    batch = net.op("Squeeze", net.op("Shape", "x", start=0, end=1), net.const(np.asarray([0])))
    zero, one, width = (net.op("Constant", value=numpy_helper.from_array(np.asarray(v))) for v in (0, 1, 16))
    starts = net.op("Unsqueeze", net.op("Mul", net.op("Range", zero, batch, one), width), net.const(np.asarray([1])))
    where = net.op("Add", starts, net.const(np.arange(16)[None]))
    y = net.op("Gather", net.op("Reshape", x, net.const(np.asarray([-1]))), where)
    return net.model(net.gemm(y, 5))


def test_what_follows_from_the_batch_size_is_computed_when_it_is_read(tmp_path):
    graph = Graph(index_net())
    x = images(96)
    chunks = [{"x": x[:64]}, {"x": x[64:]}]
    stream = Stream(graph, probe(graph)[0], chunks)
    for node in graph.nodes:
        stream.advance(node.index + 1, node.outputs if node.op_type == "Conv" else ())
    whole = outputs(graph.model, chunks)[0]
    np.testing.assert_allclose(np.concatenate([c[graph.outputs[0]] for c in stream.chunks]), whole, atol=1e-5)
    onnx.save(graph.model, tmp_path / "model.onnx")
    np.save(tmp_path / "inputs.npy", x)
    result = slim(
        SlimConfig(
            input=tmp_path / "model.onnx", output=tmp_path / "small.onnx", keep_macs=0.6, align=1,
            calibration=str(tmp_path / "inputs.npy"),
        )
    )  # fmt: skip
    assert result.after.macs <= 0.6 * result.before.macs
    assert result.verification.max_rel_diff < 1e-5


def test_a_random_tensor_is_drawn_once_for_all_that_read_it():
    net = Net()
    x = net.input(2, 3, 8, 8)
    noise = net.op("RandomNormal", shape=[2, 3, 8, 8])
    y = net.op("Add", net.relu(net.op("Add", x, noise)), noise)
    graph = Graph(net.model(y))
    chunks = [{"x": np.full((2, 3, 8, 8), 100, np.float32)}]  # Relu passes all of it on
    stream = Stream(graph, probe(graph)[0], chunks)
    for node in graph.nodes:
        stream.advance(node.index + 1, [noise])
    found = stream.chunks[0]
    np.testing.assert_allclose(found[graph.outputs[0]], 100 + 2 * found[noise], atol=1e-4)


def test_forked_stream_goes_on_with_other_weights(setting):
    graph, analysis, chunks = setting
    stream = Stream(graph, analysis.probe, chunks)
    last = next(n for n in graph.nodes if n.op_type == "Gemm")
    stream.advance(last.index)
    weight = np.zeros_like(graph.constant(last.inputs[1]))
    other = stream.fork({last.inputs[1]: weight}, 1)
    other.advance(len(graph.nodes))
    stream.advance(len(graph.nodes))
    bias = graph.constant(last.inputs[2])
    np.testing.assert_allclose(other.chunks[0][graph.outputs[0]], np.broadcast_to(bias, (32, 5)), atol=1e-6)
    assert len(other.chunks) == 1
    assert np.abs(stream.chunks[0][graph.outputs[0]] - bias).max() > 0.01


def test_nothing_pruned_means_nothing_changed(setting):
    _, analysis, chunks = setting
    work = Reconstruction(analysis, chunks)
    work.run({}, {})
    assert work.keep.all()
    assert not work.weights


def test_refitting_on_inputs_that_did_not_change_returns_the_trained_weights(setting):
    graph, analysis, chunks = setting
    work = Reconstruction(analysis, chunks)
    site = next(s for s in work.sites if s.total is not None)
    dense, same = (Stream(graph, analysis.probe, chunks) for _ in range(2))
    same.advance(site.node.index)
    work._open(site, dense)
    fitted = work._fit(site, dense, same, {})
    np.testing.assert_allclose(fitted, site.layer.matrix(), atol=1e-4)


@pytest.mark.parametrize("fraction", [0.75, 0.5])
def test_compensation_brings_the_output_back(setting, fraction):
    graph, analysis, chunks = setting
    work = Reconstruction(analysis, chunks)
    found = Survey(analysis, chunks).statistics()
    assert len(found.paths) >= 3
    counts = {g: max(1, int(fraction * len(work.parts[g].units))) for g in found.paths}
    work.run(counts, found.paths)
    for g, count in counts.items():
        assert work.keep[work.parts[g].units].sum() == count
    fresh = [{"x": images(64, seed=9)}]
    dense = outputs(graph.model, fresh)
    plain = divergence(dense, outputs(masked_reference(analysis, work.keep), fresh))
    fitted = divergence(dense, outputs(masked_reference(analysis, work.keep, Edits(operands=work.weights)), fresh))
    assert fitted < 0.5 * plain


def calibrated(tmp_path, model: onnx.ModelProto, **options):
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=images(96))
    return slim(
        SlimConfig(
            **{
                "input": tmp_path / "in.onnx",
                "output": tmp_path / "out.onnx",
                "keep_macs": 0.5,
                "align": 1,
                "calibration": str(tmp_path / "data.npz"),
                "calibration_size": 96,
                **options,
            }
        )
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"criterion": "l2"},
        {"compensate": "none"},
        {"keep_macs": None, "keep_params": 0.6},
        {"align": 4},
        {"scope": "layer"},
    ],
    ids=str,
)
def test_stage_meets_the_budget_and_is_verified(tmp_path, options):
    result = calibrated(tmp_path, residual_net(bn=True), **options)
    kind, fraction = ("params", 0.6) if "keep_params" in options else ("macs", 0.5)
    assert getattr(result.after, kind) <= fraction * getattr(result.before, kind)
    assert result.verification.reference == "masked"
    assert result.verification.passed
    assert result.criterion == options.get("criterion", "obs")
    assert sum(g.channels for g in result.groups) > sum(g.kept for g in result.groups)


def test_model_of_fixed_batch_size_is_calibrated_in_its_batches(tmp_path):
    result = calibrated(tmp_path, residual_net(dynamic=False))
    assert result.after.macs <= 0.5 * result.before.macs


def test_calibration_beats_the_same_budget_without_it(tmp_path):
    model = residual_net(bn=True)
    calibrated(tmp_path, model)
    onnx.save(model, tmp_path / "in.onnx")
    slim(SlimConfig(input=tmp_path / "in.onnx", output=tmp_path / "plain.onnx", keep_macs=0.5, align=1))
    fresh = [{"x": images(64, seed=5)}]
    dense, plain, fitted = (outputs(onnx.load(tmp_path / f"{n}.onnx"), fresh) for n in ("in", "plain", "out"))
    assert divergence(dense, fitted) < 0.5 * divergence(dense, plain)


def twins() -> onnx.ModelProto:
    """Every channel twice, in layers that share weight and bias or have none: half of them can go without a loss.

    The twin of the first layer is three times as strong, those of the shared layers a third: what one of the two layers
    needs is wrong for the other.
    """
    net = Net()

    def twice(*dims: int, ratio: float = 1 / 3) -> np.ndarray:
        values = np.repeat(net.random(*dims, scale=0.4), 2, axis=0)
        values[1::2] *= ratio
        return values

    x = net.relu(net.conv(net.input("n", 3, 8, 8), 8, weight=twice(4, 3, 3, 3, ratio=3), bias=False))
    weight, bias = net.const(twice(4, 8, 3, 3)), net.const(twice(4))
    for _ in range(2):
        x = net.relu(net.op("Conv", x, weight, bias))
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    x = net.relu(net.op("Add", net.op("MatMul", x, twice(4, 8).T.copy()), bias))
    return net.model(net.matmul(x, 5))


def test_shared_and_missing_constants_are_refitted_layer_by_layer(tmp_path):
    model = twins()
    calibrated(tmp_path, model, keep_macs=None, keep_channels=0.5, scope="layer")
    fresh = [{"x": images(64, seed=5)}]
    dense, small = (outputs(onnx.load(tmp_path / f"{n}.onnx"), fresh) for n in ("in", "out"))
    assert np.abs(dense[0] - small[0]).max() < 0.02 * np.abs(dense[0]).max()


def test_report_counts_against_the_original_graph(tmp_path):
    result = calibrated(tmp_path, residual_net(bn=True))
    assert result.before.params > result.after.params
    assert result.notes[0].startswith("folded 5 BatchNormalization")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "x.npz"}, "budget"),
        ({"keep_macs": 0.5, "criterion": "obs"}, "calibration"),
        ({"keep_macs": 0.5, "compensate": "least-squares"}, "calibration"),
        ({"keep_macs": 0.5, "calibration": "x.npz", "plan": "p.json", "dry_run": True}, "plan"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValidationError, match=message):
        SlimConfig(input=tmp_path / "in.onnx", output=tmp_path / "out.onnx", **options)


def test_divergence_of_equal_outputs_is_zero():
    z = np.random.default_rng(0).standard_normal((5, 4))
    for some in ([z], [z[:, :, None]], [z, z[:, 0]]):
        assert divergence(some, some) == 0
        assert divergence(some, [x[::-1] for x in some]) > 0


def test_divergence_of_probabilities_is_that_of_their_logits():
    a, b = np.random.default_rng(0).standard_normal((2, 6, 4))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (a, b))
    assert divergence([p], [q]) == pytest.approx(divergence([a], [b]))


def test_divergence_of_maps_is_their_relative_error():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 2, 4, 4))
    assert divergence([a], [b]) == pytest.approx(np.square(a - b).mean() / a.var(0).mean())
    assert divergence([10 * a + 3], [10 * b + 3]) == pytest.approx(divergence([a], [b]))


@pytest.mark.parametrize(("sizes", "whole"), [([64], False), ([128] * 4, False), ([4] * 20, True), ([128, 3], False)])
def test_a_twentieth_is_held_out(sizes, whole):
    ends = np.cumsum([0, *sizes])
    x = np.arange(ends[-1])
    chunks = [{"x": x[a:b]} for a, b in pairwise(ends)]
    fit, check = held_out(chunks, whole=whole)
    np.testing.assert_array_equal(np.concatenate([c["x"] for c in fit + check]), x)
    assert sum(len(c["x"]) for c in check) == max(1, round(0.05 * len(x)))


def test_a_single_batch_of_fixed_size_serves_for_both():
    chunks = [{"x": np.zeros(4)}]
    assert held_out(chunks, whole=True) == (chunks, chunks)
