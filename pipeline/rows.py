"""What a result says, as rows of text: the same in the terminal, in HTML and in Markdown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .eval_results import EvalResult, Measured, NodeTime
from .formats import faster, growth, milliseconds, number, p_value, percent, plain, points, ratio, size
from .pareto import quality_of_result


@dataclass(frozen=True)
class Row:
    """One figure before and after.

    Attributes:
        label: what it is.
        before: the baseline's, empty without a baseline.
        after: the model's.
        change: from before to after, in words.
        note: its interval, or what it was measured on.
        tone: ``good`` or ``bad`` where the change is beyond doubt, else empty.
        part: after divided by before, for amounts of which less is better.
    """

    label: str
    before: str
    after: str
    change: str = ""
    note: str = ""
    tone: str = ""
    part: float | None = None


def change_rows(result: EvalResult) -> list[Row]:
    """Return what changed from baseline to model; without a baseline, what the model has."""
    return [*_accuracy_rows(result), *_metric_rows(result), *_latency_rows(result), *_size_rows(result)]


def _accuracy_rows(result: EvalResult) -> list[Row]:
    after, before = result.model.accuracy, result.baseline.accuracy if result.baseline else None
    if after is None:
        return []
    change = result.accuracy_change
    if before is None or change is None:
        rows = [Row("Top-1 accuracy", percent(before.top1) if before else "", percent(after.top1),
                    note=f"{after.samples:,} samples")]  # fmt: skip
    else:
        low, high = change.ci95
        test = f", {p_value(change.p_value)}" if change.p_value is not None else ""
        note = f"{points(low)} to {points(high)}, {after.samples:,} samples{test}"
        row = Row("Top-1 accuracy", percent(before.top1), percent(after.top1), points(change.top1), note)
        rows = [replace(row, tone=_tone(low, high))]
    if after.top5 < 1:
        row = Row("Top-5 accuracy", percent(before.top5) if before else "", percent(after.top5))
        if before and change and change.top5 is not None and change.top5_ci95 is not None:
            low, high = change.top5_ci95
            note = f"{points(low)} to {points(high)}"
            row = replace(row, change=points(change.top5), note=note, tone=_tone(low, high))
        rows.append(row)
    return rows


def _metric_rows(result: EvalResult) -> list[Row]:
    if result.model.metric is None:
        return []
    row = Row("Metric", "", plain(result.model.metric))
    if (change := result.metric_change) is None or result.baseline is None or result.baseline.metric is None:
        return [row]
    row = replace(row, before=plain(result.baseline.metric), change=plain(change.value, sign=True), note=change.name)
    if change.ci95 is None:
        return [row]
    low, high = change.ci95
    note = f"{plain(low, sign=True)} to {plain(high, sign=True)}, {change.name}"
    return [replace(row, note=note, tone=_tone(low, high))]


def _tone(low: float, high: float) -> str:
    """Return the tone of a change of something of which more is better."""
    return "good" if low > 0 else "bad" if high < 0 else ""


def _latency_rows(result: EvalResult) -> list[Row]:
    after, before = result.model.latency_ms, result.baseline.latency_ms if result.baseline else None
    low, high = result.speedup.ci95 if result.speedup else after.p50_ci95
    note = f"{ratio(low)} to {ratio(high)}" if result.speedup else f"{milliseconds(low)} to {milliseconds(high)}"
    tone = "" if result.speedup is None or low <= 1 <= high else "good" if low > 1 else "bad"
    rows = []
    for name, text in (("p50", "median"), ("p90", "p90"), ("p99", "p99")):
        mine, theirs = getattr(after, name), getattr(before, name) if before else None
        label = f"Latency, {text}"
        if theirs is None:
            rows.append(Row(label, "", milliseconds(mine), note=note if name == "p50" else ""))
        else:
            change = faster(theirs / mine)
            certain = (note, tone, mine / theirs) if name == "p50" else ()
            rows.append(Row(label, milliseconds(theirs), milliseconds(mine), change, *certain))
    mine, theirs = result.model.throughput_per_s, result.baseline.throughput_per_s if result.baseline else None
    texts = (f"{theirs:,.0f} /s", f"{mine:,.0f} /s", faster(mine / theirs)) if theirs else ("", f"{mine:,.0f} /s")
    return [*rows, Row("Throughput", *texts)]


def _size_rows(result: EvalResult) -> list[Row]:
    after, before = result.model, result.baseline
    rows = [
        _amount("File size", after.bytes, before and before.bytes, size),
        _amount("Parameters", after.params, before and before.params, number),
        _amount("MACs", after.macs, before and before.macs, number),
    ]
    peaks = [_peak(side) if side else None for side in (after, before)]
    if peaks[0] is not None:
        rows.append(_amount("Peak memory", peaks[0], peaks[1], size))
    return rows


def _peak(measured: Measured) -> int | None:
    """Peak memory of where a model runs."""
    peak = measured.peak_memory
    return None if peak is None else peak.host_bytes if peak.device_bytes is None else peak.device_bytes


def _amount(label: str, after: float, before: float | None, text: Callable[[float], str]) -> Row:
    """Return a row of something of which less is better."""
    if not before:
        return Row(label, "", text(after))
    part = after / before
    tone = "good" if part < 1 else "bad" if part > 1 else ""
    return Row(label, text(before), text(after), growth(part), "", tone, part)


@dataclass(frozen=True)
class Contender:
    """One of several models, as a row of a table; texts are empty where there is nothing to say.

    Attributes:
        name: of its file.
        verdict: of its gates, or of its measurement.
        on_front: whether no other model beats it.
        cells: latency, speed-up, quality, change of quality, file size, MACs.
    """

    name: str
    verdict: str
    on_front: bool
    cells: list[str]


CONTENDER_CELLS = ("Latency", "Speed-up", "Quality", "Change", "File size", "MACs")


def contenders(result: EvalResult) -> list[Contender]:
    """Return all models of a result in the order given, the baseline first."""
    found = quality_of_result(result)
    values, before = ([None] * len(result.judged), None) if found is None else found[1:]
    text = percent if found is None or found[0].fraction else plain

    def row(model: Measured, value: float | None, change: str, speedup: str) -> list[str]:
        quality = "" if value is None else text(value)
        return [milliseconds(model.latency_ms.p50), speedup, quality, change, size(model.bytes), number(model.macs)]

    rows = []
    if result.baseline is not None:
        cells = row(result.baseline, before, "", "")
        rows.append(Contender(Path(result.baseline.file).name, "", False, cells))
    for each, value in zip(result.judged, values, strict=True):
        change = ""
        if value is not None and before is not None:
            change = (points if text is percent else functools.partial(plain, sign=True))(value - before)
        faster_by = ratio(each.speedup.p50) if each.speedup else ""
        cells = row(each.model, value, change, faster_by)
        rows.append(Contender(Path(each.model.file).name, each.verdict, each.on_front, cells))
    return rows


@dataclass(frozen=True)
class Spent:
    """Time of one node or of all nodes of one operator, in ms a run; ``None`` where there is none of it."""

    name: str
    op_type: str
    before: float | None
    after: float | None

    @property
    def most(self) -> float:
        """The larger of both."""
        return max(self.before or 0.0, self.after or 0.0)


def spent(result: EvalResult) -> tuple[list[Spent], list[Spent]]:
    """Return where the time goes, by operator and by node, the most first; both empty without a profile."""
    if result.profile is None:
        return [], []
    sides = (result.profile.baseline, result.profile.model)
    by_operator = _joined(sides, lambda node: ("", node.op_type))
    by_node = _joined(sides, lambda node: (node.name, node.op_type))
    return by_operator, by_node


def _joined(sides: Sequence[list[NodeTime] | None], key: Callable[[NodeTime], tuple[str, str]]) -> list[Spent]:
    totals: list[dict[tuple[str, str], float]] = []
    for nodes in sides:
        total: dict[tuple[str, str], float] = {}
        for node in nodes or ():
            total[key(node)] = total.get(key(node), 0.0) + node.ms
        totals.append(total)
    every = dict.fromkeys([*totals[0], *totals[1]])
    rows = [Spent(name, op, totals[0].get((name, op)), totals[1].get((name, op))) for name, op in every]
    return sorted(rows, key=lambda row: -row.most)
