"""Reshapes: minimal blocks, special entries, fan-out, merged and split axes."""

from __future__ import annotations

from ..builder import Net
from . import MACS_ONLY, add, case


def fan_out(op: str, *more: object, dynamic: bool = False, **attributes: object) -> object:
    """Every channel owns H x W consecutive features."""

    def build(net: Net) -> str:
        y = net.conv(net.input("N" if dynamic else 1, 3, 6, 5), 8)
        y = net.op(op, net.relu(y), *more, **attributes)
        if dynamic:
            net.types[y].tensor_type.shape.dim[1].dim_value = 8 * 4 * 3
        return net.gemm(net.relu(net.gemm(y, 10, transB=1)), 5, name="head")

    return build


add("flatten", fan_out("Flatten"), "Flatten")
add("flatten_axis", fan_out("Flatten", axis=-3), "Flatten")
add("flatten_dynamic", fan_out("Flatten", dynamic=True), "Flatten")
add("reshape_rows", fan_out("Reshape", [1, 96]), "Reshape")
add("reshape_minus_one", fan_out("Reshape", [1, -1]), "Reshape")
add("reshape_infer_batch", fan_out("Reshape", [-1, 96], dynamic=True), "Reshape")
add("reshape_copy_batch", fan_out("Reshape", [0, -1], dynamic=True), "Reshape")
add("reshape_copy_batch_named", fan_out("Reshape", [0, 96], dynamic=True), "Reshape")
add("reshape_allow_zero", fan_out("Reshape", [1, 96], allowzero=1), "Reshape")


@case("Reshape")
def reshape_and_back(net: Net) -> str:
    y = net.op("Reshape", net.conv(net.input(1, 3, 6, 6), 8), [0, 0, -1])
    y = net.op("Mul", y, net.random(16))
    return net.head(net.conv(net.op("Reshape", y, [0, -1, 4, 4]), 5))


@case("Reshape")
def reshape_by_shape_of_another(net: Net) -> str:
    """The target is computed from the Shape of a tensor that is cut."""
    y = net.conv(net.input("N", 3, "H", "W"), 8)
    flat = net.op("Reshape", y, [0, 0, -1])
    flat = net.op("Div", flat, net.op("Add", net.op("ReduceMax", net.op("Abs", flat), axes=[2]), net.const(1.0)))
    back = net.op("Reshape", flat, net.op("Shape", y))
    net.types[back].CopyFrom(net.types[y])
    return net.head(net.conv(back, 5))


@case("Reshape")
def reshape_by_pieces_of_a_shape(net: Net) -> str:
    """(N, 2, C / 2, H, W) with every entry but the first computed from Shape, as old exporters write a shuffle."""
    y = net.conv(net.input("N", 3, 6, 6), 8)
    shape = net.op("Shape", y)
    n, c, h, w = (net.op("Gather", shape, [i]) for i in range(4))
    half = net.op("Div", c, [2])
    y = net.op("Reshape", y, net.op("Concat", n, [2], half, h, w, axis=0))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), net.op("Concat", n, c, h, w, axis=0))
    net.types[y].tensor_type.CopyFrom(net.types["conv0_out"].tensor_type)
    return net.head(net.conv(y, 5))


@case("MatMul", check=MACS_ONLY)
def scale_from_a_shape(net: Net) -> str:
    """1 / sqrt(width) computed from Shape keeps its value when the width shrinks."""
    q, k = net.matmul(net.input(1, 6, 7), 8, name="q"), net.matmul("x", 8, name="k")
    width = net.op("Cast", net.op("Gather", net.op("Shape", q), net.const(2)), to=1)
    y = net.op("Div", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), net.op("Sqrt", width))
    y = net.op("MatMul", net.op("Softmax", y, axis=2), net.op("Reshape", net.matmul("x", 12, name="v"), [1, 6, 12]))
    return net.matmul(y, 5, name="head")


def shuffle(groups: int) -> object:
    """Channel shuffle between two grouped convolutions."""

    def build(net: Net) -> str:
        y = net.relu(net.conv(net.conv(net.input(1, 3, 6, 6), 12), 12, 1, group=groups))
        y = net.op("Reshape", y, [1, groups, 12 // groups, 4, 4])
        y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), [1, 12, 4, 4])
        return net.head(net.conv(net.conv(y, 12, 3, group=12), 5, 1))

    return build


add("shuffle_2", shuffle(2), "Reshape Transpose")
add("shuffle_3", shuffle(3), "Reshape Transpose")


@case("Reshape", pinned=("merged", "head"))
def merge_of_two_labelled_axes(net: Net) -> str:
    """Tokens and features in one axis: only the longer of the two can be cut."""
    y = net.op("Reshape", net.conv(net.input(1, 3, 5, 5), 6), [1, 6, 9])
    y = net.matmul(y, 4, name="merged")
    return net.gemm(net.op("Flatten", net.relu(y)), 5, name="head")


@case("Squeeze Unsqueeze")
def squeeze(net: Net) -> str:
    y = net.op("Squeeze", net.op("GlobalAveragePool", net.conv(net.input(1, 3, 6, 6), 8)), [2, -1])
    y = net.op("Unsqueeze", net.op("Squeeze", net.relu(net.gemm(y, 6))), [0, 2])
    y = net.op("Unsqueeze", y, [-1])
    return net.head(net.conv(y, 5, 1))


@case("Squeeze Unsqueeze", opset=11)
def squeeze_attributes(net: Net) -> str:
    y = net.op("Squeeze", net.op("GlobalAveragePool", net.conv(net.input(1, 3, 6, 6), 8)), axes=[2, 3])
    y = net.op("Unsqueeze", net.relu(net.gemm(y, 6)), axes=[2, 3])
    return net.head(net.conv(y, 5, 1))


@case("Reshape")
def batch_and_time_in_one_axis(net: Net) -> str:
    """(N, T, C, H, W) <-> (N * T, C, H, W): the batch moves, the channels do not care."""
    x = net.input("N", 2, 3, 6, 6)
    y = net.op("Reshape", x, [-1, 3, 6, 6])
    y = net.op("Reshape", net.op("Flatten", net.op("GlobalAveragePool", net.conv(y, 8))), [-1, 2, 8])
    return net.matmul(net.relu(net.matmul(net.op("ReduceMean", y, axes=[1], keepdims=0), 6)), 5, name="head")
