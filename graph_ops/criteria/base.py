"""What a criterion is, what it may look at, and the registry of all of them.

A unit stands for coupled channels of several layers, so its score gathers all of them. Under ``--scope global`` scores
of different groups are compared; criteria whose scale differs from layer to layer are divided by their group's mean
first (as Torch-Pruning's group importance does), those that are comparable by design are not. Each criterion's
docstring says which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..analysis import Analysis
from ..progress import SILENT, Progress
from ..records import Producer
from ..registry import Registry

Scores = np.ndarray
"""float64 (units,); NaN where the criterion has nothing to say (such units are kept)."""

WEIGHTS, ACTIVATIONS, LABELS = "weights", "activations", "labels"


class Taps(Protocol):
    """Runs the network over the calibration inputs, a few at a time, and shows tensors of it."""

    def __call__(self, names: Sequence[str], images: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, value) of every tensor for every batch; the first ``images`` inputs, all for ``None``."""


class Loss(Protocol):
    """The loss of the network on labelled calibration inputs when units are masked."""

    def __call__(self, keep: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Loss without each candidate, (len(candidates),), where only the units ``keep`` (bool) are left as it is."""


@dataclass
class Evidence:
    """What a criterion may look at.

    Attributes:
        analysis: the graph's analysis.
        rng: of the random criterion.
        taps: shows activations; ``None`` without calibration data.
        loss: of the masked network; ``None`` without labelled calibration data.
        enough: whether a keep-set, bool (units,), is as small as anybody will ask; ``None`` where nobody knows.
        progress: told how far a criterion is.
    """

    analysis: Analysis
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    taps: Taps | None = None
    loss: Loss | None = None
    enough: Callable[[np.ndarray], bool] | None = None
    progress: Progress = SILENT


@dataclass(frozen=True)
class Criterion:
    """A named criterion.

    Attributes:
        name: as on the command line.
        score: evidence to one score per unit, higher is more important.
        comparable: whether scores of different groups are on one scale.
        needs: ``weights``, ``activations`` (calibration data) or ``labels`` (calibration data with labels).
    """

    name: str
    score: Callable[[Evidence], Scores]
    comparable: bool
    needs: str = WEIGHTS

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return self.score.__doc__ or ""


CRITERIA: Registry[Criterion] = Registry("criterion")


def criterion(name: str, *, comparable: bool = False, needs: str = WEIGHTS) -> Callable[[Callable], Callable]:
    """List a scoring function under ``name``."""

    def add(score: Callable[[Evidence], Scores]) -> Callable:
        CRITERIA.register(name)(Criterion(name, score, comparable, needs))
        return score

    return add


def producing_weights(analysis: Analysis) -> Iterator[tuple[Producer, np.ndarray, int]]:
    """Yield each producer that has a readable weight, the weight, and the weight's axis of output channels."""
    for producer in analysis.producers:
        if producer.weight is not None:
            index, axis = producer.weight
            weight = analysis.value(producer.node.inputs[index])
            if weight is not None:
                yield producer, weight, axis


class Total:
    """A sum over all members of each unit; units that nobody added to come out as NaN."""

    def __init__(self, units: int) -> None:
        self._sum, self._seen = np.zeros(units), np.zeros(units, int)

    def add(self, labels: np.ndarray, values: np.ndarray) -> None:
        """Add ``values[i]`` to unit ``labels[i]``."""
        np.add.at(self._sum, labels, values)
        np.add.at(self._seen, labels, 1)

    def sum(self) -> Scores:
        """Sum over the members."""
        return np.where(self._seen > 0, self._sum, np.nan)

    def mean(self) -> Scores:
        """Mean over the members."""
        return np.where(self._seen > 0, self._sum / np.maximum(self._seen, 1), np.nan)
