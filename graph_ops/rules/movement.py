"""Operators that move whole axes or runs of positions: the operator is applied to the label vectors themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..graph import Node
from ..labels import Vector
from .base import MICROSOFT, Rule, rule, varying_axes

if TYPE_CHECKING:
    from ..analysis import Context
    from ..constants import Constants, Traces
    from ..cut import Cut


class Move(Rule):
    """Base of rules whose outputs hold nothing but values of their inputs."""

    def traces(self, node: Node, known: Constants) -> Traces:
        """Where the axes of the data inputs go: by default each axis of the first input stays what it is."""
        return {0: {a: {a} for a in range(len(known.shape(node.inputs[0])))}}

    def constants(self, node: Node, known: Constants) -> None:
        known.move(node, self.traces(node, known))


@rule("Transpose")
class Transpose(Move):
    """Permutes the vectors."""

    def propagate(self, node: Node, ctx: Context) -> None:
        rank = len(ctx.shape(node.inputs[0]))
        perm = node.attribute("perm", list(range(rank))[::-1])
        vectors = ctx.vectors(node.inputs[0])
        ctx.set(node.outputs[0], {out: vectors[a] for out, a in enumerate(perm) if a in vectors})

    def traces(self, node: Node, known: Constants) -> Traces:
        rank = len(known.shape(node.inputs[0]))
        return {0: {a: {out} for out, a in enumerate(node.attribute("perm", list(range(rank))[::-1]))}}


@rule("Concat")
class Concat(Move):
    """Joins parts end to end; the other axes are joined like an addition's."""

    def parts(self, node: Node) -> list[int]:
        """Input indexes that are concatenated."""
        return list(range(len(node.inputs)))

    def propagate(self, node: Node, ctx: Context) -> None:
        out = node.outputs[0]
        rank = len(ctx.shape(out))
        cut_axis = node.attribute("axis") % rank
        names = [(i, node.inputs[i]) for i in self.parts(node)]
        fixed = [(i, n) for i, n in names if ctx.static(n) and not ctx.varies(n)]
        moving = [(i, n) for i, n in names if (i, n) not in fixed]
        result: dict[int, Vector] = {}
        for axis in range(rank):
            if axis == cut_axis or ctx.shape(out)[axis] == 1:
                continue
            found = [ctx.vectors(n).get(axis) for _, n in moving]
            vectors = [v for v in found if v is not None]
            for vector in vectors[1:]:
                ctx.join(vectors[0], vector)
            if vectors:
                if len(vectors) < len(found):
                    ctx.pin(vectors[0], node, f"not every part can be cut on axis {axis}")
                result[axis] = vectors[0]
        for i, _ in fixed:
            ctx.operand(node, i, result)
        if any(cut_axis in ctx.vectors(n) for _, n in moving):
            result[cut_axis] = np.concatenate(
                [self._part(node, ctx, i, n, cut_axis, (i, n) in fixed) for i, n in names]
            )
        ctx.set(out, result)

    def constants(self, node: Node, known: Constants) -> None:
        rank = len(known.shape(node.outputs[0]))
        traces = {i: {a: {a} for a in range(rank)} for i in self.parts(node)}
        known.move(node, traces, joins=node.attribute("axis") % rank)

    def _part(self, node: Node, ctx: Context, i: int, name: str, axis: int, fixed: bool) -> Vector:
        vector = ctx.vectors(name).get(axis)
        if vector is not None:
            return vector
        n = ctx.shape(name)[axis]
        vector = ctx.labels.fresh(n)
        if fixed and n > 1:
            ctx.produce(node, axis, vector, weight=(i, axis))
            ctx.operand(node, i, {axis: vector})
        else:
            ctx.pin(vector, node, f"its part {name!r} cannot be cut")
        return vector


@rule("QLinearConcat", domain=MICROSOFT)
class QuantizedConcat(Concat):
    """Joins quantised parts end to end."""

    def parts(self, node: Node) -> list[int]:
        return list(range(2, len(node.inputs), 3))

    def constants(self, node: Node, known: Constants) -> None:
        """Parts are re-quantised, so nothing is claimed."""


@rule("Split")
class Split(Move):
    """Cuts the vector into pieces; parts may keep different counts."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x = node.inputs[0]
        axis = node.attribute("axis", 0) % len(ctx.shape(x))
        start = 0
        for out in node.outputs:
            size = ctx.shape(out)[axis]
            pieces = dict(ctx.vectors(x))
            if axis in pieces:
                piece = pieces[axis][start : start + size]
                pieces[axis] = piece
                if size == 1:
                    ctx.pin(piece, node, "a part of length 1 cannot be cut")
            ctx.set(out, pieces)
            start += size

    def rewrite(self, node: Node, cut: Cut) -> None:
        axis = node.attribute("axis", 0) % len(cut.shape(node.inputs[0]))
        if cut.kept(node.inputs[0], axis) is None:
            return
        sizes = [cut.size(out, axis) for out in node.outputs]
        if cut.graph.opset >= 13:
            cut.feed(node, 1, np.asarray(sizes, np.int64))
            cut.drop_attribute(node, "num_outputs")
        else:
            cut.set_attribute(node, "split", sizes)


@rule("Slice")
class Slice(Move):
    """Slices the vectors; bounds are recounted."""

    def written(self, node: Node, ctx: Context | Cut) -> list[list[int]] | None:
        """Return starts, ends, axes and steps as the file has them, or ``None`` when they depend on data."""
        rank = len(ctx.shape(node.inputs[0]))
        if ctx.graph.opset < 10:
            starts, ends, axes, steps = node.attribute("starts"), node.attribute("ends"), node.attribute("axes"), None
        else:
            given = [ctx.value(n) if n else None for n in [*node.inputs[1:], "", ""][:4]]
            if given[0] is None or given[1] is None:
                return None
            starts, ends, axes, steps = (None if g is None else [int(v) for v in g.reshape(-1)] for g in given)
        axes = [a % rank for a in axes] if axes is not None else list(range(len(starts)))
        return [list(starts), list(ends), axes, steps if steps is not None else [1] * len(starts)]

    def propagate(self, node: Node, ctx: Context) -> None:
        written = self.written(node, ctx)
        if written is None:
            ctx.pin_inputs(node, "its bounds depend on data")
            return
        vectors = dict(ctx.vectors(node.inputs[0]))
        follows_size = any(ctx.varies(name) for name in node.inputs[1:])
        for start, end, axis, step in zip(*written, strict=True):
            if axis not in vectors:
                continue
            piece = vectors[axis][slice(*_bounds(start, end, step, len(vectors[axis])))]
            if follows_size or len(piece) == 1:
                ctx.pin(
                    vectors[axis] if follows_size else piece,
                    node,
                    "its bounds follow a dynamic size" if follows_size else f"it takes one position of axis {axis}",
                )
            vectors[axis] = piece
        ctx.set(node.outputs[0], vectors)

    def rewrite(self, node: Node, cut: Cut) -> None:
        written = self.written(node, cut)
        assert written is not None
        starts, ends, axes, steps = written
        changed = False
        for i, axis in enumerate(axes):
            kept = cut.kept(node.inputs[0], axis)
            if kept is None:
                continue
            changed = True
            size = len(cut.analysis.axes[node.inputs[0]][axis])
            start, end, step = _bounds(starts[i], ends[i], steps[i], size)
            if step == 1:
                starts[i], ends[i] = (int(np.searchsorted(kept, bound)) for bound in (start, end))
            else:  # a stride over kept positions is no stride any more
                taken = np.arange(size)[slice(start, end, step)]
                cut.gather_first(node, axis, np.searchsorted(kept, taken[np.isin(taken, kept)]))
                starts[i], ends[i], steps[i] = 0, int(np.iinfo(np.int32).max), 1
        if changed and cut.graph.opset < 10:
            for name, value in (("starts", starts), ("ends", ends), ("axes", axes)):
                cut.set_attribute(node, name, value)
        elif changed:
            for i, value in enumerate((starts, ends, axes, steps), start=1):
                cut.feed(node, i, np.asarray(value, np.int64))


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int | None, int]:
    """Normalise bounds to an axis of ``size`` positions; ``None`` as the end means: to the front."""
    first, last, step = slice(start, end if step > 0 or end >= -size else None, step).indices(size)
    return first, last if step > 0 or last >= 0 else None, step


@rule("Gather")
class Gather(Move):
    """Picks labels by a constant index; an embedding table starts fresh ones."""

    def propagate(self, node: Node, ctx: Context) -> None:
        data, indices, out = node.inputs[0], node.inputs[1], node.outputs[0]
        axis = node.attribute("axis", 0) % len(ctx.shape(data))
        shift = len(ctx.shape(indices)) - 1
        if ctx.static(data) and not ctx.varies(data):
            self._table(node, ctx, axis, shift)
            return
        result = {a if a < axis else a + shift: v for a, v in ctx.vectors(data).items() if a != axis}
        vector = ctx.vectors(data).get(axis)
        if vector is not None:
            index = ctx.value(indices)
            if index is None or (ctx.varies(indices) and not _is_reshape(node, ctx)) or index.size == 1:
                ctx.pin(vector, node, "it picks single positions or by data")
            else:
                self._pick(node, ctx, vector[index], axis, result)
        ctx.set(out, result)

    def traces(self, node: Node, known: Constants) -> Traces:
        rank, index_rank = len(known.shape(node.inputs[0])), len(known.shape(node.inputs[1]))
        axis = node.attribute("axis", 0) % rank
        picked = {axis: set(range(axis, axis + index_rank))}
        return {0: {a: {a if a < axis else a + index_rank - 1} for a in range(rank)} | picked}

    def _table(self, node: Node, ctx: Context, axis: int, shift: int) -> None:
        ctx.pin_except(node, node.inputs[1], (), "it holds indices")
        result = {}
        for a, n in enumerate(ctx.shape(node.inputs[0])):
            if a != axis and n > 1:
                out = a if a < axis else a + shift
                result[out] = ctx.fresh(node, out, n, weight=(0, a))
                ctx.operand(node, 0, {a: result[out]})
        ctx.set(node.outputs[0], result)

    def _pick(self, node: Node, ctx: Context, grid: np.ndarray, axis: int, result: dict[int, Vector]) -> None:
        if ctx.select_inputs and grid.ndim == 1:
            result[axis] = ctx.fork(node, axis, grid)
            return
        varying = varying_axes(ctx.labels.find(grid))
        if not varying:
            ctx.pin(grid.reshape(-1), node, "all positions are one unit")
            return
        ranked = sorted(varying, key=lambda a: -grid.shape[a])
        where = ctx.choose(node, 0, ranked, {a: grid.take(0, a) if grid.ndim > 1 else grid for a in ranked})
        result[axis + where] = ctx.labels.join_across(grid, where)

    def rewrite(self, node: Node, cut: Cut) -> None:
        data, indices = node.inputs[0], node.inputs[1]
        axis = node.attribute("axis", 0) % len(cut.shape(data))
        vector = cut.analysis.axes.get(data, {}).get(axis)
        if vector is None or not cut.graph.is_static(indices):
            return
        if indices in cut.probe.varying:
            if _is_reshape(node, cut):
                y = node.outputs[0]
                moving = cut.probe.moving_axes(y)
                target = [-1 if moving[a] else cut.size(y, a) for a in range(len(moving))]
                cut.proto(node).op_type = "Reshape"
                cut.drop_attribute(node, "axis")
                cut.feed(node, 1, np.asarray(target, np.int64))
            return
        kept = np.flatnonzero(cut.keep[vector])
        index = cut.value(indices) % len(vector)
        for a in range(index.ndim):
            positions = cut.kept(node.outputs[0], axis + a)
            if positions is not None:
                index = index.take(positions, a)
        index = np.searchsorted(kept, index).astype(np.int64)
        if np.array_equal(index, np.arange(len(kept))):
            cut.bypass(node)
        else:
            cut.feed(node, 1, index)


def _is_reshape(node: Node, place: Context | Cut) -> bool:
    """Whether a Gather takes every position of a line in order, whatever the dynamic sizes are.

    The dynamo exporter writes views by strides that way: a flat copy, and an index that counts through it.
    """
    probe, (data, indices) = place.probe, node.inputs[:2]
    index, other = probe.values.get(indices), probe.other_values.get(indices)
    if index is None or other is None or len(place.shape(data)) != 1 or sum(probe.moving_axes(node.outputs[0])) != 1:
        return False
    every = index.size == place.shape(data)[0] and (other.size,) == probe.other_shapes.get(data)
    return every and all(np.array_equal(v.reshape(-1), np.arange(v.size)) for v in (index, other))


@rule("Pad")
class Pad(Move):
    """Padding on a labelled axis starts fresh labels; the amounts are recounted."""

    def amounts(self, node: Node, ctx: Context | Cut) -> tuple[list[int], list[int]] | None:
        """Return the pads before and after, one entry an axis, or ``None`` when they depend on data."""
        rank = len(ctx.shape(node.inputs[0]))
        if ctx.graph.opset < 11:
            pads = node.attribute("pads") or node.attribute("paddings")
        else:
            value = ctx.value(node.inputs[1])
            if value is None:
                return None
            pads = [int(v) for v in value.reshape(-1)]
            if len(node.inputs) > 3 and node.inputs[3]:
                axes = ctx.value(node.inputs[3])
                if axes is None:
                    return None
                full = [0] * (2 * rank)
                for i, a in enumerate(axes.reshape(-1).tolist()):
                    full[a % rank], full[a % rank + rank] = pads[i], pads[i + len(pads) // 2]
                pads = full
        return list(pads[:rank]), list(pads[rank:])

    def propagate(self, node: Node, ctx: Context) -> None:
        amounts = self.amounts(node, ctx)
        if amounts is None:
            ctx.pin_inputs(node, "its amounts depend on data")
            return
        result = dict(ctx.vectors(node.inputs[0]))
        for axis, vector in list(result.items()):
            before, after = amounts[0][axis], amounts[1][axis]
            if before == after == 0:
                continue
            if before < 0 or after < 0 or node.attribute("mode", "constant") != "constant":
                ctx.pin(vector, node, f"it crops or reflects axis {axis}")
                del result[axis]
                continue
            padding = ctx.labels.fresh(before + after)
            ctx.produce(node, axis, padding)
            result[axis] = np.concatenate([padding[:before], vector, padding[before:]])
        ctx.set(node.outputs[0], result)

    def constants(self, node: Node, known: Constants) -> None:
        amounts = self.amounts(node, known)  # type: ignore[arg-type]
        if amounts is None:
            return
        fill = known.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.zeros(1)
        fill = node.attribute("value", 0.0) if known.graph.opset < 11 else None if fill is None else fill.reshape(-1)[0]
        x, y = node.inputs[0], node.outputs[0]
        for axis in known.axes(y):
            before, after = amounts[0][axis], amounts[1][axis]
            inner = known.flags(x, axis)
            filled = node.attribute("mode", "constant") == "constant"
            if filled and any(a != axis and amounts[0][a] | amounts[1][a] for a in range(len(amounts[0]))):
                inner = inner & (known.line(x, axis) == fill) if fill is not None else np.zeros_like(inner)
            edge = np.full(before, fill is not None), np.full(after, fill is not None)
            if before >= 0 and after >= 0 and len(inner) + before + after == known.shape(y)[axis]:
                known.set(y, axis, np.concatenate([edge[0], inner, edge[1]]))

    def rewrite(self, node: Node, cut: Cut) -> None:
        amounts = self.amounts(node, cut)
        before, after = amounts if amounts is not None else ([], [])
        changed = False
        for axis in range(len(before)):
            kept = cut.kept(node.outputs[0], axis)
            if kept is not None and before[axis] + after[axis]:
                inside = len(cut.analysis.axes[node.inputs[0]][axis])
                before[axis], after[axis] = (
                    int((kept < before[axis]).sum()),
                    int((kept >= before[axis] + inside).sum()),
                )
                changed = True
        if not changed:
            return
        if cut.graph.opset < 11:
            cut.set_attribute(node, "pads", before + after)
        else:
            cut.feed(node, 1, np.asarray(before + after, np.int64))
            if len(node.inputs) > 3:
                cut.drop_input(node, 3)


@rule("Tile")
class Tile(Move):
    """Repeats the vectors."""

    def propagate(self, node: Node, ctx: Context) -> None:
        repeats = ctx.value(node.inputs[1])
        if repeats is None:
            ctx.pin_inputs(node, "its repeats depend on data")
            return
        axes = ctx.spread(node, lambda a: a)
        ctx.set(node.outputs[0], {a: np.tile(v, int(repeats[a])) for a, v in axes.items()})


@rule("Expand")
class Expand(Move):
    """Passes the axes that keep their length; new ones cannot be cut."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x, y = node.inputs[0], node.outputs[0]
        shift = len(ctx.shape(y)) - len(ctx.shape(x))
        ctx.set(y, {a + shift: v for a, v in ctx.spread(node, lambda a: a + shift).items()})

    def traces(self, node: Node, known: Constants) -> Traces:
        rank, shift = len(known.shape(node.inputs[0])), len(known.shape(node.outputs[0]))
        return {0: {a: {a + shift - rank} for a in range(rank)}}

    def rewrite(self, node: Node, cut: Cut) -> None:
        cut.resize_operand(node, 1)


@rule("ConstantOfShape")
class ConstantOfShape(Rule):
    """The same value everywhere, in a shape that follows a dynamic size: the other axes are cut freely."""

    def propagate(self, node: Node, ctx: Context) -> None:
        y = node.outputs[0]
        moving = ctx.probe.moving_axes(y)
        ctx.set(y, {a: ctx.labels.fresh(n) for a, n in enumerate(ctx.shape(y)) if not moving[a]})

    def constants(self, node: Node, known: Constants) -> None:
        for axis, vector in known.axes(node.outputs[0]).items():
            known.set(node.outputs[0], axis, np.ones(len(vector), bool))

    def rewrite(self, node: Node, cut: Cut) -> None:
        cut.resize_operand(node, 0)
