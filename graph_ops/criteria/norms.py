"""Norms of the filters that produce a channel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .base import Evidence, Scores, Total, criterion, producing_weights

Norm = Callable[[np.ndarray], np.ndarray]


def gather(evidence: Evidence, norm: Norm) -> Scores:
    """Sum a per-channel measure of the producing weights over all members of each unit."""
    analysis = evidence.analysis
    total = Total(analysis.units)
    for producer, weight, axis in producing_weights(analysis):
        per_channel = _by_channel(weight, axis, norm)
        # A grouped ConvTranspose stores the outputs of one group there, and the labels of the others repeat them.
        total.add(producer.labels[: len(per_channel)], per_channel)
        total.add(producer.labels[len(per_channel) :], np.zeros(len(producer.labels) - len(per_channel)))
    return total.sum()


def _by_channel(weight: np.ndarray, axis: int, norm: Norm) -> np.ndarray:
    """Apply a norm to every slice of ``axis`` in float64, a few at a time: a large layer never exists twice."""
    rows = np.moveaxis(weight, axis, 0)
    step = max(1, 2**20 // max(1, weight.size // len(rows)))
    parts = [
        norm(np.asarray(rows[i : i + step], np.float64).reshape(len(rows[i : i + step]), -1))
        for i in range(0, len(rows), step)
    ]
    return np.concatenate(parts)


@criterion("l1")
def l1(evidence: Evidence) -> Scores:
    """Sum of absolute weights of the producing filters (Li et al. 2017).

    Coupled filters add up. Global: divided by the group's mean.
    """
    return gather(evidence, lambda rows: np.abs(rows).sum(1))


@criterion("l2")
def l2(evidence: Evidence) -> Scores:
    """Euclidean norm of the producing filters.

    Coupled filters count as one long filter. Global: divided by the group's mean.
    """
    return np.sqrt(gather(evidence, lambda rows: np.square(rows).sum(1)))
