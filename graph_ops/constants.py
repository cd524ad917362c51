"""Channels that are the same number everywhere, whatever the input.

A zero BatchNorm scale leaves the constant bias: dead is not zero. Such a channel is found here from either form of the
graph (BN kept, or folded into a filter that is all zero) and through everything that keeps a constant constant. The
analysis only says *which* channels are constant; their value is read from the probe run, as the runtime computes it.

Where data is moved, a position of an axis can come to hold several constants: the view (2, C / 2) of a channel axis has
two channels at each position of its last axis. Such a position is *mixed* along the other axis. It counts as constant
only to the operators that move on, and again to everybody once they have taken it apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .analysis import Analysis
from .graph import Node
from .labels import Vector
from .probe import Shape
from .records import Axes
from .rules import rule_for

Traces = dict[int, dict[int, set[int]]]
"""For inputs of a node by index: which output axes the positions of each of their axes end up on."""


class Constants:
    """Constant flags of every labelled axis; filled by the rules in topological order.

    Attributes:
        varying: names of static tensors that follow a dynamic size (their values are not constants).
        memo: what :mod:`.exact` worked out about the graph's sums.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.graph = analysis.graph
        self.varying = analysis.probe.varying
        self.memo: Any = None
        self._flags: dict[tuple[str, int], np.ndarray] = {}
        self._mixed: dict[tuple[str, int], set[int]] = {}
        self._operands = {(o.node.index, o.input): o.axes for o in analysis.operands}
        for node in self.graph.nodes:
            if any(out in analysis.axes for out in node.outputs):
                rule_for(node).constants(node, self)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor at the probed sizes."""
        return self.analysis.probe.shapes.get(name, ())

    def axes(self, name: str) -> Axes:
        """Labelled axes of a tensor."""
        return self.analysis.axes.get(name, {})

    def value(self, name: str) -> np.ndarray | None:
        """Value of a static tensor that follows no dynamic size."""
        return None if name in self.varying else self.analysis.value(name)

    def flags(self, name: str, axis: int) -> np.ndarray:
        """Which positions of an axis are constant: one number whatever the input, bool (dim,)."""
        return self._any_flags(name, axis) & (not self._mixed.get((name, axis)))

    def _any_flags(self, name: str, axis: int) -> np.ndarray:
        """Which positions hold nothing but constants, be they several, bool (dim,)."""
        found = self._flags.get((name, axis))
        return found if found is not None else np.zeros(self.shape(name)[axis], bool)

    def line(self, name: str, axis: int) -> np.ndarray:
        """One sample of every position of an axis; a constant position's value, float64 (dim,)."""
        return np.asarray(self.analysis.probe.lines[name][axis], np.float64)

    def zeros(self, name: str, axis: int) -> np.ndarray:
        """Which positions of an axis are constant zero, bool (dim,)."""
        flags = self.flags(name, axis)
        return flags & (self.line(name, axis) == 0) if flags.any() else flags

    def set(self, name: str, axis: int, flags: np.ndarray, mixed: set[int] | None = None) -> None:
        """Mark constant positions; a value that is not finite is never one.

        Args:
            name: tensor.
            axis: of the tensor.
            flags: which of its positions are constant, bool (dim,).
            mixed: other axes along which a position's constant may change.
        """
        if flags.any():
            self._flags[name, axis] = flags & np.isfinite(self.line(name, axis))
            self._mixed[name, axis] = mixed or set()

    def move(self, node: Node, traces: Traces, *, joins: int | None = None) -> None:
        """Flags of a node that only moves data: a position is constant when all inputs with its label are.

        Args:
            node: the node.
            traces: where the axes of its inputs go; other inputs hold no data.
            joins: output axis along which several inputs lie end to end.
        """
        seen = np.zeros(self.analysis.units, bool)
        live = np.zeros(self.analysis.units, bool)
        mixed: dict[int, set[int]] = {}
        for i, trace in traces.items():
            found = self._moved(node.index, i, node.inputs[i])
            for axis, (vector, constant, others) in found.items():
                seen[vector] = True
                live[vector[~constant]] = True
                if constant.any():
                    goes = trace[axis].union(*(trace[other] for other in others))
                    for out in trace[axis]:
                        mixed.setdefault(out, set()).update(goes - {out})
            if joins is not None:  # what cannot be cut here may be anything
                for axis in set(self.axes(node.outputs[0])) - set(found) - {joins}:
                    live[self.axes(node.outputs[0])[axis]] = True
        for fork in self.analysis.forks:
            if fork.node is node:
                seen[fork.labels[seen[fork.source]]] = True
                live[fork.labels[live[fork.source]]] = True
        for out in node.outputs:
            for axis, vector in self.axes(out).items():
                along = mixed.get(axis, set()) | ({joins} if joins not in (None, axis) else set())
                self.set(out, axis, seen[vector] & ~live[vector], along)

    def _moved(self, n: int, i: int, name: str) -> dict[int, tuple[Vector, np.ndarray, set[int]]]:
        """By axis of a node's input: labels, constant positions, and the axes that these are mixed along."""
        found = {
            axis: (vector, self._any_flags(name, axis), self._mixed.get((name, axis), set()))
            for axis, vector in self.axes(name).items()
        }
        value = self.value(name) if (n, i) in self._operands else None
        for axis, vector in self._operands.get((n, i), {}).items():
            constant = np.zeros(len(vector), bool)
            if value is not None:
                rows = np.moveaxis(value, axis, 0).reshape(len(vector), -1)
                constant = (rows == rows[:, :1]).all(1)
            found[axis] = vector, constant, set()
        return found


def constant_units(known: Constants) -> Vector:
    """Units that are constant wherever a sum reads them, bool (units,); for reports."""
    seen = np.zeros(known.analysis.units, bool)
    live = np.zeros(known.analysis.units, bool)
    for contraction in known.analysis.contractions:
        for i, axis in contraction.sides:
            flags = known.flags(contraction.node.inputs[i], axis)
            seen[contraction.labels] = True
            live[contraction.labels[~flags]] = True
    return seen & ~live
