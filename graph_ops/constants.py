"""Channels that are the same number everywhere, whatever the input.

A zero BatchNorm scale leaves the constant bias: dead is not zero. Such a channel is found here from either form of the
graph (BN kept, or folded into a filter that is all zero) and through everything that keeps a constant constant. The
analysis only says *which* channels are constant; their value is read from the probe run, as the runtime computes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .analysis import Analysis, Axes
from .graph import Node
from .labels import Vector
from .probe import Shape
from .rules import rule_for


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
        """Which positions of an axis are constant, bool (dim,)."""
        found = self._flags.get((name, axis))
        return found if found is not None else np.zeros(self.shape(name)[axis], bool)

    def line(self, name: str, axis: int) -> np.ndarray:
        """One sample of every position of an axis; a constant position's value, float64 (dim,)."""
        return np.asarray(self.analysis.probe.lines[name][axis], np.float64)

    def zeros(self, name: str, axis: int) -> np.ndarray:
        """Which positions of an axis are constant zero, bool (dim,)."""
        flags = self.flags(name, axis)
        return flags & (self.line(name, axis) == 0) if flags.any() else flags

    def set(self, name: str, axis: int, flags: np.ndarray) -> None:
        """Mark constant positions; a value that is not finite is never one."""
        if flags.any():
            self._flags[name, axis] = flags & np.isfinite(self.line(name, axis))

    def move(self, node: Node, *, only_zeros: bool = False) -> None:
        """Flags of a node that only moves data: a position is constant when all inputs with its label are."""
        seen = np.zeros(self.analysis.units, bool)
        live = np.zeros(self.analysis.units, bool)
        for name in node.inputs:
            for axis, vector in self.axes(name).items():
                constant = self.zeros(name, axis) if only_zeros else self.flags(name, axis)
                seen[vector] = True
                live[vector[~constant]] = True
        for fork in self.analysis.forks:
            if fork.node is node:
                seen[fork.labels], live[fork.labels] = seen[fork.source], live[fork.source]
        for out in node.outputs:
            for axis, vector in self.axes(out).items():
                self.set(out, axis, seen[vector] & ~live[vector])


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
