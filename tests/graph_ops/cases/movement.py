"""Operators that move data: transposes, joins, parts, picks, padding, repetition."""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper

from ..builder import MICROSOFT, Net
from . import MACS_ONLY, add, case
from .conv import dequantize, quantize


@case("Transpose")
def transpose(net: Net) -> str:
    y = net.op("Transpose", net.conv(net.input(1, 3, 6, 5), 8))
    y = net.op("Transpose", y, perm=[3, 2, 1, 0])
    return net.head(net.conv(y, 5))


@case("Concat")
def concat_channels(net: Net) -> str:
    x = net.input(1, 3, 6, 6)
    y = net.op("Concat", net.conv(x, 8), net.conv(x, 6), net.conv(x, 1, name="single"), axis=1)
    return net.head(net.conv(y, 5))


@case("Concat")
def concat_with_the_input(net: Net) -> str:
    """Dense connections: the part that is the graph's input stays, the others go."""
    x = net.input(1, 3, 6, 6)
    y = net.op("Concat", x, net.conv(x, 8, pads=[1, 1, 1, 1]), axis=1)
    y = net.op("Concat", net.conv(net.relu(net.bn(y)), 6, pads=[1, 1, 1, 1]), y, axis=-3)
    return net.head(net.conv(y, 5))


def concat_with_constant(first: bool) -> object:
    """Constants end to end with activations: they can be cut like any channel."""

    def build(net: Net) -> str:
        y = net.conv(net.input(1, 3, 6, 6), 8)
        parts = [y, net.const(net.random(1, 4, 4, 4)), net.const(net.random(1, 1, 4, 4))]
        y = net.op("Concat", *(parts[::-1] if first else parts), axis=1)
        return net.head(net.conv(y, 5))

    return build


add("concat_constant_last", concat_with_constant(False), "Concat")
add("concat_constant_first", concat_with_constant(True), "Concat")


@case("Concat")
def concat_of_space(net: Net) -> str:
    """Along another axis the channels are joined like an addition's; a constant takes their labels (class token)."""
    x = net.input(1, 3, 6, 6)
    y = net.op("Concat", net.conv(x, 8), net.conv(x, 8), net.random(1, 8, 1, 4), axis=2)
    return net.head(net.conv(y, 5))


@case("com.microsoft.QLinearConcat")
def concat_quantised(net: Net) -> str:
    x = net.input(1, 3, 6, 6)
    scale, zero = net.const(np.float32(0.05)), net.const(np.uint8(100))
    left, right = quantize(net, net.conv(x, 8)), quantize(net, net.conv(x, 6))
    y = net.op(
        "QLinearConcat",
        scale,
        zero,
        left,
        scale,
        zero,
        right,
        scale,
        zero,
        domain=MICROSOFT,
        dims=[1, 14, 4, 4],
        axis=1,
    )
    net.types[y].tensor_type.elem_type = 2
    return net.head(net.conv(dequantize(net, y, 0.05, 100), 5))


def parts(net: Net, pieces: tuple[str, ...]) -> str:
    """Use every part differently and put them together again."""
    ys = [net.conv(y, 4, 1, name=f"part{i}") if i else net.relu(y) for i, y in enumerate(pieces)]
    return net.head(net.conv(net.op("Concat", *ys, axis=1), 5))


def split(opset: int, sizes: tuple[int, ...] | None, count: int, channels: int = 12, **attributes: object) -> object:
    def build(net: Net) -> str:
        y = net.conv(net.input(1, 3, 6, 6), channels)
        if sizes and opset >= 13:
            pieces = net.op("Split", y, list(sizes), outputs=count, axis=1, **attributes)
        else:
            pieces = net.op("Split", y, outputs=count, axis=1, split=sizes, **attributes)
        return parts(net, pieces)

    return build


add("split_attribute", split(11, (5, 3, 4), 3), "Split", opset=11)
add("split_attribute_equal", split(11, None, 2), "Split", opset=11)
add("split_input", split(13, (5, 3, 4), 3), "Split", opset=13)
add("split_equal", split(13, None, 3), "Split", opset=13)
add("split_num_outputs", split(18, None, 2, num_outputs=2), "Split", opset=18)
add("split_num_outputs_uneven", split(18, None, 4, 11, num_outputs=4), "Split", opset=18)


@case("Split")
def split_space(net: Net) -> str:
    """Along another axis the parts share their channels."""
    left, right = net.op("Split", net.conv(net.input(1, 3, 6, 6), 8), [1, 3], outputs=2, axis=-1)
    return net.head(net.conv(net.op("Concat", right, left, axis=3), 5))


def sliced(opset: int, *bounds: list[int] | None) -> object:
    """Part of the channels beside the whole, so that nothing is dead."""

    def build(net: Net) -> str:
        y = net.conv(net.input(1, 3, 7, 7), 12)
        starts, ends, axes, steps = (*bounds, None, None)[:4]
        if opset < 10:
            piece = net.op("Slice", y, starts=starts, ends=ends, axes=axes)
        else:
            piece = net.op(
                "Slice", y, *(b if b is not None else "" for b in (starts, ends, axes, steps) if b is not None or steps)
            )
        whole = net.op("GlobalMaxPool", y)
        return net.head(net.op("Add", net.conv(piece, 5, 1), net.conv(whole, 5, 1)))

    return build


BIG = 2**62
add("slice_attributes", sliced(9, [2], [8], [1]), "Slice", opset=9)
add("slice_attributes_all_axes", sliced(9, [0, -7], [1, 100]), "Slice", opset=9)
add("slice_inputs", sliced(17, [3], [11], [1]), "Slice")
add("slice_negative", sliced(17, [-9], [-2], [-3]), "Slice")
add("slice_open_end", sliced(17, [5], [BIG], [1]), "Slice")
add("slice_without_axes", sliced(17, [0, 2, 1], [1, 9, BIG]), "Slice")
add("slice_two_axes", sliced(17, [4, 1], [12, 4], [1, 3]), "Slice")
add("slice_step", sliced(17, [1], [12], [1], [3]), "Slice")
add("slice_backwards", sliced(17, [10], [1], [1], [-2]), "Slice")
add("slice_backwards_to_the_front", sliced(17, [-1], [-BIG], [1], [-1]), "Slice")
add("slice_space_steps", sliced(17, [0, 1], [BIG, BIG], [2, 3], [2, 1]), "Slice")


@case("Split", pinned=("stem", "head"))
def split_off_one(net: Net) -> str:
    """A part of length 1 cannot be cut; the others can."""
    return parts(net, net.op("Split", net.conv(net.input(1, 3, 6, 6), 12, name="stem"), [1, 7, 4], outputs=3, axis=1))


@case("Slice Concat")
def slices_that_overlap(net: Net) -> str:
    y = net.conv(net.input(1, 3, 6, 6), 12)
    y = net.op("Concat", net.op("Slice", y, [0], [8], [1]), net.op("Slice", y, [3], [12], [1]), axis=1)
    return net.head(net.conv(y, 5))


@case("Slice", pinned=("stem", "head"))
def slice_of_one(net: Net) -> str:
    """One position cannot be cut; the others can."""
    y = net.conv(net.input(1, 3, 6, 6), 8, name="stem")
    return parts(net, (net.op("Slice", y, [3], [4], [1]), y))


def gathered(index: np.ndarray, axis: int = 1) -> object:
    def build(net: Net) -> str:
        y = net.op("Gather", net.conv(net.input(1, 3, 6, 6), 8), index, axis=axis)
        if index.ndim == 2:
            y = net.op("Reshape", y, [1, -1, 4, 4])
        return net.head(net.conv(y, 5))

    return build


add("gather_permutation", gathered(np.asarray([5, 2, 7, 0, 1, 3, 6, 4])), "Gather")
add("gather_some_twice", gathered(np.asarray([5, 2, -1, 2, 0]), axis=-3), "Gather")
add("gather_grid", gathered(np.asarray([[0, 1, 2, 3], [4, 5, 6, 7]])), "Gather Reshape")
add("gather_windows", gathered(np.asarray([[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]])), "Gather Reshape")
add("gather_space", gathered(np.asarray([3, 1, 0]), axis=2), "Gather")


@case("Conv", pinned=("stem", "head"))
def gather_of_one(net: Net) -> str:
    """One channel picked by number stays with the number, and all channels with it."""
    y = net.conv(net.relu(net.conv(net.input(1, 3, 6, 6), 8)), 6, name="stem")
    one = net.op("Unsqueeze", net.op("Gather", y, net.const(2), axis=1), [1])
    return net.head(net.conv(net.relu(net.conv(net.op("Mul", y, one), 8, 1)), 5, 1))


@case("Gather")
def embedding(net: Net) -> str:
    """Rows of a table by the input's numbers: its columns are channels."""
    tokens = net.input(1, 6, name="tokens", dtype=np.int64)
    y = net.op("Gather", net.random(12, 8), tokens, name="table")
    y = net.op("Add", y, net.random(6, 8))
    return net.gemm(net.op("ReduceMean", net.matmul(net.relu(y), 6), axes=[1], keepdims=0), 5, name="head")


def padded(opset: int, pads: list[int], *more: object, **attributes: object) -> object:
    def build(net: Net) -> str:
        y = net.conv(net.input(1, 3, 6, 6), 8)
        if opset < 11:
            y = net.op("Pad", y, pads=pads, **attributes)
        else:
            y = net.op("Pad", y, pads, *more, **attributes)
        return net.head(net.conv(net.op("Add", y, net.conv(y, net.dims(y)[1], 1)), 5))

    return build


SPACE = [0, 0, 1, 2, 0, 0, 0, 1]
CHANNELS = [0, 3, 0, 0, 0, 2, 0, 0]
add("pad_space", padded(17, SPACE), "Pad")
add("pad_space_reflect", padded(17, SPACE, mode="reflect"), "Pad")
add("pad_channels", padded(17, CHANNELS), "Pad")
add("pad_channels_and_space", padded(17, [0, 3, 1, 0, 0, 2, 0, 1]), "Pad")
add("pad_channels_old", padded(9, CHANNELS, value=0.7), "Pad", opset=9)
add("pad_channels_axes", padded(18, [3, 1, 2, 1], "", [1, -1]), "Pad", opset=18)


@case("Pad")
def pad_with_a_value(net: Net) -> str:
    y = net.op("Pad", net.conv(net.input(1, 3, 6, 6), 8), CHANNELS, net.const(0.7))
    return net.head(net.conv(net.op("Add", y, net.conv("x", 13, name="beside")), 5))


@case("Conv", pinned=("stem", "head"))
def pad_channels_by_reflection(net: Net) -> str:
    y = net.conv(net.relu(net.conv(net.input(1, 3, 6, 6), 8)), 6, name="stem")
    y = net.op("Pad", y, [0, 2, 0, 0, 0, 1, 0, 0], mode="reflect")
    return net.head(net.conv(net.relu(net.conv(y, 8, 1)), 5, 1))


@case("Conv", pinned=("stem", "head"))
def pad_crops_channels(net: Net) -> str:
    y = net.conv(net.relu(net.conv(net.input(1, 3, 6, 6), 8)), 6, name="stem")
    y = net.op("Pad", y, [0, -1, 0, 0, 0, -2, 0, 0])
    return net.head(net.conv(net.relu(net.conv(y, 8, 1)), 5, 1))


def option_a(by_concat: bool) -> object:
    """A parameter-free shortcut: every second pixel, zero channels on both sides."""

    def build(net: Net) -> str:
        y = net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 8, pads=[1, 1, 1, 1], name="stem")))
        main = net.relu(net.bn(net.conv(y, 16, pads=[1, 1, 1, 1], strides=[2, 2])))
        main = net.bn(net.conv(main, 16, pads=[1, 1, 1, 1], name="residual"))
        short = net.op("Slice", y, [0, 0], [2**31, 2**31], [2, 3], [2, 2])
        if by_concat:
            zeros = net.const(np.zeros((1, 4, 4, 4), np.float32))
            short = net.op("Concat", zeros, short, zeros, axis=1)
        else:
            short = net.op("Pad", short, [0, 4, 0, 0, 0, 4, 0, 0])
        return net.head(net.conv(net.relu(net.op("Add", main, short)), 6))

    return build


add("option_a_pad", option_a(False), "Pad Slice")
add("option_a_concat", option_a(True), "Concat Slice", check=MACS_ONLY)


@case("Tile")
def tile_space(net: Net) -> str:
    y = net.op("Tile", net.op("GlobalAveragePool", net.conv(net.input(1, 3, 6, 6), 8)), [1, 1, 3, 2])
    return net.head(net.conv(y, 5, [2, 1]))


@case("Tile")
def tile_channels(net: Net) -> str:
    y = net.op("Tile", net.conv(net.input(1, 3, 6, 6), 8), [1, 2, 1, 1])
    return net.head(net.conv(y, 5))


@case("Expand")
def expand(net: Net) -> str:
    y = net.op("Expand", net.op("GlobalAveragePool", net.conv(net.input(1, 3, 6, 6), 8)), [1, 1, 3, 3])
    y = net.op("Expand", net.op("GlobalAveragePool", net.conv(y, 6)), [1, 6, 4, 4])
    return net.head(net.conv(y, 5))


@case("Expand")
def expand_to_a_shape_of_the_graph(net: Net) -> str:
    y = net.conv(net.input("N", 3, "H", "W"), 8)
    y = net.op("Expand", net.op("GlobalAveragePool", y), net.op("Shape", net.conv("x", 8, name="other")))
    return net.head(net.conv(y, 5))


@case("Conv", pinned=("one", "head"))
def expand_one_channel(net: Net) -> str:
    """One channel spread over many: none of them can be told from the others, so they stay."""
    x = net.input(1, 3, 6, 6)
    wide = net.op("Expand", net.conv(x, 1, name="narrow"), [1, 8, 4, 4])
    y = net.op("Add", net.conv(x, 8, name="one"), wide)
    return net.head(net.conv(net.relu(net.conv(y, 6, 1)), 5))


def class_token(how: str) -> object:
    """A constant for every image of a batch, in front of what is computed from the image."""

    def build(net: Net) -> str:
        y = net.op("Reshape", net.conv(net.input("N", 3, 6, 6), 8, name="stem"), [0, 8, 16])
        y = net.op("Transpose", y, perm=[0, 2, 1])
        batch = net.op("Slice", net.op("Shape", y), [0], [1])
        rest = [1, 1] if how == "Tile" else [1, 8]
        shape = net.op("Concat", batch, np.asarray(rest), axis=0)
        if how == "ConstantOfShape":
            token = net.op(how, shape, value=numpy_helper.from_array(np.asarray([0.5], np.float32)))
        else:
            token = net.op(how, net.random(1, 1, 8), shape)
        y = net.matmul(net.relu(net.op("Concat", token, y, axis=1)), 6)
        return net.matmul(y, 5, name="head")

    return build


for operator in ("Expand", "Tile", "ConstantOfShape"):
    add(f"class_token_by_{operator.lower()}", class_token(operator), f"Concat {operator}")
