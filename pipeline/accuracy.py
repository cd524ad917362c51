"""Accuracy of models, and how each differs from a baseline on the very same samples.

All models see each batch, and only counts are kept, so a data set of any size streams through.

The interval of the accuracy change uses that the samples are paired: only those that one model gets right and the
other wrong count. It is the adjusted Wald interval of Agresti and Min, "Simple improved confidence intervals for
comparing matched proportions", Statistics in Medicine 24, 2005: half a sample is added to each of the four cells of
the table, which keeps the coverage near 95 % for small samples and for models that never disagree. Beside it stands
the exact test of McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages", Psychometrika 12, 1947: how likely so uneven a table is for two models that are equally good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from prune_onnx.graph_ops.errors import DataError

from .eval_results import Accuracy, AccuracyChange, Agreement
from .sessions import input_specs, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Batch = tuple[np.ndarray, np.ndarray | None]
Feed = Mapping[str, np.ndarray]
Z_95 = 1.959964


@dataclass
class Tally:
    """What is counted over the batches; the properties turn counts into results.

    Attributes:
        samples: seen so far.
        labelled: of these, how many had a label.
        top1: right answers of the model and of the baseline.
        top5: samples with the right answer among the five highest, of the model and of the baseline.
        gained: samples that only the model gets right.
        lost: samples that only the baseline gets right.
        gained5: samples that only the model has among its five highest.
        lost5: samples that only the baseline has there.
        same: samples that both give the same class; ``None`` when the output holds no classes.
        max_abs_diff: largest absolute difference between the two over all outputs.
        not_finite: samples for which the model's output holds NaN or infinity.
    """

    samples: int = 0
    labelled: int = 0
    top1: list[int] = field(default_factory=lambda: [0, 0])
    top5: list[int] = field(default_factory=lambda: [0, 0])
    gained: int = 0
    lost: int = 0
    gained5: int = 0
    lost5: int = 0
    same: int | None = 0
    max_abs_diff: float = 0.0
    not_finite: int = 0

    def accuracy(self, which: int = 0) -> Accuracy | None:
        """Accuracy of the model (0) or the baseline (1), ``None`` without labels."""
        n = self.labelled
        return Accuracy(top1=self.top1[which] / n, top5=self.top5[which] / n, samples=n) if n else None

    @property
    def change(self) -> AccuracyChange | None:
        """Change of accuracy from baseline to model, ``None`` without labels."""
        n = self.labelled
        if not n:
            return None
        return AccuracyChange(
            top1=(self.gained - self.lost) / n,
            ci95=paired_interval(self.gained, self.lost, n),
            p_value=mcnemar(self.gained, self.lost),
            top5=(self.gained5 - self.lost5) / n,
            top5_ci95=paired_interval(self.gained5, self.lost5, n),
        )

    @property
    def agreement(self) -> Agreement:
        """How far model and baseline agree."""
        same = None if self.same is None else self.same / self.samples
        return Agreement(top1=same, max_abs_diff=self.max_abs_diff, samples=self.samples)


class Kept:
    """All outputs and labels of a run over the data, for a metric that wants to see them at once."""

    def __init__(self, sessions: int) -> None:
        self._outputs: list[list[list[np.ndarray]]] = [[] for _ in range(sessions)]
        self._labels: list[np.ndarray | None] = []

    def add(self, outputs: Sequence[list[np.ndarray]], labels: np.ndarray | None) -> None:
        """Keep one batch: the outputs of every session, and the labels."""
        for kept, arrays in zip(self._outputs, outputs, strict=True):
            kept.append(arrays)
        self._labels.append(labels)

    def outputs(self, which: int) -> list[np.ndarray]:
        """Return all outputs of one session, each with the samples along its first axis."""
        return [np.concatenate(arrays) for arrays in zip(*self._outputs[which], strict=True)]

    @property
    def labels(self) -> np.ndarray | None:
        """All labels, int64 (N,); ``None`` where there are none."""
        given = [labels for labels in self._labels if labels is not None]
        return np.concatenate(given) if given else None


def tally(
    models: Sequence[InferenceSession],
    baseline: InferenceSession | None,
    batches: Iterable[Batch],
    advance: Callable[[int], None] = lambda steps: None,
    keep: Kept | None = None,
) -> list[Tally]:
    """Run all models over all batches.

    Args:
        models: sessions with one input whose first axis counts samples.
        baseline: a session with the same interface, or ``None``.
        batches: (inputs, labels) with inputs of shape (N, ...), labels int64 of shape (N,) or ``None``.
        advance: told the number of samples of each batch.
        keep: gets the outputs of all models, the baseline's last. Whether the labels are classes is then the metric's
            to know: outputs without classes have no accuracy, and are no error.

    Returns:
        One for each model.

    Raises:
        DataError: labels name classes that the model does not have, or there are no samples.
        ModelError: a model fails to run, or the inputs do not fit it.
    """
    counts = [Tally() for _ in models]
    for inputs, labels in batches:
        if not len(inputs):
            continue
        every = [predict(session, inputs) for session in (*models, *([baseline] if baseline is not None else []))]
        theirs = every[-1] if baseline is not None else None
        for count, mine in zip(counts, every, strict=False):
            _count(count, mine, theirs, labels, lenient=keep is not None)
        if keep is not None:
            keep.add(every, labels)
        advance(len(inputs))
    if not counts[0].samples:
        raise DataError("the data holds no samples.")
    return counts


def compare_outputs(model: InferenceSession, baseline: InferenceSession, feeds: Iterable[Feed]) -> Tally:
    """Run both models on whole inputs, for models or inputs that do not come sample by sample.

    Raises:
        DataError: the two give outputs of different shapes.
        ModelError: a model fails to run.
    """
    count = Tally()
    for feed in feeds:
        mine, theirs = run_session(model, feed), run_session(baseline, feed)
        _compare(count, mine, theirs, _class_scores(mine[0]), _class_scores(theirs[0]))
        count.samples += len(mine[0]) if mine[0].ndim else 1
        count.not_finite += int(not all(np.isfinite(output).all() for output in mine))
    return count


def predict(session: InferenceSession, inputs: np.ndarray) -> list[np.ndarray]:
    """Run a model over samples, also where it takes a fixed number of samples at a time.

    Args:
        session: a session with one input whose first axis counts samples.
        inputs: shape (N, ...); cast to the model's type.

    Returns:
        All outputs, each with N as its first axis.

    Raises:
        ModelError: the run fails.
        DataError: an output has no axis that counts samples.
    """
    spec = input_specs(session)[0]
    inputs = np.ascontiguousarray(inputs, spec.dtype)
    n, size = len(inputs), spec.shape[0]
    parts = []
    for start in range(0, n, size or n):
        part = inputs[start : start + (size or n)]
        if size is not None and len(part) < size:
            # A model of fixed batch size takes full batches only: fill up with copies, dropped again below.
            part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        outputs = run_session(session, {spec.name: part})
        for output, value in zip(session.get_outputs(), outputs, strict=True):
            if not value.ndim or len(value) != len(part):
                raise DataError(
                    f"output {output.name!r} has shape {list(value.shape)} for {len(part)} samples, so it cannot be "
                    "compared sample by sample."
                )
        parts.append(outputs)
    return [np.concatenate(arrays)[:n] for arrays in zip(*parts, strict=True)]


def label_rank(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return for each sample how many classes come before the right one, 0 where it is the answer.

    Equal scores rank by class index, as ``argmax`` has it, so a network that gives the same score to all classes is
    not called right. Samples with a NaN are wrong.

    Args:
        scores: (N, classes).
        labels: (N,) int64.

    Returns:
        (N,) int64 in ``0 .. classes``.
    """
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = (scores > right).sum(1) + ((scores == right) & before).sum(1)
    return np.where(np.isnan(scores).any(1), scores.shape[1], rank)


def paired_interval(gained: int, lost: int, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of ``(gained - lost) / samples``, an accuracy change on paired samples.

    Args:
        gained: samples that only the model gets right.
        lost: samples that only the baseline gets right.
        samples: all samples.
    """
    n, b, c = samples + 2, gained + 0.5, lost + 0.5
    middle = (b - c) / n
    half = Z_95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: that a fair coin splits the differing samples so unevenly.

    Args:
        gained: samples that only the model gets right.
        lost: samples that only the baseline gets right.
    """
    n, fewer = gained + lost, min(gained, lost)
    ways = term = 1  # of ``fewer`` heads or less in n throws; exact integers, for n may be large
    for heads in range(fewer):
        term = term * (n - heads) // (heads + 1)
        ways += term
    return min(1.0, 2 * ways / 2**n)


def _count(
    count: Tally,
    mine: list[np.ndarray],
    theirs: list[np.ndarray] | None,
    labels: np.ndarray | None,
    lenient: bool,
) -> None:
    n = len(mine[0])
    scores = _class_scores(mine[0])
    count.samples += n
    count.not_finite += int((~np.isfinite(mine[0].reshape(n, -1))).any(1).sum())
    other = None
    if theirs is not None:
        other = _class_scores(theirs[0])
        _compare(count, mine, theirs, scores, other)
    if labels is None or (scores is None and lenient):
        return
    if scores is None:
        raise DataError(
            f"the data has labels, but the model's first output has shape {list(mine[0].shape)} instead of one score "
            "for each class."
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < scores.shape[1]:
        raise DataError(
            f"the data has labels from {labels.min()} to {labels.max()}, but the model gives {scores.shape[1]} classes."
        )
    count.labelled += n
    ranks = [label_rank(s, labels) for s in (scores, other) if s is not None]
    for which, rank in enumerate(ranks):
        count.top1[which] += int((rank == 0).sum())
        count.top5[which] += int((rank < 5).sum())
    if len(ranks) == 2:
        count.gained += int(((ranks[0] == 0) & (ranks[1] != 0)).sum())
        count.lost += int(((ranks[0] != 0) & (ranks[1] == 0)).sum())
        count.gained5 += int(((ranks[0] < 5) & (ranks[1] >= 5)).sum())
        count.lost5 += int(((ranks[0] >= 5) & (ranks[1] < 5)).sum())


def _compare(
    count: Tally,
    mine: list[np.ndarray],
    theirs: list[np.ndarray],
    scores: np.ndarray | None,
    other: np.ndarray | None,
) -> None:
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape:
            raise DataError(f"model and baseline give outputs of different shapes: {list(a.shape)}, {list(b.shape)}.")
        if a.size:
            with np.errstate(invalid="ignore"):  # infinity minus infinity
                diff = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
            count.max_abs_diff = max(count.max_abs_diff, math.inf if np.isnan(diff) else float(diff))
    if scores is None or other is None or count.same is None:
        count.same = None
    else:
        count.same += int((scores.argmax(1) == other.argmax(1)).sum())


def _class_scores(output: np.ndarray) -> np.ndarray | None:
    """Return an output as (N, classes), also from (N, classes, 1, 1); ``None`` for anything else."""
    if output.ndim < 2 or output.shape[1] < 2 or output.size != len(output) * output.shape[1]:
        return None
    return output.reshape(len(output), -1)
