"""Shapes: asking for them, computing with them, and bringing data into them."""

from __future__ import annotations

import math

import torch

from .base import Operation, Tensor, ints, operator, torch_dtype
from .values import as_tensor


@operator("Shape")
def shape(op: Operation, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[op.attribute("start", 0) : op.attribute("end")], dtype=torch.int64)


@operator("Size")
def size(op: Operation, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape")
def reshape(op: Operation, x: Tensor, target: Tensor) -> Tensor:
    """Bring data into another shape.

    Where the file fixes the batch size, it stands first in such shapes, by itself or times something; then it is
    replaced.
    """
    sizes = ints(target)
    leads = op.batch.factor > 1 and sizes[:1] > [0]
    if not op.attribute("allowzero", 0):
        sizes = [x.shape[axis] if n == 0 else n for axis, n in enumerate(sizes)]
    if leads and (op.constants == {1} if -1 in sizes else math.prod(sizes) * op.batch.factor == x.numel()):
        sizes[0] *= op.batch.factor
    return x.reshape(sizes)


@operator("Flatten")
def flatten(op: Operation, x: Tensor) -> Tensor:
    axis = op.attribute("axis", 1)
    axis += x.dim() if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Squeeze")
def squeeze(op: Operation, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = op.attribute("axes") if given is None else ints(given)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operator("Unsqueeze")
def unsqueeze(op: Operation, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = op.attribute("axes") if given is None else ints(given)
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Expand")
def expand(op: Operation, x: Tensor, target: Tensor) -> Tensor:
    sizes = ints(target)
    if op.batch.factor > 1 and 1 in op.constants and sizes[0] == op.batch.fixed:
        sizes[0] = op.batch.actual
    return x.expand(torch.broadcast_shapes(x.shape, sizes))


@operator("ConstantOfShape")
def constant_of_shape(op: Operation, target: Tensor) -> Tensor:
    value = op.attribute("value")
    fill = torch.zeros(1) if value is None else as_tensor(value)
    return fill.reshape(()).expand(ints(target)).clone()


@operator("Range")
def arange(op: Operation, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


@operator("EyeLike")
def eye_like(op: Operation, x: Tensor) -> Tensor:
    dtype = torch_dtype(op.attribute("dtype")) if op.attribute("dtype") else x.dtype
    shift = torch.arange(x.shape[1], device=x.device) - op.attribute("k", 0)
    return (torch.arange(x.shape[0], device=x.device).unsqueeze(1) == shift).to(dtype)
