"""The program ``prune-onnx``: its commands, imported when used, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from types import FrameType
from typing import Any

import click

from prune_onnx.graph_ops.errors import PruneOnnxError, Terminated
from prune_onnx.graph_ops.registry import close_matches

COMMANDS = {
    "train": "Train a network that is sparse by construction, and write it as ONNX.",
    "slim": "Remove channels from any ONNX file: exactly, or down to a budget.",
    "eval": "Measure speed, accuracy and size in ONNX Runtime, and gate on them.",
    "run": "Run the stages of one TOML file, those that are not up to date.",
}

ARGV = "prune_onnx.argv"
"""Key of the click context's ``meta`` under which the whole command line lies."""

DEBUG = "prune_onnx.debug"
"""Key of the click context's ``meta`` that ``--debug`` sets."""


class Stop(click.ClickException):
    """An end of the program with a message on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int = 1, prefix: str = "Error: ") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.prefix = prefix

    def show(self, file: Any = None) -> None:
        """Write the message to stderr."""
        click.echo(f"{self.prefix}{self.message}", file=file, err=True)


class Program(click.Group):
    """The group of all commands; each is imported from its module of the same name when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        return import_module(f".{cmd_name}", __package__).command if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown name is an error with close matches."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}.{close_matches(args[0], list(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the command line, which results and the closing line quote."""
        ctx.meta[ARGV] = list(args)
        return super().parse_args(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Read the command line; an interrupt this early is one too."""
        try:
            return super().make_context(*args, **extra)
        except KeyboardInterrupt as error:
            raise explain(error) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; every error leaves as a message and an exit code."""
        with _ended_by_signals() as stopped, warnings.catch_warnings():
            # Libraries warn about their own insides; what users need to know, our stages say themselves.
            warnings.simplefilter("ignore")
            try:
                return super().invoke(ctx)
            except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError, SystemExit):
                if stopped:
                    raise explain(stopped[0]) from None
                raise
            except BaseException as error:
                if ctx.meta.get(DEBUG):
                    click.echo(traceback.format_exc().rstrip(), err=True)
                raise explain(stopped[0] if stopped else error) from None


def explain(error: BaseException) -> Stop:
    """Return the message and exit code of any error."""
    name = type(error).__name__
    if isinstance(error, PruneOnnxError):
        return Stop(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, Terminated)
        return Stop("Terminated." if terminated else "Interrupted.", 143 if terminated else 130, prefix="")
    # Named, because torch (whose error of this name is for device memory) is not imported here.
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return Stop("out of memory. A smaller --batch-size needs less; so does closing other programs.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Stop(f"the disk is full{f' at {error.filename}' if error.filename else ''}. Free some space and repeat.")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return Stop(f"{error.filename}: {error.strerror}.")
    text = " ".join(str(error).split())
    return Stop(
        f"unexpected {name}{f': {text}' if text else ''}\n"
        "This is a defect of prune-onnx. Repeat with --debug for the traceback, and report it with that."
    )


@contextmanager
def _ended_by_signals() -> Iterator[list[KeyboardInterrupt]]:
    """Let SIGINT and SIGTERM end the block; the yielded list gets the reason.

    What they raise may come out as something else, or not at all: libraries that are being imported, or cleared away,
    turn it into errors of their own. The list knows.
    """
    stopped: list[KeyboardInterrupt] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise stopped[-1]

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    try:
        version = metadata.version("prune-onnx")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    click.echo(f"prune-onnx {version}")
    ctx.exit()


EPILOG = """\b
Examples:
  prune-onnx train --model bn-cnn --dataset digits --method proximal-ns -o runs/digits
  prune-onnx slim runs/digits/model.onnx slim.onnx --keep-macs 0.5
  prune-onnx eval slim.onnx --baseline runs/digits/model.onnx --dataset digits
  prune-onnx run examples/demo.toml

\b
Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 a gate failed, 4 the measurement is inconclusive,
            130 interrupted, 143 terminated.
"""

VERSION = click.Option(
    ["--version"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)

program = Program(
    "prune-onnx",
    help="Make a CNN's ONNX file smaller and really faster, prove that it is right, and say what it cost.",
    epilog=EPILOG,
    params=[VERSION],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def main() -> None:
    """Run the program; the entry point."""
    program(prog_name="prune-onnx")


if __name__ == "__main__":
    main()
