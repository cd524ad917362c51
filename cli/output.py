"""What the person sees: results on stdout, everything else on stderr. The only module that prints."""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from prune_onnx.graph_ops.progress import Advance, Progress
from prune_onnx.pipeline.config import to_toml
from prune_onnx.pipeline.formats import counted, growth, in_unit, milliseconds, number, percent, ratio, size
from prune_onnx.pipeline.results import StageResult

if TYPE_CHECKING:
    from prune_onnx.pipeline.eval_results import EvalResult, GateResult, Timing
    from prune_onnx.pipeline.run import RunResult
    from prune_onnx.pipeline.slim_schema import Group, SlimResult
    from prune_onnx.pipeline.train import TrainResult

WIDE = 1000
"""Columns where there is no terminal: a table in a log must not be folded."""

PLAIN = {"−": "-", "×": "x", "µ": "u", "█": "#", "░": "-"}
"""What stands for our own characters on a stream that cannot encode them."""

MOST_GROUPS = 30
"""Channel groups that are shown without ``-v``."""

BAR = 20
"""Characters of a full bar of kept channels."""

STYLES = {"passed": "green", "done": "green", "failed": "red", "inconclusive": "yellow", "good": "green", "bad": "red"}
"""Colours of verdicts and of changes."""


class Console:
    """Both output streams of one command.

    Args:
        verbosity: 0 is normal, below is quiet, above shows more.
        as_json: stdout carries one JSON object instead of tables.
        line: the command line, for the closing line.
    """

    def __init__(self, *, verbosity: int = 0, as_json: bool = False, line: str = "prune-onnx") -> None:
        self.verbosity = verbosity
        self.as_json = as_json
        self.line = line
        self.out = _rich(sys.stdout)
        self.err = _rich(sys.stderr)
        self.progress = ConsoleProgress(self.err, quiet=verbosity < 0)

    def result(self, result: StageResult, show: Callable[[Console, Any], None]) -> None:
        """Print a result, as JSON or through ``show``, and the closing line."""
        if self.as_json:
            click.echo(result.to_json())
        else:
            show(self, result)
        if self.verbosity >= 0:
            verdict = getattr(result, "verdict", None) or "done"
            text = Text(verdict.upper(), STYLES[verdict])
            self.err.print(text, f": {result.seconds:.1f} s: {self.line}", sep="", soft_wrap=True)

    def config(self, config: BaseModel) -> None:
        """Print a configuration so that ``--config`` reads it back."""
        values = config.model_dump(mode="json", by_alias=True)
        click.echo(json.dumps(values, indent=2) if self.as_json else to_toml(values), nl=self.as_json)

    def listing(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and what they are."""
        if self.as_json:
            click.echo(json.dumps([{"name": name, "description": text} for name, text in rows], indent=2))
            return
        table = _table("", "")
        for name, text in rows:
            table.add_row(Text(name, "bold"), Text(text))
        self.out.print(table)

    def say(self, text: str) -> None:
        """Print a line of the result."""
        self.out.print(text, soft_wrap=True)


class ConsoleProgress(Progress):
    """Bars on a terminal only; notes and warnings as lines. All on stderr."""

    def __init__(self, console: RichConsole, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bars: Bars | None = None

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """Draw a bar of ``total`` steps while the block runs; tasks inside tasks share one display."""
        if self._quiet or not self._console.is_terminal:
            yield lambda steps: None
            return
        outermost = self._bars is None
        if self._bars is None:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bars = Bars(*columns, console=self._console, transient=True)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(description, total=total)
        try:
            yield lambda steps: bars.advance(task, steps)
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None

    def note(self, message: str) -> None:
        """Print a line, unless the user wants quiet."""
        if not self._quiet:
            self._console.print(message, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self._console.print(Text("Warning:", "yellow"), message, soft_wrap=True)


def show_slim(console: Console, result: SlimResult) -> None:
    """Print the result of ``slim``: sizes before and after, groups, verification."""
    table = _table("", ">before", ">after", ">change")
    for label, key, form in (("MACs", "macs", number), ("parameters", "params", number), ("file size", "bytes", size)):
        before, after = getattr(result.before, key), getattr(result.after, key)
        table.add_row(label, form(before), form(after), growth(after / before) if before else "")
    console.out.print(table)
    _show_groups(console, result.groups)
    if latency := result.latency:
        where = [latency.provider, *([counted(latency.threads, "thread")] if latency.threads else [])]
        before, after = milliseconds(latency.original_ms), milliseconds(latency.measured_ms)
        console.say(
            f"Latency: {before} to {after} ({percent(latency.measured_ms / latency.original_ms)} of it; asked for "
            f"{milliseconds(latency.asked_ms)}), {', '.join(where)}, batch {latency.batch_size}; "
            f"{latency.rounds} plans timed."
        )
    kind = "would be removed" if result.dry_run else "removed"
    console.say(f"{result.removed.channels:,} channels of {result.removed.groups:,} groups {kind} ({result.budget}).")
    if check := result.verification:
        console.say(
            f"Verified against the {check.reference} model: largest difference {check.max_abs_diff:.2g} "
            f"(relative {check.max_rel_diff:.2g}, allowed {check.tolerance:.2g})."
        )
    if precision := result.precision:
        same = "" if precision.agreement is None else f", the same class for {percent(precision.agreement)}"
        console.say(
            f"Written as {precision.type}: on {precision.samples:,} inputs the largest difference from float32 is "
            f"{precision.max_abs_diff:.2g}{same}."
        )
    for note in result.notes:
        console.say(f"Note: {note}.")
    if result.output:
        console.say(f"Written: {result.output}")


def _show_groups(console: Console, groups: Sequence[Group]) -> None:
    """Print a row a group: kept and all channels, and a bar; with ``-v`` every group, and why channels are pinned."""
    detailed = console.verbosity > 0
    free = [group for group in groups if group.kept < group.channels or not group.pinned_by]
    shown = groups if detailed else free[:MOST_GROUPS]
    table = _table("group", ">kept", ">channels", "", *(["pinned by"] if detailed else []))
    for group in shown:
        filled = round(BAR * group.kept / group.channels) if group.channels else 0
        why = ["\n".join(group.pinned_by)] if detailed else []
        table.add_row(group.name, f"{group.kept:,}", f"{group.channels:,}", "█" * filled + "░" * (BAR - filled), *why)
    if shown:
        console.out.print(table)
    if len(shown) < len(groups):
        console.say(f"{len(shown):,} of {len(groups):,} groups shown; -v shows all, and why channels are pinned.")


def show_train(console: Console, result: TrainResult) -> None:
    """Print the result of ``train``."""
    table = _table("", ">")
    if result.accuracy.validation is not None:
        table.add_row("validation accuracy", percent(result.accuracy.validation))
    table.add_row("test accuracy", percent(result.accuracy.test))
    table.add_row("dead channels", f"{result.sparsity.dead_channels:,} of {result.sparsity.channels:,}")
    if result.sparsity.weights is not None:
        table.add_row("zero weights", f"{result.sparsity.zero_weights:,} of {result.sparsity.weights:,}")
    console.out.print(table)
    console.say(f"{result.model} on {result.dataset}, {result.method}, {result.epochs} epochs.")
    console.say(f"Written: {result.artifacts['model']}")


def show_eval(console: Console, result: EvalResult) -> None:
    """Print the result of ``eval``: what changed (the report's own rows), batch sizes, gates, hints."""
    from prune_onnx.pipeline.rows import change_rows

    if result.candidates:
        _show_models(console, result)
        return
    table = _table("", *([">baseline", ">model", ">change"] if result.baseline else [">model"]), "95 % interval")
    for row in change_rows(result):
        figures = [row.before, row.after, Text(row.change, STYLES.get(row.tone, ""))]
        table.add_row(row.label, *(figures if result.baseline else figures[1:2]), row.note)
    console.out.print(table)
    if (agreement := result.agreement) and agreement.top1 is not None:
        console.say(f"Same class as the baseline: {percent(agreement.top1)} of {agreement.samples:,} samples.")
    latency = result.model.latency_ms
    runs = f"{latency.runs:,} runs{' each, in turns' if result.baseline else ''}, CV {percent(latency.cv)}"
    threads = f", {counted(result.threads, 'thread')}" if result.threads else ""
    console.say(f"{result.provider}{threads}, batch {result.timings[0].batch_size}, {runs}; {result.data}.")
    if result.compared_with:
        console.say(f"The baseline is the result in {result.compared_with.file} ({result.compared_with.date}).")
    _show_batches(console, result.timings)
    _show_gates(console, result.gates)
    _show_profile(console, result)
    _show_notes(console, result)


def _show_models(console: Console, result: EvalResult) -> None:
    """Print several models: a row each, their gates, and how they were measured."""
    from prune_onnx.pipeline.pareto import quality_of_result
    from prune_onnx.pipeline.rows import CONTENDER_CELLS, contenders

    quality = quality_of_result(result)
    heads = [quality[0].name if quality and cell == "Quality" else cell for cell in CONTENDER_CELLS]
    table = _table("model", *(f">{head}" for head in heads), "", "")
    for each in contenders(result):
        verdict = Text(each.verdict, STYLES.get(each.verdict, "")) if each.verdict else Text("baseline")
        table.add_row(each.name, *each.cells, verdict, "on the front" if each.on_front else "")
    console.out.print(table)
    console.say("On the front: no other model is both as fast and as good.")
    threads = f", {counted(result.threads, 'thread')}" if result.threads else ""
    runs = f"{result.model.latency_ms.runs:,} runs each, in turns"
    console.say(f"{result.provider}{threads}, batch {result.timings[0].batch_size}, {runs}; {result.data}.")
    for each in result.candidates:
        if each.gates:
            console.say(f"{each.model.file}:")
            _show_gates(console, each.gates)
    _show_notes(console, result)


def _show_gates(console: Console, gates: Sequence[GateResult]) -> None:
    if not gates:
        return
    table = _table("gate", ">limit", ">value", ">95 % interval", "verdict")
    for gate in gates:
        limit, value, low, high = (in_unit(x, gate.unit) for x in (gate.limit, gate.value, *gate.ci95))
        verdict = Text(gate.verdict, STYLES[gate.verdict])
        table.add_row(gate.name, limit, value, f"{low} to {high}" if low != high else "", verdict)
    console.out.print(table)


def _show_profile(console: Console, result: EvalResult) -> None:
    """Print where the time goes by operator, and with ``-v`` by node."""
    from prune_onnx.pipeline.rows import spent

    if result.profile is None:
        return
    both = result.profile.baseline is not None
    by_operator, by_node = spent(result)
    for head, rows in (("operator", by_operator), ("node", by_node if console.verbosity > 0 else [])):
        if not rows:
            continue
        table = _table(head, *([">before", ">after"] if both else [">time"]))
        for row in rows:
            times = [milliseconds(time) if time is not None else "" for time in (row.before, row.after)]
            table.add_row(f"{row.name} ({row.op_type})" if row.name else row.op_type, *times[0 if both else 1 :])
        console.out.print(table)


def _show_notes(console: Console, result: EvalResult) -> None:
    for hint in result.hints:
        console.say(f"Note: {hint}")
    if console.verbosity > 0:
        facts = result.environment
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        console.say(f"{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}, {versions}")


def _show_batches(console: Console, timings: Sequence[Timing]) -> None:
    """Print a row for each number of threads and batch size, when there are several."""
    if len(timings) < 2:
        return
    sweep = len({timing.threads for timing in timings}) > 1
    threads = [">threads"] if sweep else []
    table = _table(*threads, ">batch", ">baseline p50", ">model p50", ">throughput", ">speed-up", "")
    for timing in timings:
        baseline = milliseconds(timing.baseline.p50) if timing.baseline else ""
        speedup = ratio(timing.speedup.p50) if timing.speedup else ""
        noise = "" if timing.stable else "unstable"
        threads = [str(timing.threads or "unset")] if sweep else []
        mine, throughput = milliseconds(timing.model.p50), f"{timing.batch_size * 1e3 / timing.model.mean:,.0f} /s"
        table.add_row(*threads, str(timing.batch_size), baseline, mine, throughput, speedup, noise)
    console.out.print(table)


def show_run(console: Console, result: RunResult) -> None:
    """Print what became of each stage, and the last one's result."""
    table = _table("stage", "", ">time", "folder")
    for outcome in result.stages:
        table.add_row(outcome.stage, outcome.status, f"{outcome.seconds:.1f} s", outcome.folder)
    console.out.print(table)
    last = result.stages[-1]
    {"train": show_train, "slim": show_slim, "eval": show_eval}[last.stage](console, last.typed())
    if result.report:
        console.say(f"Report: {result.report}")


def _table(*columns: str) -> Table:
    """Return a table without frame; a heading that starts with ``>`` is of a column of numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.show_header = any(column.lstrip(">") for column in columns)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _rich(stream: Any) -> RichConsole:
    """Return a console that takes text as it is: node names may hold what rich reads as markup, or any character."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="prune_onnx.plain")
    console = RichConsole(file=stream, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Stand in for characters that a stream cannot encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("prune_onnx.plain", _plain)
