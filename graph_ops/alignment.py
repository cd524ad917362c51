"""Which counts of units give widths that the runtime computes fast.

A group's units need not all occur in the same layers, nor as one channel each: a stream that is padded from stage to
stage has units of all stages and units of the last ones, a unit of an attention layer is a whole head. So a group is
taken apart into parts whose units occur in the same layers equally often, and every part has steps of its own: every
layer's width is then a sum of multiples of its step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .analysis import Analysis

# Parts of fewer units than this have no steps of their own (a shuffled stream falls into dozens of them).
SMALLEST_PART = 8


def alignment_step(channels: int, align: int | str) -> int:
    """Return the step that a width is rounded up to.

    ONNX Runtime's CPU convolutions cost ceil(C / 16) blocks and leave the fast path when C % 4 != 0, so wide layers
    step by 16 and narrow ones by 8 or 4; very narrow ones step by 1, because 4 would be too coarse.
    """
    if align != "auto":
        return int(align)
    for step, least in ((16, 128), (8, 32), (4, 8)):
        if channels >= least:
            return step
    return 1


@dataclass(frozen=True)
class Part:
    """Units of one group that occur in the same layers.

    Attributes:
        units: ids, in the group's order.
        channels: that each of them is in every layer, or a divisor of that where layers differ.
    """

    units: np.ndarray
    channels: int = 1

    def step(self, align: int | str) -> int:
        """Return the step of the number of units that keeps widths on the steps of :func:`alignment_step`."""
        step = alignment_step(len(self.units) * self.channels, align)
        return step // math.gcd(step, self.channels)


def parts(analysis: Analysis) -> list[list[Part]]:
    """Return the parts of every group, in the order of the groups."""
    members: list[list[np.ndarray]] = [[] for _ in analysis.groups]
    for producer in analysis.producers:
        if producer.weight is not None:
            members[analysis.group_of[producer.labels[0]]].append(producer.labels)
    return [
        _parts(group.units, list({labels.tobytes(): labels for labels in layers}.values()), analysis.units)
        for group, layers in zip(analysis.groups, members, strict=True)
    ]


def _parts(units: np.ndarray, layers: list[np.ndarray], total: int) -> list[Part]:
    if not layers:
        return [Part(units)]
    counts = np.stack([np.bincount(labels, minlength=total)[units] for labels in layers], 1)
    if (counts == counts[:1]).all():
        return [_part(units, counts)]
    _, kinds, sizes = np.unique(counts, axis=0, return_inverse=True, return_counts=True)
    kinds = kinds.reshape(-1)
    chosen = [kinds == kind for kind in np.flatnonzero(sizes >= SMALLEST_PART)]
    rest = ~np.logical_or.reduce([np.zeros(len(units), bool), *chosen])
    return [_part(units[where], counts[where]) for where in [*chosen, rest] if where.any()]


def _part(units: np.ndarray, counts: np.ndarray) -> Part:
    return Part(units, math.gcd(*np.unique(counts).tolist()) or 1)
