"""How far a network's outputs are from the dense network's: one number, without labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from .probing import Feeds
from .runner import Runner

TEMPERATURE = 4.0
SUMS_TO_ONE = 1e-3
"""Rows that are not negative and sum to 1 this closely are probabilities."""

Outputs = list[np.ndarray]
"""Of each of a network's outputs the values for all inputs, the first axis counting them."""


def outputs(model: onnx.ModelProto, chunks: Sequence[Feeds]) -> Outputs:
    """Run a model."""
    runner = Runner(model)
    return joined([runner.run(None, chunk) for chunk in chunks])


def joined(runs: Sequence[Sequence[np.ndarray]]) -> Outputs:
    """Put the outputs of several runs together."""
    return [np.concatenate([np.atleast_1d(o) for o in parts]) for parts in zip(*runs, strict=True)]


def divergence(dense: Outputs, other: Outputs) -> float:
    """Return how far outputs are from the dense network's.

    Of a classifier, which has a single output (N, classes), the Kullback-Leibler divergence at a temperature, averaged
    over the inputs: at temperature 1 a network is certain of the inputs that it was trained on, and damage would hardly
    show. Of everything else (maps, boxes, several outputs) the squared error over the squared deviation of the dense
    output from its mean over the inputs, averaged over the outputs.
    """
    if len(dense) == 1 and dense[0].ndim == 2 and dense[0].shape[1] > 1:
        p, q = (_log_softmax(_logits(z[0].astype(np.float64)) / TEMPERATURE) for z in (dense, other))
        return float((np.exp(p) * (p - q)).sum(1).mean()) * TEMPERATURE**2
    return float(
        np.mean([_relative(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(dense, other, strict=True)])
    )


def _relative(dense: np.ndarray, other: np.ndarray) -> float:
    energy = np.square(dense - (dense.mean(0) if len(dense) > 1 else dense.mean())).sum()
    return float(np.square(dense - other).sum() / max(energy, 1e-30))


def _logits(z: np.ndarray) -> np.ndarray:
    """The logits of probabilities; what are none is returned as it is."""
    if z.min() >= 0 and np.abs(z.sum(1) - 1).max() < SUMS_TO_ONE:
        return np.log(np.maximum(z, 1e-12))
    return z


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))
