"""Reductions, softmax, and operators that compare positions along an axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .base import OPERATORS, Operation, Outputs, Tensor, ints, operator

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


REDUCTIONS: dict[str, Reduction] = {
    "L1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "L2": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "LogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "LogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "Max": lambda x, axes, keep: x.amax(axes, keep),
    "Mean": lambda x, axes, keep: x.mean(axes, keep),
    "Min": lambda x, axes, keep: x.amin(axes, keep),
    "Prod": _product,
    "Sum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "SumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
}


def _reduction(name: str) -> None:
    """List the Reduce operator of a name; its axes are an attribute, or an input from opset 13 or 18 on."""
    function = REDUCTIONS[name]

    def reduce(op: Operation, x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = op.attribute("axes") if given is None else ints(given)
        if not axes:
            if op.attribute("noop_with_empty_axes", 0):
                return x
            axes = range(x.dim())
        return function(x, tuple(axes), bool(op.attribute("keepdims", 1)))

    OPERATORS.register(f"Reduce{name}")(reduce)


for _name in REDUCTIONS:
    _reduction(_name)


def _rows(op: Operation, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply a function along an axis; before opset 13 everything from the axis on was one row."""
    if op.opset >= 13:
        return function(x, op.attribute("axis", -1))
    axis = op.attribute("axis", 1) % x.dim()
    return function(x.flatten(axis), axis).view(x.shape) if axis < x.dim() - 1 else function(x, axis)


@operator("Softmax")
def softmax(op: Operation, x: Tensor) -> Tensor:
    return _rows(op, x, F.softmax)


@operator("LogSoftmax")
def log_softmax(op: Operation, x: Tensor) -> Tensor:
    return _rows(op, x, F.log_softmax)


@operator("Hardmax")
def hardmax(op: Operation, x: Tensor) -> Tensor:
    def first_largest(y: Tensor, axis: int) -> Tensor:
        return torch.zeros_like(y).scatter(axis, y.argmax(axis, keepdim=True), 1.0)

    return _rows(op, x, first_largest)


@operator("ArgMax", "ArgMin")
def arg(op: Operation, x: Tensor) -> Tensor:
    axis, keep = op.attribute("axis", 0) % x.dim(), bool(op.attribute("keepdims", 1))
    find = torch.argmax if op.op_type == "ArgMax" else torch.argmin
    if op.attribute("select_last_index", 0):
        return x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=keep)
    return find(x, axis, keepdim=keep)


@operator("CumSum")
def cumulative_sum(op: Operation, x: Tensor, along: Tensor) -> Tensor:
    axis = int(along) % x.dim()
    if op.attribute("reverse", 0):
        x = x.flip(axis)
    y = x.cumsum(axis, dtype=x.dtype)
    if op.attribute("exclusive", 0):
        y = y - x
    return y.flip(axis) if op.attribute("reverse", 0) else y


@operator("TopK")
def top_k(op: Operation, x: Tensor, k: Tensor | None = None) -> Outputs:
    count = op.attribute("k") if k is None else int(k)
    values, places = x.topk(
        count, op.attribute("axis", -1), bool(op.attribute("largest", 1)), bool(op.attribute("sorted", 1))
    )
    return values, places
