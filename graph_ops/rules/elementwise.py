"""Element-wise operators with broadcasting: the labels of all inputs are joined axis by axis.

An input of length 1 on an axis broadcasts and imposes nothing; a static input takes the labels and is sliced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..graph import Node
from .base import MICROSOFT, Rule, rule

if TYPE_CHECKING:
    from ..analysis import Context
    from ..constants import Constants

UNARY = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
BINARY = [
    "Add",
    "And",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "Pow",
    "PRelu",
    "Sub",
    "Sum",
    "Where",
    "Xor",
]


@rule(*UNARY, *BINARY)
@rule("Gelu", "FastGelu", "QuickGelu", "BiasGelu", domain=MICROSOFT)
class Elementwise(Rule):
    """Joins the labels of all inputs axis by axis; static inputs are sliced."""

    def data(self, node: Node) -> list[tuple[int, str]]:
        """The inputs that broadcast against each other, as (index, name)."""
        return [(i, name) for i, name in enumerate(node.inputs) if name]

    def propagate(self, node: Node, ctx: Context) -> None:
        out_shape = ctx.shape(node.outputs[0])
        rank = len(out_shape)
        result = {}
        for axis in range(rank):
            vectors, blocker = [], None
            for _, name in self.data(node):
                own = axis - rank + len(ctx.shape(name))
                if own < 0 or ctx.shape(name)[own] == 1 or (ctx.static(name) and not ctx.varies(name)):
                    continue
                vector = ctx.vectors(name).get(own)
                if vector is None:
                    blocker = name
                else:
                    vectors.append(vector)
            if not vectors:
                continue
            for vector in vectors[1:]:
                ctx.join(vectors[0], vector)
            if blocker is not None:
                ctx.pin(vectors[0], node, f"the other input {blocker!r} cannot be cut on that axis")
            result[axis] = vectors[0]
        for i, name in self.data(node):
            if ctx.static(name):
                offset = rank - len(ctx.shape(name))
                ctx.operand(node, i, {a - offset: v for a, v in result.items() if a >= offset})
        for out in node.outputs:
            if out:
                ctx.set(out, result)

    def constants(self, node: Node, known: Constants) -> None:
        out = node.outputs[0]
        rank = len(known.shape(out))
        for axis in known.axes(out):
            every = np.ones(known.shape(out)[axis], bool)
            zero = np.zeros_like(every)
            for _, name in self.data(node):
                flags, zeros = self._operand(name, axis - rank + len(known.shape(name)), len(every), known)
                every &= flags
                zero |= zeros
            # Zero times anything finite stays zero: a dead channel behind a gate is dead.
            known.set(out, axis, every | zero if node.op_type == "Mul" else every)

    def _operand(self, name: str, own: int, n: int, known: Constants) -> tuple[np.ndarray, np.ndarray]:
        """Which of the ``n`` positions an operand holds constant, and constant zero."""
        shape = known.shape(name)
        value = known.value(name)
        if value is not None and name not in known.varying:
            value = np.asarray(value)
            if own < 0 or shape[own] == 1:
                flat = value.reshape(1, -1)
            else:
                flat = np.moveaxis(value, own, 0).reshape(shape[own], -1)
            flags = (flat == flat[:, :1]).all(1)
            return np.broadcast_to(flags, n), np.broadcast_to(flags & (flat[:, 0] == 0), n)
        if own < 0 or shape[own] == 1:
            return np.zeros(n, bool), np.zeros(n, bool)
        return known.flags(name, own), known.zeros(name, own)


@rule("CastLike", "Dropout")
class FirstInput(Elementwise):
    """Passes the first input's labels on; the other inputs are settings."""

    def data(self, node: Node) -> list[tuple[int, str]]:
        return [(0, node.inputs[0])]


@rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
class QuantizedBinary(Elementwise):
    """Joins the labels of both quantised inputs; scales and zero points are per tensor."""

    def data(self, node: Node) -> list[tuple[int, str]]:
        return [(0, node.inputs[0]), (3, node.inputs[3])]

    def constants(self, node: Node, known: Constants) -> None:
        """Stored zeros are not real zeros here, so nothing is claimed."""


@rule("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
class QuantizedUnary(FirstInput):
    """Passes the quantised input's labels on."""


@rule("QuantizeLinear", "DequantizeLinear")
@rule("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
class Quantize(Rule):
    """Passes labels on; per-channel scales and zero points are sliced."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x, scale = node.inputs[0], node.inputs[1]
        axes = dict(ctx.vectors(x))
        if node.attribute("block_size", 0) or not ctx.static(scale):
            ctx.pin_inputs(node, "its scales are blocked or computed from data")
        elif len(ctx.shape(scale)) == 1 and ctx.shape(scale)[0] > 1:
            axis = node.attribute("axis", 1) % len(ctx.shape(x))
            for i in (1, 2):
                ctx.operand(node, i, {0: axes[axis]} if axis in axes else {})
        ctx.set(node.outputs[0], axes)

    def constants(self, node: Node, known: Constants) -> None:
        for axis in known.axes(node.outputs[0]):
            known.set(node.outputs[0], axis, known.flags(node.inputs[0], axis))
