"""Charts for the HTML report: geometry only; the template gives them colours and labels.

A chart is a set of paths in a square of 100 by 100, y downwards, which the page stretches to the width it has. Labels
are not part of it but HTML beside it, so that text keeps its size on a phone and colours follow the reader's theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .eval_results import Candidate, EvalResult, Timing
from .formats import milliseconds, percent, plain
from .pareto import quality_of_result

# Bins of a latency distribution, and the quantiles between which it is drawn: one outlier must not flatten the rest.
BINS = 72
TAILS = (0.002, 0.985)
# What an epoch may have recorded: the chart's title, and how its values are written.
CURVES: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("Training loss", "{:.3g}".format),
    "validation_accuracy": ("Validation accuracy", lambda fraction: f"{100 * fraction:.4g} %"),
    "dead_channels": ("Channels at zero", "{:,.0f}".format),
}


@dataclass(frozen=True)
class Tick:
    """A label at ``at`` per cent of an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One path; ``kind`` (``model`` or ``baseline``) chooses its colour, ``mark`` is a value worth naming on it."""

    path: str
    kind: str
    mark: Tick | None = None


@dataclass(frozen=True)
class Chart:
    """Lines on common axes."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_name: str = ""


@dataclass(frozen=True)
class Point:
    """A model in a trade-off plot, its place in per cent of both axes.

    Attributes:
        label: its name.
        kind: ``baseline``, ``front`` or ``model``.
        x: of its latency.
        y: of its quality, downwards.
        across: both ends of the interval of its latency.
        along: both ends of the interval of its quality, where that is known.
        below: whether its label would cover another one's, and stands lower.
    """

    label: str
    kind: str
    x: float
    y: float
    across: tuple[float, float]
    along: tuple[float, float] | None
    below: bool = False


@dataclass(frozen=True)
class TradeOff:
    """Speed against quality of several models; ``front`` is a path in the square of 100 by 100."""

    points: list[Point]
    front: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    y_name: str


def trade_off(result: EvalResult) -> TradeOff | None:
    """Return the plot of latency against quality; ``None`` where models have no quality, or there is only one point."""
    found = quality_of_result(result)
    if found is None or len(result.judged) + (result.baseline is not None) < 2:
        return None
    quality, values, before = found
    # Each: label, kind, latency with both ends of its interval, quality with both ends of its interval if known.
    rows = [
        (
            Path(each.model.file).name,
            "front" if each.on_front else "model",
            (each.model.latency_ms.p50, *each.model.latency_ms.p50_ci95),
            value,
            _quality_ends(each, before) if quality.name != "agreement with the baseline" else None,
        )
        for each, value in zip(result.judged, values, strict=True)
    ]
    if result.baseline is not None and before is not None:
        latency = result.baseline.latency_ms
        ends = (latency.p50, *latency.p50_ci95)
        rows.insert(0, (Path(result.baseline.file).name, "baseline", ends, before, None))
    xs = np.log([row[2][0] for row in rows])
    pad = max(0.12 * (xs.max() - xs.min()), 0.05)
    left, width = xs.min() - pad, xs.max() - xs.min() + 2 * pad
    heights = [*(row[3] for row in rows), *(end for row in rows for end in row[4] or ())]
    ticks = _linear_ticks(min(heights), max(heights))
    low, span = ticks[0], ticks[-1] - ticks[0]

    def across(value: float) -> float:
        return min(100.0, max(0.0, 100 * (math.log(max(value, 1e-9)) - left) / width))

    def along(value: float) -> float:
        return 100 - 100 * (value - low) / span

    points = [
        Point(
            label,
            kind,
            across(latency[0]),
            along(value),
            (across(latency[1]), across(latency[2])),
            (along(ends[0]), along(ends[1])) if ends else None,
        )
        for label, kind, latency, value, ends in rows
    ]
    text = percent if quality.fraction else plain
    return TradeOff(
        [replace(point, below=any(_near(point, other) for other in points[:i])) for i, point in enumerate(points)],
        _stairs([(point.x, point.y) for point in points]),
        [Tick(across(v), _tick_text(v)) for v in _log_ticks(math.exp(left), math.exp(left + width))],
        [Tick(along(tick), text(tick)) for tick in ticks],
        quality.name,
    )


def _quality_ends(candidate: Candidate, before: float | None) -> tuple[float, float] | None:
    """Return both ends of a model's quality: the baseline's and the paired interval of the change."""
    change = candidate.metric_change or candidate.accuracy_change
    if before is None or change is None or change.ci95 is None:
        return None
    return before + change.ci95[0], before + change.ci95[1]


def _near(point: Point, other: Point) -> bool:
    """Whether the labels of two points would cover each other."""
    return abs(point.x - other.x) < 30 and abs(point.y - other.y) < 8


def _stairs(points: list[tuple[float, float]]) -> str:
    """Return the path along the points that no other one beats, from the fastest to the best."""
    best, path = math.inf, ""
    for x, y in sorted(points):
        if y < best:
            path += f" L{x:.2f},{best:.2f} L{x:.2f},{y:.2f}" if path else f"M{x:.2f},{y:.2f}"
            best = y
    return path + f" L100,{best:.2f}"


def latency_charts(timing: Timing, others: Sequence[Timing] = ()) -> list[Chart]:
    """Return each model's distribution of latencies, all on the same logarithmic axis, baseline first.

    Args:
        timing: of the model and its baseline.
        others: of further models.
    """
    both = [*_both(timing), *(("model", other.samples_ms.model, other.model) for other in others)]
    series = [
        (kind, np.log(np.concatenate([np.asarray(block) for block in blocks])), latency.p50)
        for kind, blocks, latency in both
    ]
    ends = np.array([np.quantile(samples, TAILS) for _, samples, _ in series])
    low, high = ends[:, 0].min(), ends[:, 1].max()
    pad = max(0.04 * (high - low), 0.01)
    edges = np.linspace(low - pad, high + pad, BINS + 1)
    width = edges[-1] - edges[0]
    ticks = [
        Tick(100 * (math.log(value) - edges[0]) / width, _tick_text(value))
        for value in _log_ticks(math.exp(edges[0]), math.exp(edges[-1]))
    ]
    middles = 100 * (np.arange(BINS) + 0.5) / BINS
    charts = []
    for kind, samples, p50 in series:
        smooth = np.convolve(np.histogram(samples, edges)[0], (0.25, 0.5, 0.25), mode="same")
        outline = _path(middles, 100 - 70 * smooth / smooth.max())  # the upper part is for the mark's label
        mark = Tick(100 * (math.log(p50) - edges[0]) / width, milliseconds(p50))
        charts.append(Chart(kind, [Line(f"M0,100 L{outline} L100,100 Z", kind, mark)], ticks, []))
    return charts


def rounds_chart(timing: Timing) -> Chart:
    """Return the median of every round in the order in which they ran; steady lines are good measurements."""
    medians = [(kind, [float(np.median(block)) for block in blocks]) for kind, blocks, _ in _both(timing)]
    return _lines("Median of every round", medians, _tick_text, x_name="round", zero=True)


def training_charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return a curve for each quantity that the epochs recorded and that changed at all."""
    charts = []
    for key, (title, text) in CURVES.items():
        values = [float(epoch[key]) for epoch in metrics if epoch.get(key) is not None]
        if len(set(values)) > 1:
            charts.append(_lines(title, [("model", values)], text, x_name="epoch"))
    return charts


def _both(timing: Timing) -> list[tuple[str, list[list[float]], Any]]:
    series = [("model", timing.samples_ms.model, timing.model)]
    if timing.samples_ms.baseline is not None:
        series.insert(0, ("baseline", timing.samples_ms.baseline, timing.baseline))
    return series


def _lines(
    title: str, series: list[tuple[str, list[float]]], text: Callable[[float], str], *, x_name: str, zero: bool = False
) -> Chart:
    """Draw values over 1, 2, 3, ...; with ``zero`` the y axis begins at 0."""
    every = [value for _, values in series for value in values]
    ticks = _linear_ticks(0.0 if zero else min(every), max(every))
    low, span = ticks[0], ticks[-1] - ticks[0]
    longest = max(len(values) for _, values in series)
    lines = []
    for kind, values in series:
        xs = 100 * np.arange(len(values)) / max(1, longest - 1)
        lines.append(Line("M" + _path(xs, 100 - 100 * (np.asarray(values) - low) / span), kind))
    y_ticks = [Tick(100 - 100 * (tick - low) / span, text(tick)) for tick in ticks]
    return Chart(title, lines, [Tick(0, "1"), Tick(100, str(longest))], y_ticks, x_name)


def _tick_text(value: float) -> str:
    """Return a round latency in ms without needless zeros."""
    return f"{value * 1e3:.6g} µs" if 0 < value < 0.1 else f"{value:.6g} ms"


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
    return " L".join(f"{x:.2f},{y:.2f}" for x, y in zip(xs, ys, strict=True))


def _linear_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return at most ``most + 2`` multiples of a round step that enclose ``low`` to ``high``."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span <= factor * power * most)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round values inside ``low`` to ``high``, fit for a logarithmic axis."""
    if high / low < 4:
        return [tick for tick in _linear_ticks(low, high) if low <= tick <= high]
    factors = (1, 2, 5) if high / low < 200 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    return [tick for power in decades for factor in factors if low <= (tick := factor * 10.0**power) <= high]
