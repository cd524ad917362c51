"""Compensation that leaves the weights' directions alone: means, and means with variances, layer after layer.

Two networks run side by side over the calibration inputs, the dense one and the cut one, from the first layer that a
removed channel touches to the last. With y the output of a layer in the dense network and z in the cut one, both per
channel over inputs and positions:

    bias   b <- b + E[y] - E[z]                             every Conv, ConvTranspose, Gemm and MatMul
    bn     W <- s W,  b <- s (b - E[z]) + E[y],  s = sqrt(Var[y] / Var[z])      every Conv and ConvTranspose
           mean <- E[x],  var <- Var[x]                     every BatchNormalization, x its input in the cut network

As z is what the layers before it, already corrected, really make of the inputs, the mean of every such layer over the
calibration inputs is the dense network's afterwards, exactly; ``bias`` in a net of one layer is the textbook correction
b + W_removed E[x_removed] (which is only right at the borders of padded maps because E[z] is taken over the outputs).
A layer in front of a BatchNormalization is left to that.

Sources: Nagel et al. 2019 (bias correction); Li et al. 2017 and Yang et al. 2020 for statistics after pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.exact import Edits
from prune_onnx.graph_ops.fold import scaled_outputs
from prune_onnx.graph_ops.graph import Graph, Node
from prune_onnx.graph_ops.progress import SILENT, Progress

from .probing import Feeds, probe
from .streams import Stream

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CONVOLUTIONS = ("Conv", "ConvTranspose")
TINY = 1e-6
"""A channel whose deviation in the cut network is this fraction of the dense one's has nothing left to scale up."""


@dataclass(frozen=True)
class _Layer:
    """A node whose output is corrected; ``kept`` are the channels that the cut network has, ``axis`` is theirs."""

    node: Node
    axis: int
    kept: np.ndarray
    normalises: bool


def correct_means(analysis: Analysis, keep: np.ndarray, chunks: Sequence[Feeds], progress: Progress = SILENT) -> Edits:
    """Return biases with which every layer's mean over the calibration inputs is the dense network's.

    Args:
        analysis: of the dense network.
        keep: units that stay, bool (units,).
        chunks: calibration inputs, in batches that the network takes.
        progress: told how far it is.
    """
    return _Correction(analysis, keep, chunks, variances=False).run(progress)


def match_statistics(
    analysis: Analysis, keep: np.ndarray, chunks: Sequence[Feeds], progress: Progress = SILENT
) -> Edits:
    """Return BatchNorm statistics of the cut network, and weights that match the dense means and variances elsewhere.

    Args:
        analysis: of the dense network.
        keep: units that stay, bool (units,).
        chunks: calibration inputs, in batches that the network takes.
        progress: told how far it is.
    """
    return _Correction(analysis, keep, chunks, variances=True).run(progress)


class _Correction:
    """One run over both networks."""

    def __init__(self, analysis: Analysis, keep: np.ndarray, chunks: Sequence[Feeds], *, variances: bool) -> None:
        self.analysis, self.keep, self.variances = analysis, keep, variances
        self.edits = Edits()
        shapes = {name: value.shape for name, value in chunks[0].items()}
        graph = analysis.graph
        self.small = Graph(cut(analysis, keep))
        self.dense = Stream(graph, analysis.probe, chunks)
        self.cut = Stream(self.small, probe(self.small, shapes)[0], chunks)
        self.layers = self._layers()

    def run(self, progress: Progress) -> Edits:
        with progress.task("compensation", len(self.layers)) as advance:
            for layer in self.layers:
                if layer.normalises:
                    self._renormalise(layer)
                else:
                    self._correct(layer)
                advance(1)
        return self.edits

    def _layers(self) -> list[_Layer]:
        """Nodes that the removed channels reach and that have something to correct, in order."""
        touched: set[str] = set()
        less = {c.node.index for c in self.analysis.contractions if not self.keep[c.labels].all()}
        less |= {r.node.index for r in self.analysis.released if not self.keep[r.labels].all()}
        found = []
        for node in self.analysis.graph.nodes:
            if node.index in less or any(name in touched for name in [*node.inputs, *node.captured]):
                touched.update(node.outputs)
                layer = self._layer(node)
                if layer is not None and node.outputs[0] in self.small.producer:
                    found.append(layer)
        return found

    def _layer(self, node: Node) -> _Layer | None:
        graph = self.analysis.graph
        y = node.outputs[0] if node.outputs else ""
        normalises = node.op_type == "BatchNormalization"
        wanted = ("BatchNormalization", *CONVOLUTIONS) if self.variances else LAYERS
        if node.domain or node.op_type not in wanted or y not in graph.dynamic:
            return None
        weight = self.analysis.value(node.inputs[1])
        bias = self._bias_input(node)
        if weight is None or weight.dtype.kind not in "fV" or node.attribute("training_mode", 0):
            return None
        if normalises:
            if any(self.analysis.value(name) is None for name in node.inputs[1:5]):
                return None
        elif self.variances and any(r.op_type == "BatchNormalization" for r, _ in graph.readers.get(y, ())):
            return None
        if node.op_type == "MatMul" and weight.ndim != 2:
            return None
        if node.op_type == "Gemm" and node.attribute("beta", 1.0) != 1.0:
            return None
        if bias is not None and bias < len(node.inputs) and node.inputs[bias]:
            value = self.analysis.value(node.inputs[bias])
            if value is None or value.ndim != 1 or len(value) != self.analysis.probe.shapes[y][1]:
                return None
        rank = len(self.analysis.probe.shapes[y])
        axis = 1 if node.op_type != "MatMul" else rank - 1
        vector = self.analysis.axes.get(y, {}).get(axis)
        size = self.analysis.probe.shapes[y][axis]
        kept = np.arange(size) if vector is None else np.flatnonzero(self.keep[vector])
        return _Layer(node, axis, kept, normalises)

    @staticmethod
    def _bias_input(node: Node) -> int | None:
        return 2 if node.op_type in ("Conv", "ConvTranspose", "Gemm") else None

    def _correct(self, layer: _Layer) -> None:
        """Shift (and scale) a layer's channels to the dense network's mean (and variance)."""
        node, y = layer.node, layer.node.outputs[0]
        here = self.small.producer[y].index + 1
        self.dense.advance(node.index + 1, [y])
        self.cut.advance(here, [y])
        mean, var = (m[layer.kept] for m in _moments(self.dense, y, layer.axis))
        got, spread = _moments(self.cut, y, layer.axis)
        factor = np.ones(len(mean))
        if self.variances:
            alive = spread > TINY**2 * var
            factor[alive] = np.sqrt(var[alive] / spread[alive])
        shift = mean - factor * got
        _affine(self.cut, y, layer.axis, factor, shift)
        bias = self._bias_input(node)
        weight = self.analysis.value(node.inputs[1])
        size = self.analysis.probe.shapes[y][layer.axis]
        if bias is None:
            self.edits.shifts[node.index] = _filled(np.zeros(size), layer.kept, shift)
            return
        given = bias < len(node.inputs) and node.inputs[bias]
        old = np.asarray(self.analysis.value(node.inputs[bias]), np.float64) if given else np.zeros(size)
        new = _filled(old, layer.kept, factor * old[layer.kept] + shift)
        self.edits.operands[node.index, bias] = new.astype(weight.dtype)
        if self.variances:
            full = _filled(np.ones(size), layer.kept, factor)
            scaled = scaled_outputs(
                node.op_type, np.asarray(weight, np.float64), full, groups=node.attribute("group", 1)
            )
            self.edits.operands[node.index, 1] = scaled.astype(weight.dtype)

    def _renormalise(self, layer: _Layer) -> None:
        """Give a BatchNormalization the statistics of its input in the cut network."""
        node, y = layer.node, layer.node.outputs[0]
        there = self.small.producer[y]
        x = there.inputs[0]
        self.cut.advance(there.index, [x])
        mean, var = _moments(self.cut, x, 1)
        old_mean, old_var = (np.asarray(self.analysis.value(name), np.float64) for name in node.inputs[3:5])
        scale, beta = (np.asarray(self.analysis.value(n), np.float64)[layer.kept] for n in node.inputs[1:3])
        factor = scale / np.sqrt(var + node.attribute("epsilon", 1e-5))
        inputs = [chunk[x] for chunk in self.cut.chunks]
        self.cut.advance(there.index + 1, [y])
        for chunk, value in zip(self.cut.chunks, inputs, strict=True):
            chunk[y] = value
        _affine(self.cut, y, 1, factor, beta - factor * mean)
        dtype = np.asarray(self.analysis.value(node.inputs[3])).dtype
        self.edits.operands[node.index, 3] = _filled(old_mean, layer.kept, mean).astype(dtype)
        self.edits.operands[node.index, 4] = _filled(old_var, layer.kept, var).astype(dtype)


def _moments(stream: Stream, name: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a tensor per channel, over all inputs and positions, float64."""
    count, first, second = 0, 0.0, 0.0
    for chunk in stream.chunks:
        rows = np.moveaxis(chunk[name], axis, 0).reshape(chunk[name].shape[axis], -1)
        middle = rows.mean(1, dtype=np.float64)
        spread = rows.var(1, dtype=np.float64)
        count += rows.shape[1]
        first = first + rows.shape[1] * middle
        second = second + rows.shape[1] * (spread + middle**2)
    mean = first / count
    return mean, np.maximum(second / count - mean**2, 0)


def _affine(stream: Stream, name: str, axis: int, factor: np.ndarray, shift: np.ndarray) -> None:
    """Replace a cached tensor by factor * tensor + shift, channel by channel."""
    for chunk in stream.chunks:
        shape = [-1 if a == axis else 1 for a in range(chunk[name].ndim)]
        dtype = chunk[name].dtype
        chunk[name] = chunk[name] * factor.reshape(shape).astype(dtype) + shift.reshape(shape).astype(dtype)


def _filled(values: np.ndarray, positions: np.ndarray, new: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[positions] = new
    return values
