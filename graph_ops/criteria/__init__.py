"""Importance criteria, one decorated function each; ``--list-criteria`` shows them."""

from . import norms, scales, median, maps, readers, loss, others  # noqa: F401, I001 - the order of the list
from .base import ACTIVATIONS, CRITERIA, LABELS, WEIGHTS, Criterion, Evidence, Loss, Scores, Taps, criterion

__all__ = [
    "ACTIVATIONS",
    "CRITERIA",
    "LABELS",
    "WEIGHTS",
    "Criterion",
    "Evidence",
    "Loss",
    "Scores",
    "Taps",
    "criterion",
]
