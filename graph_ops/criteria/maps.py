"""Feature maps: how high their rank is, how often they are zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..analysis import Analysis
from ..errors import ConfigError
from .base import ACTIVATIONS, Evidence, Scores, Total, criterion

PASSED = frozenset(
    {
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"),
        *("Flatten", "Reshape", "Squeeze", "Identity", "Dropout", "Pad"),
    }
)
"""What only thins out or rearranges a map: the map in front of it is the one that counts."""

Measure = Callable[[np.ndarray], np.ndarray]
"""Maps (N, channels, ...) to a number a channel, summed over N."""

RANKED = 128
"""Images whose maps are ranked: the mean rank of a channel hardly moves after that (HRank takes 500)."""


@dataclass(frozen=True)
class Map:
    """A tensor that layers read: units along ``axis``."""

    tensor: str
    axis: int
    labels: np.ndarray


def maps(analysis: Analysis) -> list[Map]:
    """The maps of all units: what the sums over channels read, taken before pooling and flattening."""
    found: dict[tuple[str, int], Map] = {}
    for contraction in analysis.contractions:
        for index, axis in contraction.sides:
            name = contraction.node.inputs[index]
            if name in analysis.graph.dynamic:
                here = _before_pooling(analysis, Map(name, axis, contraction.labels))
                found.setdefault((here.tensor, here.axis), here)
    return list(found.values())


def _before_pooling(analysis: Analysis, here: Map) -> Map:
    while True:
        node = analysis.graph.producer.get(here.tensor)
        if node is None or node.domain or node.op_type not in PASSED or node.inputs[0] not in analysis.graph.dynamic:
            return here
        wanted = np.unique(here.labels)
        axes = analysis.axes.get(node.inputs[0], {})
        same = [a for a, labels in axes.items() if np.array_equal(np.unique(labels), wanted)]
        if not same:
            return here
        here = Map(node.inputs[0], same[0], axes[same[0]])


def by_channel(value: np.ndarray, axis: int) -> np.ndarray:
    """View a map as (N, channels, ...); maps whose batch is not the first axis count as one sample."""
    return value[None].swapaxes(0, 1) if axis == 0 else np.moveaxis(value, axis, 1)


def averaged(evidence: Evidence, measure: Measure, images: int | None = None) -> list[tuple[Map, np.ndarray]]:
    """Average a measure of all maps over the calibration inputs."""
    assert evidence.taps is not None
    todo = maps(evidence.analysis)
    by_name: dict[str, list[int]] = {}
    for i, one in enumerate(todo):
        by_name.setdefault(one.tensor, []).append(i)
    sums: list[np.ndarray | float] = [0.0] * len(todo)
    counts = [0] * len(todo)
    for name, value in evidence.taps(list(by_name), images):
        for i in by_name[name]:
            x = by_channel(value, todo[i].axis)
            sums[i] = sums[i] + np.asarray(measure(x), np.float64)
            counts[i] += len(x)
    return [(one, total / max(count, 1)) for one, total, count in zip(todo, sums, counts, strict=True)]


@criterion("hrank", comparable=True, needs=ACTIVATIONS)
def hrank(evidence: Evidence) -> Scores:
    """Mean rank of a channel's map after its activation, as a matrix (HRank, Lin et al. 2020); needs --calibration.

    Coupled maps are averaged. Global: as a fraction of the largest rank that the map's size allows.
    """
    total = Total(evidence.analysis.units)
    for one, ranks in averaged(evidence, _ranks, RANKED):
        total.add(one.labels, ranks)
    return total.mean()


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of (N, channels, ...) maps over the full rank, summed over N."""
    rows = x.shape[2] if x.ndim > 2 else 1
    matrices = np.ascontiguousarray(x.reshape(*x.shape[:2], rows, -1), np.float32)
    full = max(1, min(matrices.shape[2:]))
    return np.linalg.matrix_rank(matrices).sum(0) / full


@criterion("apoz", comparable=True, needs=ACTIVATIONS)
def apoz(evidence: Evidence) -> Scores:
    """Share of a channel's activations that are not zero (1 - APoZ, Hu et al. 2016); needs --calibration.

    Coupled maps are averaged. Global: as it is, a fraction.
    """
    total = Total(evidence.analysis.units)
    for one, share in averaged(evidence, lambda x: (x != 0).reshape(*x.shape[:2], -1).mean(2).sum(0)):
        total.add(one.labels, share)
    scores = total.mean()
    if not (scores < 1).any():
        raise ConfigError(
            "criterion 'apoz' counts zeros, and no activation of this model is ever zero (it has no Relu in front of "
            "what may be pruned). Use --criterion activation."
        )
    return scores
