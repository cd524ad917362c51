"""The reference of a lossy cut: the original graph in which the removed channels no longer count.

At every sum that reads a removed position the position is replaced by zero (by the zero point in quantised graphs),
which is the same as zeroing the consumers' weights and also covers products of two activations. Where statistics run
across a released axis they are taken over the kept positions: gather, normalise, scatter back.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from .analysis import Analysis
from .cut import Cut
from .exact import Edits
from .records import Contraction, Released

# Input index of the zero point of a quantised data input, by operator and data input.
ZERO_POINTS = {("QLinearConv", 0): 2, ("ConvInteger", 0): 2, ("QLinearMatMul", 0): 2, ("MatMulInteger", 0): 2}


def masked_reference(analysis: Analysis, keep: np.ndarray, edits: Edits | None = None) -> onnx.ModelProto:
    """Return the original model with ``edits`` made and the units outside ``keep`` masked.

    Args:
        analysis: of the original.
        keep: bool (units,).
        edits: operand values that the cut was made with.
    """
    return _Masked(analysis, keep, edits or Edits()).model()


class _Masked(Cut):
    """A cut that removes nothing but masks what another cut would remove."""

    def __init__(self, analysis: Analysis, keep: np.ndarray, edits: Edits) -> None:
        super().__init__(analysis, np.ones(analysis.units, bool), edits)
        self.masked = Cut(analysis, keep, Edits())
        for contraction in analysis.contractions:
            mask = keep[contraction.labels]
            if not mask.all():
                self._mask(contraction, mask)
        by_node: dict[int, list[Released]] = {}
        for released in analysis.released:
            if not keep[released.labels].all():
                by_node.setdefault(released.node.index, []).append(released)
        for items in by_node.values():
            self._normalise_kept(items, keep)

    def _mask(self, contraction: Contraction, mask: np.ndarray) -> None:
        node = contraction.node
        i, axis = contraction.sides[0]
        x = node.inputs[i]
        rank = len(self.shape(x))
        proto = self.proto(node)
        dtype = self.probe.lines[x][axis].dtype
        flag, out = self._name(f"{x}_mask"), self._name(f"{x}_masked")
        mask = mask.reshape([-1 if a == axis else 1 for a in range(rank)])
        if dtype.kind in "iu":
            point = ZERO_POINTS.get((node.op_type, i), len(node.inputs))
            zero = node.inputs[point] if point < len(node.inputs) else ""
            if not zero:
                zero = self._name(f"{x}_zero")
                self._add(zero, np.zeros((), dtype))
            self._add(flag, mask)
            made = helper.make_node("Where", [flag, proto.input[i], zero], [out], name=self._name(f"{node.name}_mask"))
        else:
            self._add(flag, mask.astype(dtype))
            made = helper.make_node("Mul", [proto.input[i], flag], [out], name=self._name(f"{node.name}_mask"))
        self._before.setdefault(node.index, []).append(made)
        proto.input[i] = out

    def _normalise_kept(self, items: list[Released], keep: np.ndarray) -> None:
        """Gather the kept positions in front of a normalisation and scatter its output back among zeros."""
        node = items[0].node
        proto = self.proto(node)
        y = node.outputs[0]
        for released in items:
            mask = keep[released.labels]
            kept = np.flatnonzero(mask)
            self.gather_first(node, released.axis, kept)
            offset = len(self.shape(node.inputs[0]))
            for i in range(1, len(node.inputs)):
                operand = self._operands.get((node.index, i))
                for a, vector in (operand.axes if operand else {}).items():
                    if not keep[vector].all() and np.isin(vector, released.labels).all():
                        name = self._name(f"{node.inputs[i]}_kept")
                        self._add(name, np.asarray(self.value(node.inputs[i])).take(np.flatnonzero(keep[vector]), a))
                        proto.input[i] = name
            if offset == len(self.shape(y)) and self.shape(y)[released.axis] == len(mask):
                self._scatter(node.index, y, released.axis, mask)

    def _scatter(self, index: int, y: str, axis: int, mask: np.ndarray) -> None:
        proto = self._protos[index]
        inner, zero, padded, back = (self._name(f"{y}_{part}") for part in ("kept", "zero", "padded", "back"))
        pads = np.zeros(2 * len(self.shape(y)), np.int64)
        pads[len(self.shape(y)) + axis] = 1
        self._add(zero, pads)
        self._add(back, np.where(mask, np.cumsum(mask) - 1, mask.sum()).astype(np.int64))
        last = proto.output[0]
        proto.output[0] = inner
        self._after.setdefault(index, [])[:0] = [
            _pad(self.graph.opset, inner, zero, pads, padded),
            helper.make_node("Gather", [padded, back], [last], axis=axis),
        ]


def _pad(opset: int, x: str, pads_name: str, pads: np.ndarray, y: str) -> onnx.NodeProto:
    if opset < 11:
        return helper.make_node("Pad", [x], [y], pads=pads.tolist())
    return helper.make_node("Pad", [x, pads_name], [y])
