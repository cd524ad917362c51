"""Bars on a terminal only, notes and warnings as lines, and text as it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as RichConsole

from prune_onnx.cli.output import Console, ConsoleProgress, show_slim
from prune_onnx.pipeline.slim_schema import Group, Latency, SlimResult


def progress(*, terminal: bool, quiet: bool = False) -> tuple[ConsoleProgress, io.StringIO]:
    stream = io.StringIO()
    console = RichConsole(file=stream, force_terminal=terminal, width=80, highlight=False)
    return ConsoleProgress(console, quiet=quiet), stream


def test_a_terminal_shows_a_bar_and_what_is_said_meanwhile() -> None:
    said, stream = progress(terminal=True)
    with said.task("training", 10) as advance:
        advance(4)
        said.note("epoch 1")
        with said.task("accuracy", 2) as inner:
            inner(2)
        advance(6)
    text = stream.getvalue()
    assert all(part in text for part in ("training", "0/10", "accuracy", "0/2", "epoch 1"))


@pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (True, True)])
def test_logs_and_quiet_terminals_get_no_bars(terminal: bool, quiet: bool) -> None:
    said, stream = progress(terminal=terminal, quiet=quiet)
    with said.task("training", 10) as advance:
        advance(10)
    assert stream.getvalue() == ""


def test_a_bar_is_taken_down_when_its_stage_fails() -> None:
    said, stream = progress(terminal=True)
    with pytest.raises(ValueError, match="broken"), said.task("training", 10):
        raise ValueError("broken")
    shown = stream.getvalue()
    with said.task("again", 1):
        pass
    assert "\x1b[?25h" in shown, "the cursor is shown again"
    assert "again" in stream.getvalue()[len(shown) :]


@pytest.fixture
def wide_group() -> Group:
    return Group(name="net/[bold]conv[/bold]:0" + "x" * 150, nodes=["n"], channels=4, kept=2, pinned_by=[])


def test_long_names_and_markup_are_printed_as_they_are(
    slim_result: SlimResult, wide_group: Group, capsys: pytest.CaptureFixture[str]
) -> None:
    show_slim(Console(), slim_result.model_copy(update={"groups": [wide_group]}))
    assert any(line.startswith(wide_group.name) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("utf-8", ["−50.0 %", "█████░░░░░", "convé"]), ("ascii", ["-50.0 %", "#####-----", "conv?"])],
)
def test_a_stream_that_lacks_a_character_gets_another(
    slim_result: SlimResult, monkeypatch: pytest.MonkeyPatch, encoding: str, expected: list[str]
) -> None:
    group = Group(name="convé", nodes=["convé"], channels=4, kept=2, pinned_by=[])
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    show_slim(Console(), slim_result.model_copy(update={"groups": [group]}))
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert all(part in text for part in expected), text


def test_a_latency_budget_says_what_was_measured(slim_result: SlimResult, capsys: pytest.CaptureFixture[str]) -> None:
    show_slim(Console(), slim_result)
    assert "Latency" not in capsys.readouterr().out
    latency = Latency(
        provider="cpu", threads=2, batch_size=4, original_ms=8, asked_ms=4, predicted_ms=4.1, measured_ms=3.9, rounds=3
    )
    show_slim(Console(), slim_result.model_copy(update={"latency": latency}))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Latency"))
    for part in ("8.00 ms to 3.90 ms", "asked for 4.00 ms", "cpu, 2 threads, batch 4", "3 plans"):
        assert part in line


def test_a_dry_run_says_what_would_be_removed(slim_result: SlimResult, capsys: pytest.CaptureFixture[str]) -> None:
    show_slim(Console(), slim_result.model_copy(update={"dry_run": True, "output": None}))
    out = capsys.readouterr().out
    assert "24 channels of 1 groups would be removed" in out
    assert "Written" not in out


def test_no_color_is_respected(
    slim_result: SlimResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    Console().result(slim_result, show_slim)
    coloured = capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    Console().result(slim_result, show_slim)
    assert "\x1b[32mDONE" in coloured
    assert "\x1b[32m" not in capsys.readouterr().err
