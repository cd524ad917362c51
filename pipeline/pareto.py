"""Which of several models nobody would leave for another: the Pareto front of speed and quality.

Quality is what there is to judge by: the user's metric, else top-1 accuracy, else how often a model answers as the
baseline does. Points are compared as they are, without their intervals; those are drawn beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .eval_results import Agreement, EvalResult, Measured


@dataclass(frozen=True)
class Quality:
    """How good models are.

    Attributes:
        name: what it is, for headings.
        of: its value for a model and its agreement with the baseline.
        fraction: whether values are fractions, which people read as per cent.
    """

    name: str
    of: Callable[[Measured, Agreement | None], float | None]
    fraction: bool


QUALITIES = (
    Quality("metric", lambda model, agreement: model.metric, False),
    Quality("top-1 accuracy", lambda model, agreement: model.accuracy.top1 if model.accuracy else None, True),
    Quality("agreement with the baseline", lambda model, agreement: agreement.top1 if agreement else None, True),
)

ITSELF = Agreement(top1=1.0, max_abs_diff=0.0, samples=0)
"""Of the baseline with itself."""


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each (latency, quality) whether it is on the front.

    It is when no other one is better in one of both and not worse in the other. Equal points are all on it, or none.
    """
    return [
        not any(
            latency <= mine and quality >= good and (latency < mine or quality > good) for latency, quality in points
        )
        for mine, good in points
    ]


def quality_of(
    models: Sequence[tuple[Measured, Agreement | None]], baseline: Measured | None
) -> tuple[Quality, list[float], float | None] | None:
    """Return by what the models are judged, the value of each, and the baseline's; ``None`` where there is nothing."""
    for quality in QUALITIES:
        values = [quality.of(*model) for model in models]
        before = quality.of(baseline, ITSELF) if baseline is not None else None
        if all(value is not None for value in values):
            return quality, [value for value in values if value is not None], before
    return None


def quality_of_result(result: EvalResult) -> tuple[Quality, list[float], float | None] | None:
    """Return what :func:`quality_of` gives for all models of a result."""
    return quality_of([(each.model, each.agreement) for each in result.judged], result.baseline)


def on_front(models: Sequence[tuple[Measured, Agreement | None]], baseline: Measured | None) -> list[bool]:
    """Return for each model whether it is on the front, the baseline counted; without a quality, by latency alone."""
    found = quality_of(models, baseline)
    values, before = (found[1], found[2]) if found else ([0.0] * len(models), 0.0)
    points = [(model.latency_ms.p50, value) for (model, _), value in zip(models, values, strict=True)]
    if baseline is not None and before is not None:
        points.append((baseline.latency_ms.p50, before))
    return front(points)[: len(models)]
