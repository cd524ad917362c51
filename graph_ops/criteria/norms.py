"""Norms of the filters that produce a channel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .base import Evidence, Scores, Total, criterion, producing_weights

Norm = Callable[[np.ndarray], np.ndarray]
"""Of every row; sums in float64, and where that is not enough (squares that overflow) of rows in float64."""


def gather(evidence: Evidence, norm: Norm) -> Scores:
    """Mean over all members of a unit of a measure of the producing weights, each layer's relative to its own mean.

    A sum would favour units with many members: in a group whose parts differ in that (split and shuffled streams,
    dense and dual paths), all of the part with fewer members would go before one channel of the other. Without the
    layer's mean the parts with larger filters would win in the same way.
    """
    analysis = evidence.analysis
    total = Total(analysis.units)
    for producer, weight, axis in producing_weights(analysis):
        per_channel = _by_channel(weight, axis, norm)
        scale = per_channel.mean() if len(per_channel) else 0.0
        # A grouped ConvTranspose stores the outputs of one group there, and the labels of the others repeat them.
        total.add(producer.labels[: len(per_channel)], per_channel / scale if scale > 0 else per_channel)
    return total.mean()


def _by_channel(weight: np.ndarray, axis: int, norm: Norm) -> np.ndarray:
    """Apply a norm to every slice of ``axis``, a few at a time: a large layer never exists twice."""
    rows = np.moveaxis(weight, axis, 0)
    step = max(1, 2**17 // max(1, weight.size // len(rows)))
    kind = weight.dtype if weight.dtype in (np.float32, np.float64) else np.float64
    parts = []
    for i in range(0, len(rows), step):
        part = np.asarray(rows[i : i + step], kind).reshape(len(rows[i : i + step]), -1)
        found = norm(part)
        parts.append(found if np.isfinite(found).all() else norm(part.astype(np.float64)))
    return np.concatenate(parts)


@criterion("l1")
def l1(evidence: Evidence) -> Scores:
    """Sum of absolute weights of the producing filters (Li et al. 2017).

    Coupled filters count alike, each relative to its layer's mean. Global: divided by the group's mean.
    """
    return gather(evidence, lambda rows: np.abs(rows).sum(1, dtype=np.float64))


@criterion("l2")
def l2(evidence: Evidence) -> Scores:
    """Euclidean norm of the producing filters.

    Coupled filters count alike, each relative to its layer's mean. Global: divided by the group's mean.
    """
    return gather(evidence, lambda rows: np.sqrt(np.square(rows).sum(1, dtype=np.float64)))
