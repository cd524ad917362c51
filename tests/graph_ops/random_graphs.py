"""Grows small random networks out of many operators, for hypothesis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from .builder import Net

Step = Callable[["Grower"], None]
STEPS: list[Step] = []
MOST_CHANNELS, LARGEST_SIDE = 24, 12


def step(grow: Step) -> Step:
    """List a way to grow."""
    STEPS.append(grow)
    return grow


class Grower:
    """A network under construction.

    Attributes:
        maps: tensors of shape (N, C, H, W) that later steps may read.
        made: all tensors of this shape, also those too large to go on with.
    """

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.net = Net(seed=draw(st.integers(0, 2**16)), opset=draw(st.sampled_from([13, 17])))
        self.dead = draw(st.sampled_from([0.0, 0.3, 0.7]))
        side = st.sampled_from([5, 6, 8])
        self.net.input(draw(st.sampled_from([1, "N"])), draw(st.sampled_from([1, 3, 4])), draw(side), draw(side))
        self.maps: list[str] = ["x"]
        self.made: list[str] = []

    def pick(self, fits: Callable[[list[int]], bool] = lambda dims: True) -> str:
        """Choose a map, late ones first; an empty string where none fits."""
        names = [name for name in self.maps if fits(self.dims(name))]
        if not names:
            return ""
        return self.draw(st.sampled_from(names[::-1]))

    def dims(self, name: str) -> list[int]:
        return self.net.dims(name)

    def add(self, name: str) -> None:
        """Offer a map to later steps."""
        if 0 < self.dims(name)[1] <= MOST_CHANNELS and max(self.dims(name)[2:]) <= LARGEST_SIDE:
            self.maps.append(name)
        self.made.append(name)

    def choose(self, *options: object) -> object:
        return self.draw(st.sampled_from(options))

    def channels(self) -> int:
        return int(self.choose(4, 6, 8, 12))

    def like(self, name: str) -> str:
        """Another map of the same shape: one that exists, or a projection."""
        shape = self.dims(name)
        names = [m for m in self.maps if self.dims(m)[1:] == shape[1:] and m != name]
        if names and self.choose(True, False):
            return str(self.choose(*names))
        other = self.pick(lambda dims: dims[2:] == shape[2:])
        return self.net.conv(other, shape[1], 1)

    def model(self) -> onnx.ModelProto:
        """Join everything that nobody reads in the outputs."""
        net = self.net
        main = self.maps[-1]
        read = {name for node in net.nodes for name in node.input}
        y = tail(self, main)
        for name in [name for name in self.made if name not in read and name != main]:
            y = net.op("Add", y, net.gemm(net.op("Flatten", net.op("GlobalMaxPool", name)), 5))
        return net.model(y)


def tail(g: Grower, y: str) -> str:
    net = g.net
    kind = g.choose("pool", "flatten", "flatten_matmul", "reshape", "mean_matmul")
    if kind == "flatten":
        return net.gemm(net.op("Flatten", y), 5, name="head", transB=1)
    if kind == "flatten_matmul":
        return net.op("Add", net.matmul(net.op("Flatten", y), 5, name="head"), net.random(5))
    if kind == "reshape":
        flat = net.op("Reshape", y, [0, -1])
        net.types[flat].tensor_type.shape.dim[1].dim_value = int(np.prod(g.dims(y)[1:]))
        return net.gemm(net.relu(net.gemm(flat, 7)), 5, name="head")
    if kind == "mean_matmul":
        y = net.op("Transpose", y, perm=[0, 2, 3, 1])
        return net.matmul(net.op("ReduceMean", y, axes=[1, 2], keepdims=0), 5, name="head")
    return net.head(y)


# -- sums ------------------------------------------------------------------------------------------
@step
def conv(g: Grower) -> None:
    x = g.pick(lambda dims: min(dims[2:]) >= 3)
    if not x:
        return
    kernel = g.choose(1, 2, 3)
    attributes = {"pads": [1, 1, 1, 1]} if kernel == 3 and g.choose(True, False) else {}
    y = g.net.conv(x, g.channels(), kernel, bias=g.choose(True, False), strides=[g.choose(1, 2)] * 2, **attributes)
    y = norm(g, y)
    g.add(g.net.relu(y) if g.choose(True, False) else y)


@step
def grouped_conv(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] % 2 == 0 and min(dims[2:]) >= 3)
    if x:
        y = g.net.conv(x, g.channels(), g.choose(1, 3), group=2, pads=g.choose(None, [1, 1, 1, 1]))
        g.add(norm(g, y))


@step
def depthwise(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] > 1 and min(dims[2:]) >= 3)
    if x:
        n = g.dims(x)[1]
        g.add(norm(g, g.net.conv(x, n * g.choose(1, 1, 2), 3, group=n, pads=g.choose(None, [1, 1, 1, 1]))))


@step
def conv_transpose(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] % 2 == 0 and max(dims[2:]) <= 5)
    if x:
        g.add(g.net.conv_transpose(x, g.channels(), 2, group=g.choose(1, 2), strides=[2, 2]))


@step
def channels_last(g: Grower) -> None:
    y = g.net.op("Transpose", g.pick(), perm=[0, 2, 3, 1])
    y = g.net.matmul(y, g.channels())
    if g.choose(True, False):
        y = g.net.op("Add", y, g.net.random(g.dims(y)[-1]))
    g.add(g.net.op("Transpose", y, perm=[0, 3, 1, 2]))


def norm(g: Grower, y: str) -> str:
    """A BatchNorm, some of whose scales are zero."""
    if g.choose(True, False):
        return y
    n = g.dims(y)[1]
    return g.net.bn(y, gamma=np.where(g.net.rng.random(n) < g.dead, 0, g.net.positive(n)))


# -- point by point --------------------------------------------------------------------------------
@step
def activation(g: Grower) -> None:
    x = g.pick()
    op = g.choose("Relu", "Sigmoid", "LeakyRelu", "HardSigmoid", "Tanh", "Softplus", "Clip", "PRelu")
    if op == "PRelu":
        g.add(g.net.op(op, x, g.net.random(g.dims(x)[1], 1, 1, scale=0.3)))
    elif op == "Clip":
        g.add(g.net.op(op, x, g.net.const(0.0), g.net.const(1.0)))
    else:
        g.add(g.net.op(op, x))


@step
def batch_norm(g: Grower) -> None:
    x = g.pick()
    n = g.dims(x)[1]
    g.add(g.net.bn(x, gamma=np.where(g.net.rng.random(n) < g.dead, 0, g.net.positive(n))))


@step
def join(g: Grower) -> None:
    x = g.pick()
    g.add(g.net.op(str(g.choose("Add", "Sub", "Mul", "Max")), x, g.like(x)))


@step
def constant(g: Grower) -> None:
    x = g.pick()
    n = g.dims(x)[1]
    value = g.net.random(*g.choose((n, 1, 1), (1, n, 1, 1), (1,)), scale=0.5)
    g.add(g.net.op(str(g.choose("Add", "Mul")), *([x, value] if g.choose(True, False) else [value, x])))


@step
def squeeze_excite(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] > 1)
    if x:
        y = g.net.relu(g.net.conv(g.net.op("GlobalAveragePool", x), 4, 1))
        g.add(g.net.op("Mul", x, g.net.op("Sigmoid", g.net.conv(y, g.dims(x)[1], 1))))


@step
def spatial_gate(g: Grower) -> None:
    x = g.pick()
    g.add(g.net.op("Mul", x, g.net.op("Sigmoid", g.net.conv(x, 1, 1))))


# -- space -----------------------------------------------------------------------------------------
@step
def pool(g: Grower) -> None:
    x = g.pick(lambda dims: min(dims[2:]) >= 3)
    if not x:
        return
    op = str(g.choose("MaxPool", "AveragePool"))
    pads = g.choose(None, [1, 1, 1, 1])
    counted = g.choose(0, 1) if op == "AveragePool" else None
    g.add(g.net.op(op, x, kernel_shape=[3, 3], strides=[g.choose(1, 2)] * 2, pads=pads, count_include_pad=counted))


@step
def resize(g: Grower) -> None:
    x = g.pick(lambda dims: max(dims[2:]) <= 6)
    if x:
        y = g.net.op("Resize", x, "", np.asarray([1, 1, 2, 2], np.float32), mode=g.choose("nearest", "linear"))
        g.net.types[y].CopyFrom(g.net.types[x])
        for axis in (2, 3):
            g.net.types[y].tensor_type.shape.dim[axis].dim_value = 2 * g.dims(x)[axis]
        g.add(y)


@step
def instance_norm(g: Grower) -> None:
    x = g.pick(lambda dims: dims[2] * dims[3] > 1)
    if x:
        n = g.dims(x)[1]
        g.add(g.net.op("InstanceNormalization", x, g.net.positive(n), g.net.random(n), epsilon=0.1))


@step
def global_context(g: Grower) -> None:
    x = g.pick()
    # Not subtracted: a map without its mean has a mean of nothing but rounding.
    g.add(g.net.op("Add", x, g.net.op(str(g.choose("ReduceMean", "ReduceMax")), x, axes=[2, 3])))


# -- moves -----------------------------------------------------------------------------------------
@step
def concat(g: Grower) -> None:
    x = g.pick()
    other = g.pick(lambda dims: dims[2:] == g.dims(x)[2:])
    if g.dims(x)[1] + g.dims(other)[1] <= MOST_CHANNELS:
        g.add(g.net.op("Concat", x, other, axis=g.choose(1, -3)))


@step
def concat_space(g: Grower) -> None:
    x = g.pick(lambda dims: dims[2] <= 6)
    if not x:
        return
    shape = g.dims(x)
    if shape[0] == 1 and g.choose(True, False):
        other = g.net.const(g.net.random(1, shape[1], 1, shape[3]) * np.float32(g.choose(0, 1)))
    else:
        other = g.like(x)
    g.add(g.net.op("Concat", *((x, other) if g.choose(True, False) else (other, x)), axis=2))


@step
def product_per_half(g: Grower) -> None:
    """Both halves of the channels through the same matrix."""
    x = g.pick(lambda dims: dims[1] % 2 == 0)
    if x:
        _, n, height, width = g.dims(x)
        y = g.net.op("Transpose", g.net.op("Reshape", x, [0, 2, n // 2, -1]), perm=[0, 1, 3, 2])
        weight = g.net.random(n // 2, 5, scale=(n // 2) ** -0.5)
        y = g.net.op("Transpose", g.net.op("MatMul", y, weight), perm=[0, 1, 3, 2])
        out = g.net.op("Reshape", y, [0, 10, height, width])
        g.net.types[out].CopyFrom(g.net.types[x])
        g.net.types[out].tensor_type.shape.dim[1].dim_value = 10
        g.add(out)


@step
def split(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] >= 4)
    if x:
        first = int(g.choose(1, 2, g.dims(x)[1] // 2))
        for y in g.net.op("Split", x, [first, g.dims(x)[1] - first], outputs=2, axis=1):
            g.add(y)


@step
def channel_slice(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] >= 4)
    if x:
        bounds = g.choose(([1], [2**40], [1]), ([0], [-1], [2]), ([-1], [-(2**40)], [-2]), ([2], [4], [1]))
        g.add(g.net.op("Slice", x, bounds[0], bounds[1], [1], bounds[2]))


@step
def gather(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] > 1)
    if x:
        n = g.dims(x)[1]
        index = g.net.rng.permutation(n) if g.choose(True, False) else g.net.rng.integers(-n, n, n)
        g.add(g.net.op("Gather", x, index, axis=1))


@step
def shuffle(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] % 2 == 0)
    if x:
        _, n, height, width = g.dims(x)
        groups = int(g.choose(2, n // 2))
        y = g.net.op("Reshape", x, [0, groups, n // groups, height, width])
        y = g.net.op("Reshape", g.net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), [0, -1, height, width])
        g.net.types[y].CopyFrom(g.net.types[x])
        g.add(y)


@step
def pad_channels(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] <= 12)
    if x:
        g.add(
            g.net.op("Pad", x, g.choose([0, 2, 0, 0, 0, 1, 0, 0], [0, 2, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]))
        )


@step
def tile(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] <= 8)
    if x:
        g.add(g.net.op("Tile", x, [1, 2, 1, 1]))


@step
def rows_and_back(g: Grower) -> None:
    x = g.pick()
    _, n, height, width = g.dims(x)
    y = g.net.op("Mul", g.net.op("Reshape", x, [0, n, -1]), g.net.random(height * width, scale=0.5))
    y = g.net.op("Reshape", y, g.choose([0, n, height, width], [-1, n, height, width], [0, 0, height, width]))
    g.net.types[y].CopyFrom(g.net.types[x])
    g.add(y)


@step
def space_to_depth(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] <= 6 and dims[2] % 2 == dims[3] % 2 == 0)
    if x:
        g.add(g.net.op("SpaceToDepth", x, blocksize=2))


@step
def depth_to_space(g: Grower) -> None:
    x = g.pick(lambda dims: dims[1] % 4 == 0 and max(dims[2:]) <= 6)
    if x:
        g.add(g.net.op("DepthToSpace", x, blocksize=2, mode=g.choose("DCR", "CRD")))


def describe(model: onnx.ModelProto) -> str:
    """The nodes with their attributes and the values of small operands, for reports of failures."""
    small = {t.name: numpy_helper.to_array(t).tolist() for t in model.graph.initializer if np.prod(t.dims) <= 12}
    lines = [f"input {[d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]}"]
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        lines.append(
            f"{node.output[0]} = {node.op_type}({', '.join(str(small.get(i, i)) for i in node.input)}) {attributes}"
        )
    return "\n".join(lines)


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Small networks of shape (N, C, H, W) -> (N, 5)."""
    g = Grower(draw)
    conv(g)
    for grow in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=9)):
        grow(g)
    return g.model()
