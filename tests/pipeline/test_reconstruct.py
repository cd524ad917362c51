"""Layers of every kind are pruned and refitted; inputs join where there is room for them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops.analysis import analyse
from prune_onnx.graph_ops.exact import Edits
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.masked import masked_reference
from prune_onnx.pipeline import layerwise, reconstruct, streams, survey
from prune_onnx.pipeline.divergence import divergence, outputs
from prune_onnx.pipeline.probing import Feeds, probe
from prune_onnx.pipeline.reconstruct import Reconstruction
from prune_onnx.pipeline.streams import Stream

from ..graph_ops.builder import Net
from .test_posttraining import images, residual_net


def batches(count: int = 96, size: int = 32) -> list[Feeds]:
    x = images(count)
    return [{"x": x[i : i + size]} for i in range(0, count, size)]


def decoder() -> onnx.ModelProto:
    """Down and up again, with a skip connection; a transposed convolution reads the narrow maps."""
    net = Net()
    first = net.relu(net.conv(net.input("n", 3, 8, 8), 8, pads=[1, 1, 1, 1]))
    low = net.relu(net.conv(first, 12, strides=[2, 2], pads=[1, 1, 1, 1]))
    up = net.op("ConvTranspose", low, net.const(net.random(12, 8, 2, 2, scale=0.3)), strides=[2, 2])
    both = net.relu(net.conv(net.op("Concat", first, net.relu(up), axis=1), 8, pads=[1, 1, 1, 1]))
    return net.model(net.conv(both, 3, 1))


def flattened() -> onnx.ModelProto:
    """A classifier on all positions of the maps."""
    net = Net()
    x = net.relu(net.conv(net.input("n", 3, 8, 8), 12, pads=[1, 1, 1, 1], strides=[2, 2]))
    x = net.relu(net.conv(x, 10, pads=[1, 1, 1, 1]))
    return net.model(net.gemm(net.relu(net.gemm(net.op("Flatten", x), 16)), 5))


def padded_stream() -> onnx.ModelProto:
    """Two stages of sums; the second has channels of its own, which the first stage's are padded with."""
    net = Net()
    x = net.relu(net.conv(net.input("n", 3, 8, 8), 8, pads=[1, 1, 1, 1]))
    y = net.conv(net.relu(net.conv(x, 8, pads=[1, 1, 1, 1])), 8, pads=[1, 1, 1, 1])
    x = net.relu(net.op("Add", y, x))
    y = net.conv(net.relu(net.conv(x, 16, pads=[1, 1, 1, 1])), 16, pads=[1, 1, 1, 1])
    wide = net.op("Pad", x, net.const(np.asarray([0, 4, 0, 0, 0, 4, 0, 0], np.int64)))
    x = net.relu(net.op("Add", y, wide))
    return net.model(net.head(x, 5))


NETS = {"residual": residual_net, "decoder": decoder, "flattened": flattened, "padded stream": padded_stream}


def pruned(model: onnx.ModelProto, fraction: float) -> tuple[Reconstruction, float, float]:
    """Prune all parts to a fraction; return the work, and the outputs' divergence without and with the new weights."""
    graph = Graph(model)
    work = Reconstruction(analyse(graph, probe(graph)[0]), batches())
    found = survey.Survey(work.analysis, batches()).statistics()
    counts = {n: max(1, int(fraction * len(work.parts[n].units))) for n in found.paths}
    work.run(counts, found.paths)
    for number, count in counts.items():
        assert work.keep[work.parts[number].units].sum() == count
    fresh = [{"x": images(64, seed=9)}]
    dense = outputs(model, fresh)
    plain = divergence(dense, outputs(masked_reference(work.analysis, work.keep), fresh))
    edits = Edits(operands=work.weights)
    return work, plain, divergence(dense, outputs(masked_reference(work.analysis, work.keep, edits), fresh))


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_every_part_is_pruned_and_made_up_for(make):
    work, plain, fitted = pruned(make(), 0.5)
    assert len(work.parts) >= 2
    assert all(work.keep[part.units].sum() == len(part.units) // 2 for part in work.parts)
    assert fitted < 0.65 * plain


def test_layers_that_are_too_wide_are_fitted_channel_by_channel(monkeypatch):
    exact = pruned(flattened(), 0.5)
    monkeypatch.setattr(Reconstruction, "widest", 30)
    monkeypatch.setattr(survey.Survey, "widest", 30)
    work, plain, fitted = pruned(flattened(), 0.5)
    kinds = {type(site.layer).__name__ for site in work.sites}
    assert kinds == {"Layer", "ChannelLayer"}
    assert exact[2] < fitted < 0.7 * plain


@pytest.mark.parametrize("bounds", [(0.0, np.inf), (0.0, 0.6), (-0.5, 0.5)], ids=str)
def test_what_is_cut_off_need_not_be_fitted(monkeypatch, bounds):
    """After the Relu or Clip the fit that knows of it is closer than the one that does not."""
    net = Net()
    x = net.relu(net.conv(net.input("n", 3, 8, 8), 12, pads=[1, 1, 1, 1]))
    y = net.conv(x, 8, pads=[1, 1, 1, 1])
    limits = [net.const(np.asarray(b, np.float32)) for b in bounds if np.isfinite(b)]
    model = net.model(net.relu(y) if len(limits) < 2 else net.op("Clip", y, *limits))
    errors = {}
    for passes in (0, 4):
        monkeypatch.setattr(reconstruct, "RELU_PASSES", passes)
        work, _, errors[passes] = pruned(model, 0.5)
        assert work.sites[1].bounds == pytest.approx(bounds)
    assert errors[4] < errors[0]


def test_parts_of_a_padded_stream_are_cut_by_themselves():
    graph = Graph(padded_stream())
    work = survey.Survey(analyse(graph, probe(graph)[0]), batches())
    found = work.statistics()
    inside = [n for n in found.paths if n not in work.shared()]
    assert sorted(len(work.parts[n].units) for n in inside) == [8, 8, 16]  # of both blocks, and the second stage's own
    assert [len(work.parts[n].units) for n in found.paths if n in work.shared()] == [8]


def test_inputs_that_join_pass_the_layers_as_they_are():
    graph = Graph(residual_net())
    probed = probe(graph)[0]
    chunks = batches()
    node = [n for n in graph.nodes if n.op_type == "Conv"][2]
    weights = {node.inputs[1]: np.zeros_like(graph.constant(node.inputs[1]))}
    whole, late = Stream(graph, probed, chunks, weights), Stream(graph, probed, chunks[:1], weights)
    whole.advance(node.index + 2)
    late.advance(node.index + 2)
    late.join(chunks[1:])
    for stream in (whole, late):
        stream.advance(len(graph.nodes))
    assert len(late.chunks) == len(whole.chunks)
    for a, b in zip(whole.chunks, late.chunks, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_little_memory_is_enough(monkeypatch):
    """One chunk fits in the first layers, all of them in the last ones."""
    graph = Graph(residual_net())
    analysis = analyse(graph, probe(graph)[0])
    sizes = streams.alive(graph, analysis.probe)
    monkeypatch.setattr(layerwise, "MEMORY", 2 * 40 * max(sizes))
    work = Reconstruction(analysis, batches())
    assert work._fitting(0, 2) == 1
    assert work._fitting(len(graph.nodes) - 1, 2) == 3
    _, plain, fitted = pruned(residual_net(), 0.5)
    assert fitted < 0.5 * plain


def test_ridge_is_the_one_that_unseen_positions_like_best(monkeypatch):
    """Few inputs, many columns: the strong pull to the trained weights wins over the weak one."""
    graph = Graph(residual_net())
    analysis = analyse(graph, probe(graph)[0])
    found = {}
    for ridges in ((1e-6,), (1e-6, 1e-1)):
        monkeypatch.setattr(reconstruct, "RIDGES", ridges)
        work = Reconstruction(analysis, [{"x": images(3)}])
        statistics = survey.Survey(analysis, work.chunks).statistics()
        work.run({n: len(p.order) // 2 for n, p in statistics.paths.items()}, statistics.paths)
        fresh = [{"x": images(64, seed=9)}]
        reference = masked_reference(analysis, work.keep, Edits(operands=work.weights))
        found[ridges] = divergence(outputs(graph.model, fresh), outputs(reference, fresh))
    assert found[1e-6, 1e-1] < found[1e-6,]
