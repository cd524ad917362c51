"""The report: one HTML page that needs nothing else, and its twin in Markdown. Both show the same figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_onnx.graph_ops.files import write_text

from . import formats
from .charts import latency_charts, rounds_chart, training_charts
from .eval_schema import EvalResult
from .formats import faster, growth, milliseconds, number, percent, points, ratio, size
from .slim_schema import Group, SlimResult

if TYPE_CHECKING:
    from jinja2 import Template

    from .train import TrainResult

Metrics = Sequence[Mapping[str, Any]]


def write_html(
    path: str | Path,
    *,
    eval_result: EvalResult,
    slim_result: SlimResult | None = None,
    train_result: TrainResult | None = None,
    metrics: Metrics | None = None,
) -> None:
    """Write the report as one self-contained HTML page.

    Args:
        path: the file; replaced if it exists.
        eval_result: what was measured.
        slim_result: what was removed, for the channels along the depth of the net.
        train_result: how the net was trained.
        metrics: the epochs of the training, as in ``metrics.jsonl``.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, _template("report.html.j2").render(_view(eval_result, slim_result, train_result, metrics)))


def to_markdown(
    *,
    eval_result: EvalResult,
    slim_result: SlimResult | None = None,
    train_result: TrainResult | None = None,
    metrics: Metrics | None = None,
) -> str:
    """Return the report as GitHub-flavoured Markdown; the arguments are those of :func:`write_html`."""
    return _template("report.md.j2").render(_view(eval_result, slim_result, train_result, metrics))


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
    return [*_accuracy_rows(result), *_latency_rows(result), *_size_rows(result)]


def _accuracy_rows(result: EvalResult) -> list[Row]:
    after, before = result.model.accuracy, result.baseline.accuracy if result.baseline else None
    if after is None:
        return []
    if before is None or result.accuracy_change is None:
        rows = [Row("Top-1 accuracy", "", percent(after.top1), note=f"{after.samples:,} samples")]
    else:
        low, high = result.accuracy_change.ci95
        tone = "good" if low > 0 else "bad" if high < 0 else ""
        note = f"{points(low)} to {points(high)}, {after.samples:,} samples"
        change = points(result.accuracy_change.top1)
        rows = [Row("Top-1 accuracy", percent(before.top1), percent(after.top1), change, note, tone)]
    if after.top5 < 1:
        change = points(after.top5 - before.top5) if before else ""
        rows.append(Row("Top-5 accuracy", percent(before.top5) if before else "", percent(after.top5), change))
    return rows


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
    rows = []
    amounts = (("File size", "bytes", size), ("Parameters", "params", number), ("MACs", "macs", number))
    for label, field, text in amounts:
        after, before = getattr(result.model, field), getattr(result.baseline, field, None)
        if before:
            part = after / before
            tone = "good" if part < 1 else "bad" if part > 1 else ""
            rows.append(Row(label, text(before), text(after), growth(part), "", tone, part))
        else:
            rows.append(Row(label, "", text(after)))
    return rows


def _view(
    result: EvalResult, slim: SlimResult | None, train: TrainResult | None, metrics: Metrics | None
) -> dict[str, Any]:
    """Return everything that the templates show."""
    rows = change_rows(result)
    shown = ("Top-1 accuracy", "Latency, median", "File size", "MACs")
    groups = slim.groups if slim else []
    return {
        "result": result,
        "name": Path(result.model.file).name,
        "baseline_name": Path(result.baseline.file).name if result.baseline else None,
        "rows": rows,
        "tiles": [row for row in rows if row.label in shown],
        "latency": latency_charts(result.timings[0]),
        "rounds": rounds_chart(result.timings[0]),
        "slim": slim,
        "groups": groups,
        "widest": max((group.channels for group in groups), default=1),
        "pinned": [group for group in groups if group.pinned_by],
        "train": train,
        "training": training_charts(metrics or []),
        "environment": _environment(result),
        "command": _command(result.environment.get("argv", [])),
    }


def _template(name: str) -> Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=name.endswith(".html.j2"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    named = ("milliseconds", "size", "number", "percent", "points", "ratio", "in_unit")
    environment.filters.update({name: getattr(formats, name) for name in named}, text_bar=_text_bar, cell=_cell)
    return environment.from_string((resources.files(__package__) / "templates" / name).read_text(encoding="utf-8"))


def _environment(result: EvalResult) -> list[tuple[str, str]]:
    """Return what the figures depend on, as pairs of name and text."""
    facts, timing = result.environment, result.timings[0]
    runs = " and ".join(f"{latency.runs:,}" for latency in (timing.baseline, timing.model) if latency)
    load = facts.get("load_1min")
    pairs = [
        ("Provider", result.provider),
        ("Threads", str(result.threads or "chosen by ONNX Runtime")),
        ("Batch size", str(timing.batch_size)),
        ("Timed runs", f"{runs} in {len(timing.samples_ms.model)} rounds"),
        ("Data", result.data),
        ("CPU", f"{facts.get('cpu', 'unknown')}, {facts.get('cores', '?')} cores"),
        ("Load before", "" if load is None else f"{load:.2f}"),
        ("Platform", str(facts.get("platform", ""))),
        ("Python", str(facts.get("python", ""))),
        *((package, version) for package, version in facts.get("versions", {}).items()),
        ("Date", str(facts.get("date", ""))),
    ]
    return [(name, text) for name, text in pairs if text]


def _command(argv: Sequence[str]) -> str:
    return shlex.join([Path(argv[0]).name, *argv[1:]]) if argv else ""


def _text_bar(group: Group, width: int = 16) -> str:
    filled = round(width * group.kept / group.channels) if group.channels else 0
    return "█" * filled + "░" * (width - filled)


def _cell(text: object) -> str:
    """Keep a text inside one cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")
