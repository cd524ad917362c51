"""Blocks of well-known networks, and weights that are not plain initializers."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ..builder import Net
from . import MACS_ONLY, add, case

SAME = {"pads": [1, 1, 1, 1]}


def attention(net: Net, x: str, width: int, heads: int, fused: str) -> str:
    """Multi-head self-attention of (1, tokens, width), with one layer for q, k and v or with three."""
    tokens, d = net.dims(x)[1], width // heads
    if fused:
        y = net.op("Reshape", net.matmul(x, 3 * width, name="qkv"), [1, tokens, 3, heads, d])
        y = net.op("Transpose", y, perm=[2, 0, 3, 1, 4])
        if fused == "gather":
            q, k, v = (net.op("Gather", y, net.const(i), axis=0) for i in range(3))
        else:
            q, k, v = (net.op("Squeeze", part, [0]) for part in net.op("Split", y, outputs=3, axis=0))
    else:
        q, k, v = (
            net.op(
                "Transpose",
                net.op("Reshape", net.matmul(x, width, name=name), [1, tokens, heads, d]),
                perm=[0, 2, 1, 3],
            )
            for name in ("q", "k", "v")
        )
    scores = net.op("Mul", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), net.const(d**-0.5))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), [1, tokens, width])
    return net.matmul(y, net.dims(x)[2], name="projection")


def transformer(fused: str, norm: bool) -> object:
    def build(net: Net) -> str:
        x = net.op("Add", net.matmul(net.input(1, 5, 6), 8, name="embed"), net.random(1, 5, 8, scale=0.3))
        y = x
        if norm:
            y = net.op("LayerNormalization", y, net.positive(8), net.random(8), axis=-1)
        x = net.op("Add", x, attention(net, y, 12, 3, fused))
        x = net.op("Add", x, net.matmul(net.op("Tanh", net.matmul(x, 16, name="up")), 8, name="down"))
        return net.gemm(net.op("ReduceMean", x, axes=[1], keepdims=0), 5, name="head")

    return build


add("attention_separate", transformer("", False), "MatMul Reshape Transpose")
add("attention_fused_gather", transformer("gather", False), "MatMul Gather Reshape")
add("attention_fused_split", transformer("split", False), "MatMul Split Squeeze")
add("attention_norms_pinned", transformer("", True), "MatMul", pinned=("embed", "head"))
add("attention_norms_released", transformer("gather", True), "MatMul LayerNormalization", check={"release": True})


@case("MatMul Transpose")
def channels_last_block(net: Net) -> str:
    """ConvNeXt without its norm: depthwise, channels last, two products, layer scale, back."""
    x = net.conv(net.input(1, 3, 8, 8), 8, name="stem")
    y = net.op("Transpose", net.conv(x, 8, group=8, **SAME), perm=[0, 2, 3, 1])
    y = net.op("Add", net.matmul(y, 16), net.random(16))
    y = net.op("Add", net.matmul(net.op("Tanh", y), 8), net.random(8))
    y = net.op("Transpose", net.op("Mul", y, net.positive(8)), perm=[0, 3, 1, 2])
    return net.head(net.conv(net.op("Add", x, y), 5))


@case("Add BatchNormalization Conv")
def residual_stage(net: Net) -> str:
    y = net.relu(net.bn(net.conv(net.input("N", 3, 8, 8), 8, bias=False, name="stem", **SAME)))
    for channels, stride in ((8, 1), (12, 2)):
        z = net.relu(net.bn(net.conv(y, channels, strides=[stride, stride], bias=False, **SAME)))
        z = net.bn(net.conv(z, channels, bias=False, **SAME))
        short = y if stride == 1 else net.bn(net.conv(y, channels, 1, strides=[2, 2], bias=False))
        y = net.relu(net.op("Add", z, short))
    return net.head(y)


@case("Concat AveragePool")
def dense_block(net: Net) -> str:
    y = net.conv(net.input(1, 3, 8, 8), 6, **SAME)
    for _ in range(3):
        z = net.conv(net.relu(net.bn(y)), 4, **SAME)
        y = net.op("Concat", y, z, axis=1)
    y = net.op("AveragePool", net.conv(net.relu(net.bn(y)), 8, 1), kernel_shape=[2, 2], strides=[2, 2])
    return net.head(net.relu(net.bn(y)))


@case("Conv Clip Add")
def inverted_residual(net: Net) -> str:
    x = net.conv(net.input(1, 3, 8, 8), 8, **SAME)
    y = net.op("Clip", net.bn(net.conv(x, 24, 1)), net.const(0.0), net.const(6.0))
    y = net.op("Clip", net.bn(net.conv(y, 24, group=24, **SAME)), net.const(0.0), net.const(6.0))
    return net.head(net.op("Add", x, net.bn(net.conv(y, 8, 1))))


@case("Resize Concat ConvTranspose")
def u_net(net: Net) -> str:
    x = net.input(1, 3, 8, 8)
    one = net.relu(net.conv(x, 8, **SAME))
    two = net.relu(net.conv(net.op("MaxPool", one, kernel_shape=[2, 2], strides=[2, 2]), 12, **SAME))
    three = net.relu(net.conv(net.op("MaxPool", two, kernel_shape=[2, 2], strides=[2, 2]), 16, **SAME))
    up = net.op("Concat", net.op("Resize", three, "", np.asarray([1, 1, 2, 2], np.float32)), two, axis=1)
    up = net.conv_transpose(net.relu(net.conv(up, 12, **SAME)), 8, strides=[2, 2])
    return net.conv(net.relu(net.conv(net.op("Concat", up, one, axis=1), 8, **SAME)), 2, 1, name="head")


@case("Split Concat")
def partial_stages(net: Net) -> str:
    """C2f: split, run a part through bottlenecks, concatenate everything."""
    y = net.conv(net.input(1, 3, 8, 8), 16)
    parts = list(net.op("Split", y, [8, 8], outputs=2, axis=1))
    for _ in range(2):
        z = net.op("Sigmoid", net.conv(parts[-1], 8, **SAME))
        parts.append(net.op("Add", parts[-1], net.conv(z, 8, **SAME)))
    return net.head(net.conv(net.op("Concat", *parts, axis=1), 6, 1))


@case("Conv MatMul", pinned=("tokens_out", "head"))
def mixer(net: Net) -> str:
    """Tokens and channels carry labels of their own; the token axis is pinned by the patches."""
    x = net.conv(net.input(1, 3, 6, 6), 8, 2, strides=[2, 2], name="patches")
    x = net.op("Reshape", x, [1, 8, 9])
    y = net.matmul(net.relu(net.matmul(x, 12, name="tokens_in")), 9, name="tokens_out")
    x = net.op("Transpose", net.op("Add", x, y), perm=[0, 2, 1])
    x = net.op("Add", x, net.matmul(net.relu(net.matmul(x, 16)), 8))
    return net.gemm(net.op("ReduceMean", x, axes=[1], keepdims=0), 5, name="head")


@case("Conv BatchNormalization", ir=3, opset=9)
def initializers_as_inputs(net: Net) -> str:
    y = net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 8)))
    return net.head(net.conv(y, 6))


@case("Conv", check=MACS_ONLY)
def shared_weights_cut_differently(net: Net) -> str:
    """Two layers read the same weight; each takes its own slice of it."""
    weight = net.const(net.random(8, 8, 3, 3, scale=0.1))
    y = net.conv(net.input(1, 3, 10, 10), 8, name="stem")
    y = net.conv(net.relu(y), 8, weight=weight, name="first")
    return net.head(net.conv(net.relu(y), 8, weight=weight, name="second"))


@case("Conv")
def shared_weights_cut_alike(net: Net) -> str:
    """A detection head on two levels: the shared weights stay shared only where both want the same slice."""
    weight, bias = net.const(net.random(6, 8, 3, 3, scale=0.1)), net.const(net.random(6))
    x = net.input(1, 3, 10, 10)
    level = net.conv(x, 8, **SAME, name="level")
    outs = [net.op("Conv", y, weight, bias, name=f"shared{i}") for i, y in enumerate((level, net.relu(level)))]
    return net.head(net.conv(net.op("Add", *outs), 5))


@case("Conv Add", check=MACS_ONLY)
def one_bias_for_unrelated_layers(net: Net) -> str:
    """Exporters merge equal tensors of unrelated layers into one initializer."""
    bias = net.const(np.zeros(8, np.float32))
    y = net.op("Conv", net.input(1, 3, 8, 8), net.random(8, 3, 3, 3), bias, name="first")
    y = net.op("Conv", net.relu(y), net.random(8, 8, 3, 3, scale=0.1), bias, name="second")
    return net.head(net.op("Add", y, net.random(8, 1, 1)))


def indirect(how: str) -> object:
    """A conv whose weight is made by other nodes."""

    def build(net: Net) -> str:
        values = net.random(8, 6, 3, 3, scale=0.2)
        y = net.conv(net.input(1, 3, 8, 8), 6, name="stem")
        if how == "identity":
            weight = net.op("Identity", values)
        elif how == "transpose":
            weight = net.op("Transpose", net.op("Identity", values.transpose(1, 3, 0, 2).copy()), perm=[2, 0, 3, 1])
        elif how == "constant":
            weight = net.op("Constant", value=numpy_helper.from_array(values))
        elif how == "constant_of_shape":
            weight = net.op(
                "ConstantOfShape", [8, 6, 3, 3], value=numpy_helper.from_array(np.asarray([0.05], np.float32))
            )
        elif how == "cast":
            weight = net.op("Cast", values.astype(np.float64), to=TensorProto.FLOAT)
        elif how == "reshape":
            weight = net.op("Reshape", values.reshape(8, 54), [8, 6, 3, 3])
        elif how == "dequantize":
            weight = net.op(
                "DequantizeLinear",
                (values * 100).astype(np.int8),
                net.positive(8) * np.float32(0.01),
                np.zeros(8, np.int8),
                axis=0,
            )
        elif how == "dequantize_tensor":
            weight = net.op("DequantizeLinear", (values * 100).astype(np.int8), net.const(np.float32(0.01)))
        elif how == "standardised":
            mean = net.op("ReduceMean", values, axes=[1, 2, 3])
            centred = net.op("Sub", net.const(values), mean)
            spread = net.op("Sqrt", net.op("ReduceMean", net.op("Mul", centred, centred), axes=[1, 2, 3]))
            weight = net.op("Div", centred, spread)
        else:
            weight = net.op("Mul", values, net.positive(8, 1, 1, 1))
        return net.head(net.conv(net.relu(net.conv(y, 8, weight=weight, name="indirect")), 5))

    return build


WRITTEN_OUT = ("dequantize", "standardised", "product")
for how in (
    "identity",
    "transpose",
    "constant",
    "constant_of_shape",
    "cast",
    "reshape",
    "dequantize",
    "dequantize_tensor",
    "standardised",
    "product",
):
    add(f"weight_by_{how}", indirect(how), "Conv", check=MACS_ONLY if how in WRITTEN_OUT else None)


@case("MatMul Gemm")
def transposed_weights(net: Net) -> str:
    """Linear layers as x @ Transpose(W), and a bias behind an Identity."""
    y = net.op("Flatten", net.conv(net.input(1, 3, 4, 4), 8))
    y = net.op("MatMul", y, net.op("Transpose", net.random(10, 32, scale=0.2), perm=[1, 0]), name="fc")
    y = net.op("Add", y, net.op("Identity", net.random(10)))
    return net.gemm(net.relu(y), 5, name="head")


@case("Conv", pinned=("captured", "head"), check=MACS_ONLY)
def body_reads_an_outer_tensor(net: Net) -> str:
    """An If whose bodies read a weight and an activation of the main graph: both stay whole."""
    weight = net.const(net.random(6, 8, 3, 3, scale=0.2), name="outer_weight")
    y = net.conv(net.input(1, 3, 8, 8), 8, name="stem")
    y = net.conv(net.relu(y), 6, weight=weight, bias=False, name="captured")
    kind = helper.make_tensor_value_info("body_out", TensorProto.FLOAT, None)
    flip = helper.make_node("Mul", [y, "body_scale"], ["body_out"], name="body_mul")
    mean = helper.make_node("ReduceMean", ["outer_weight"], ["body_scale"], keepdims=0, name="body_mean")
    same = helper.make_node("Identity", [y], ["body_out"], name="body_identity")
    then, other = (helper.make_graph(nodes, f"body{i}", [], [kind]) for i, nodes in enumerate(([mean, flip], [same])))
    condition = net.op("Greater", net.op("ReduceMax", "x", keepdims=0), net.const(0.0))
    picked = net.op("If", condition, dims=[1, 6, 4, 4], then_branch=then, else_branch=other)
    net.types[picked].tensor_type.elem_type = TensorProto.FLOAT
    return net.head(net.conv(net.relu(net.conv(picked, 8, 1)), 5, 1))


@case("Conv")
def dynamic_everything(net: Net) -> str:
    y = net.conv(net.input("N", 3, "H", "W"), 8, **SAME)
    y = net.op("MaxPool", net.relu(net.bn(y)), kernel_shape=[2, 2], strides=[2, 2])
    short = net.conv(y, 12, 1)
    y = net.op("Add", short, net.conv(net.relu(net.conv(y, 10, **SAME)), 12, **SAME))
    return net.head(y)


@case("Conv Reshape Transpose")
def dynamic_shuffle(net: Net) -> str:
    """A shuffle with an open batch: -1 stands for it."""
    y = net.relu(net.conv(net.conv(net.input("N", 3, 6, 6), 8), 8, 1, group=2))
    y = net.op("Reshape", y, [-1, 2, 4, 4, 4])
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), [-1, 8, 4, 4])
    return net.head(net.conv(y, 5))


@case("Conv Add", pinned=("head", "map"))
def two_inputs_two_outputs(net: Net) -> tuple[str, str]:
    left, right = net.input("N", 3, 6, 6, name="left"), net.input("N", 2, 6, 6, name="right")
    y = net.relu(net.op("Add", net.conv(left, 8, name="of_left"), net.conv(right, 8, name="of_right")))
    return net.head(y), net.conv(y, 2, 1, name="map")
