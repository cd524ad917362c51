"""Reductions and operators that compare positions: the axis they run along is pinned, the others pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph import Node
from .base import Rule, rule
from .normalization import across

if TYPE_CHECKING:
    from ..analysis import Context
    from ..constants import Constants

REDUCTIONS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]


def reduced_axes(node: Node, rank: int, value: object) -> list[int]:
    """Axes that a Reduce* node runs along, from its attribute or its second input's value."""
    axes = node.attribute("axes") if value is None else [int(a) for a in value]  # type: ignore[attr-defined]
    if not axes:
        return [] if node.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return [a % rank for a in axes]


@rule(*(f"Reduce{name}" for name in REDUCTIONS))
class Reduce(Rule):
    """The reduced axes are pinned (released with --norms release), the others pass."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x = node.inputs[0]
        rank = len(ctx.shape(x))
        given = len(node.inputs) > 1 and node.inputs[1]
        value = ctx.value(node.inputs[1]) if given else None
        if given and value is None:
            ctx.pin_inputs(node, "its axes depend on data")
            return
        axes = reduced_axes(node, rank, value)
        vectors = across(node, ctx, dict(ctx.vectors(x)), set(axes), "it")
        ctx.set(
            node.outputs[0],
            {
                a if node.attribute("keepdims", 1) else a - sum(r < a for r in axes): v
                for a, v in vectors.items()
                if a not in axes
            },
        )

    def constants(self, node: Node, known: Constants) -> None:
        # A sum of a constant follows the map's size; mean, max and min do not.
        steady = node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin")
        x, y = node.inputs[0], node.outputs[0]
        value = known.value(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
        axes = reduced_axes(node, len(known.shape(x)), value)
        for axis in known.axes(x):
            out = axis if node.attribute("keepdims", 1) else axis - sum(r < axis for r in axes)
            if axis not in axes and out in known.axes(y):
                known.set(y, out, known.flags(x, axis) if steady else known.zeros(x, axis))


@rule("Softmax", "LogSoftmax", "Hardmax")
class Softmax(Rule):
    """Its axis is pinned, the others pass."""

    def propagate(self, node: Node, ctx: Context) -> None:
        rank = len(ctx.shape(node.inputs[0]))
        # Before opset 13 everything from the axis on was one row.
        axis = node.attribute("axis", -1 if ctx.graph.opset >= 13 else 1) % rank
        last = axis + 1 if ctx.graph.opset >= 13 else rank
        passing = [a for a in range(rank) if not axis <= a < last]
        ctx.set(node.outputs[0], ctx.pin_except(node, node.inputs[0], passing, "it runs across axis {axis}"))


@rule("ArgMax", "ArgMin")
class Arg(Rule):
    """Its axis is pinned, the others pass."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x = node.inputs[0]
        axis = node.attribute("axis", 0) % len(ctx.shape(x))
        kept = ctx.pin_except(
            node, x, [a for a in range(len(ctx.shape(x))) if a != axis], "it compares along axis {axis}"
        )
        keepdims = node.attribute("keepdims", 1)
        ctx.set(node.outputs[0], {a if keepdims or a < axis else a - 1: v for a, v in kept.items()})


@rule("CumSum", "TopK")
class Along(Rule):
    """The axis it runs along is pinned, the others pass."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x = node.inputs[0]
        rank = len(ctx.shape(x))
        if node.op_type == "CumSum":
            value = ctx.value(node.inputs[1])
            if value is None:
                ctx.pin_inputs(node, "its axis depends on data")
                return
            axis = int(value.reshape(-1)[0]) % rank
        else:
            axis = node.attribute("axis", -1) % rank
        kept = ctx.pin_except(node, x, [a for a in range(rank) if a != axis], "it runs along axis {axis}")
        for out in node.outputs:
            if out:
                ctx.set(out, kept)


@rule("LSTM", "GRU", "RNN")
class Recurrent(Rule):
    """Left alone: what it reads stays whole."""

    def propagate(self, node: Node, ctx: Context) -> None:
        ctx.pin_inputs(node, "recurrent layers are left alone")


@rule("If", "Loop", "Scan", "SequenceMap")
class ControlFlow(Rule):
    """Left alone: what it or its bodies read stays whole."""

    def propagate(self, node: Node, ctx: Context) -> None:
        ctx.pin_inputs(node, "control flow is left alone")


class Unknown(Rule):
    """What no rule knows: everything that reaches it stays, and the report says so."""

    def propagate(self, node: Node, ctx: Context) -> None:
        domain = f" of domain {node.domain}" if node.domain else ""
        ctx.pin_inputs(node, f"no rule for operator {node.op_type}{domain}")


UNKNOWN = Unknown()
