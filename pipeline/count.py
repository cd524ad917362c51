"""Counts a model's parameters and multiply-accumulates."""

from __future__ import annotations

import onnx

from prune_onnx.graph_ops import cost
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.probe import Shape

from .probing import probe


def count(model: onnx.ModelProto, input_shape: dict[str, Shape] | None = None) -> tuple[int, int]:
    """Return (params, macs) of a model; MACs at its input shape with batch size 1.

    Args:
        model: the model, functions inlined.
        input_shape: chosen shapes of inputs with dynamic sizes.

    Raises:
        ModelError: the model does not run.
    """
    graph = Graph(model)
    found, _, _ = probe(graph, input_shape)
    return cost.params(graph), cost.macs(graph, found.shapes)
