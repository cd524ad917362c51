"""A metric of the user's own, and how far it changed from baseline to model.

The function is called as ``function(outputs, labels)`` and returns one number, of which more is better:

* ``outputs``: list of arrays, the model's outputs in its own order, each with all samples along the first axis;
* ``labels``: int64 array of shape (N,), or ``None`` where the data has no labels.

It is called once for each model, and again on resamples of the samples (drawn with replacement, the same for both
models) for the paired bootstrap interval of the change: Efron and Tibshirani, "An Introduction to the Bootstrap",
1993, chapter 13. A function that takes too long for that, or that fails on a resample, gets no interval.
"""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.plugins import current_folder_first, find_function, said

from .eval_results import MetricChange

Outputs = list[np.ndarray]
Function = Callable[[Outputs, np.ndarray | None], float]

RESAMPLES = 400
# Calls of the metric on resamples may take this long in all.
BUDGET_S = 5.0


@dataclass(frozen=True)
class Metric:
    """The user's function under the name by which it was asked for."""

    name: str
    function: Function

    @classmethod
    def find(cls, name: str) -> Metric:
        """Import ``package.module:function``; the current folder is searched first.

        Raises:
            ConfigError: no such module or function.
        """
        return cls(name, find_function(name, "metric"))

    def __call__(self, outputs: Outputs, labels: np.ndarray | None) -> float:
        """Return the metric of one model.

        Raises:
            DataError: the function fails, or returns something else than a finite number.
        """
        try:
            with current_folder_first():
                value = self.function(outputs, labels)
        except Exception as error:  # whatever the user's function does
            raise DataError(f"metric {self.name} fails: {said(error)}{_place(error)}.") from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise DataError(f"metric {self.name} must return a number, not {type(value).__name__}.") from None
        if not math.isfinite(number):
            raise DataError(f"metric {self.name} returned {number}; it must return a finite number.")
        return number

    def change(
        self, model: Outputs, baseline: Outputs, labels: np.ndarray | None, seed: int = 0
    ) -> tuple[float, float, MetricChange]:
        """Return the metric of model and baseline, and the change from one to the other with its interval.

        Args:
            model: its outputs.
            baseline: its outputs on the same samples.
            labels: of the samples.
            seed: of the bootstrap.

        Raises:
            DataError: see :meth:`__call__`.
        """
        began = time.perf_counter()
        mine, theirs = self(model, labels), self(baseline, labels)
        affordable = (time.perf_counter() - began) * RESAMPLES <= BUDGET_S
        interval = None
        if affordable:
            with contextlib.suppress(DataError):  # a class that is missing from a resample, for one
                interval = self._interval(model, baseline, labels, seed)
        return mine, theirs, MetricChange(name=self.name, value=mine - theirs, ci95=interval)

    def _interval(
        self, model: Outputs, baseline: Outputs, labels: np.ndarray | None, seed: int
    ) -> tuple[float, float]:
        rng, samples = np.random.default_rng(seed), len(model[0])
        changes = []
        for _ in range(RESAMPLES):
            drawn = rng.integers(0, samples, samples)
            right = None if labels is None else labels[drawn]
            changes.append(self(_rows(model, drawn), right) - self(_rows(baseline, drawn), right))
        low, high = np.quantile(changes, (0.025, 0.975))
        return float(low), float(high)


def _rows(outputs: Sequence[np.ndarray], chosen: np.ndarray) -> Outputs:
    return [output[chosen] for output in outputs]


def _place(error: Exception) -> str:
    """Say where in the user's file it happened."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if len(frames) > 1 else None  # the first one is ours
    return f" ({Path(last.filename).name}, line {last.lineno})" if last else ""
