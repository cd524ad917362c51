"""Normalisations: per-channel parameters follow the channels; statistics that run across channels pin them.

With ``--norms release`` such an axis may be cut; the statistics are then those of the kept channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..graph import Node
from ..labels import Vector
from ..records import Released
from .base import Rule, rule

if TYPE_CHECKING:
    from ..analysis import Context
    from ..constants import Constants
    from ..cut import Cut
    from ..records import Axes


def across(node: Node, ctx: Context, axes: Axes, normalised: range | set[int], what: str) -> Axes:
    """Pin, or release, the vectors on the axes that statistics run across; return what still can be cut."""
    for axis in sorted(axes):
        if axis in normalised:
            if ctx.release_norms:
                ctx.released.append(Released(node, axis, axes[axis]))
            else:
                ctx.pin(axes[axis], node, f"{what} runs across axis {axis} (--norms release lets it be cut)")
    return axes


@rule("BatchNormalization")
class BatchNorm(Rule):
    """Passes channels on; scale, bias, mean and variance are sliced."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x = node.inputs[0]
        axes = dict(ctx.vectors(x))
        if 1 in axes and ctx.select_inputs and self._shares(x, ctx):
            axes[1] = ctx.fork(node, 1, axes[1])
        if 1 in axes:
            for i in range(1, 5):
                ctx.operand(node, i, {0: axes[1]})
        if len([out for out in node.outputs if out]) > 1 and node.attribute("training_mode", 0):
            ctx.pin_inputs(node, "it is in training mode")
        ctx.set(node.outputs[0], axes)

    def _shares(self, x: str, ctx: Context) -> bool:
        """Whether the channels that it reads are not its own: other readers, or a stream that others add to."""
        producer = ctx.graph.producer.get(x)
        own = producer is not None and producer.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
        return not own or len(ctx.graph.readers[x]) > 1 or x in ctx.graph.outputs

    def constants(self, node: Node, known: Constants) -> None:
        """A zero scale leaves the constant bias, whatever comes in."""
        if 1 not in known.axes(node.outputs[0]):
            return
        scale = known.value(node.inputs[1])
        if scale is not None and not any(known.value(name) is None for name in node.inputs[2:5]):
            known.set(node.outputs[0], 1, known.flags(node.inputs[0], 1) | (np.asarray(scale) == 0))


@rule("InstanceNormalization")
class InstanceNorm(Rule):
    """Passes channels on; statistics run across the other axes."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x = node.inputs[0]
        axes = across(node, ctx, dict(ctx.vectors(x)), range(2, len(ctx.shape(x))), "its mean")
        if 1 in axes:
            for i in (1, 2):
                ctx.operand(node, i, {0: axes[1]})
        ctx.set(node.outputs[0], axes)

    def constants(self, node: Node, known: Constants) -> None:
        scale, bias = known.value(node.inputs[1]), known.value(node.inputs[2])
        if scale is not None and bias is not None and 1 in known.axes(node.outputs[0]):
            known.set(node.outputs[0], 1, scale == 0)


@rule("LayerNormalization", "RMSNormalization")
class LayerNorm(Rule):
    """Statistics run across the last axes: pinned, or released with --norms release."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x = node.inputs[0]
        first = node.attribute("axis", -1) % len(ctx.shape(x))
        axes = across(node, ctx, dict(ctx.vectors(x)), range(first, len(ctx.shape(x))), "its mean")
        for i in range(1, len(node.inputs)):
            rank = len(ctx.shape(node.inputs[i]))
            offset = len(ctx.shape(x)) - rank
            ctx.operand(node, i, {a - offset: v for a, v in axes.items() if a >= offset})
        ctx.set(node.outputs[0], axes)


@rule("GroupNormalization")
class GroupNorm(Rule):
    """Whole norm groups are cut exactly; single channels only with --norms release."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x = node.inputs[0]
        vector = ctx.pin_except(node, x, (1,), "its mean runs across axis {axis}").get(1)
        if vector is None:
            return
        groups = node.attribute("num_groups")
        grid = vector.reshape(groups, -1)
        if ctx.release_norms and grid.shape[1] > 1:
            ctx.labels.join_across(grid, 1)
            ctx.released.append(Released(node, 1, vector))
            heads: Vector | None = None
        else:
            heads = ctx.labels.join_across(grid, 0)
        per_channel = ctx.shape(node.inputs[1])[0] == len(vector)
        for i in (1, 2):
            if per_channel:
                ctx.operand(node, i, {0: vector})
            elif heads is not None:
                ctx.operand(node, i, {0: heads})
        ctx.set(node.outputs[0], {1: vector})

    def rewrite(self, node: Node, cut: Cut) -> None:
        vector = cut.analysis.axes.get(node.inputs[0], {}).get(1)
        groups = node.attribute("num_groups")
        if vector is None:
            return
        kept = cut.keep[vector].reshape(groups, -1).any(1).sum()
        cut.set_attribute(node, "num_groups", int(kept))


@rule("LRN")
class LocalResponse(Rule):
    """Sums over neighbouring channels: pinned, or released with --norms release."""

    def propagate(self, node: Node, ctx: Context) -> None:
        ctx.set(node.outputs[0], across(node, ctx, dict(ctx.vectors(node.inputs[0])), {1}, "its sum"))


@rule("LpNormalization", "MeanVarianceNormalization")
class OtherNorm(Rule):
    """Normalises over given axes: those are pinned, or released with --norms release."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x = node.inputs[0]
        rank = len(ctx.shape(x))
        if node.op_type == "LpNormalization":
            normalised = {node.attribute("axis", -1) % rank}
        else:
            normalised = {a % rank for a in node.attribute("axes", [0, 2, 3])}
        ctx.set(node.outputs[0], across(node, ctx, dict(ctx.vectors(x)), normalised, "it normalises and"))
