"""Resizing, and sampling at given positions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .base import Operation, Tensor, ints, operator

TAPS = {"linear": 1, "cubic": 2}
"""Neighbours on either side that an interpolation looks at."""


@operator("Resize")
def resize(op: Operation, x: Tensor, *inputs: Tensor | None) -> Tensor:
    """Resize axis by axis: interpolation is a small matrix along each axis, the nearest neighbour a selection."""
    if op.opset < 11:
        return _resize(op, x, inputs[0].tolist(), mode_only=True)
    roi, scales, sizes = (*inputs, None, None, None)[:3]
    axes = [a % x.dim() for a in op.attribute("axes") or range(x.dim())]
    if scales is not None and scales.numel():
        by = scales.tolist()
    else:
        by = _scales_of(op, x, axes, ints(sizes))
    factors = [1.0] * x.dim()
    for axis, factor in zip(axes, by, strict=True):
        factors[axis] = factor
    regions = [(0.0, 1.0)] * x.dim()
    if op.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        bounds = roi.tolist()
        for place, axis in enumerate(axes):
            regions[axis] = (bounds[place], bounds[place + len(axes)])
    wanted = None
    if (scales is None or not scales.numel()) and op.attribute("keep_aspect_ratio_policy", "stretch") == "stretch":
        wanted = dict(zip(axes, ints(sizes), strict=True))
    return _resize(op, x, factors, regions, wanted)


@operator("Upsample")
def upsample(op: Operation, x: Tensor, scales: Tensor | None = None) -> Tensor:
    return _resize(op, x, op.attribute("scales") if scales is None else scales.tolist(), mode_only=True)


def _scales_of(op: Operation, x: Tensor, axes: list[int], sizes: list[int]) -> list[float]:
    """Return the factors that lead to given sizes, one for all where the aspect ratio is kept."""
    by = [size / x.shape[axis] for axis, size in zip(axes, sizes, strict=True)]
    policy = op.attribute("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return by
    return [min(by) if policy == "not_larger" else max(by)] * len(by)


def _resize(
    op: Operation,
    x: Tensor,
    factors: list[float],
    regions: list[tuple[float, float]] | None = None,
    wanted: dict[int, int] | None = None,
    *,
    mode_only: bool = False,
) -> Tensor:
    """Resize every axis by its factor; with ``mode_only`` by the rules of the opsets before 11."""
    mode = op.attribute("mode", "nearest")
    coordinates = "asymmetric" if mode_only else op.attribute("coordinate_transformation_mode", "half_pixel")
    outside: Tensor | None = None
    for axis, factor in enumerate(factors):
        n = x.shape[axis]
        m = (wanted or {}).get(axis) or _length(op, n, factor)
        region = regions[axis] if regions else (0.0, 1.0)
        if m == n and factor == 1 and region == (0.0, 1.0):
            continue
        at = _positions(coordinates, n, m, factor, region)
        if coordinates == "tf_crop_and_resize":
            beyond = ((at < 0) | (at > n - 1)).view([-1 if a == axis else 1 for a in range(x.dim())])
            outside = beyond if outside is None else outside | beyond
        if mode == "nearest":
            rounding = "floor" if mode_only else op.attribute("nearest_mode", "round_prefer_floor")
            x = x.index_select(axis, _nearest(at, rounding).clamp(0, n - 1).long().to(x.device))
        else:
            matrix = _interpolation(op, mode, at, n, factor).to(x)
            x = torch.tensordot(x, matrix, dims=([axis], [1])).movedim(-1, axis)
    if outside is not None:
        x = torch.where(outside.to(x.device), torch.full_like(x, op.attribute("extrapolation_value", 0.0)), x)
    return x


def _length(op: Operation, n: int, factor: float) -> int:
    """Return the size of an axis afterwards. ONNX Runtime, unlike the specification, leaves the region out of it."""
    kept = op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch"
    return math.floor(n * factor + (0.5 if kept else 0))


def _positions(coordinates: str, n: int, m: int, factor: float, region: tuple[float, float]) -> Tensor:
    """Return where on the axis of ``n`` entries each of the ``m`` new ones lies (ONNX, Resize)."""
    i = torch.arange(m, dtype=torch.float64)
    if coordinates == "asymmetric":
        return i / factor
    if coordinates == "align_corners":
        return i * (n - 1) / (m - 1) if m > 1 else i * 0
    if coordinates == "tf_half_pixel_for_nn":
        return (i + 0.5) / factor
    if coordinates == "tf_crop_and_resize":
        start, end = region
        if m == 1:
            return i * 0 + 0.5 * (start + end) * (n - 1)
        return start * (n - 1) + i * (end - start) * (n - 1) / (m - 1)
    if coordinates == "pytorch_half_pixel" and m == 1:
        return i * 0
    if coordinates == "half_pixel_symmetric":
        adjust = m / (factor * n)
        return n / 2 * (1 - adjust) + (i + 0.5) / factor - 0.5
    return (i + 0.5) / factor - 0.5


def _nearest(at: Tensor, rounding: str) -> Tensor:
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "round_prefer_floor": lambda v: torch.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: torch.floor(v + 0.5),
        "floor": torch.floor,
        "ceil": torch.ceil,
    }
    return rules[rounding](at.float())  # as runtimes have it: rounding errors of float64 would fall elsewhere


def _interpolation(op: Operation, mode: str, at: Tensor, n: int, factor: float) -> Tensor:
    """Return the matrix (new entries, old entries) of an interpolation along one axis."""
    stretch = min(factor, 1.0) if op.attribute("antialias", 0) else 1.0
    reach = math.ceil(TAPS[mode] / stretch)
    first = torch.floor(at)
    taps = first.unsqueeze(1) + torch.arange(-reach, reach + 2)
    distance = (taps - at.unsqueeze(1)).abs() * stretch
    if mode == "linear":
        weights = (1 - distance).clamp(min=0)
    else:
        weights = _cubic(distance, op.attribute("cubic_coeff_a", -0.75))
    inside = (taps >= 0) & (taps <= n - 1)
    if op.attribute("exclude_outside", 0) or op.attribute("antialias", 0):
        weights = weights * inside
    weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros(len(at), n, dtype=torch.float64)
    return matrix.scatter_add(1, taps.clamp(0, n - 1).long(), weights)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Return the cubic convolution kernel (Keys, 1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


@operator("GridSample")
def grid_sample(op: Operation, x: Tensor, grid: Tensor) -> Tensor:
    names = {"linear": "bilinear", "cubic": "bicubic"}
    mode = op.attribute("mode", "linear")
    return F.grid_sample(
        x,
        grid,
        names.get(mode, mode),
        op.attribute("padding_mode", "zeros"),
        align_corners=bool(op.attribute("align_corners", 0)),
    )


@operator("RoiAlign")
def roi_align(op: Operation, x: Tensor, boxes: Tensor, images: Tensor) -> Tensor:
    """Pool boxes of maps to one size by interpolated samples (He et al., Mask R-CNN, 2017)."""
    rows, columns = op.attribute("output_height", 1), op.attribute("output_width", 1)
    half = op.attribute("coordinate_transformation_mode", "half_pixel" if op.opset >= 16 else "output_half_pixel")
    shift = 0.5 if half == "half_pixel" else 0.0
    pooled = []
    for box, image in zip(boxes.unbind(0), images.tolist(), strict=True):
        left, top, right, bottom = (float(v) for v in box * op.attribute("spatial_scale", 1.0) - shift)
        height, width = bottom - top, right - left
        if not shift:
            height, width = max(height, 1.0), max(width, 1.0)
        ys, per_y = _sample_lines(op, top, height, rows)
        xs, per_x = _sample_lines(op, left, width, columns)
        values = _bilinear(x[int(image)], ys, xs).unflatten(2, (columns, per_x)).unflatten(1, (rows, per_y))
        pooled.append(values.amax((2, 4)) if op.attribute("mode", "avg") == "max" else values.mean((2, 4)))
    return torch.stack(pooled) if pooled else x.new_zeros(0, x.shape[1], rows, columns)


def _sample_lines(op: Operation, start: float, length: float, bins: int) -> tuple[Tensor, int]:
    """Return the coordinates of the samples along one side of a box, and how many there are a bin."""
    per_bin = op.attribute("sampling_ratio", 0) or max(1, math.ceil(length / bins))
    offsets = (torch.arange(bins * per_bin, dtype=torch.float64) + 0.5) / per_bin
    return start + offsets * length / bins, per_bin


def _bilinear(maps: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """Return maps (C, H, W) at all pairs of coordinates, (C, ys, xs); zero beyond one pixel outside."""
    return torch.einsum("chw,yh,xw->cyx", maps, _lines(ys, maps.shape[1]).to(maps), _lines(xs, maps.shape[2]).to(maps))


def _lines(at: Tensor, n: int) -> Tensor:
    inside = (at >= -1) & (at <= n)
    weights = (1 - (at.clamp(0, n - 1).unsqueeze(1) - torch.arange(n)).abs()).clamp(min=0)
    return weights * inside.unsqueeze(1)


@operator("MaxRoiPool")
def max_roi_pool(op: Operation, x: Tensor, boxes: Tensor) -> Tensor:
    """Largest values of boxes of maps, in bins of whole pixels (Girshick, Fast R-CNN, 2015)."""
    rows, columns = op.attribute("pooled_shape")
    scale = op.attribute("spatial_scale", 1.0)
    pooled = []
    for image, *corners in boxes.tolist():
        left, top, right, bottom = (math.floor(c * scale + 0.5) for c in corners)
        lines = [_bin(index, rows, top, bottom, x.shape[2]) for index in range(rows)]
        places = [_bin(index, columns, left, right, x.shape[3]) for index in range(columns)]
        bins = [torch.stack([_largest(x[int(image)], line, place) for place in places], 1) for line in lines]
        pooled.append(torch.stack(bins, 1))
    return torch.stack(pooled) if pooled else x.new_zeros(0, x.shape[1], rows, columns)


def _bin(index: int, bins: int, first: int, last: int, n: int) -> slice:
    """Return the pixels of one bin along one side of a box."""
    size = max(last - first + 1, 1) / bins
    start, end = first + math.floor(index * size), first + math.ceil((index + 1) * size)
    return slice(min(max(start, 0), n), min(max(end, 0), n))


def _largest(maps: Tensor, rows: slice, columns: slice) -> Tensor:
    part = maps[:, rows, columns]
    return part.amax((1, 2)) if part.numel() else maps.new_zeros(len(maps))
