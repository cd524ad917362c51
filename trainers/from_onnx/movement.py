"""Operators that move data: transposes, joins, parts, picks, padding, repetition."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from .base import Operation, Outputs, Tensor, ints, operator


@operator("Transpose")
def transpose(op: Operation, x: Tensor) -> Tensor:
    return x.permute(op.attribute("perm") or tuple(reversed(range(x.dim()))))


@operator("Concat")
def concat(op: Operation, *inputs: Tensor) -> Tensor:
    axis, batch = op.attribute("axis"), op.batch
    if batch.factor > 1 and axis not in (0, -inputs[0].dim()) and any(len(x) == batch.actual for x in inputs):
        inputs = tuple(x.expand(batch.actual, *x.shape[1:]) if len(x) == batch.fixed == 1 else x for x in inputs)
    return torch.cat(inputs, axis)


@operator("Split")
def split(op: Operation, x: Tensor, given: Tensor | None = None) -> Outputs:
    """Cut into parts of given lengths, or of equal ones with a shorter last part."""
    axis = op.attribute("axis", 0)
    lengths = op.attribute("split") if given is None else ints(given)
    if lengths is None:
        lengths = math.ceil(x.shape[axis] / len(op.outputs))
    return tuple(x.split(lengths, axis))


@operator("Slice")
def slice_(
    op: Operation,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Take parts of axes, with steps of either sign; bounds beyond an axis mean its end."""
    first = op.attribute("starts") if starts is None else ints(starts)
    last = op.attribute("ends") if ends is None else ints(ends)
    along = op.attribute("axes") if axes is None else ints(axes)
    by = [1] * len(first) if steps is None else ints(steps)
    for axis, start, end, step in zip(along or range(len(first)), first, last, by, strict=True):
        where = range(*slice(*_bounds(start, end, step, x.shape[axis]), step).indices(x.shape[axis]))
        if step > 0:
            index = [slice(None)] * x.dim()
            index[axis] = slice(where.start, where.stop, step)
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.tensor(list(where), dtype=torch.int64, device=x.device))
    return x


def _bounds(start: int, end: int, step: int, n: int) -> tuple[int, int | None]:
    """Return Python's bounds: a negative end beyond the front of a backward slice is no end there."""
    return start, None if step < 0 and end < -n else end


@operator("Gather")
def gather(op: Operation, x: Tensor, index: Tensor) -> Tensor:
    axis = op.attribute("axis", 0) % x.dim()
    index = index.long()
    flat = torch.where(index < 0, index + x.shape[axis], index).reshape(-1)
    return x.index_select(axis, flat).reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


@operator("GatherElements")
def gather_elements(op: Operation, x: Tensor, index: Tensor) -> Tensor:
    axis = op.attribute("axis", 0)
    index = index.long()
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index))


@operator("GatherND")
def gather_nd(op: Operation, x: Tensor, index: Tensor) -> Tensor:
    batch = op.attribute("batch_dims", 0)
    places = list(index.long().unbind(-1))
    for axis in range(batch):
        lead = torch.arange(x.shape[axis], device=x.device)
        places.insert(axis, lead.view([-1 if a == axis else 1 for a in range(index.dim() - 1)]))
    return x[tuple(places)]


@operator("ScatterElements", "Scatter")
def scatter_elements(op: Operation, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis, kind = op.attribute("axis", 0), op.attribute("reduction", "none")
    index = index.long()
    index = torch.where(index < 0, index + x.shape[axis], index)
    if kind == "none":
        return x.scatter(axis, index, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, index, updates, names[kind])


@operator("ScatterND")
def scatter_nd(op: Operation, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    places = tuple(index.long().unbind(-1))
    kind = op.attribute("reduction", "none")
    if kind in ("none", "add"):
        return x.index_put(places, updates, accumulate=kind == "add")
    before = x[places]
    changed = {"mul": torch.mul, "max": torch.maximum, "min": torch.minimum}[kind](before, updates)
    return x.index_put(places, changed)


@operator("Pad")
def pad(
    op: Operation, x: Tensor, given: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Put a constant, the reflected or the edge's values, or the other end's, around the data; or crop it."""
    amounts = op.attribute("pads") if given is None else ints(given)
    along = list(range(x.dim())) if axes is None else [a % x.dim() for a in ints(axes)]
    mode = op.attribute("mode", "constant")
    if mode == "constant":
        fill = value.item() if value is not None and value.numel() else op.attribute("value", 0)
        both = [0] * (2 * x.dim())
        for place, axis in enumerate(along):
            both[2 * (x.dim() - 1 - axis)] = amounts[place]
            both[2 * (x.dim() - 1 - axis) + 1] = amounts[place + len(along)]
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), both, value=int(fill)).bool()
        return F.pad(x, both, value=fill)
    for place, axis in enumerate(along):
        before, behind = amounts[place], amounts[place + len(along)]
        if before or behind:
            x = x.index_select(axis, _padded_positions(mode, x.shape[axis], before, behind).to(x.device))
    return x


def _padded_positions(mode: str, n: int, before: int, behind: int) -> Tensor:
    """Return, for every position after padding, the one that its value comes from."""
    positions = torch.arange(-before, n + behind)
    if mode == "edge":
        return positions.clamp(0, n - 1)
    if mode == "wrap":
        return positions % n
    period = max(2 * (n - 1), 1)
    folded = positions % period
    return torch.where(folded < n, folded, period - folded)


@operator("Tile")
def tile(op: Operation, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(ints(repeats))


@operator("DepthToSpace")
def depth_to_space(op: Operation, x: Tensor) -> Tensor:
    b, (n, c, h, w) = op.attribute("blocksize"), x.shape
    if op.attribute("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    y = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(op: Operation, x: Tensor) -> Tensor:
    b, (n, c, h, w) = op.attribute("blocksize"), x.shape
    y = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * b**2, h // b, w // b)


@operator("Trilu")
def trilu(op: Operation, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if op.attribute("upper", 1) else torch.tril(x, diagonal)


@operator("OneHot")
def one_hot(op: Operation, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    n = int(depth.reshape(-1)[0])
    axis = op.attribute("axis", -1)
    index = index.long()
    index = torch.where(index < 0, index + n, index)
    hot = index.unsqueeze(-1) == torch.arange(n, device=index.device)
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)


@operator("NonZero")
def non_zero(op: Operation, x: Tensor) -> Tensor:
    return x.nonzero().t()
