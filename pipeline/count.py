"""Counts a model's parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from prune_onnx.graph_ops import cost
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.probe import Shape

from .probing import probe


@dataclass(frozen=True, eq=False)
class Counted:
    """A model's costs and what they were counted from.

    Attributes:
        params: stored weights.
        macs: multiply-accumulates at batch size 1.
        graph: the model's graph.
        shapes: of every tensor in it.
    """

    params: int
    macs: int
    graph: Graph
    shapes: Mapping[str, Shape]


def count(model: onnx.ModelProto, input_shape: dict[str, Shape] | None = None) -> Counted:
    """Count a model's costs; MACs at its input shape with batch size 1.

    Args:
        model: the model, functions inlined.
        input_shape: chosen shapes of inputs with dynamic sizes.

    Raises:
        ModelError: the model does not run.
    """
    graph = Graph(model)
    found, _, _ = probe(graph, input_shape)
    return Counted(cost.params(graph), cost.macs(graph, found.shapes), graph, found.shapes)
