"""Matrix products with weights and between activations."""

from __future__ import annotations

import numpy as np

from ..builder import Net
from . import add, case
from .conv import dequantize, int8, quantize


def flat(net: Net, channels: int = 8) -> str:
    """A conv, then one row of features."""
    return net.op("Flatten", net.relu(net.conv(net.input(1, 3, 4, 4), channels)))


def between(bias: object = True, **attributes: object) -> object:
    def build(net: Net) -> str:
        y = net.relu(net.gemm(flat(net), 10, bias=bias, **attributes))
        return net.gemm(y, 5, name="head")

    return build


for label, settings in {
    "plain": {},
    "trans_b": {"transB": 1},
    "alpha_beta": {"alpha": 0.7, "beta": 1.3, "transB": 1},
    "beta_zero": {"beta": 0.0},
    "no_bias": {"bias": False},
    "row_bias": {"bias": np.linspace(-1, 1, 10, dtype=np.float32).reshape(1, 10)},
    "scalar_bias": {"bias": np.float32(0.3)},
    "one_bias": {"bias": np.full((1,), 0.3, np.float32)},
    "one_by_one_bias": {"bias": np.full((1, 1), 0.3, np.float32)},
}.items():
    if "bias" in settings and settings["bias"] is not False:
        settings["bias"] = np.asarray(settings["bias"])
    add(f"gemm_{label}", between(**settings), "Gemm")


@case("Gemm Transpose")
def gemm_trans_a(net: Net) -> str:
    y = net.op("Transpose", flat(net), perm=[1, 0])
    return net.gemm(net.relu(net.gemm(y, 10, transA=1)), 5, name="head")


def rows(bias: object) -> object:
    """The labelled axis is the row axis: a weight mixes positions, channel by channel."""

    def build(net: Net) -> str:
        y = net.op("Reshape", net.conv(net.input(1, 3, 5, 5), 8), [8, 9])
        y = net.op("Reshape", net.gemm(y, 4, bias=bias, name="rows"), [1, 8, 2, 2])
        return net.head(net.conv(y, 5, 1))

    return build


add("gemm_rows", rows(True), "Gemm Reshape", pinned=("rows", "head"))
add(
    "gemm_rows_full_bias", rows(np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)), "Gemm", pinned=("rows", "head")
)
add(
    "gemm_rows_column_bias",
    rows(np.linspace(-1, 1, 8, dtype=np.float32).reshape(8, 1)),
    "Gemm",
    pinned=("rows", "head"),
)


@case("MatMul")
def matmul_right(net: Net) -> str:
    y = net.op("Transpose", net.conv(net.input(1, 3, 6, 6), 8), perm=[0, 2, 3, 1])
    y = net.op("Add", net.matmul(y, 12), net.random(12))
    y = net.op("Add", net.matmul(net.relu(y), 6), net.random(1, 1, 6))
    return net.head(net.op("Transpose", y, perm=[0, 3, 1, 2]))


@case("MatMul")
def matmul_left(net: Net) -> str:
    """A weight from the left mixes channels that lie on the second to last axis."""
    y = net.op("Reshape", net.conv(net.input(1, 3, 6, 6), 8), [1, 8, 16])
    y = net.relu(net.op("MatMul", net.random(10, 8, scale=0.3), y))
    y = net.op("MatMul", net.random(6, 10, scale=0.3), y)
    return net.gemm(net.op("ReduceMean", y, axes=[2], keepdims=0), 5, name="head")


@case("MatMul")
def matmul_batched_weight(net: Net) -> str:
    """Each channel has a matrix of its own: the weight's batch axis follows the channels."""
    y = net.conv(net.input(1, 3, 8, 8), 8)
    y = net.op("MatMul", y, net.random(8, 6, 7, scale=0.3))
    y = net.op("MatMul", net.relu(y), net.random(1, 8, 7, 1, scale=0.3))
    return net.gemm(net.op("Flatten", y), 5, name="head")


@case("MatMul")
def matmul_batched_left_weight(net: Net) -> str:
    y = net.conv(net.input(1, 3, 8, 8), 8)
    y = net.op("MatMul", net.random(8, 7, 6, scale=0.3), y)
    y = net.op("MatMul", net.random(8, 1, 7, scale=0.3), net.relu(y))
    return net.gemm(net.op("Flatten", y), 5, name="head")


@case("MatMul")
def matmul_weight_of_higher_rank(net: Net) -> str:
    y = net.op("Reshape", net.conv(net.input(1, 3, 6, 6), 8), [8, 16])
    y = net.op("MatMul", net.op("Transpose", y), net.random(1, 1, 8, 6))
    return net.op("ReduceMean", net.matmul(net.relu(y), 5, name="head"), axes=[2], keepdims=0)


@case("MatMul")
def matmul_of_activations(net: Net) -> str:
    """Both factors are activations: the summed axis is joined, rows and columns pass."""
    x = net.input(1, 7, 6)
    q, k, v = (net.matmul(x, n, name=name) for n, name in ((8, "q"), (8, "k"), (10, "v")))
    y = net.op("MatMul", net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), axis=-1), v)
    return net.matmul(y, 5, name="head")


@case("MatMul", pinned=("mix", "head"))
def matmul_channels_by_channels(net: Net) -> str:
    """The product of two maps over space (bilinear pooling): both channel axes live on."""
    y = net.op("Reshape", net.conv(net.input(1, 3, 6, 6), 8), [1, 8, 16])
    z = net.op("Reshape", net.conv("x", 6), [1, 6, 16])
    y = net.op("MatMul", y, net.op("Transpose", z, perm=[0, 2, 1]))
    y = net.op("ReduceMax", net.matmul(y, 4, name="mix"), axes=[2], keepdims=0)
    return net.gemm(y, 5, name="head")


@case("MatMul")
def matmul_batch_of_activations(net: Net) -> str:
    """Channels as the batch axis of a product of two activations."""
    y, z = net.conv(net.input(1, 3, 7, 7), 8, name="left"), net.conv("x", 8, name="right")
    return net.head(net.conv(net.op("MatMul", y, z), 5, 1))


@case("MatMulInteger")
def matmul_integer(net: Net) -> str:
    y = quantize(net, net.matmul(net.input(1, 5, 6), 8))
    y = net.op("MatMulInteger", y, int8(net, 8, 10), net.const(np.uint8(100)), net.const(np.zeros(10, np.int8)))
    y = net.op("Mul", net.op("Cast", y, to=1), net.random(10, scale=1e-3))
    return net.matmul(y, 5, name="head")


@case("QLinearMatMul")
def qlinear_matmul(net: Net) -> str:
    y = quantize(net, net.matmul(net.input(1, 5, 6), 8))
    y = net.op(
        "QLinearMatMul",
        y,
        net.const(np.float32(0.05)),
        net.const(np.uint8(100)),
        int8(net, 8, 10),
        net.positive(10) * np.float32(0.01),
        np.zeros(10, np.int8),
        net.const(np.float32(0.1)),
        net.const(np.uint8(120)),
    )
    return net.matmul(dequantize(net, y), 5, name="head")


@case("QLinearMatMul")
def qlinear_matmul_per_tensor(net: Net) -> str:
    y = quantize(net, net.matmul(net.input(1, 5, 6), 8))
    y = net.op(
        "QLinearMatMul",
        y,
        net.const(np.float32(0.05)),
        net.const(np.uint8(100)),
        int8(net, 8, 10),
        net.const(np.float32(0.01)),
        net.const(np.int8(0)),
        net.const(np.float32(0.1)),
        net.const(np.uint8(120)),
    )
    return net.matmul(dequantize(net, y), 5, name="head")


def einsum_attention(equations: tuple[str, str]) -> object:
    def build(net: Net) -> str:
        x = net.input(1, 7, 6)
        q, k, v = (
            net.op("Reshape", net.matmul(x, n, name=name), [1, 7, 2, n // 2])
            for n, name in ((8, "q"), (8, "k"), (10, "v"))
        )
        y = net.op("Softmax", net.op("Einsum", q, k, equation=equations[0]), axis=-1)
        y = net.op("Einsum", y, v, equation=equations[1])
        return net.matmul(net.op("Reshape", y, [1, 7, 10]), 5, name="head")

    return build


add("einsum_attention", einsum_attention(("b i h d, b j h d -> b h i j", "b h i j, b j h d -> b i h d")), "Einsum")
add("einsum_ellipsis", einsum_attention(("...ihd,...jhd->...hij", "...hij,...jhd->...ihd")), "Einsum")


@case("Einsum")
def einsum_weight(net: Net) -> str:
    """A constant brings letters of its own, follows those of the data and ends those that are summed over."""
    y = net.op("Einsum", net.conv(net.input(1, 3, 6, 6), 8), net.random(8, 5, 4), equation="bchw,cko->bkohw")
    y = net.op("Einsum", net.relu(y), net.random(5, 4), equation="bkohw,ko->bkhw")
    return net.head(net.conv(y, 5, 1))


@case("Einsum")
def einsum_without_result(net: Net) -> str:
    """Letters that occur once make up a result that is not written out."""
    y = net.op("Einsum", net.matmul(net.input(4, 6), 8), net.random(8, 5), equation="ab,bc")
    return net.matmul(net.relu(y), 5, name="head")


def attention(flat: bool, heads: tuple[int, int] = (4, 4), **attributes: object) -> object:
    def build(net: Net) -> str:
        x = net.input(1, 7, 6)
        sizes = (heads[0] * 4, heads[1] * 4, heads[1] * 6)
        made = [net.matmul(x, n, name=name) for n, name in zip(sizes, "qkv", strict=True)]
        if flat:
            y = net.op("Attention", *made, q_num_heads=heads[0], kv_num_heads=heads[1], **attributes)
        else:
            split = [
                net.op("Transpose", net.op("Reshape", m, [1, 7, h, m_size // h]), perm=[0, 2, 1, 3])
                for m, h, m_size in zip(made, (heads[0], heads[1], heads[1]), sizes, strict=True)
            ]
            y = net.op("Attention", *split, **attributes)
            y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), [1, 7, heads[0] * 6])
        return net.matmul(y, 5, name="head")

    return build


for label, settings in {
    "split": {"flat": False},
    "flat": {"flat": True},
    "flat_scaled": {"flat": True, "scale": 0.3, "is_causal": 1},
    "shared": {"flat": False, "heads": (4, 2)},
    "flat_shared": {"flat": True, "heads": (4, 2)},
}.items():
    add(f"attention_{label}", attention(**settings), "Attention", opset=23)
