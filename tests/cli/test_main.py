"""Errors leave as one message and the exit code of the contract; help comes up without the heavy libraries."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from prune_onnx.cli import main
from prune_onnx.cli.main import COMMANDS, program
from prune_onnx.graph_ops import errors
from prune_onnx.pipeline import slim
from prune_onnx.pipeline.slim_schema import SlimResult

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
PROGRAM = [sys.executable, "-m", "prune_onnx.cli.main"]

Invoke = Callable[..., Result]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, invoke: Invoke, tmp_path: Path) -> Callable[..., Result]:
    """Run ``slim`` with a stage that raises the given error."""

    def run(error: BaseException, *arguments: str) -> Result:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(slim, "slim", fail)
        return invoke("slim", "in.onnx", tmp_path / "out.onnx", *arguments)

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.PruneOnnxError, 1),
        (errors.ConfigError, 2),
        (errors.ModelError, 1),
        (errors.DataError, 1),
        (errors.PlanError, 1),
        (errors.VerificationError, 1),
        (errors.ProviderError, 1),
        (errors.OutputError, 1),
        (errors.TrainingError, 1),
    ],
)
def test_a_users_mistake_is_its_message_and_its_exit_code(failing: Callable, error: type, code: int) -> None:
    result = failing(error("what, where, what to do."))
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "Error: what, where, what to do.\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (errors.Terminated(), 143, "Terminated.\n"),
        (MemoryError(), 1, "Error: out of memory. "),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 1, "Error: out of memory. "),
        (OSError(errno.ENOSPC, "No space left on device", "x.onnx"), 1, "Error: the disk is full at x.onnx. "),
        (PermissionError(errno.EACCES, "Permission denied", "x.onnx"), 1, "Error: x.onnx: Permission denied.\n"),
    ],
)
def test_what_the_machine_does_not_give_is_said_in_one_line(
    failing: Callable, error: BaseException, code: int, message: str
) -> None:
    result = failing(error)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1


def test_a_defect_of_ours_says_how_to_get_the_traceback(failing: Callable) -> None:
    result = failing(ZeroDivisionError("division by zero"))
    assert (result.exit_code, result.stdout) == (1, "")
    first, second = result.stderr.splitlines()
    assert first == "Error: unexpected ZeroDivisionError: division by zero"
    assert "--debug" in second


@pytest.mark.parametrize("error", [errors.ModelError("broken"), ZeroDivisionError("division by zero")])
def test_debug_shows_the_traceback_before_the_message(failing: Callable, error: Exception) -> None:
    stderr = failing(error, "--debug").stderr
    assert stderr.startswith("Traceback (most recent call last):")
    assert f"{type(error).__name__}: {error}" in stderr
    assert "\nError: " in stderr
    assert "Traceback" not in failing(error).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slm"], "No such command 'slm'. Did you mean 'slim'?"),
        (["--verson"], "No such option '--verson'. Did you mean '--version'?"),
        (["eval", "m.onnx", "--thraeds", "3"], "No such option '--thraeds'. Did you mean '--threads'?"),
        (["slim", "in.onnx", "out.onnx", "--scope", "globl"], "'globl' is not one of 'global', 'layer'."),
        (["slim", "in.onnx", "out.onnx", "--keep-macs", "2"], "--keep-macs: 2 should be less than or equal to 1."),
        (["slim", "in.onnx"], "output is missing"),
        (["slim"], "IN.onnx is missing."),
        (["train", "--dataset", "digits"], "--model is missing."),
        (["slim", "a", "b", "c"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_usage_error_is_exit_code_2_and_a_hint(invoke: Invoke, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_version_is_one_line(invoke: Invoke) -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("prune-onnx ")
    assert len(result.stdout.splitlines()) == 1


def test_help_lists_the_commands_in_the_order_of_the_work(invoke: Invoke) -> None:
    text = invoke("--help").stdout
    places = [text.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert text.index("Examples:") > places[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_every_option_with_its_default_and_examples(invoke: Invoke, name: str) -> None:
    result = invoke(name, "-h")
    assert (result.exit_code, result.stderr) == (0, "")
    command = program.get_command(click.Context(program), name)
    assert isinstance(command, click.Command)
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.opts[-1] in result.stdout
    assert result.stdout.index("Common options:") < result.stdout.index("Examples:")
    assert f"prune-onnx {name} " in result.stdout[result.stdout.index("Examples:") :]


@pytest.mark.parametrize("line", ["--help", "--version", *(f"{name} --help" for name in COMMANDS)])
def test_help_imports_no_heavy_library(line: str) -> None:
    code = (
        "import sys\n"
        "from prune_onnx.cli.main import program\n"
        f"program({line.split()!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'onnxruntime', 'matplotlib', 'onnx', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_comes_up_in_half_a_second() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([*PROGRAM, "--help"], env=ENVIRONMENT, check=True, capture_output=True)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.5


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    pipe = f"set -o pipefail; {' '.join(PROGRAM)} slim --list-ops | true"
    done = subprocess.run(["bash", "-c", pipe], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(("name", "code", "said"), [("SIGINT", 130, "Interrupted."), ("SIGTERM", 143, "Terminated.")])
def test_a_signal_ends_the_program_with_one_line(name: str, code: int, said: str) -> None:
    """A stage that waits stands in for a long one; the signal comes while it runs."""
    script = (
        "import time\n"
        "from prune_onnx.pipeline import slim\n"
        "def wait(config, progress):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "slim.slim = wait\n"
        "from prune_onnx.cli.main import main\n"
        "main()\n"
    )
    arguments = [sys.executable, "-c", script, "slim", "in.onnx", "out.onnx"]
    with subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[name])
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (code, f"{said}\n")


@pytest.mark.parametrize(("name", "code", "said"), [("SIGINT", 130, "Interrupted."), ("SIGTERM", 143, "Terminated.")])
@pytest.mark.parametrize("swallowed", [True, False])
def test_a_signal_that_a_library_turns_into_something_else_still_ends_the_program(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, slim_result: SlimResult, name: str, code: int, said: str,
    swallowed: bool,
) -> None:  # fmt: skip
    def work(*_: object) -> SlimResult:
        try:
            signal.raise_signal(signal.Signals[name])
        except KeyboardInterrupt:
            if not swallowed:
                raise ImportError("cannot import the C extension") from None
        return slim_result

    monkeypatch.setattr(slim, "slim", work)
    result = invoke("slim", "in.onnx", "out.onnx")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == said


def test_an_interrupt_while_the_command_line_is_read_is_one_too(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main.Program, "parse_args", interrupted)
    result = invoke("--version")
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def test_the_signal_handlers_are_put_back(failing: Callable) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    failing(errors.ModelError("broken"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
