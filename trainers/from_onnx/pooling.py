"""Pooling."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from .base import Operation, Outputs, Tensor, operator
from .windows import Window, by_rank, pad, sums


@operator("MaxPool")
def max_pool(op: Operation, x: Tensor) -> Outputs:
    """Largest value of each window; the padding never wins. The second output counts positions of the whole tensor."""
    window = Window.of(op, op.attribute("kernel_shape"))
    rank = len(window.kernel)
    sizes = list(x.shape[2:])
    pads = window.padding(sizes)
    over = window.overhang(sizes, pads)
    pool = by_rank((F.max_pool1d, F.max_pool2d, F.max_pool3d), rank, op)
    simple = pads[:rank] == pads[rank:] and all(2 * p <= k for p, k in zip(pads, window.kernel, strict=False))
    if simple and not any(over) and x.is_floating_point() and not _wants_indices(op):
        return pool(x, window.kernel, window.strides, pads[:rank], window.dilations)
    least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    around = (*pads[:rank], *(end + extra for end, extra in zip(pads[rank:], over, strict=True)))
    padded = pad(x, around, least)
    if not x.is_floating_point():  # torch pools floats only; float64 holds every integer of this size
        return pool(padded.double(), window.kernel, window.strides, 0, window.dilations).to(x.dtype)
    if not _wants_indices(op):
        return pool(padded, window.kernel, window.strides, 0, window.dilations)
    y, places = pool(padded, window.kernel, window.strides, 0, window.dilations, return_indices=True)
    return y, _whole_positions(places, padded.shape, x.shape, pads, op.attribute("storage_order", 0))


def _wants_indices(op: Operation) -> bool:
    return len(op.outputs) > 1 and bool(op.outputs[1])


def _whole_positions(
    places: Tensor, padded: torch.Size, shape: torch.Size, pads: tuple[int, ...], columns_first: int
) -> Tensor:
    """Turn positions within each padded map into positions within the whole tensor."""
    coordinates = []
    for size in reversed(padded[2:]):
        coordinates.append(places % size)
        places = places // size
    found = [c - p for c, p in zip(reversed(coordinates), pads, strict=False)]
    flat = torch.zeros_like(found[0])
    axes = range(len(found))
    scale = 1
    for axis in axes if columns_first else reversed(axes):
        flat = flat + found[axis] * scale
        scale *= shape[2 + axis]
    maps = torch.arange(shape[0] * shape[1], device=flat.device).view(*shape[:2], *[1] * len(found))
    return flat + maps * scale


@operator("AveragePool")
def average_pool(op: Operation, x: Tensor) -> Tensor:
    """Mean of each window, over what lies in the map, or with ``count_include_pad`` in its padding too."""
    window = Window.of(op, op.attribute("kernel_shape"))
    rank = len(window.kernel)
    sizes = list(x.shape[2:])
    pads, include = window.padding(sizes), bool(op.attribute("count_include_pad", 0))
    over = window.overhang(sizes, pads)
    dilated = any(d > 1 for d in window.dilations)
    if (
        not (dilated or any(over))
        and pads[:rank] == pads[rank:]
        and all(2 * p <= k for p, k in zip(pads, window.kernel, strict=False))
    ):
        pool = by_rank((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), rank, op)
        return pool(x, window.kernel, window.strides, pads[:rank], False, include)
    behind = (*[0] * rank, *over)
    total = sums(pad(pad(x, pads), behind), window)
    ones = torch.ones((1, 1, *sizes), dtype=x.dtype, device=x.device)
    return total / sums(pad(pad(ones, pads, float(include)), behind), window)


@operator("LpPool")
def lp_pool(op: Operation, x: Tensor) -> Tensor:
    window = Window.of(op, op.attribute("kernel_shape"))
    sizes, p = list(x.shape[2:]), op.attribute("p", 2)
    pads = window.padding(sizes)
    behind = (*[0] * len(sizes), *window.overhang(sizes, pads))
    return sums(pad(pad(x.abs() ** p, pads), behind), window) ** (1 / p)


@operator("GlobalAveragePool")
def global_average_pool(op: Operation, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(op: Operation, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(op: Operation, x: Tensor) -> Tensor:
    p = op.attribute("p", 2)
    return (x.abs() ** p).sum(tuple(range(2, x.dim())), keepdim=True) ** (1 / p)
