"""The report: one HTML page that needs nothing else, and its twin in Markdown. Both show the same figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_onnx.graph_ops.files import write_text

from . import formats
from .charts import latency_charts, rounds_chart, trade_off, training_charts
from .eval_results import EvalResult, Layer
from .formats import milliseconds
from .rows import CONTENDER_CELLS, change_rows, contenders, spent
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


def _view(
    result: EvalResult, slim: SlimResult | None, train: TrainResult | None, metrics: Metrics | None
) -> dict[str, Any]:
    """Return everything that the templates show."""
    rows = change_rows(result)
    shown = ("Top-1 accuracy", "Latency, median", "File size", "MACs")
    groups = slim.groups if slim else []
    by_operator, by_node = spent(result)
    several = bool(result.candidates)
    others = [each.timings[0] for each in result.candidates[1:]]
    sides = [result.baseline] if result.timings[0].baseline and result.baseline else []
    names = [Path(each.file).name for each in (*sides, *(judged.model for judged in result.judged))]
    stored = result.compared_with
    return {
        "result": result,
        "name": Path(result.model.file).name,
        "baseline_name": Path(result.baseline.file).name if result.baseline else None,
        "several": several,
        "stored": stored,
        "stored_words": f"stored result of {stored.date or 'an unknown date'}" if stored else "",
        "several_threads": len({timing.threads for timing in result.timings}) > 1,
        "judged_names": [Path(each.model.file).name for each in result.judged],
        "contenders": contenders(result) if several else [],
        "contender_cells": CONTENDER_CELLS,
        "trade_off": trade_off(result) if several else None,
        "judged": [(Path(each.model.file).name, each.gates) for each in result.judged if each.gates],
        "by_operator": by_operator,
        "by_node": by_node[:MOST_NODES],
        "most_spent": [max((row.most for row in part), default=1.0) or 1.0 for part in (by_operator, by_node)],
        "layers": result.layers,
        "widest_layer": max((layer.before for layer in result.layers), default=1),
        "layers_cut": sum(layer.after < layer.before for layer in result.layers),
        "rows": rows,
        "tiles": [row for row in rows if row.label in shown],
        "latency": list(zip(names, latency_charts(result.timings[0], others), strict=True)),
        "rounds": rounds_chart(result.timings[0]),
        "slim": slim,
        "groups": groups,
        "widest": max((group.channels for group in groups), default=1),
        "pinned": [group for group in groups if group.pinned_by],
        "pinned_nodes": {node for group in groups if group.pinned_by for node in group.nodes},
        "train": train,
        "training": training_charts(metrics or []),
        "environment": _environment(result),
        "command": _command(result.environment.get("argv", [])),
    }


MOST_NODES = 20
"""Nodes that the report shows: those that take most."""


def _template(name: str) -> Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=name.endswith(".html.j2"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    named = ("milliseconds", "size", "number", "percent", "points", "ratio", "growth", "in_unit")
    environment.filters.update({name: getattr(formats, name) for name in named}, text_bar=_text_bar, cell=_cell)
    return environment.from_string((resources.files(__package__) / "templates" / name).read_text(encoding="utf-8"))


def _environment(result: EvalResult) -> list[tuple[str, str]]:
    """Return what the figures depend on, as pairs of name and text."""
    facts, timing = result.environment, result.timings[0]
    runs = " and ".join(f"{latency.runs:,}" for latency in (timing.baseline, timing.model) if latency)
    load = facts.get("load_1min")
    pairs = [
        ("Provider", result.provider),
        *_execution(result),
        ("Threads", str(result.threads or "chosen by ONNX Runtime")),
        ("Batch size", str(timing.batch_size)),
        ("Opening a session", _opening(result)),
        ("Timed runs", f"{runs} in {len(timing.samples_ms.model)} rounds"),
        ("Data", result.data),
        ("CPU", f"{facts.get('cpu', 'unknown')}, {facts.get('cores', '?')} cores"),
        ("Load before", "" if load is None else f"{load:.2f}"),
        ("GPU", _gpu(facts.get("gpu") or {})),
        *((name, str(version)) for name, version in (facts.get("libraries") or {}).items()),
        ("Platform", str(facts.get("platform", ""))),
        ("Python", str(facts.get("python", ""))),
        *((package, version) for package, version in facts.get("versions", {}).items()),
        ("Date", str(facts.get("date", ""))),
    ]
    return [(name, text) for name, text in pairs if text]


def _execution(result: EvalResult) -> list[tuple[str, str]]:
    """Return how the models ran, as pairs of name and text."""
    if (how := result.execution) is None:
        return []
    switches = {"TF32 allowed": how.tf32, "float16 allowed": how.fp16, "CUDA graph": how.cuda_graph}
    parts = [name for name, on in switches.items() if on]
    if how.layout:
        parts.append(how.layout.upper())
    if how.conv_search:
        parts.append(f"{how.conv_search} search of algorithms")
    if how.pinned:
        parts.append(f"threads bound to processors {', '.join(map(str, how.pinned))}")
    return [("Timed", how.timed), ("Weights", how.precision), ("Execution", ", ".join(parts))]


def _gpu(facts: Mapping[str, Any]) -> str:
    clocks = facts.get("clocks_mhz", {})
    parts = [
        str(facts.get("name", "")),
        f"driver {facts['driver']}" if "driver" in facts else "",
        f"{clocks['sm']} MHz" if "sm" in clocks else "",
    ]
    return ", ".join(part for part in parts if part)


def _opening(result: EvalResult) -> str:
    sides = [side.creation_ms for side in (result.baseline, result.model) if side and side.creation_ms is not None]
    return " and ".join(milliseconds(side) for side in sides)


def _command(argv: Sequence[str]) -> str:
    return shlex.join([Path(argv[0]).name, *argv[1:]]) if argv else ""


def _text_bar(item: Group | Layer, width: int = 16) -> str:
    """Draw the channels kept of a group or a layer."""
    kept, all_ = (item.kept, item.channels) if isinstance(item, Group) else (item.after, item.before)
    filled = min(width, round(width * kept / all_)) if all_ else 0
    return "█" * filled + "░" * (width - filled)


def _cell(text: object) -> str:
    """Keep a text inside one cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")
