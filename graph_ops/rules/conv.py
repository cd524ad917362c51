"""Convolutions: labels on the input channels end, fresh ones start on the output channels.

Weight layouts: Conv (out, in / group, *kernel); ConvTranspose (in, out / group, *kernel).
A grouped convolution keeps the same positions in every group, so position j of all groups is joined (weight axis 1
then follows the first group). Where a group is one channel wide (depthwise) whole groups are cut instead: the outputs
of a group go with its inputs and ``group`` shrinks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..graph import Node
from ..labels import Vector
from ..records import Axes, Contraction, Released, Work
from .base import MICROSOFT, Rule, product, rule

if TYPE_CHECKING:
    from ..analysis import Context
    from ..constants import Constants
    from ..cut import Cut


def is_padded(node: Node) -> bool:
    """Whether the window sees zeros outside the map."""
    return any(node.attribute("pads", ())) or str(node.attribute("auto_pad", "NOTSET")).startswith("SAME")


def reads_anything(weight: np.ndarray) -> np.ndarray:
    """Where the last axis of a weight holds anything but zeros, bool, that axis less."""
    if weight.shape[-1] == 0:
        return np.zeros(weight.shape[:-1], bool)
    first = weight[..., 0] != 0  # which decides it for nearly every trained weight
    return first if first.all() else (weight != 0).any(-1)


@rule("Conv")
@rule("FusedConv", domain=MICROSOFT)
class Conv(Rule):
    """Ends the labels of its input channels and starts fresh ones; groups keep equal counts."""

    weight, bias = 1, 2
    along_out: tuple[int, ...] = ()  # further operands with one entry an output channel
    out_axis, in_axis = 0, 1  # of the weight

    def propagate(self, node: Node, ctx: Context) -> None:
        x, w, y = node.inputs[0], node.inputs[self.weight], node.outputs[0]
        across = self._across(node, ctx)
        vector = ctx.pin_except(node, x, (1, *across), "it computes across axis {axis}").get(1)
        if not ctx.static(w) or ctx.varies(w):
            ctx.pin_inputs(node, "its weight depends on data")
            return
        group = node.attribute("group", 1)
        out_channels, in_channels = ctx.shape(y)[1], ctx.shape(x)[1]
        area = [n for a, n in enumerate(ctx.shape(y if self.out_axis == 0 else x)) if a > 1 and a not in across]
        scale = ctx.shape(y)[0] * product(area) * product(ctx.shape(w)[2:])
        whole = group > 1 and self._whole_groups(node, ctx, group, in_channels, out_channels, vector)
        if whole:
            out = self._by_group(node, ctx, vector, group, in_channels, out_channels)
            scale *= in_channels // group
            factors = tuple(across.values())
            ctx.works.append(
                Work(node, scale, (out, *factors)) if out is not None else Work(node, scale * out_channels, factors)
            )
        else:
            out = self._by_position(node, ctx, vector, group, in_channels, out_channels, scale, across)
        if out is not None:
            for i in (self.bias, *self.along_out):
                if i < len(node.inputs) and ctx.static(node.inputs[i]) and len(ctx.shape(node.inputs[i])) == 1:
                    ctx.operand(node, i, {0: out})
                elif i < len(node.inputs) and node.inputs[i] and not ctx.static(node.inputs[i]):
                    ctx.pin(out, node, f"its input {i} depends on data")
        ctx.set(y, across | ({1: out} if out is not None else {}))
        if len(node.inputs) > 3 and node.op_type == "FusedConv" and node.inputs[3]:  # fused residual sum
            ctx.pin_inputs(node, "it adds a fused residual")
            if out is not None:
                ctx.pin(out, node, "it adds a fused residual")

    def _across(self, node: Node, ctx: Context) -> Axes:
        """Spatial axes that carry channels and may be cut all the same: those that keep their length, once released.

        Efficient channel attention (ECA-Net, Wang et al. 2020) lays the channels out as a line and convolves along it.
        """
        x, y = node.inputs[0], node.outputs[0]
        if not ctx.release_norms or self.along_out or any(s != 1 for s in node.attribute("strides", ())):
            return {}
        released = {a: v for a, v in ctx.vectors(x).items() if a > 1 and ctx.shape(x)[a] == ctx.shape(y)[a]}
        for axis, vector in released.items():
            ctx.released.append(Released(node, axis, vector))
        return released

    def _whole_groups(self, node: Node, ctx: Context, group: int, cin: int, cout: int, vector: Vector | None) -> bool:
        if cin == group or (cout == group and vector is not None):
            return True
        if vector is None:
            return False
        # Options: 0 cuts positions inside every group, 1 cuts whole groups.
        return bool(ctx.choose(node, 0, [0, 1], {0: vector, 1: vector}))

    def _by_group(
        self, node: Node, ctx: Context, vector: Vector | None, group: int, cin: int, cout: int
    ) -> Vector | None:
        if vector is None:
            return None
        heads = ctx.labels.join_across(vector.reshape(group, cin // group), 0)
        out = np.repeat(heads, cout // group)
        follows = out if self.out_axis == 0 else vector
        ctx.operand(node, self.weight, {0: follows})
        ctx.produce(node, 1, out, weight=(self.weight, 0) if cout == len(follows) else None)
        return out

    def _by_position(
        self,
        node: Node,
        ctx: Context,
        vector: Vector | None,
        group: int,
        cin: int,
        cout: int,
        scale: int,
        across: Axes,
    ) -> Vector:
        fresh = ctx.labels.fresh(cout // group)
        out = np.tile(fresh, group)
        inside = None
        if vector is not None:
            inside = ctx.labels.join_across(vector.reshape(group, cin // group), 1)
        if self.out_axis == 0:
            axes = {0: out} | ({1: inside} if inside is not None else {})
        else:
            axes = {1: fresh} | ({0: vector} if vector is not None else {})
        ctx.operand(node, self.weight, axes)
        ctx.produce(node, 1, out, weight=(self.weight, self.out_axis))
        if inside is not None:
            ctx.contractions.append(
                Contraction(
                    node,
                    ((0, 1),),
                    vector,
                    weight=(self.weight, self.in_axis),
                    out=(self.weight, self.out_axis),
                    groups=group,
                    padded=is_padded(node) or self.out_axis == 1,
                    bias=self.bias,
                )
            )
        factors = tuple(v for v in (out if cout > 1 else None, inside, *across.values()) if v is not None)
        ctx.works.append(Work(node, scale if inside is not None else scale * (cin // group), factors))
        return out

    def constants(self, node: Node, known: Constants) -> None:
        """An output channel is constant when every input that it reads is, and zero wherever padding is seen."""
        x, y = node.inputs[0], node.outputs[0]
        weight = known.value(node.inputs[self.weight])
        if weight is None or 1 not in known.axes(y) or self.along_out:
            return
        if any(name and known.value(name) is None for name in node.inputs[2:]):
            return  # a bias that depends on data
        group = node.attribute("group", 1)
        reads = reads_anything(weight.reshape(*weight.shape[:2], -1))
        if self.out_axis == 1:  # (in, out / group) -> (out, in / group)
            reads = reads.reshape(group, -1, reads.shape[1]).transpose(0, 2, 1).reshape(-1, reads.shape[0] // group)
        usable = known.flags(x, 1)
        if is_padded(node) or self.out_axis == 1:
            usable = known.zeros(x, 1)
        if any(r.node is node for r in known.analysis.released):
            return
        bad = ~usable.reshape(group, 1, -1)
        known.set(y, 1, ~(reads.reshape(group, -1, reads.shape[1]) & bad).any(2).reshape(-1))

    def rewrite(self, node: Node, cut: Cut) -> None:
        group = node.attribute("group", 1)
        if group > 1:
            channels = cut.size(node.inputs[0], 1)
            inside = cut.operand_size(node, self.weight, 1 if self.out_axis == 0 else 0)
            if self.out_axis == 0:
                cut.set_attribute(node, "group", channels // inside)
            else:
                cut.set_attribute(node, "group", cut.size(node.outputs[0], 1) // cut.operand_size(node, self.weight, 1))


@rule("ConvTranspose")
class ConvTranspose(Conv):
    """Like Conv, with the weight's axes the other way round."""

    out_axis, in_axis = 1, 0


@rule("ConvInteger")
class ConvInteger(Conv):
    """Quantised Conv with integer output."""

    bias = 99  # it has none
    along_out = (3,)


@rule("QLinearConv")
class QLinearConv(Conv):
    """Quantised Conv; scales and zero points of the weight are per tensor or per output channel."""

    weight, bias = 3, 8
    along_out = (4, 5)
