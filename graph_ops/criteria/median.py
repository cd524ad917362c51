"""Distance to the other filters of the group: those near the geometric median are the most replaceable."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..analysis import Analysis
from .base import Evidence, Scores, criterion, producing_weights
from .norms import l2

NORM_SHARE = 0.25
"""Part of the removed filters of ``fpgm-mix`` that goes by the norm (the paper's 40 % are 30 % distance, 10 % norm)."""

AT_ONCE = 2**22
"""Weights that are looked at together: their float64 copies take 64 MB."""


@criterion("fpgm")
def fpgm(evidence: Evidence) -> Scores:
    """Distances of a filter to all others, summed: filters near the geometric median go (FPGM, He et al. 2019).

    Coupled filters count as one long filter (a layer that does not make a unit adds zeros). Global: divided by the
    group's mean.
    """
    scores = np.full(evidence.analysis.units, np.nan)
    for units, distance in _distances(evidence.analysis):
        scores[units] = distance.sum(1, dtype=np.float64)
    return scores


@criterion("fpgm-mix")
def fpgm_mix(evidence: Evidence) -> Scores:
    """One filter in four goes by its norm, the others by their distance to those that the norm left (FPGM-mix).

    The order within a group is the mixed one; the scores are the group's distances, handed out in that order. Global:
    divided by the group's mean.
    """
    norms = l2(evidence)
    scores = np.full(evidence.analysis.units, np.nan)
    for units, distance in _distances(evidence.analysis):
        order = mixed_order(norms[units], distance)
        scores[units[order]] = np.sort(distance.sum(1, dtype=np.float64))
    return scores


def mixed_order(norms: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Order of removal: of each four, the first by the norm, the others by the distance to what the norm left.

    Args:
        norms: (n,).
        distance: (n, n).
    """
    left = np.ones(len(norms), bool)
    sums = distance.sum(1, dtype=np.float64)
    order = []
    for step in range(len(norms)):
        by_norm = int(step * NORM_SHARE) == step * NORM_SHARE
        best = int(np.argmin(np.where(left, norms if by_norm else sums, np.inf)))
        left[best] = False
        if by_norm:
            sums = sums - distance[best]
        order.append(best)
    return np.asarray(order, np.int64)


def _distances(analysis: Analysis) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each group's units and their pairwise distances, float32 (n, n), units without any filter left out."""
    by_group: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for producer, weight, axis in producing_weights(analysis):
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        group = int(analysis.group_of[producer.labels[0]])
        by_group.setdefault(group, []).append((producer.labels[: len(rows)], rows))
    for group, members in by_group.items():
        units = analysis.groups[group].units
        place = np.full(analysis.units, -1)
        place[units] = np.arange(len(units))
        squares = np.zeros((len(units), len(units)))
        covered = np.zeros(len(units), bool)
        for labels, rows in members:
            for part in _one_each(labels):
                where = place[labels[part]]
                step = max(1, AT_ONCE // len(units))
                for first in range(0, rows.shape[1], step):
                    columns = rows[part, first : first + step]
                    full = np.zeros((len(units), columns.shape[1]))
                    full[where] = columns
                    squares += _pairwise(full)
                covered[where] = True
        squares = squares[np.ix_(covered, covered)]
        yield units[covered], np.sqrt(np.maximum(squares, 0)).astype(np.float32)


def _one_each(labels: np.ndarray) -> list[np.ndarray]:
    """Split positions so that no unit occurs twice in a part."""
    order = np.argsort(labels, kind="stable")
    ranked = labels[order]
    first = np.concatenate([[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1])
    nth = np.empty(len(labels), np.int64)
    nth[order] = np.arange(len(labels)) - np.repeat(first, np.diff([*first, len(labels)]))
    return [np.flatnonzero(nth == n) for n in range(nth.max() + 1)]


def _pairwise(rows: np.ndarray) -> np.ndarray:
    """Squared distances of rows in float64; what they have in common is taken off first, so that little cancels."""
    rows = rows - rows.mean(0)
    gram = rows @ rows.T
    norms = np.diag(gram)
    squares = norms[:, None] + norms[None] - 2 * gram
    np.fill_diagonal(squares, 0)
    return squares
