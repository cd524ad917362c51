"""Matrix products: labels on the contracted axis end, the weight's other axis starts fresh ones.

A product of two activations joins the contracted axes of both and passes the outer ones (attention).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..graph import Node
from ..labels import Vector
from ..records import Contraction, Work
from .base import Rule, product, rule
from .conv import reads_anything

if TYPE_CHECKING:
    from ..analysis import Context
    from ..constants import Constants


def add_work(node: Node, ctx: Context, out_axes: dict[int, Vector], k: int, k_vector: Vector | None) -> None:
    """Count ``out elements x k`` multiply-accumulates."""
    shape = ctx.shape(node.outputs[0])
    factors = [v for a, v in out_axes.items() if len(v) == shape[a] > 1]
    scale = product(d for a, d in enumerate(shape) if not (a in out_axes and d > 1))
    if k_vector is None:
        scale *= k
    else:
        factors.append(k_vector)
    ctx.works.append(Work(node, scale, tuple(factors)))


@rule("MatMul")
class MatMul(Rule):
    """Ends labels on the contracted axis, starts fresh ones on a weight's outer axis, passes the others."""

    sides = (0, 1)

    def propagate(self, node: Node, ctx: Context) -> None:
        left, right = (node.inputs[i] for i in self.sides)
        if min(len(ctx.shape(left)), len(ctx.shape(right))) < 2:
            ctx.pin_inputs(node, "a product with a vector")
        elif ctx.static(right) and not ctx.varies(right):
            self._with_weight(node, ctx, data=0, weight=1)
        elif ctx.static(left) and not ctx.varies(left):
            self._with_weight(node, ctx, data=1, weight=0)
        else:
            self._of_activations(node, ctx)

    def _with_weight(self, node: Node, ctx: Context, data: int, weight: int) -> None:
        x, w = node.inputs[self.sides[data]], node.inputs[self.sides[weight]]
        y, rank_x, rank_w = node.outputs[0], len(ctx.shape(x)), len(ctx.shape(w))
        rank = len(ctx.shape(y))
        # x @ w contracts the last axis of x with the first matrix axis of w; w @ x is the mirror image.
        k_x, k_w, outer_w = (rank_x - 1, rank_w - 2, rank_w - 1) if data == 0 else (rank_x - 2, rank_w - 1, rank_w - 2)
        vector = ctx.vectors(x).get(k_x)
        out = {a + rank - rank_x: v for a, v in ctx.vectors(x).items() if a != k_x}
        outer = rank - 1 if data == 0 else rank - 2
        follows = {a - rank + rank_w: v for a, v in out.items() if a - rank + rank_w >= 0 and a < rank - 2}
        if ctx.shape(y)[outer] > 1:
            out[outer] = ctx.fresh(node, outer, ctx.shape(y)[outer], weight=(self.sides[weight], outer_w))
            follows[outer_w] = out[outer]
        if vector is not None:
            follows[k_w] = vector
            ctx.contractions.append(
                Contraction(
                    node,
                    ((self.sides[data], k_x),),
                    vector,
                    weight=(self.sides[weight], k_w),
                    out=(self.sides[weight], outer_w),
                )
            )
        ctx.operand(node, self.sides[weight], follows)
        add_work(node, ctx, out, ctx.shape(x)[k_x], vector)
        ctx.set(y, out)

    def _of_activations(self, node: Node, ctx: Context) -> None:
        left, right = (node.inputs[i] for i in self.sides)
        y = node.outputs[0]
        rank, rank_l, rank_r = (len(ctx.shape(name)) for name in (y, left, right))
        out: dict[int, Vector] = {}
        for axis in range(rank - 2):
            found = []
            for name, own in ((left, axis - rank + rank_l), (right, axis - rank + rank_r)):
                if own < 0 or ctx.shape(name)[own] == 1:
                    continue
                found.append(ctx.vectors(name).get(own))
            vectors = [v for v in found if v is not None]
            if vectors:
                for vector in vectors[1:]:
                    ctx.join(vectors[0], vector)
                if len(vectors) < len(found):
                    ctx.pin(vectors[0], node, "only one input can be cut on a batch axis")
                out[axis] = vectors[0]
        if (rows := ctx.vectors(left).get(rank_l - 2)) is not None:
            out[rank - 2] = rows
        if (columns := ctx.vectors(right).get(rank_r - 1)) is not None:
            out[rank - 1] = columns
        a, b = ctx.vectors(left).get(rank_l - 1), ctx.vectors(right).get(rank_r - 2)
        if a is not None and b is not None:
            ctx.join(a, b)
            ctx.contractions.append(Contraction(node, ((self.sides[0], rank_l - 1), (self.sides[1], rank_r - 2)), a))
        elif a is not None or b is not None:
            ctx.pin(a if a is not None else b, node, "only one of two activations can be cut on the summed axis")
        both = a if a is not None and b is not None else None
        add_work(node, ctx, out, ctx.shape(left)[-1], both)
        ctx.set(y, out)

    def constants(self, node: Node, known: Constants) -> None:
        right = known.value(node.inputs[self.sides[1]])
        y = node.outputs[0]
        axis = len(known.shape(y)) - 1
        if right is None or right.ndim != 2 or axis not in known.axes(y) or self.sides != (0, 1):
            return
        x = node.inputs[0]
        bad = ~known.flags(x, len(known.shape(x)) - 1)
        known.set(y, axis, ~(reads_anything(right.T) if bad.all() else reads_anything(right.T[:, bad])))


@rule("MatMulInteger")
class MatMulInteger(MatMul):
    """Quantised MatMul with integer output."""

    def propagate(self, node: Node, ctx: Context) -> None:
        super().propagate(node, ctx)
        per_column = len(node.inputs) > 3 and ctx.static(node.inputs[3]) and len(ctx.shape(node.inputs[3])) == 1
        vector = ctx.vectors(node.outputs[0]).get(len(ctx.shape(node.outputs[0])) - 1)
        if per_column and vector is not None:
            ctx.operand(node, 3, {0: vector})

    def constants(self, node: Node, known: Constants) -> None:
        """Zero points shift the stored zeros, so nothing is claimed."""


@rule("QLinearMatMul")
class QLinearMatMul(MatMul):
    """Quantised MatMul; the weight's scales may be per column."""

    sides = (0, 3)

    def propagate(self, node: Node, ctx: Context) -> None:
        super().propagate(node, ctx)
        vector = ctx.vectors(node.outputs[0]).get(len(ctx.shape(node.outputs[0])) - 1)
        for i in (4, 5):
            if vector is not None and ctx.static(node.inputs[i]) and len(ctx.shape(node.inputs[i])) == 1:
                ctx.operand(node, i, {0: vector})


@rule("Gemm")
class Gemm(Rule):
    """Fully connected layer: ends its input's labels, starts fresh ones on its outputs."""

    def propagate(self, node: Node, ctx: Context) -> None:
        a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
        if not ctx.static(b) or ctx.varies(b):
            ctx.pin_inputs(node, "its weight depends on data")
            return
        row, k = (1, 0) if node.attribute("transA", 0) else (0, 1)
        k_b, n_b = (1, 0) if node.attribute("transB", 0) else (0, 1)
        vector = ctx.vectors(a).get(k)
        out = {0: ctx.vectors(a)[row]} if row in ctx.vectors(a) else {}
        follows = {}
        if ctx.shape(y)[1] > 1:
            out[1] = ctx.fresh(node, 1, ctx.shape(y)[1], weight=(1, n_b))
            follows[n_b] = out[1]
        if vector is not None:
            follows[k_b] = vector
            ctx.contractions.append(Contraction(node, ((0, k),), vector, weight=(1, k_b), out=(1, n_b), bias=2))
        ctx.operand(node, 1, follows)
        if len(node.inputs) > 2 and node.inputs[2]:
            offset = 2 - len(ctx.shape(node.inputs[2]))
            if ctx.static(node.inputs[2]):
                ctx.operand(node, 2, {axis - offset: v for axis, v in out.items() if axis >= offset})
            elif ctx.vectors(node.inputs[2]) or 1 in out:
                ctx.pin_inputs(node, "its bias depends on data")
                ctx.pin(out[1], node, "its bias depends on data")
        add_work(node, ctx, out, ctx.shape(a)[k], vector)
        ctx.set(y, out)

    def constants(self, node: Node, known: Constants) -> None:
        a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
        weight = known.value(b)
        if weight is None or 1 not in known.axes(y):
            return
        bias = known.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.zeros(1)
        if bias is None or (bias.ndim == 2 and bias.shape[0] > 1):
            return
        rows = weight if node.attribute("transB", 0) else weight.T
        bad = ~known.flags(a, 0 if node.attribute("transA", 0) else 1)
        known.set(y, 1, ~(reads_anything(rows) if bad.all() else reads_anything(rows[:, bad])))
