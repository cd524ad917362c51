"""The loss of a network with channels masked, on labelled inputs.

Every sum over channels gets a mask in front of it, as a graph input. What lies before a candidate's first reader is
computed once for all candidates of a group, and what lies behind is one session that runs with one mask after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.errors import ConfigError, DataError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.records import Contraction

from .probing import Feeds
from .streams import Stream

IMAGES = 128
"""Labelled inputs that the loss is taken over."""


@dataclass(frozen=True)
class _Mask:
    """A mask in front of a contraction: graph input ``name``, multiplied along ``axis`` of a tensor of ``rank``."""

    name: str
    labels: np.ndarray
    axis: int
    rank: int
    dtype: np.dtype

    def value(self, keep: np.ndarray) -> np.ndarray:
        shape = [-1 if a == self.axis else 1 for a in range(self.rank)]
        return keep[self.labels].astype(self.dtype).reshape(shape)


class MaskedLoss:
    """Mean cross-entropy of the network on labelled inputs, without units of its choice."""

    def __init__(self, analysis: Analysis, chunks: Sequence[Feeds], labels: Sequence[np.ndarray]) -> None:
        """Prepare the masked network.

        Args:
            analysis: of the network.
            chunks: calibration inputs, in batches that the network takes.
            labels: of each batch.
        """
        self.analysis = analysis
        few = max(1, -(-IMAGES // len(labels[0])))
        self._chunks, self._labels = list(chunks[:few]), np.concatenate(list(labels[:few]))
        self._masks: dict[int, _Mask] = {}
        self._graph = Graph(self._masked_model())
        self._first = self._first_readers()

    def __call__(self, keep: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return the loss without each candidate, (len(candidates),).

        Args:
            keep: bool (units,), the others are masked already.
            candidates: units.

        Raises:
            ConfigError: the first output holds no class scores.
            DataError: labels beyond the model's classes.
        """
        losses = np.empty(len(candidates))
        masks = {mask.name: mask.value(keep) for mask in self._masks.values()}
        stream = Stream(self._graph, self.analysis.probe, [{**chunk, **masks} for chunk in self._chunks])
        starts = self._first[candidates]
        for start in np.unique(starts):
            stream.advance(int(start))
            rest = stream.rest()
            for i in np.flatnonzero(starts == start):
                without = keep.copy()
                without[candidates[i]] = False
                other = {
                    mask.name: mask.value(without)
                    for mask in self._masks.values()
                    if (mask.labels == candidates[i]).any()
                }
                losses[i] = self._loss(np.concatenate([out[0] for out in rest(other)]))
        return losses

    def _masked_model(self) -> onnx.ModelProto:
        graph, model = self.analysis.graph, onnx.ModelProto()
        model.CopyFrom(graph.model)
        before: dict[int, onnx.NodeProto] = {}
        copies = [onnx.NodeProto() for _ in graph.nodes]
        for copy, node in zip(copies, graph.nodes, strict=True):
            copy.CopyFrom(node.proto)
        for contraction in self.analysis.contractions:
            if self.analysis.pinned[contraction.labels].all():
                continue
            mask = self._mask(contraction)
            if mask.dtype.kind not in "fV":
                raise ConfigError("criterion 'loss' does not look into quantised models; use --criterion l2.")
            index, (i, _) = contraction.node.index, contraction.sides[0]
            self._masks[index] = mask
            out = f"{mask.name}_masked"
            before[index] = helper.make_node("Mul", [copies[index].input[i], mask.name], [out], name=mask.name)
            copies[index].input[i] = out
            kind = helper.np_dtype_to_tensor_dtype(mask.dtype)
            model.graph.input.append(helper.make_tensor_value_info(mask.name, kind, [None] * mask.rank))
        del model.graph.node[:]
        for index, copy in enumerate(copies):
            model.graph.node.extend([before[index], copy] if index in before else [copy])
        return model

    def _mask(self, contraction: Contraction) -> _Mask:
        i, axis = contraction.sides[0]
        line = self.analysis.probe.lines[contraction.node.inputs[i]]
        name = f"prune_onnx_mask_{contraction.node.index}"
        return _Mask(name, contraction.labels, axis, len(line), line[axis].dtype)

    def _first_readers(self) -> np.ndarray:
        """Per unit, the position of the first mask of its group: all candidates of a group start there."""
        by_name = {node.proto.name: node.index for node in self._graph.nodes}
        first = np.full(self.analysis.units, len(self._graph.nodes))
        for mask in self._masks.values():
            np.minimum.at(first, mask.labels, by_name[mask.name])
        for group in self.analysis.groups:
            first[group.units] = first[group.units].min(initial=len(self._graph.nodes))
        return first

    def _loss(self, scores: np.ndarray) -> float:
        z = scores.reshape(len(scores), -1).astype(np.float64)
        if scores.size != z.shape[1] * len(self._labels) or (scores.ndim > 2 and max(scores.shape[2:]) > 1):
            raise ConfigError(
                f"criterion 'loss' needs class scores; the model's first output has shape {list(scores.shape)}. "
                "Use --criterion obs."
            )
        if self._labels.max() >= z.shape[1]:
            raise DataError(f"the calibration data has label {self._labels.max()}; the model has {z.shape[1]} classes.")
        chances = (z >= 0).all() and np.allclose(z.sum(1), 1, atol=1e-3)
        logs = np.log(np.maximum(z, 1e-30)) if chances else z - z.max(1, keepdims=True)
        if not chances:
            logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
        return float(-logs[np.arange(len(z)), self._labels].mean())
