"""Element by element: arithmetic, comparisons, activations, types."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .base import MICROSOFT, OPERATORS, Operation, Outputs, Tensor, operator, torch_dtype

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
}


def _list_plain_functions() -> None:
    """List what torch has under another name; several inputs are taken two by two."""
    for name, function in {**UNARY, **BINARY, **VARIADIC}.items():
        OPERATORS.register(name)(functools.partial(_fold, function))


def _fold(function: Callable[..., Tensor], op: Operation, *inputs: Tensor) -> Tensor:
    if len(inputs) < 2 and op.op_type not in VARIADIC:
        return function(*inputs)
    return functools.reduce(function, inputs)


_list_plain_functions()


@operator("Identity")
def identity(op: Operation, x: Tensor) -> Tensor:
    return x


@operator("Dropout")
def dropout(op: Operation, x: Tensor, ratio: Tensor | None = None, mode: Tensor | None = None) -> Outputs:
    """Drop while training, as the network did that was exported; inference leaves values as they are."""
    share = float(ratio) if ratio is not None else op.attribute("ratio", 0.5)
    y = F.dropout(x, share, op.training)
    return (y, torch.ones_like(x, dtype=torch.bool)) if len(op.outputs) > 1 else y


@operator("Mean")
def mean(op: Operation, *inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


@operator("Div")
def divide(op: Operation, a: Tensor, b: Tensor) -> Tensor:
    """Divide; integers towards zero."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def modulo(op: Operation, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if op.attribute("fmod", 0) else torch.remainder(a, b)


@operator("Pow")
def power(op: Operation, base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


@operator("BitShift")
def bit_shift(op: Operation, x: Tensor, by: Tensor) -> Tensor:
    wide, bits = x.to(torch.int64), 8 * x.element_size()
    if op.attribute("direction") == "LEFT":
        shifted = torch.bitwise_left_shift(wide, by.to(torch.int64))
        return (shifted & ((1 << bits) - 1) if bits < 64 else shifted).to(x.dtype)
    return torch.bitwise_right_shift(wide, by.to(torch.int64)).to(x.dtype)


@operator("Where")
def where(op: Operation, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@operator("IsInf")
def is_infinite(op: Operation, x: Tensor) -> Tensor:
    up, down = op.attribute("detect_positive", 1), op.attribute("detect_negative", 1)
    return (torch.isposinf(x) & bool(up)) | (torch.isneginf(x) & bool(down))


@operator("Cast")
def cast(op: Operation, x: Tensor) -> Tensor:
    return x.to(torch_dtype(op.attribute("to")))


@operator("CastLike")
def cast_like(op: Operation, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


# -- activations with settings ---------------------------------------------------------------------
@operator("Clip")
def clip(op: Operation, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least = low.item() if low is not None else op.attribute("min")
    most = high.item() if high is not None else op.attribute("max")
    if (least, most) == (0, 6) and x.is_floating_point():
        return F.relu6(x)
    return x if least is None and most is None else torch.clamp(x, least, most)


@operator("Celu")
def celu(op: Operation, x: Tensor) -> Tensor:
    return F.celu(x, op.attribute("alpha", 1.0))


@operator("Elu")
def elu(op: Operation, x: Tensor) -> Tensor:
    return F.elu(x, op.attribute("alpha", 1.0))


@operator("Selu")
def selu(op: Operation, x: Tensor) -> Tensor:
    """Scaled exponential unit; both numbers may be set."""
    alpha = op.attribute("alpha", 1.67326319217681884765625)
    gamma = op.attribute("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


@operator("HardSigmoid")
def hard_sigmoid(op: Operation, x: Tensor) -> Tensor:
    return torch.clamp(op.attribute("alpha", 0.2) * x + op.attribute("beta", 0.5), 0, 1)


@operator("LeakyRelu")
def leaky_relu(op: Operation, x: Tensor) -> Tensor:
    return F.leaky_relu(x, op.attribute("alpha", 0.01))


@operator("PRelu")
def prelu(op: Operation, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("Shrink")
def shrink(op: Operation, x: Tensor) -> Tensor:
    bias, edge = op.attribute("bias", 0.0), op.attribute("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x)))


@operator("Swish")
def swish(op: Operation, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.attribute("alpha", 1.0) * x)


@operator("ThresholdedRelu")
def thresholded_relu(op: Operation, x: Tensor) -> Tensor:
    return F.threshold(x, op.attribute("alpha", 1.0), 0.0)


@operator("Gelu")
def gelu(op: Operation, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=op.attribute("approximate", "none"))


@operator("Gelu", domain=MICROSOFT)
def microsoft_gelu(op: Operation, x: Tensor) -> Tensor:
    return F.gelu(x)


@operator("BiasGelu", domain=MICROSOFT)
def bias_gelu(op: Operation, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@operator("FastGelu", domain=MICROSOFT)
def fast_gelu(op: Operation, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=MICROSOFT)
def quick_gelu(op: Operation, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.attribute("alpha", 1.702) * x)
