"""Operators over space: channels pass, spatial axes stay whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..graph import Node
from .base import MICROSOFT, Rule, rule
from .conv import is_padded

if TYPE_CHECKING:
    from ..analysis import Context
    from ..constants import Constants
    from ..cut import Cut


@rule("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
class Pool(Rule):
    """Passes channels; spatial axes stay whole."""

    def propagate(self, node: Node, ctx: Context) -> None:
        axes = ctx.pin_except(node, node.inputs[0], (0, 1), "its window runs along axis {axis}")
        if len(node.outputs) > 1 and node.outputs[1]:
            ctx.pin_inputs(node, "its indices count positions across channels")
        ctx.set(node.outputs[0], axes)

    def constants(self, node: Node, known: Constants) -> None:
        x, y = node.inputs[0], node.outputs[0]
        keeps_constants = node.op_type in ("MaxPool", "GlobalAveragePool", "GlobalMaxPool") or (
            node.op_type == "AveragePool" and not (is_padded(node) and node.attribute("count_include_pad", 0))
        )
        for axis in known.axes(y):
            known.set(y, axis, known.flags(x, axis) if keeps_constants else known.zeros(x, axis))


@rule("QLinearGlobalAveragePool", "QLinearAveragePool", domain=MICROSOFT)
class QuantizedPool(Rule):
    """Quantised pooling: passes channels; spatial axes stay whole."""

    def propagate(self, node: Node, ctx: Context) -> None:
        last = len(ctx.shape(node.inputs[0])) - 1
        channel = last if node.attribute("channels_last", 0) else 1
        ctx.set(
            node.outputs[0], ctx.pin_except(node, node.inputs[0], (0, channel), "its window runs along axis {axis}")
        )


@rule("RoiAlign", "MaxRoiPool", "GridSample")
class Sample(Rule):
    """Samples positions of a map: channels pass, everything else stays whole."""

    def propagate(self, node: Node, ctx: Context) -> None:
        axes = ctx.pin_except(node, node.inputs[0], (1,), "it samples along axis {axis}")
        for name in node.inputs[1:]:
            ctx.pin_except(node, name, (), "it holds coordinates")
        ctx.set(node.outputs[0], axes)


@rule("Resize", "Upsample")
class Resize(Rule):
    """Passes the axes that keep their length; resized axes stay whole."""

    def propagate(self, node: Node, ctx: Context) -> None:
        x, y = node.inputs[0], node.outputs[0]
        same = [a for a, (n, m) in enumerate(zip(ctx.shape(x), ctx.shape(y), strict=True)) if n == m]
        if node.attribute("coordinate_transformation_mode", "") == "tf_crop_and_resize":
            same = []
        ctx.set(y, ctx.pin_except(node, x, same, "it resizes axis {axis}"))

    def constants(self, node: Node, known: Constants) -> None:
        x, y = node.inputs[0], node.outputs[0]
        exact = node.attribute("mode", "nearest") in ("nearest", "linear")
        for axis in known.axes(y):
            known.set(y, axis, known.flags(x, axis) if exact else known.zeros(x, axis))

    def rewrite(self, node: Node, cut: Cut) -> None:
        if len(node.inputs) > 3 and node.inputs[3] and node.attribute("axes") is None:
            cut.resize_operand(node, 3)


@rule("DepthToSpace")
class DepthToSpace(Rule):
    """Joins the sub-pixels of every output channel (DCR and CRD order)."""

    def propagate(self, node: Node, ctx: Context) -> None:
        vector = ctx.pin_except(node, node.inputs[0], (0, 1), "it spreads over axis {axis}").get(1)
        if vector is not None:
            block = node.attribute("blocksize") ** 2
            if node.attribute("mode", "DCR") == "CRD":
                out = ctx.labels.join_across(vector.reshape(-1, block), 0)
            else:
                out = ctx.labels.join_across(vector.reshape(block, -1), 1)
            ctx.set(node.outputs[0], {1: out})

    def constants(self, node: Node, known: Constants) -> None:
        if 1 in known.axes(node.outputs[0]):
            block = node.attribute("blocksize") ** 2
            zeros = known.zeros(node.inputs[0], 1)
            crd = node.attribute("mode", "DCR") == "CRD"
            known.set(node.outputs[0], 1, np.all(zeros.reshape(-1, block) if crd else zeros.reshape(block, -1).T, 1))


@rule("SpaceToDepth")
class SpaceToDepth(Rule):
    """Repeats every channel's label for each sub-pixel."""

    def propagate(self, node: Node, ctx: Context) -> None:
        vector = ctx.pin_except(node, node.inputs[0], (1,), "it gathers axis {axis} into channels").get(1)
        if vector is not None:
            ctx.set(node.outputs[0], {1: np.tile(vector, node.attribute("blocksize") ** 2)})

    def constants(self, node: Node, known: Constants) -> None:
        known.move(node, {0: {0: {0}, 1: {1}, 2: {1, 2}, 3: {1, 3}}})
