"""Attention as one operator (opset 23): whole heads go together, and so do the positions of a query-key product.

Query, key and value are (batch, heads, length, head size), or (batch, length, heads * head size) with the number of
heads in attributes. Several query heads may share one key and value head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..graph import Node
from ..labels import Vector
from ..records import Contraction
from .base import Rule, rule

if TYPE_CHECKING:
    from ..analysis import Context
    from ..cut import Cut

Q, K, V = range(3)


@rule("Attention")
class Attention(Rule):
    """Cuts whole heads, or positions inside every head (query and key together, value apart)."""

    def propagate(self, node: Node, ctx: Context) -> None:
        extra = [name for name in (*node.inputs[3:], *node.outputs[1:]) if name]
        if [name for name in extra if not ctx.static(name)] or any(len(ctx.shape(name)) > 2 for name in extra):
            ctx.pin_inputs(node, "its mask or its past may follow the heads")
            return
        flat = len(ctx.shape(node.inputs[Q])) == 3
        last = 2 if flat else 3
        passing = (0, 2) if flat else (0, 1, 3)
        vectors = [ctx.pin_except(node, name, passing, "it runs across axis {axis}") for name in node.inputs[:3]]
        if len({frozenset(v) for v in vectors}) > 1:
            ctx.pin_inputs(node, "only some of query, key and value can be cut")
            return
        out: dict[int, Vector] = {}
        if 0 in vectors[Q]:
            for other in vectors[1:]:
                ctx.join(vectors[Q][0], other[0])
            out[0] = vectors[Q][0]
        if last in vectors[Q]:
            wide = [v[last] for v in vectors]
            if flat:
                out[2] = self._flat(node, ctx, wide)
            else:
                ctx.join(wide[Q], wide[K])
                ctx.contractions.append(Contraction(node, ((Q, 3), (K, 3)), wide[Q]))
                out[3] = wide[V]
        if not flat and 1 in vectors[Q]:
            out[1] = self._heads(ctx, *(v[1] for v in vectors))
        ctx.set(node.outputs[0], out)

    def _heads(self, ctx: Context, q: Vector, k: Vector, v: Vector) -> Vector:
        """Join each key and value head with the query heads that read it."""
        ctx.join(k, v)
        ctx.join(q, np.repeat(k, len(q) // len(k)))
        return q

    def _flat(self, node: Node, ctx: Context, wide: list[Vector]) -> Vector:
        """Heads and their positions lie on one axis: cut the positions of every head alike, or whole heads."""
        shared = node.attribute("kv_num_heads")
        counts = [node.attribute("q_num_heads"), shared, shared]
        grids = [v.reshape(n, -1) for v, n in zip(wide, counts, strict=True)]
        where = ctx.choose(node, 0, [1, 0], {1: wide[Q], 0: wide[Q]})
        q, k, v = (ctx.labels.join_across(grid, where) for grid in grids)
        if where == 0:
            self._heads(ctx, q, k, v)
            return np.repeat(q, grids[V].shape[1])
        ctx.join(q, k)
        ctx.contractions.append(Contraction(node, ((Q, 2), (K, 2)), wide[Q]))
        return np.tile(v, counts[Q])

    def rewrite(self, node: Node, cut: Cut) -> None:
        """Keep the scale that the network was trained with, and count the heads that are left."""
        flat = len(cut.shape(node.inputs[Q])) == 3
        heads = node.attribute("q_num_heads") if flat else cut.shape(node.inputs[Q])[1]
        size = cut.shape(node.inputs[Q])[-1] // (heads if flat else 1)
        if not node.attribute("scale"):
            cut.set_attribute(node, "scale", float(size**-0.5))
        if not flat:
            return
        for name, attribute in ((node.inputs[Q], "q_num_heads"), (node.inputs[K], "kv_num_heads")):
            vector = cut.analysis.axes.get(name, {}).get(2)
            if vector is not None:
                grid = cut.keep[vector].reshape(node.attribute(attribute), -1)
                cut.set_attribute(node, attribute, int(grid.any(1).sum()))
