"""Convolutions in all their forms."""

from __future__ import annotations

import numpy as np

from ..builder import MICROSOFT, Net
from . import add, case


def between(**attributes: object) -> object:
    """A convolution between two others."""

    def build(net: Net) -> str:
        y = net.relu(net.conv(net.input(1, 3, 9, 8), 8, name="before"))
        y = net.relu(net.conv(y, 8, name="conv", **attributes))
        return net.head(net.conv(y, 6, 1, name="after"))

    return build


for label, settings in {
    "stride_and_pads": {"strides": [2, 1], "pads": [1, 0, 2, 1]},
    "dilation": {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
    "same_upper": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "same_lower": {"auto_pad": "SAME_LOWER"},
    "valid": {"auto_pad": "VALID"},
    "no_bias": {"bias": False, "kernel": [1, 3]},
    "two_groups": {"group": 2},
    "four_groups": {"group": 4, "pads": [1, 1, 1, 1]},
    "depthwise": {"group": 8, "pads": [1, 1, 1, 1]},
}.items():
    add(f"conv_{label}", between(**settings), "Conv")


@case("Conv")
def conv_1d(net: Net) -> str:
    y = net.conv(net.input(1, 2, 16), 8, 3, strides=[2])
    return net.head(net.conv(net.relu(y), 6, 3, pads=[1, 1]))


@case("Conv")
def conv_3d(net: Net) -> str:
    y = net.conv(net.input(1, 2, 5, 6, 5), 6, 3, pads=[1, 1, 1, 0, 0, 0])
    return net.head(net.conv(net.relu(y), 5, 2))


@case("Conv")
def conv_depthwise_multiplier(net: Net) -> str:
    y = net.conv(net.input(1, 3, 8, 8), 6)
    y = net.conv(net.relu(y), 18, group=6, pads=[1, 1, 1, 1], name="multiplied")
    return net.head(net.conv(y, 5, 1))


@case("Conv")
def conv_depthwise_on_input(net: Net) -> str:
    """The channels of the graph's input are not for cutting, nor is what a depthwise layer makes of them."""
    y = net.conv(net.input(1, 4, 8, 8), 8, group=4)
    return net.head(net.conv(net.relu(net.conv(y, 8, 1)), 6))


@case("Conv")
def conv_groups_on_input(net: Net) -> str:
    y = net.conv(net.input(1, 4, 8, 8), 8, group=2)
    return net.head(net.conv(net.relu(y), 6))


@case("Conv")
def conv_group_one_output(net: Net) -> str:
    """Four inputs a group, one output: the groups go as a whole."""
    y = net.conv(net.input(1, 3, 8, 8), 16)
    y = net.conv(net.relu(y), 4, group=4, name="four_to_one")
    return net.head(net.conv(y, 5, 1))


@case("Conv")
def conv_widening_groups(net: Net) -> str:
    y = net.conv(net.input(1, 3, 8, 8), 6)
    y = net.conv(net.relu(y), 12, group=3, name="widening")
    return net.head(net.conv(y, 5, 1))


@case("com.microsoft.FusedConv")
def fused_conv(net: Net) -> str:
    y = net.conv(net.input(1, 3, 8, 8), 8)
    weight = net.random(6, 8, 3, 3, scale=0.1)
    y = net.op("FusedConv", y, weight, net.random(6), domain=MICROSOFT, dims=[1, 6, 4, 4], activation="Relu")
    return net.head(net.conv(y, 4))


def transposed(**attributes: object) -> object:
    def build(net: Net) -> str:
        y = net.relu(net.conv(net.input(1, 3, 5, 5), 8))
        y = net.relu(net.conv_transpose(y, 8, 3, name="deconv", **attributes))
        return net.head(net.conv(y, 5))

    return build


for label, settings in {
    "plain": {},
    "stride": {"strides": [2, 2], "pads": [1, 1, 0, 0], "output_padding": [1, 1]},
    "no_bias": {"bias": False, "dilations": [2, 1]},
    "same": {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "two_groups": {"group": 2, "strides": [2, 2]},
    "four_groups": {"group": 4},
    "depthwise": {"group": 8, "strides": [2, 2]},
}.items():
    add(f"conv_transpose_{label}", transposed(**settings), "ConvTranspose")


@case("ConvTranspose")
def conv_transpose_depthwise_multiplier(net: Net) -> str:
    y = net.conv(net.input(1, 3, 6, 6), 4)
    y = net.conv_transpose(net.relu(y), 12, group=4, strides=[2, 2])
    return net.head(net.conv(y, 5))


@case("ConvTranspose")
def conv_transpose_1d_on_input(net: Net) -> str:
    y = net.conv_transpose(net.input(1, 4, 6), 8, 3, group=2)
    return net.head(net.conv(net.relu(y), 5))


@case("ConvTranspose")
def conv_transpose_3d(net: Net) -> str:
    y = net.conv(net.input(1, 2, 4, 4, 4), 6, 2)
    return net.head(net.conv(net.conv_transpose(y, 4), 5, 1))


def quantize(net: Net, x: str, dtype: type = np.uint8) -> str:
    return net.op("QuantizeLinear", x, net.const(np.float32(0.05)), net.const(dtype(100)))


def dequantize(net: Net, x: str, scale: float = 0.1, zero: int = 120) -> str:
    return net.op("DequantizeLinear", x, net.const(np.float32(scale)), net.const(np.uint8(zero)))


def int8(net: Net, *dims: int) -> np.ndarray:
    return net.rng.integers(-90, 91, dims).astype(np.int8)


def qlinear_conv(
    net: Net, x: str, channels: int, *, per_channel: bool = True, group: int = 1, **attributes: object
) -> str:
    n = net.dims(x)[1] // group
    scale = net.positive(channels) * np.float32(0.01) if per_channel else np.asarray(0.01, np.float32)
    zero = np.zeros(channels if per_channel else (), np.int8)
    bias = net.rng.integers(-3000, 3000, channels).astype(np.int32)
    return net.op(
        "QLinearConv",
        x,
        net.const(np.float32(0.05)),
        net.const(np.uint8(100)),
        int8(net, channels, n, 3, 3),
        scale,
        zero,
        net.const(np.float32(0.1)),
        net.const(np.uint8(120)),
        bias,
        group=group,
        **attributes,
    )


def quantized(per_channel: bool, group: int) -> object:
    def build(net: Net) -> str:
        y = quantize(net, net.conv(net.input(1, 3, 9, 9), 8))
        y = dequantize(net, qlinear_conv(net, y, 8, per_channel=per_channel, group=group, pads=[1, 1, 1, 1]))
        y = dequantize(net, qlinear_conv(net, quantize(net, y), 6, per_channel=per_channel))
        return net.head(net.conv(y, 5, 1))

    return build


for label, per_channel, group in (
    ("per_channel", True, 1),
    ("per_tensor", False, 1),
    ("grouped", True, 2),
    ("depthwise", True, 8),
):
    add(f"qlinear_conv_{label}", quantized(per_channel, group), "QLinearConv QuantizeLinear DequantizeLinear")


@case("ConvInteger")
def conv_integer(net: Net) -> str:
    y = quantize(net, net.conv(net.input(1, 3, 9, 9), 8))
    y = net.op(
        "ConvInteger", y, int8(net, 6, 8, 3, 3), net.const(np.uint8(100)), net.const(np.int8(0)), pads=[1, 1, 1, 1]
    )
    y = net.op("Mul", net.op("Cast", y, to=1), net.random(1, 6, 1, 1, scale=1e-3))
    return net.head(net.conv(y, 5))


@case("ConvInteger")
def conv_integer_without_zero_point(net: Net) -> str:
    y = quantize(net, net.relu(net.conv(net.input(1, 3, 9, 9), 8)))
    y = net.op("ConvInteger", y, int8(net, 6, 8, 3, 3))
    y = net.op("Mul", net.op("Cast", y, to=1), net.const(np.float32(1e-3)))
    return net.head(net.conv(y, 5))


def gated_by_neighbours(net: Net) -> str:
    """Efficient channel attention: a convolution along the line of channels."""
    y = net.conv(net.input(1, 3, 6, 6), 8, name="gated")
    line = net.op("Transpose", net.op("Squeeze", net.op("GlobalAveragePool", y), [3]), perm=[0, 2, 1])
    line = net.op("Conv", line, net.random(1, 1, 3), kernel_shape=[3], pads=[1, 1])
    gate = net.op("Unsqueeze", net.op("Transpose", net.op("Sigmoid", line), perm=[0, 2, 1]), [3])
    return net.head(net.conv(net.op("Mul", y, gate), 5, 1))


add("conv_along_channels_pins", gated_by_neighbours, "Conv", pinned=("gated", "head"))
add("conv_along_channels_released", gated_by_neighbours, "Conv", check={"release": True})
