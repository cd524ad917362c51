"""What a model costs: multiply-accumulates and parameters.

``macs`` counts Conv, ConvTranspose, Gemm and MatMul (and their quantised forms) at the probed shapes, batch 1; biases,
BatchNorm and activations count nothing. ``params`` counts the elements of all stored tensors that hold weights; int64
and bool tensors are sizes and indices and count nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from .analysis import Analysis
from .graph import Graph
from .probe import Shape
from .rules.base import product

NO_WEIGHTS = frozenset({onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING})


def macs(graph: Graph, shapes: Mapping[str, Shape]) -> int:
    """Return the model's multiply-accumulates.

    Args:
        graph: the model.
        shapes: shape of every tensor of the main graph.
    """
    total = 0
    for node in graph.nodes:
        op = node.op_type
        if all(graph.is_static(out) for out in node.outputs):
            continue  # computed once, when the session is made
        if op in ("Conv", "FusedConv", "ConvInteger", "QLinearConv"):
            weight = shapes[node.inputs[3 if op == "QLinearConv" else 1]]
            total += product(shapes[node.outputs[0]]) * product(weight[1:])
        elif op == "ConvTranspose":
            total += product(shapes[node.inputs[0]]) * product(shapes[node.inputs[1]][1:])
        elif op == "Gemm":
            k = shapes[node.inputs[0]][0 if node.attribute("transA", 0) else 1]
            total += product(shapes[node.outputs[0]]) * k
        elif op in ("MatMul", "MatMulInteger", "QLinearMatMul"):
            total += product(shapes[node.outputs[0]]) * shapes[node.inputs[0]][-1]
    return total


def params(graph: Graph) -> int:
    """Return the number of stored weights: initializers, and the values of Constant nodes."""
    total = 0
    for tensor in graph.initializers.values():
        if tensor.data_type not in NO_WEIGHTS:
            total += product(tensor.dims)
    for node in graph.nodes:
        if node.op_type == "Constant" and node.proto.attribute and node.proto.attribute[0].name == "value":
            tensor = node.proto.attribute[0].t
            if tensor.data_type not in NO_WEIGHTS:
                total += product(tensor.dims)
    return total


class CostModel:
    """Predicts MACs and parameters of a cut from the analysis, without making it."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.total_macs = macs(analysis.graph, analysis.probe.shapes)
        self.total_params = params(analysis.graph)
        everything = np.ones(analysis.units, bool)
        self._fixed_macs = self.total_macs - self._labelled_macs(everything)
        self._tensors = self._stored_tensors()
        self._fixed_params = self.total_params - self._labelled_params(everything)

    def macs(self, keep: np.ndarray) -> int:
        """MACs when only the units ``keep`` are left."""
        return self._fixed_macs + self._labelled_macs(keep)

    def params(self, keep: np.ndarray) -> int:
        """Parameters when only the units ``keep`` are left."""
        return self._fixed_params + self._labelled_params(keep)

    def channels(self, keep: np.ndarray) -> int:
        """Prunable units that are left."""
        return int((keep & ~self.analysis.pinned).sum())

    def _labelled_macs(self, keep: np.ndarray) -> int:
        return sum(w.scale * product(int(keep[v].sum()) for v in w.factors) for w in self.analysis.works)

    def _stored_tensors(self) -> list[tuple[int, list[list[np.ndarray]]]]:
        """(elements per combination of labelled positions, label vectors of each distinct slice) of each stored tensor."""
        uses: dict[str, dict[bytes, tuple[str, dict[int, np.ndarray]]]] = {}
        for operand in self.analysis.operands:
            name = operand.node.inputs[operand.input]
            stored = self._stored(name)
            if stored is not None:
                marks = b"".join(bytes([a]) + v.tobytes() for a, v in sorted(operand.axes.items()))
                uses.setdefault(stored, {})[marks] = (name, operand.axes)
        tensors = []
        for slices in uses.values():
            # Uses that want different slices get a copy each, but only once something is cut: the first one counts.
            name, axes = next(iter(slices.values()))
            rest = product(d for a, d in enumerate(self.analysis.probe.shapes[name]) if a not in axes)
            tensors.append((rest, [list(axes.values())]))
        return tensors

    def _stored(self, name: str) -> str | None:
        """The initializer or Constant that holds a static tensor's elements, ``None`` when it is not stored one to one."""
        graph, shapes = self.analysis.graph, self.analysis.probe.shapes
        size = product(shapes.get(name, ()))
        while name not in graph.initializers:
            node = graph.producer.get(name)
            if node is None or node.op_type == "Constant":
                return name if node is not None else None
            if not node.inputs or product(shapes.get(node.inputs[0], ())) != size:
                return None
            name = node.inputs[0]
        return None if graph.initializers[name].data_type in NO_WEIGHTS else name

    def _labelled_params(self, keep: np.ndarray) -> int:
        return sum(rest * product(int(keep[v].sum()) for v in vectors)
                   for rest, slices in self._tensors for vectors in slices)
