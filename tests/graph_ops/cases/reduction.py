"""Reductions over space and over channels, softmax, selections along an axis."""

from __future__ import annotations

from ..builder import Net
from . import add, case

REDUCTIONS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]


def over_space(op: str, keepdims: int, as_input: bool) -> object:
    def build(net: Net) -> str:
        y = net.op("Sigmoid", net.conv(net.input(1, 3, 5, 5), 8))
        if as_input:
            y = net.op(op, y, [-1, 2], keepdims=keepdims)
        else:
            y = net.op(op, y, axes=[-1, 2], keepdims=keepdims)
        y = net.op("Flatten", net.conv(y, 6, 1)) if keepdims else net.gemm(y, 6)
        return net.gemm(net.relu(y), 5, name="head")

    return build


for name in REDUCTIONS:
    for keepdims in (0, 1):
        add(
            f"reduce_{name}_attribute_{keepdims}",
            over_space(f"Reduce{name}", keepdims, False),
            f"Reduce{name}",
            opset=11,
        )
        add(f"reduce_{name}_input_{keepdims}", over_space(f"Reduce{name}", keepdims, True), f"Reduce{name}", opset=18)


def over_channels(keepdims: int) -> object:
    """Global response normalisation in short: a mean over the channels, next to the channels themselves."""

    def build(net: Net) -> str:
        y = net.conv(net.input(1, 3, 6, 6), 8, name="averaged")
        mean = net.op("ReduceMean", y, axes=[1], keepdims=keepdims)
        if not keepdims:
            mean = net.op("Unsqueeze", mean, [1])
        y = net.op("Mul", y, net.op("Sigmoid", mean))
        return net.head(net.conv(net.relu(net.conv(y, 8, 1)), 5, 1))

    return build


for keepdims in (0, 1):
    add(f"reduce_channels_{keepdims}_pinned", over_channels(keepdims), "Conv", pinned=("averaged", "head"))
    add(f"reduce_channels_{keepdims}_released", over_channels(keepdims), "ReduceMean", check={"release": True})


@case("Conv", pinned=("reduced", "head"), opset=18)
def reduce_everything(net: Net) -> str:
    """No axes at all: everything is summed up."""
    y = net.conv(net.relu(net.conv(net.input(1, 3, 6, 6), 8)), 6, name="reduced")
    y = net.op("Add", y, net.op("ReduceMax", y, keepdims=1))
    return net.head(net.conv(net.relu(net.conv(y, 8, 1)), 5, 1))


@case("ReduceSum", opset=18)
def reduce_nothing(net: Net) -> str:
    """No axes, and the attribute that says that this means none."""
    y = net.op("ReduceSum", net.conv(net.input(1, 3, 6, 6), 8), noop_with_empty_axes=1)
    return net.head(net.conv(y, 5))


def softmax(op: str, axis: int) -> object:
    def build(net: Net) -> str:
        y = net.op(op, net.conv(net.input(1, 3, 6, 6), 8), axis=axis)
        return net.head(net.conv(y, 5))

    return build


for op in ("Softmax", "LogSoftmax", "Hardmax"):
    add(f"{op}_space", softmax(op, -1), op)
    add(f"{op}_space_old", softmax(op, 2), op, opset=11)


def softmax_pins(axis: int | None) -> object:
    def build(net: Net) -> str:
        y = net.conv(net.relu(net.conv(net.input(1, 3, 6, 6), 8)), 6, 1, name="pinned")
        y = net.op("Softmax", y, axis=axis)
        return net.head(net.conv(net.relu(net.conv(y, 8, 1)), 5, 1))

    return build


add("softmax_channels", softmax_pins(1), "Conv", pinned=("pinned", "head"))
add("softmax_channels_old", softmax_pins(None), "Conv", pinned=("pinned", "head"), opset=11)


@case("Conv", pinned=("pinned", "head"), opset=11)
def softmax_old_runs_over_everything_behind(net: Net) -> str:
    """Before opset 13 all axes from the given one on are one row, channels at the end included."""
    y = net.conv(net.relu(net.conv(net.input(1, 3, 6, 6), 8)), 6, 1, name="pinned")
    y = net.op("Softmax", net.op("Transpose", y, perm=[0, 2, 3, 1]), axis=2)
    y = net.conv(net.op("Transpose", y, perm=[0, 3, 1, 2]), 8, 1)
    return net.head(net.conv(net.relu(y), 5, 1))


@case("Softmax ReduceSum")
def split_attention(net: Net) -> str:
    """Softmax over the radix axis of a (1, radix, channels) view: the radix is joined, the channels are cut."""
    y = net.relu(net.conv(net.input(1, 3, 6, 6), 16, name="branches"))
    parts = net.op("Reshape", y, [1, 2, 8, 4, 4])
    gate = net.op("ReduceSum", parts, [1], keepdims=0)
    gate = net.conv(net.relu(net.conv(net.op("GlobalAveragePool", gate), 6, 1)), 16, 1, name="gate")
    gate = net.op("Softmax", net.op("Reshape", gate, [1, 2, 8, 1, 1]), axis=1)
    y = net.op("ReduceSum", net.op("Mul", parts, gate), [1], keepdims=0)
    return net.head(net.conv(y, 5))


@case("ArgMax ArgMin")
def arg_max(net: Net) -> str:
    y = net.conv(net.input(1, 3, 6, 6), 8)
    high = net.op("Cast", net.op("ArgMax", y, axis=-1, keepdims=0), to=1)
    low = net.op("Cast", net.op("ArgMin", y, axis=2, keepdims=1), to=1)
    y = net.op("Add", net.op("Unsqueeze", high, [2]), low)
    return net.head(net.conv(y, 5, 1))


@case("Conv", pinned=("compared", "head"))
def arg_max_over_channels(net: Net) -> str:
    y = net.conv(net.relu(net.conv(net.input(1, 3, 6, 6), 8)), 6, name="compared")
    y = net.op("Mul", y, net.op("Cast", net.op("ArgMax", y, axis=1), to=1))
    return net.head(net.conv(net.relu(net.conv(y, 8, 1)), 5, 1))


@case("CumSum")
def cumulative_sum(net: Net) -> str:
    y = net.op("CumSum", net.conv(net.input(1, 3, 6, 6), 8), net.const(3))
    return net.head(net.conv(y, 5))


@case("TopK")
def top_k(net: Net) -> str:
    y, places = net.op("TopK", net.conv(net.input(1, 3, 6, 6), 8), [2], outputs=2, axis=3)
    y = net.op("Add", y, net.op("Mul", net.op("Cast", places, to=1), net.const(0.1)))
    return net.head(net.conv(y, 5, 1))


@case("Conv", pinned=("sorted", "head"))
def top_k_over_channels(net: Net) -> str:
    y = net.conv(net.relu(net.conv(net.input(1, 3, 6, 6), 8)), 6, name="sorted")
    y, _ = net.op("TopK", y, [4], outputs=2, axis=1)
    return net.head(net.conv(net.relu(net.conv(y, 8, 1)), 5, 1))
