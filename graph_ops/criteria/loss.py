"""The loss without a channel, on labelled inputs: backward selection."""

from __future__ import annotations

import numpy as np

from .base import LABELS, Evidence, Scores, criterion

ROUNDS = 16
"""Rounds of removal; after the first, only the best candidates are looked at again."""

AGAIN = 2
"""How many candidates are looked at in a round, as a multiple of those that go."""


@criterion("loss", comparable=True, needs=LABELS)
def loss(evidence: Evidence) -> Scores:
    """Order in which channels go when the one goes without which the loss is lowest; needs labels with --calibration.

    Coupled channels are masked together. Global: the order itself, from 0 for the first to 1 for the last. Algorithm 1
    of Mitsuno and Kurita, "Filter Pruning using Hierarchical Group Sparse Regularization", taken in rounds.
    """
    return selection(evidence, ROUNDS)


def selection(evidence: Evidence, rounds: int, again: int = AGAIN) -> Scores:
    """Score units by the order of their removal.

    Args:
        evidence: with a loss.
        rounds: in how many steps all units go; as many as there are units is the paper's algorithm.
        again: candidates of a round, as a multiple of those that go; they are the best of when last looked at. 0 takes
            all of them, which is the paper's algorithm.

    Returns:
        0 for the first that goes up to 1. What is left when enough is gone, or as the last of its group, is ranked
        behind by its loss when last looked at.
    """
    analysis = evidence.analysis
    assert evidence.loss is not None
    left = np.flatnonzero(~analysis.pinned & (analysis.group_of >= 0))
    keep = np.ones(analysis.units, bool)
    known = np.full(analysis.units, -np.inf)
    order: list[int] = []
    each = -(-len(left) // max(1, min(rounds, len(left))))
    with evidence.progress.task("loss without each channel", len(left)) as advance:
        while True:
            left = _removable(evidence, keep, left)
            if not len(left) or (evidence.enough is not None and evidence.enough(keep)):
                break
            best = left[np.argsort(known[left], kind="stable")]
            first_time = np.isinf(known[left]).any()
            candidates = np.sort(best if first_time or not again else best[: again * each])
            known[candidates] = evidence.loss(keep, candidates)
            for unit in candidates[np.argsort(known[candidates], kind="stable")][:each]:
                if _still_removable(evidence, keep, unit):
                    keep[unit] = False
                    order.append(int(unit))
                    advance(1)
            left = left[keep[left]]
    rest = np.flatnonzero(keep & ~analysis.pinned & (analysis.group_of >= 0))
    order += rest[np.argsort(known[rest], kind="stable")].tolist()
    scores = np.full(analysis.units, np.nan)
    scores[order] = np.arange(len(order)) / max(1, len(order) - 1)
    return scores


def _removable(evidence: Evidence, keep: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Those of the units that are not the last of their group."""
    groups = evidence.analysis.group_of
    alive = np.bincount(groups[keep & (groups >= 0)], minlength=len(evidence.analysis.groups))
    return units[alive[groups[units]] > 1]


def _still_removable(evidence: Evidence, keep: np.ndarray, unit: int) -> bool:
    return len(_removable(evidence, keep, np.asarray([unit]))) > 0
