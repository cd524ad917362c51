"""What a model costs: multiply-accumulates and parameters.

``macs`` counts Conv, ConvTranspose, Gemm and MatMul (and their quantised forms) at the probed shapes, batch 1; biases,
BatchNorm and activations count nothing. ``params`` counts the elements of all stored tensors that hold weights; int64
and bool tensors are sizes and indices and count nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from .analysis import Analysis
from .graph import Graph
from .probe import Shape
from .rules.base import product

# They pass every element of their first input on.
CARRIERS = frozenset(
    {"Cast", "DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
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


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a cost: ``scale`` times the number of kept positions of each factor.

    Attributes:
        scale: in the cost's unit.
        factors: vectors of units.
        curves: for each factor what stands for its number of kept positions: ``curve[kept]``, float64. Empty where the
            numbers themselves count.
    """

    scale: float
    factors: tuple[np.ndarray, ...]
    curves: tuple[np.ndarray, ...] = ()


class Curves:
    """Looks up what stands for the kept positions of factors, all factors at once."""

    def __init__(self, curves: Sequence[np.ndarray | None]) -> None:
        """Prepare the look-up; ``None`` stands for the number itself."""
        self._any = any(curve is not None for curve in curves)
        plain = np.asarray([curve is None for curve in curves])
        self._plain = np.flatnonzero(plain)
        sizes = [0 if curve is None else len(curve) for curve in curves]
        self._starts = np.cumsum([0, *sizes])[:-1]
        self._values = np.concatenate([np.zeros(1), *(c for c in curves if c is not None)])

    def at(self, counts: np.ndarray) -> np.ndarray:
        """Values of all factors, given their kept positions; further axes of ``counts`` are independent questions."""
        if not self._any:
            return counts
        places = np.rint(counts).astype(np.int64) + 1 + self._starts.reshape(-1, *[1] * (counts.ndim - 1))
        places[self._plain] = 0
        values = self._values[places]
        values[self._plain] = counts[self._plain]
        return values


class Tally:
    """A sum of terms over kept units, in a few array operations; what a few more units would add is found locally."""

    def __init__(self, terms: Sequence[Term], units: int) -> None:
        """Prepare the sum.

        Args:
            terms: the summands.
            units: how many units there are.
        """
        numbers: dict[tuple[bytes, int], int] = {}
        vectors: list[np.ndarray] = []
        curves: list[np.ndarray | None] = [None]
        width = max((len(t.factors) for t in terms), default=1)
        # Factors are numbers of distinct vectors (and curves); number 0 is a factor of one.
        self._factors = np.zeros((len(terms), width), np.int64)
        for row, term in zip(self._factors, terms, strict=True):
            for i, vector in enumerate(term.factors):
                curve = term.curves[i] if term.curves else None
                row[i] = numbers.setdefault((vector.tobytes(), id(curve)), len(vectors) + 1)
                if row[i] > len(vectors):
                    vectors.append(vector)
                    curves.append(curve)
        self._curves = Curves(curves)
        self._scale = np.asarray([t.scale for t in terms] or np.zeros(0, np.int64))
        self._units = np.concatenate([np.zeros(0, np.int64), *vectors]).astype(np.int64)
        self._vector = np.repeat(np.arange(1, len(vectors) + 1), [len(v) for v in vectors])
        self._size = len(vectors) + 1
        # Where each unit stands in the vectors, and each vector in the terms.
        self._by_unit = np.argsort(self._units, kind="stable")
        self._unit_starts = np.searchsorted(self._units[self._by_unit], np.arange(units + 1))
        flat = self._factors.ravel()
        self._by_vector = np.argsort(flat, kind="stable")
        self._vector_starts = np.searchsorted(flat[self._by_vector], np.arange(self._size + 1))
        self._by_vector //= width

    def counts(self, keep: np.ndarray) -> np.ndarray:
        """Kept positions of every distinct vector, int64; to be handed to :meth:`more`."""
        counts = np.bincount(self._vector[keep[self._units]], minlength=self._size)
        counts[0] = 1
        return counts

    def total(self, counts: np.ndarray) -> float:
        """The sum."""
        return (self._scale * self._curves.at(counts)[self._factors].prod(1)).sum().item()

    def more(self, counts: np.ndarray, units: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """What the sum grows by when units come back that were not kept.

        Returns:
            The growth, and the vectors whose counts change with by how much: ``counts[vectors] += growth_of_each``.
        """
        places = np.concatenate([self._by_unit[self._unit_starts[u] : self._unit_starts[u + 1]] for u in units])
        vectors, growth = np.unique(self._vector[places], return_counts=True)
        if not len(vectors):
            return 0, vectors, growth
        terms = np.unique(
            np.concatenate([self._by_vector[self._vector_starts[v] : self._vector_starts[v + 1]] for v in vectors])
        )
        factors, scale = self._factors[terms], self._scale[terms]
        before = self._curves.at(counts)[factors].prod(1)
        counts[vectors] += growth
        after = self._curves.at(counts)[factors].prod(1)
        counts[vectors] -= growth
        return (scale * (after - before)).sum().item(), vectors, growth


class CostModel:
    """Predicts MACs and parameters of a cut from the analysis, without making it; and what a provider takes for it.

    Args:
        analysis: of the graph.
        latency: the fixed part of the latency and its terms, for the cost ``latency``.
    """

    def __init__(self, analysis: Analysis, latency: tuple[float, list[Term]] | None = None) -> None:
        self.analysis = analysis
        self._latency = latency
        self.total_macs = macs(analysis.graph, analysis.probe.shapes)
        self.total_params = params(analysis.graph)
        self._tallies: dict[str, tuple[float, Tally]] = {}

    def tally(self, name: str) -> tuple[float, Tally]:
        """The part of a cost that no cut changes, and the sum that follows the kept units.

        Args:
            name: ``macs``, ``params``, ``channels`` or ``latency``.
        """
        if name not in self._tallies:
            fixed, terms = self.terms(name)
            self._tallies[name] = fixed, Tally(terms, self.analysis.units)
        return self._tallies[name]

    def terms(self, name: str) -> tuple[float, list[Term]]:
        """The part of a cost that no cut changes, and the terms that follow the kept units."""
        if name == "latency":
            assert self._latency is not None, "a latency needs the measured terms"
            return self._latency
        if name == "channels":
            return 0, [Term(1, (np.flatnonzero(~self.analysis.pinned),))]
        if name == "macs":
            terms = [Term(w.scale, w.factors) for w in self.analysis.works]
            return self.total_macs - _size(terms), terms
        stored, replaced = self._stored_tensors()
        computed = [self._term(weight, axes) for weight, axes in self.computed().items()]
        return self.total_params - _size(stored) - replaced, stored + computed

    def full(self, name: str) -> int:
        """A cost of the file as it is, which budgets are fractions of."""
        return {"macs": self.total_macs, "params": self.total_params}.get(name) or self._cost(
            name, np.ones(self.analysis.units, bool)
        )

    def macs(self, keep: np.ndarray) -> int:
        """MACs when only the units ``keep`` are left."""
        return self._cost("macs", keep)

    def params(self, keep: np.ndarray) -> int:
        """Parameters when only the units ``keep`` are left."""
        return self._cost("params", keep)

    def channels(self, keep: np.ndarray) -> int:
        """Prunable units that are left."""
        return self._cost("channels", keep)

    def latency(self, keep: np.ndarray) -> float:
        """Predicted latency when only the units ``keep`` are left, in the unit of its terms."""
        return self._cost("latency", keep)

    def _cost(self, name: str, keep: np.ndarray) -> float:
        fixed, tally = self.tally(name)
        return fixed + tally.total(tally.counts(keep))

    def computed(self) -> dict[str, dict[int, np.ndarray]]:
        """Weights that nodes compute (standardised ones) by name, with the labels that they follow.

        A cut writes them out; what they are computed from can go when all of them are.
        """
        made: dict[str, dict[int, np.ndarray]] = {}
        for operand in self.analysis.operands:
            name = operand.node.inputs[operand.input]
            value = self.analysis.probe.values.get(name)
            if value is not None and value.dtype.kind not in "iub" and name not in self.analysis.probe.varying:
                node = self.analysis.graph.producer.get(name)
                if node is not None and node.op_type != "ConstantOfShape" and self._stored(name) is None:
                    made.setdefault(name, operand.axes)
        return made

    def _stored_tensors(self) -> tuple[list[Term], int]:
        """Elements of each stored tensor that follows labels; and of those that only :meth:`computed` ones need."""
        uses: dict[str, tuple[str, dict[int, np.ndarray]]] = {}
        for operand in self.analysis.operands:
            name = operand.node.inputs[operand.input]
            stored = self._stored(name)
            if stored is not None:
                # Uses that want different slices get a copy each, but only once something is cut: the first one counts.
                uses.setdefault(stored, (name, operand.axes))
        sources = self._sources(set(self.computed()))
        replaced = sum(product(self.analysis.graph.initializers[name].dims) for name in sources)
        return [self._term(name, axes) for key, (name, axes) in uses.items() if key not in sources], replaced

    def _term(self, name: str, axes: dict[int, np.ndarray]) -> Term:
        rest = product(d for a, d in enumerate(self.analysis.probe.shapes[name]) if a not in axes)
        return Term(rest, tuple(axes.values()))

    def _sources(self, computed: set[str]) -> set[str]:
        """Stored weights that nothing but the computation of ``computed`` reads."""
        graph = self.analysis.graph
        gone: set[str] = set()
        for node in reversed(graph.nodes):
            for name in node.outputs:
                readers = graph.readers.get(name, ())
                unread = name in computed or all(set(reader.outputs) <= gone for reader, _ in readers)
                if unread and graph.is_static(name) and name not in graph.captured and name not in graph.outputs:
                    gone.add(name)
        return {
            name
            for name, tensor in graph.initializers.items()
            if tensor.data_type not in NO_WEIGHTS
            and graph.readers.get(name)
            and all(set(reader.outputs) <= gone for reader, _ in graph.readers[name])
        }

    def _stored(self, name: str) -> str | None:
        """The initializer or Constant that holds a static tensor's elements one to one, if there is one."""
        graph, shapes = self.analysis.graph, self.analysis.probe.shapes
        size = product(shapes.get(name, ()))
        while name not in graph.initializers:
            node = graph.producer.get(name)
            if node is None or node.op_type == "Constant":
                return name if node is not None else None
            if node.op_type not in CARRIERS or product(shapes.get(node.inputs[0], ())) != size:
                return None
            name = node.inputs[0]
        return None if graph.initializers[name].data_type in NO_WEIGHTS else name


def _size(terms: Sequence[Term]) -> int:
    """What terms come to when everything stays."""
    return sum(t.scale * product(len(v) for v in t.factors) for t in terms)
