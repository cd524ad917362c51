"""Normalisations: parameters follow; axes that statistics run across are pinned or released."""

from __future__ import annotations

import numpy as np

from ..builder import Net
from . import add, case

RELEASE = {"release": True}


@case("BatchNormalization")
def batch_norm(net: Net) -> str:
    y = net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 8)))
    return net.head(net.bn(net.conv(y, 6)))


@case("BatchNormalization")
def batch_norm_of_rows(net: Net) -> str:
    """On a matrix, behind a fully connected layer."""
    y = net.op("Flatten", net.conv(net.input(1, 3, 4, 4), 8))
    return net.gemm(net.relu(net.bn(net.gemm(y, 12))), 5, name="head")


@case("BatchNormalization", opset=9)
def batch_norm_old(net: Net) -> str:
    y = net.bn(net.conv(net.input(1, 3, 6, 6), 8))
    return net.head(net.conv(y, 5))


@case("InstanceNormalization")
def instance_norm(net: Net) -> str:
    y = net.op("InstanceNormalization", net.conv(net.input(1, 3, 8, 8), 8), net.positive(8), net.random(8))
    return net.head(net.conv(net.relu(y), 6))


def group_norm_by_instance() -> object:
    """The exporters' GroupNorm: (groups, channels / group * H * W), InstanceNormalization, and back."""

    def build(net: Net) -> str:
        y = net.conv(net.input(1, 3, 6, 6), 12, name="normed")
        y = net.op("Reshape", y, [0, 4, -1])
        y = net.op("InstanceNormalization", y, np.ones(4, np.float32), np.zeros(4, np.float32))
        y = net.op("Reshape", y, [1, 12, 4, 4])
        y = net.op("Add", net.op("Mul", y, net.positive(12, 1, 1)), net.random(12, 1, 1))
        return net.head(net.conv(net.relu(y), 5))

    return build


add("group_norm_by_instance_norm", group_norm_by_instance(), "InstanceNormalization Reshape")
add("group_norm_by_instance_norm_released", group_norm_by_instance(), "InstanceNormalization Reshape", check=RELEASE)


def group_norm(groups: int) -> object:
    def build(net: Net) -> str:
        y = net.conv(net.input(1, 3, 6, 6), 12)
        y = net.op("GroupNormalization", y, net.positive(12), net.random(12), num_groups=groups, dims=net.dims(y))
        return net.head(net.conv(net.relu(y), 5))

    return build


for groups in (2, 4, 12):
    add(f"group_norm_{groups}", group_norm(groups), "GroupNormalization", opset=21)
    add(f"group_norm_{groups}_released", group_norm(groups), "GroupNormalization", opset=21, check=RELEASE)


def layer_norm(op: str, parameters: int) -> object:
    """Over the last axis of a channels-last block, as in ConvNeXt."""

    def build(net: Net) -> str:
        y = net.op("Transpose", net.conv(net.input(1, 3, 6, 6), 8, name="stem"), perm=[0, 2, 3, 1])
        y = net.op(op, y, *[net.positive(8), net.random(8)][:parameters], axis=-1)
        y = net.matmul(net.relu(net.matmul(y, 10)), 6, name="out")
        return net.head(net.op("Transpose", y, perm=[0, 3, 1, 2]))

    return build


for op, parameters, opset in (
    ("LayerNormalization", 2, 17),
    ("LayerNormalization", 1, 17),
    ("RMSNormalization", 1, 23),
):
    label = f"{op}_{parameters}"
    add(f"norm_{label}_pinned", layer_norm(op, parameters), "MatMul", pinned=("stem", "head"), opset=opset)
    add(f"norm_{label}_released", layer_norm(op, parameters), op, opset=opset, check=RELEASE)


@case("LayerNormalization")
def layer_norm_of_tokens(net: Net) -> str:
    """Statistics over the features; the token axis has labels too, and keeps them."""
    y = net.op("Reshape", net.conv(net.input(1, 3, 5, 5), 8), [1, 8, 9])
    y = net.op("LayerNormalization", y, net.positive(9), net.random(9), axis=-1)
    return net.gemm(net.op("Flatten", y), 5, name="head")


@case("LayerNormalization", check=RELEASE)
def layer_norm_over_channels_and_space(net: Net) -> str:
    y = net.op(
        "LayerNormalization", net.conv(net.input(1, 3, 5, 5), 8), net.positive(8, 3, 3), net.random(8, 3, 3), axis=1
    )
    return net.head(net.conv(y, 5))


@case("LayerNormalization ReduceMean", check=RELEASE)
def two_released_norms(net: Net) -> str:
    """A residual stream under two norms: both normalise over what is kept."""
    x = net.matmul(net.input(1, 5, 6), 8, name="embed")
    for n in (12, 10):
        y = net.op("LayerNormalization", x, net.positive(8), net.random(8), axis=-1)
        y = net.matmul(net.relu(net.matmul(y, n)), 8)
        x = net.op("Add", x, y)
    y = net.op("LayerNormalization", x, net.positive(8), net.random(8), axis=-1)
    return net.gemm(net.op("ReduceMean", y, axes=[1], keepdims=0), 5, name="head")


@case("LpNormalization")
def lp_normalization_over_space(net: Net) -> str:
    y = net.op("LpNormalization", net.conv(net.input(1, 3, 6, 6), 8), axis=3, p=2)
    return net.head(net.conv(y, 5))


@case("LpNormalization", check=RELEASE)
def lp_normalization_released(net: Net) -> str:
    y = net.op("LpNormalization", net.conv(net.input(1, 3, 6, 6), 8), axis=1, p=2)
    return net.head(net.conv(y, 5))


@case("MeanVarianceNormalization")
def mean_variance_normalization(net: Net) -> str:
    y = net.op("MeanVarianceNormalization", net.conv(net.input(1, 3, 6, 6), 8), dims=[1, 8, 4, 4])
    return net.head(net.conv(y, 5))


@case("MeanVarianceNormalization", check=RELEASE)
def mean_variance_normalization_released(net: Net) -> str:
    y = net.op("MeanVarianceNormalization", net.conv(net.input(1, 3, 6, 6), 8), axes=[1, 2, 3], dims=[1, 8, 4, 4])
    return net.head(net.conv(y, 5))


@case("Conv", pinned=("normed", "head"))
def response_normalisation_pins(net: Net) -> str:
    """Local response normalisation reads neighbouring channels; the layers around it are free."""
    y = net.relu(net.conv(net.input(1, 3, 8, 8), 8))
    y = net.op("LRN", net.conv(y, 6, name="normed"), size=3)
    return net.head(net.conv(net.relu(net.conv(y, 8, 1)), 5, 1))


@case("LRN", check=RELEASE)
def response_normalisation_released(net: Net) -> str:
    """Released, the neighbours are those of the channels that stay."""
    y = net.op("LRN", net.conv(net.input(1, 3, 8, 8), 9), size=5, alpha=0.5)
    return net.head(net.conv(net.relu(y), 5, 1))
