"""Reshape and its relatives, in minimal blocks of axes with equal products.

Inside a block the vector is laid out over the input axes, reshaped like the data, and looked at: if it varies along
one output axis, that axis carries it. If it varies along several (channel shuffle, heads), a grid can be cut only along
one: the axis is chosen and the labels are joined across the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..graph import Node
from ..labels import Vector
from .base import product, rule, varying_axes
from .movement import Move

if TYPE_CHECKING:
    from ..analysis import Context
    from ..constants import Constants, Traces
    from ..cut import Cut

Block = tuple[list[int], list[int]]


def blocks(before: Sequence[int], after: Sequence[int]) -> list[Block]:
    """Split two shapes of equal size into minimal runs of axes with equal products; axes of length 1 are left out.

    >>> blocks((1, 6, 4, 4), (1, 2, 3, 16))
    [([1], [1, 2]), ([2, 3], [3])]
    """
    a = [i for i, n in enumerate(before) if n != 1]
    b = [i for i, n in enumerate(after) if n != 1]
    result: list[Block] = []
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        n, m = before[a[i]], after[b[j]]
        i, j = i + 1, j + 1
        while n != m:
            if n < m:
                left.append(a[i])
                n, i = n * before[a[i]], i + 1
            else:
                right.append(b[j])
                m, j = m * after[b[j]], j + 1
        result.append((left, right))
    return result


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
class Reshape(Move):
    """Lays the labels out like the data, block by block; target shapes are recomputed."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x, y = node.inputs[0], node.outputs[0]
        before, after = ctx.shape(x), ctx.shape(y)
        vectors = ctx.vectors(x)
        if not vectors:
            return
        if product(before) == 0:
            ctx.pin_inputs(node, "it is empty")
            return
        other = ctx.probe.other_shapes.get(y, after)
        if len(other) != len(after):
            ctx.pin_inputs(node, "its rank follows a dynamic size")
            return
        result: dict[int, Vector] = {}
        for number, (left, right) in enumerate(blocks(before, after)):
            labelled = [a for a in left if a in vectors]
            if not labelled:
                continue
            if len(left) == len(right) == 1:
                result[right[0]] = vectors[left[0]]
                continue
            main = max(labelled, key=lambda a: before[a])
            for other in labelled:
                if other != main:
                    ctx.pin(vectors[other], node, "it merges two axes that could be cut")
            grid = vectors[main].reshape([-1 if a == main else 1 for a in left])
            grid = np.broadcast_to(grid, [before[a] for a in left]).reshape([after[a] for a in right])
            self._place(node, ctx, number, grid, right, result)
        ctx.set(y, result)

    def _place(
        self, node: Node, ctx: Context, number: int, grid: np.ndarray, axes: list[int], result: dict[int, Vector]
    ) -> None:
        if len(axes) == 1:
            result[axes[0]] = np.ascontiguousarray(grid)
            return
        varying = varying_axes(ctx.labels.find(grid))
        if not varying:
            ctx.pin(grid.reshape(-1), node, "all its positions are one unit")
            return
        rows = {a: np.moveaxis(grid, a, 0).reshape(grid.shape[a], -1)[:, 0] for a in varying}
        if len(varying) > 1:
            ranked = sorted(varying, key=lambda a: (-grid.shape[a], -a))
            where = ctx.choose(node, number, ranked, rows)
            result[axes[where]] = ctx.labels.join_across(grid, where)
        else:
            result[axes[varying[0]]] = rows[varying[0]].copy()

    def traces(self, node: Node, known: Constants) -> Traces:
        before, after = known.shape(node.inputs[0]), known.shape(node.outputs[0])
        goes: dict[int, set[int]] = {a: set() for a in range(len(before))}
        for left, right in blocks(before, after):
            goes.update({axis: set(right) for axis in left})
        return {0: goes}

    def rewrite(self, node: Node, cut: Cut) -> None:
        if node.op_type == "Reshape":
            cut.resize_operand(node, 1)
        elif node.op_type == "Squeeze" and not node.attribute("axes") and not any(node.inputs[1:]):
            # Without axes it takes every length of 1, also that of an axis that was cut to one position.
            axes = [a for a, n in enumerate(cut.shape(node.inputs[0])) if n == 1]
            if cut.graph.opset >= 13:
                cut.feed(node, 1, np.asarray(axes, np.int64))
            else:
                cut.set_attribute(node, "axes", axes)
