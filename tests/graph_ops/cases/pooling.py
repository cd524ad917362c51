"""Pooling, resampling, sub-pixels."""

from __future__ import annotations

import numpy as np

from ..builder import MICROSOFT, Net
from . import add, case
from .conv import dequantize, quantize


def pool(op: str, **attributes: object) -> object:
    def build(net: Net) -> str:
        y = net.op(op, net.conv(net.input(1, 3, 9, 9), 8), **attributes)
        return net.head(net.conv(net.relu(y), 5, 1))

    return build


for label, op, attributes in (
    ("max", "MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("max_padded", "MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    ("average", "AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("average_counting", "AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("average_same", "AveragePool", {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}),
    ("lp", "LpPool", {"kernel_shape": [2, 2], "strides": [2, 2], "p": 2}),
    ("global_average", "GlobalAveragePool", {}),
    ("global_max", "GlobalMaxPool", {}),
    ("global_lp", "GlobalLpPool", {"p": 2}),
):
    add(f"pool_{label}", pool(op, **attributes), op)


@case("MaxPool", pinned=("indexed", "head"))
def pool_with_indices(net: Net) -> str:
    """Indices count positions of the whole map, channels included."""
    y = net.conv(net.relu(net.conv(net.input(1, 3, 8, 8), 8)), 6, name="indexed")
    y, places = net.op("MaxPool", y, outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Add", y, net.op("Mul", net.op("Cast", places, to=1), net.const(0.01)))
    y = net.op("MaxPool", net.conv(net.relu(net.conv(y, 8, 1)), 6, 1), kernel_shape=[2, 2])
    return net.head(net.conv(y, 5, 1))


@case("com.microsoft.QLinearAveragePool com.microsoft.QLinearGlobalAveragePool")
def quantized_pools(net: Net) -> str:
    q = (net.const(np.float32(0.05)), net.const(np.uint8(100)))
    y = quantize(net, net.conv(net.input(1, 3, 8, 8), 8))
    y = net.op(
        "QLinearAveragePool", y, *q, *q, domain=MICROSOFT, dims=[1, 8, 3, 3], kernel_shape=[2, 2], strides=[2, 2]
    )
    y = quantize(net, net.conv(dequantize(net, y, 0.05, 100), 6))
    y = net.op("QLinearGlobalAveragePool", y, *q, *q, domain=MICROSOFT, dims=[1, 6, 1, 1], channels_last=0)
    return net.gemm(net.op("Flatten", dequantize(net, y, 0.05, 100)), 5, name="head")


@case("com.microsoft.QLinearGlobalAveragePool")
def quantized_pool_channels_last(net: Net) -> str:
    q = (net.const(np.float32(0.05)), net.const(np.uint8(100)))
    y = net.op("Transpose", quantize(net, net.conv(net.input(1, 3, 8, 8), 8)), perm=[0, 2, 3, 1])
    y = net.op("QLinearGlobalAveragePool", y, *q, *q, domain=MICROSOFT, dims=[1, 1, 1, 8], channels_last=1)
    return net.gemm(net.op("Flatten", dequantize(net, y, 0.05, 100)), 5, name="head")


BOXES = np.asarray([[0, 0, 5, 5], [1, 1, 4, 4], [0, 2, 3, 5]], np.float32)


@case("RoiAlign")
def roi_align(net: Net) -> str:
    y = net.op(
        "RoiAlign", net.conv(net.input(1, 3, 8, 8), 8), BOXES, np.zeros(3, np.int64), output_height=2, output_width=2
    )
    return net.head(net.conv(y, 5, 1))


@case("MaxRoiPool")
def max_roi_pool(net: Net) -> str:
    boxes = np.concatenate([np.zeros((3, 1), np.float32), BOXES], 1)
    y = net.op("MaxRoiPool", net.conv(net.input(1, 3, 8, 8), 8), boxes, pooled_shape=[2, 2])
    return net.head(net.conv(y, 5, 1))


@case("GridSample", pinned=("grid", "head"))
def grid_sample(net: Net) -> str:
    """The grid comes from a layer of its own, whose channels are coordinates."""
    x = net.input(1, 3, 8, 8)
    grid = net.op("Tanh", net.op("Transpose", net.conv(net.relu(net.conv(x, 6, 1)), 2, name="grid"), perm=[0, 2, 3, 1]))
    y = net.op("GridSample", net.conv(x, 8, name="sampled"), grid)
    return net.head(net.conv(y, 5, 1))


def resize(*inputs: object, opset: int = 17, op: str = "Resize", **attributes: object) -> object:
    def build(net: Net) -> str:
        y = net.op(
            op,
            net.conv(net.input(1, 3, 6, 6), 8),
            *(net.const(i) if isinstance(i, np.ndarray) else i for i in inputs),
            **attributes,
        )
        return net.head(net.conv(y, 5))

    return build


SCALES = np.asarray([1, 1, 2, 1.5], np.float32)
add("resize_scales", resize("", SCALES), "Resize")
add("resize_sizes", resize("", "", np.asarray([1, 8, 7, 9], np.int64), mode="linear"), "Resize")
add("resize_roi", resize(np.asarray([0, 0, 0, 0, 1, 1, 1, 1], np.float32), SCALES, mode="cubic"), "Resize")
add("resize_axes", resize("", "", np.asarray([7, 9], np.int64), axes=[2, 3]), "Resize", opset=18)
add("resize_10", resize(SCALES), "Resize", opset=10)
add("upsample_9", resize(SCALES, op="Upsample"), "Upsample", opset=9)


@case("Resize", pinned=("cropped", "head"))
def resize_by_crop(net: Net) -> str:
    """Crop and resize extrapolates: its axes stay whole."""
    y = net.conv(net.relu(net.conv(net.input(1, 3, 6, 6), 8)), 6, 1, name="cropped")
    region = np.asarray([0, 0, 0.1, 0.1, 1, 1, 0.9, 0.9], np.float32)
    y = net.op("Resize", y, region, SCALES, mode="linear", coordinate_transformation_mode="tf_crop_and_resize")
    y = net.op("Resize", net.conv(net.relu(net.conv(y, 8, 1)), 6, 1), "", SCALES)
    return net.head(net.conv(y, 5, 1))


@case("Resize Sub")
def resize_like_another_map(net: Net) -> str:
    """Top-down path of a pyramid: the size comes from Shape of the larger map."""
    x = net.input("N", 3, "H", "W")
    large = net.conv(x, 8, pads=[1, 1, 1, 1], name="large")
    small = net.conv(net.relu(large), 6, pads=[1, 1, 1, 1], strides=[2, 2], name="small")
    small = net.conv(net.relu(small), 8, 1, name="lateral")
    size = net.op("Slice", net.op("Shape", large), [2], [4])
    size = net.op("Concat", net.op("Slice", net.op("Shape", small), [0], [2]), size, axis=0)
    y = net.op("Sub", large, net.op("Resize", small, "", "", size, mode="nearest"))
    return net.head(net.conv(y, 5))


def pixel_shuffle(mode: str, opset: int = 17) -> object:
    def build(net: Net) -> str:
        y = net.op("DepthToSpace", net.conv(net.input(1, 3, 5, 5), 24), blocksize=2, mode=mode or None)
        return net.head(net.conv(y, 5))

    return build


for mode in ("", "DCR", "CRD"):
    add(f"depth_to_space_{mode or 'default'}", pixel_shuffle(mode), "DepthToSpace")


@case("SpaceToDepth")
def space_to_depth(net: Net) -> str:
    y = net.op("SpaceToDepth", net.conv(net.input(1, 3, 8, 8), 8), blocksize=2)
    return net.head(net.conv(y, 5))


@case("Reshape Transpose")
def pixel_shuffle_by_hand(net: Net) -> str:
    """DepthToSpace as exporters before opset 11 wrote it."""
    y = net.op("Reshape", net.conv(net.input(1, 3, 5, 5), 24), [1, 6, 2, 2, 3, 3])
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 1, 4, 2, 5, 3]), [1, 6, 6, 6])
    return net.head(net.conv(y, 5))
