"""Quantised operators: their values in forward passes, the identity for gradients (straight-through).

Scales, zero points and integer weights stay as they are; what flows between them is trained. Integers are held as
floats where a gradient must pass, so their types do not show.
"""

from __future__ import annotations

import torch

from .base import MICROSOFT, Operation, Tensor, operator
from .linear import conv, matmul
from .pooling import average_pool

RANGES = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.uint16: (0, 65535),
    torch.int16: (-32768, 32767),
    torch.int32: (-(2**31), 2**31 - 1),
}


def _along(value: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return scales or zero points, as floats, in a shape that broadcasts along an axis."""
    value = value.to(torch.float32)
    if value.numel() == 1:
        return value.reshape(())
    return value.view([-1 if a == axis % x.dim() else 1 for a in range(x.dim())])


def quantized(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1) -> Tensor:
    """Return ``x / scale`` as integers of the zero point's type; see :func:`rounded`."""
    return rounded(x / _along(scale, x, axis), zero, axis)


def rounded(scaled: Tensor, zero: Tensor | None, axis: int = 1, *, shifted: bool = False) -> Tensor:
    """Return the nearest integers, as floats; the gradient is that of the clamped value before rounding.

    Args:
        scaled: values over their scale.
        zero: the zero point, whose type gives the range.
        axis: along which there is one for each position.
        shifted: add the zero point before rounding, not after: other halves are then even.
    """
    low, high = RANGES[torch.uint8 if zero is None else zero.dtype]
    shift = 0 if zero is None else _along(zero, scaled, axis)
    before = scaled + shift if shifted else scaled
    nearest = before + (torch.round(before) - before).detach()
    return (nearest if shifted else nearest + shift).clamp(low, high)


def centred(q: Tensor, zero: Tensor | None, axis: int = 1) -> Tensor:
    """Return integers without their zero point, as floats."""
    return q.to(torch.float32) if zero is None else q.to(torch.float32) - _along(zero, q, axis)


def restored(q: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1) -> Tensor:
    """Return the values that integers stand for."""
    return centred(q, zero, axis) * _along(scale, q, axis)


@operator("QuantizeLinear")
@operator("QuantizeLinear", domain=MICROSOFT)
def quantize_linear(op: Operation, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    return quantized(x, scale, zero, op.attribute("axis", 1))


@operator("DequantizeLinear")
@operator("DequantizeLinear", domain=MICROSOFT)
def dequantize_linear(op: Operation, q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    return restored(q, scale, zero, op.attribute("axis", 1))


@operator("QLinearConv")
def qlinear_conv(
    op: Operation, x: Tensor, x_scale: Tensor, x_zero: Tensor, weight: Tensor, w_scale: Tensor, w_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y = conv(op, centred(x, x_zero), centred(weight, w_zero, 0), None if bias is None else bias.to(torch.float32))
    return rounded(y * _along(x_scale * w_scale / y_scale, y, 1), y_zero)


@operator("ConvInteger")
def conv_integer(
    op: Operation, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None
) -> Tensor:
    return conv(op, centred(x, x_zero), centred(weight, w_zero, 0))


@operator("QLinearMatMul")
def qlinear_matmul(
    op: Operation, a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor,
) -> Tensor:  # fmt: skip
    y = matmul(op, centred(a, a_zero, -2), centred(b, b_zero, -1))
    return rounded(y * _along(a_scale, y, -2) * _along(b_scale, y, -1) / y_scale, y_zero)


@operator("MatMulInteger")
def matmul_integer(
    op: Operation, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    return matmul(op, centred(a, a_zero, -2), centred(b, b_zero, -1))


@operator("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_sum(
    op: Operation, a: Tensor, a_scale: Tensor, a_zero: Tensor | None, b: Tensor, b_scale: Tensor,
    b_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None,
) -> Tensor:  # fmt: skip
    left, right = centred(a, a_zero), centred(b, b_zero)
    if op.op_type == "QLinearAdd":
        return rounded(left * (a_scale / y_scale) + right * (b_scale / y_scale), y_zero)
    return rounded((left * a_scale) * (right * b_scale) / y_scale, y_zero, shifted=True)


@operator("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_activation(
    op: Operation, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None
) -> Tensor:
    value = restored(x, x_scale, x_zero)
    if op.op_type == "QLinearSigmoid":
        return quantized(torch.sigmoid(value), y_scale, y_zero)
    return quantized(torch.nn.functional.leaky_relu(value, op.attribute("alpha", 0.01)), y_scale, y_zero)


@operator("QLinearGlobalAveragePool", "QLinearAveragePool", domain=MICROSOFT)
def qlinear_pool(
    op: Operation, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None
) -> Tensor:
    value = centred(x, x_zero) * (x_scale / y_scale)
    last = bool(op.attribute("channels_last", 0))
    value = value.movedim(-1, 1) if last else value
    if op.op_type == "QLinearAveragePool":
        y = average_pool(op, value)
    else:
        y = value.mean(tuple(range(2, value.dim())), keepdim=True)
    return rounded(y.movedim(1, -1) if last else y, y_zero)


@operator("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(op: Operation, y_scale: Tensor, y_zero: Tensor, *parts: Tensor) -> Tensor:
    values = [restored(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return quantized(torch.cat(values, op.attribute("axis")), y_scale, y_zero)
