"""Element-wise operators: unary, binary with broadcasting, gates, quantisation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from prune_onnx.graph_ops.rules.elementwise import UNARY

from ..builder import MICROSOFT, Net
from . import MACS_ONLY, add, case
from .conv import dequantize, quantize

# What has to come before an operator so that its values are numbers (or, for the tests of numbers, of both kinds).
DOMAINS: dict[str, Callable[[Net, str], str]] = {
    "Acos": lambda net, x: net.op("Tanh", x),
    "Asin": lambda net, x: net.op("Tanh", x),
    "Atanh": lambda net, x: net.op("Mul", net.op("Tanh", x), net.const(0.9)),
    "Acosh": lambda net, x: net.op("Add", net.op("Abs", x), net.const(1.5)),
    "Log": lambda net, x: net.op("Exp", x),
    "Sqrt": lambda net, x: net.op("Abs", x),
    "Reciprocal": lambda net, x: net.op("Add", net.op("Abs", x), net.const(0.5)),
    "IsNaN": lambda net, x: net.op("Sqrt", x),
    "IsInf": lambda net, x: net.op("Reciprocal", net.relu(x)),
    "Not": lambda net, x: net.op("Cast", net.op("Floor", x), to=TensorProto.BOOL),
    "BitwiseNot": lambda net, x: net.op("Cast", net.op("Mul", x, net.const(50.0)), to=TensorProto.INT32),
}
NEWER = {"HardSwish": 14, "Mish": 18, "BitwiseNot": 18, "Gelu": 20, "Swish": 24}
ATTRIBUTES = {"Cast": {"to": TensorProto.DOUBLE}, "Shrink": {"lambd": 0.2, "bias": 0.1}}


def unary(op: str) -> object:
    def build(net: Net) -> str:
        y = net.conv(net.input(1, 3, 6, 6), 8)
        more = [net.const(-0.4), net.const(0.6)] if op == "Clip" else []
        y = net.op(op, DOMAINS.get(op, lambda _, x: x)(net, y), *more, **ATTRIBUTES.get(op, {}))
        return net.head(net.conv(net.op("Cast", y, to=TensorProto.FLOAT), 5))

    return build


for op in UNARY:
    add(f"unary_{op}", unary(op), op, opset=max(17, NEWER.get(op, 0)))


@case("Clip LeakyRelu", opset=9)
def old_clip(net: Net) -> str:
    """Clip with its bounds as attributes, before opset 11."""
    y = net.op("Clip", net.conv(net.input(1, 3, 8, 8), 8), min=-0.3, max=0.6)
    y = net.op("LeakyRelu", net.conv(y, 6), alpha=0.2)
    return net.head(net.conv(y, 5))


def branches(net: Net, x: str = "") -> tuple[str, str]:
    x = x or net.input(1, 3, 6, 6)
    return net.conv(x, 8, name="left"), net.conv(x, 8, name="right")


def binary(op: str, prepare: Callable[[Net, str], str] = lambda _, x: x, **attributes: object) -> object:
    def build(net: Net) -> str:
        left, right = (prepare(net, y) for y in branches(net))
        y = net.op("Cast", net.op(op, left, right, **attributes), to=TensorProto.FLOAT)
        return net.head(net.conv(y, 5))

    return build


def as_bool(net: Net, x: str) -> str:
    return net.op("Greater", x, net.const(0.1))


def as_int(net: Net, x: str, dtype: int = TensorProto.INT32) -> str:
    return net.op("Cast", net.op("Mul", net.op("Abs", x), net.const(9.0)), to=dtype)


def as_uint(net: Net, x: str) -> str:
    return as_int(net, x, TensorProto.UINT32)


def as_positive(net: Net, x: str) -> str:
    return net.op("Add", net.op("Abs", x), net.const(0.5))


for op in ["Add", "Sub", "Mul", "Max", "Min", "Mean", "Sum", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"]:
    add(f"binary_{op}", binary(op), op)
for op in ["And", "Or", "Xor"]:
    add(f"binary_{op}", binary(op, as_bool), op)
for op in ["BitwiseAnd", "BitwiseOr", "BitwiseXor"]:
    add(f"binary_{op}", binary(op, as_int), op, opset=18)
add("binary_Equal", binary("Equal", as_int), "Equal")
add("binary_BitShift", binary("BitShift", as_uint, direction="LEFT"), "BitShift")
add("binary_Div", binary("Div", as_positive), "Div")
add("binary_Pow", binary("Pow", as_positive), "Pow")
add("binary_Mod", binary("Mod", as_positive, fmod=1), "Mod")


@case("Sum Max Mean")
def variadic_with_constant(net: Net) -> str:
    left, right = branches(net)
    y = net.op("Sum", left, right, net.random(8, 1, 1))
    y = net.op("Mean", net.op("Max", y, net.random(1, 8, 1, 1), right), left, net.random(8, 4, 4))
    return net.head(net.conv(y, 5))


@case("Where")
def where(net: Net) -> str:
    left, right = branches(net)
    y = net.op("Where", as_bool(net, left), right, net.random(8, 1, 1))
    y = net.op("Where", net.rng.integers(0, 2, (1, 8, 4, 4)).astype(bool), y, left)
    return net.head(net.conv(y, 5))


@case("PRelu")
def prelu(net: Net) -> str:
    y = net.op("PRelu", net.conv(net.input(1, 3, 6, 6), 8), net.random(8, 1, 1, scale=0.3))
    return net.head(net.op("PRelu", net.conv(y, 6), net.const(np.asarray([0.2], np.float32))))


def with_constant(shape: tuple[int, ...], first: bool) -> object:
    """A constant against activations: it takes their labels wherever its axis has their length."""

    def build(net: Net) -> str:
        y = net.conv(net.input(1, 3, 6, 6), 8)
        constant = net.const(net.random(*shape))
        y = net.op("Mul", *([constant, y] if first else [y, constant]))
        return net.head(net.conv(y, 5))

    return build


for shape in ((), (1,), (4,), (4, 4), (8, 1, 1), (1, 8, 1, 1), (1, 8, 4, 4), (8, 1, 4), (1, 1, 8, 1, 1)):
    for first in (False, True):
        if len(shape) < 5:
            add(
                f"constant_{'x'.join(map(str, shape)) or 'scalar'}_{'first' if first else 'second'}",
                with_constant(shape, first),
                "Mul",
            )


@case("Mul Sigmoid")
def squeeze_excite(net: Net) -> str:
    y = net.conv(net.input(1, 3, 8, 8), 12)
    gate = net.conv(net.relu(net.conv(net.op("GlobalAveragePool", y), 4, 1, name="squeeze")), 12, 1, name="excite")
    return net.head(net.conv(net.op("Mul", y, net.op("Sigmoid", gate)), 5))


@case("Mul HardSigmoid ReduceMean", opset=18)
def squeeze_excite_with_gemm(net: Net) -> str:
    """Dynamo's form: a mean with negative axes, fully connected layers, a Reshape that names the channels."""
    y = net.conv(net.input(1, 3, 8, 8), 12)
    gate = net.op("Reshape", net.op("ReduceMean", y, [-1, -2], keepdims=1), [1, 12])
    gate = net.op("HardSigmoid", net.gemm(net.relu(net.gemm(gate, 4)), 12))
    y = net.op("Mul", net.op("Reshape", gate, [1, 12, 1, 1]), y)
    return net.head(net.conv(y, 5))


@case("Mul")
def spatial_gate(net: Net) -> str:
    """A map with one channel broadcasts over the channels and imposes nothing on them."""
    y = net.conv(net.input(1, 3, 8, 8), 8)
    gate = net.op("Sigmoid", net.conv(y, 1, pads=[1, 1, 1, 1], name="gate"))
    return net.head(net.conv(net.op("Mul", gate, y), 5))


@case("Conv", pinned=("beside_input", "head"))
def sum_with_the_input(net: Net) -> str:
    """The graph's input cannot be cut, so neither can what is added to it."""
    x = net.input(1, 8, 6, 6)
    y = net.op("Add", net.conv(net.relu(net.conv(x, 6, 1)), 8, 1, name="beside_input"), x)
    return net.head(net.conv(y, 5))


@case("Add")
def outer_sum(net: Net) -> str:
    """(8, 1) + (1, 6): two axes with labels of their own."""
    x = net.input(1, 3, 4, 4)
    rows = net.op("Reshape", net.op("GlobalAveragePool", net.conv(x, 8, name="rows")), [1, 8, 1])
    columns = net.op("Reshape", net.op("GlobalAveragePool", net.conv(x, 6, name="columns")), [1, 1, 6])
    y = net.matmul(net.relu(net.op("Add", rows, columns)), 1)
    return net.gemm(net.op("Flatten", y), 5, name="head")


@case("CastLike", opset=15)
def cast_like(net: Net) -> str:
    y = net.op("CastLike", net.conv(net.input(1, 3, 6, 6), 8), net.const(np.zeros((3,), np.float64)))
    return net.head(net.conv(net.op("Cast", y, to=TensorProto.FLOAT), 5))


@case("Dropout")
def dropout(net: Net) -> str:
    y = net.op("Dropout", net.conv(net.input(1, 3, 6, 6), 8), net.const(0.4), net.const(np.asarray(False)))
    return net.head(net.conv(y, 5))


@case("Dropout")
def dropout_with_mask(net: Net) -> str:
    y, mask = net.op("Dropout", net.conv(net.input(1, 3, 6, 6), 8), outputs=2)
    y = net.op("Add", net.conv(y, 8, 1), net.op("Cast", mask, to=TensorProto.FLOAT))
    return net.head(net.conv(y, 5))


def microsoft(op: str) -> object:
    def build(net: Net) -> str:
        y = net.op(op, net.conv(net.input(1, 3, 6, 6), 8), domain=MICROSOFT)
        return net.head(net.conv(y, 5))

    return build


for op in ("Gelu", "FastGelu", "QuickGelu"):
    add(f"microsoft_{op}", microsoft(op), f"com.microsoft.{op}")


@case("com.microsoft.BiasGelu com.microsoft.FastGelu")
def bias_gelu(net: Net) -> str:
    y = net.op("BiasGelu", net.matmul(net.input(1, 5, 6), 8), net.random(8), domain=MICROSOFT)
    y = net.op("FastGelu", net.matmul(y, 7), net.random(7), domain=MICROSOFT)
    return net.matmul(y, 5, name="head")


def quantized_binary(op: str) -> object:
    def build(net: Net) -> str:
        left, right = (quantize(net, y) for y in branches(net))
        scale, zero = net.const(np.float32(0.05)), net.const(np.uint8(100))
        y = net.op(
            op,
            left,
            scale,
            zero,
            right,
            scale,
            zero,
            net.const(np.float32(0.1)),
            net.const(np.uint8(120)),
            domain=MICROSOFT,
        )
        return net.head(net.conv(dequantize(net, y), 5))

    return build


def quantized_unary(op: str, **attributes: object) -> object:
    def build(net: Net) -> str:
        y = quantize(net, net.conv(net.input(1, 3, 6, 6), 8))
        y = net.op(
            op,
            y,
            net.const(np.float32(0.05)),
            net.const(np.uint8(100)),
            net.const(np.float32(0.02)),
            net.const(np.uint8(30)),
            domain=MICROSOFT,
            **attributes,
        )
        return net.head(net.conv(dequantize(net, y, 0.02, 30), 5))

    return build


for op in ("QLinearAdd", "QLinearMul"):
    add(f"microsoft_{op}", quantized_binary(op), f"com.microsoft.{op}")
add("microsoft_QLinearSigmoid", quantized_unary("QLinearSigmoid"), "com.microsoft.QLinearSigmoid")
add("microsoft_QLinearLeakyRelu", quantized_unary("QLinearLeakyRelu", alpha=0.1), "com.microsoft.QLinearLeakyRelu")


@case("QuantizeLinear DequantizeLinear", check=MACS_ONLY)
def qdq_channels_last(net: Net) -> str:
    """Scales along the last axis, where the channels are."""
    y = net.op("Transpose", net.conv(net.input(1, 3, 8, 8), 8), perm=[0, 2, 3, 1])
    scale, zero = net.positive(8) * np.float32(0.05), np.full(8, 3, np.int8)
    y = net.op("DequantizeLinear", net.op("QuantizeLinear", y, scale, zero, axis=-1), scale, zero, axis=3)
    return net.head(net.conv(net.op("Transpose", net.relu(y), perm=[0, 3, 1, 2]), 5))


def qdq(domain: str, per_channel: bool) -> object:
    """Fake quantisation of activations and weights, per tensor and per channel."""

    def build(net: Net) -> str:
        def fake(x: str) -> str:
            n = net.dims(x)[1]
            scale = net.positive(n) * np.float32(0.05) if per_channel else np.asarray(0.05, np.float32)
            zero = np.full(n, 3, np.int8) if per_channel else np.asarray(3, np.int8)
            q = net.op("QuantizeLinear", x, scale, zero, domain=domain, axis=1 if per_channel else None)
            if domain:
                net.types[q].tensor_type.elem_type = TensorProto.INT8
            y = net.op("DequantizeLinear", q, scale, zero, domain=domain, axis=1 if per_channel else None)
            if domain:
                net.types[y].tensor_type.elem_type = TensorProto.FLOAT
            return y

        def weight(channels: int, inputs: int) -> str:
            values = net.rng.integers(-100, 101, (channels, inputs, 3, 3)).astype(np.int8)
            return net.op(
                "DequantizeLinear",
                values,
                net.positive(channels) * np.float32(0.004),
                np.zeros(channels, np.int8),
                axis=0,
            )

        y = fake(net.relu(net.conv(fake(net.conv(net.input(1, 3, 8, 8), 8)), 8, weight=weight(8, 8))))
        return net.head(net.conv(y, 6, 1))

    return build


for domain, label in (("", "onnx"), (MICROSOFT, "microsoft")):
    prefix = f"{domain}." if domain else ""
    for per_channel in (False, True):
        add(
            f"qdq_{label}_{'channel' if per_channel else 'tensor'}",
            qdq(domain, per_channel),
            f"{prefix}QuantizeLinear {prefix}DequantizeLinear",
            check=MACS_ONLY,
        )
