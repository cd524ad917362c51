"""What models give: accuracy, the user's metric, and how both changed from the baseline or from a stored result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_onnx.graph_ops.progress import Progress

from . import compare
from .accuracy import Kept, Tally
from .eval_results import Accuracy, AccuracyChange, Agreement, EvalResult, MetricChange
from .eval_schema import EvalConfig
from .inputs import DataInputs, RandomInputs
from .metrics import Metric

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


@dataclass(frozen=True)
class Quality:
    """One model; all but the first two are ``None`` for the baseline itself.

    Attributes:
        accuracy: ``None`` without labels.
        metric: the user's own, where there is one.
        accuracy_change: from the baseline or the stored result.
        metric_change: likewise.
        agreement: with the baseline.
        tally: the counts behind all this; ``None`` where nothing was run.
    """

    accuracy: Accuracy | None = None
    metric: float | None = None
    accuracy_change: AccuracyChange | None = None
    metric_change: MetricChange | None = None
    agreement: Agreement | None = None
    tally: Tally | None = None


def judge(
    config: EvalConfig,
    inputs: DataInputs | RandomInputs,
    sessions: Sequence[InferenceSession],
    metric: Metric | None,
    stored: EvalResult | None,
    progress: Progress,
) -> list[Quality]:
    """Run all models over all samples.

    Args:
        config: how many models there are, whether there is a baseline, and the gates.
        inputs: what they run on.
        sessions: of the models, and last of the baseline.
        metric: the user's own.
        stored: the result that stands for a baseline.
        progress: told of the samples.

    Returns:
        One for each session.

    Raises:
        DataError: data that does not fit, a metric that fails, or gates for which the stored result has nothing.
        ModelError: a model fails to run.
    """
    models = sessions[: len(config.models)]
    baseline = sessions[-1] if config.baseline is not None else None
    kept = Kept(len(sessions)) if metric else None
    tallies = inputs.judge(models, baseline, kept, progress)
    metrics = _metrics(config, metric, kept, len(models), stored)
    found = []
    for which, (value, change) in enumerate(metrics[: len(models)]):
        count = tallies[which] if tallies else None
        accuracy = count.accuracy() if count else None
        since = compare.accuracy_change(stored, accuracy, inputs.name) if stored else None
        if count and baseline is not None:
            found.append(Quality(accuracy, value, count.change, change, count.agreement, count))
        else:
            found.append(Quality(accuracy, value, since, change, None, count))
    if stored is not None:
        compare.check_gates(config, stored, found[0].accuracy_change, inputs.name)
    if baseline is not None:
        accuracy = tallies[0].accuracy(1) if tallies else None
        found.append(Quality(accuracy=accuracy, metric=metrics[-1][0]))
    return found


def _metrics(
    config: EvalConfig, metric: Metric | None, kept: Kept | None, models: int, stored: EvalResult | None
) -> list[tuple[float | None, MetricChange | None]]:
    """Return the metric of every model and how it changed; the baseline's last, which has no change."""
    if metric is None or kept is None:
        return [(None, None)] * (models + 1)
    if config.baseline is None:
        values = [metric(kept.outputs(which), kept.labels) for which in range(models)]
        return [(value, compare.metric_change(stored, metric.name, value)) for value in values]
    theirs, found = kept.outputs(models), []
    before = None
    for which in range(models):
        mine, before, change = metric.change(kept.outputs(which), theirs, kept.labels, config.seed)
        found.append((mine, change))
    return [*found, (before, None)]
