"""``prune-onnx run``."""

from __future__ import annotations

import click

from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline.run import RunConfig, RunResult, StageName

from .command import StageCommand
from .options import Flag
from .output import show_run

EPILOG = """\b
Examples:
  prune-onnx run examples/demo.toml                     all stages; again, only what changed
  prune-onnx run pipeline.toml --stage slim -o out      one stage, in a job of its own

The file has the tables [train], [slim] and [eval] with the options of these commands, and output, seed, data_dir and
download at the top. [slim] may be a list of steps: [[slim]]. All paths are relative to the current folder.
"""


def work(config: RunConfig, progress: Progress, stage: StageName | None) -> RunResult:
    """Run the stages of one TOML file: those that are not up to date.

    A stage is up to date when its options, its input files and the program's version are the same as when it was
    finished. Results lie in OUT/train, OUT/slim and OUT/eval; the report is OUT/report.html.
    """
    from prune_onnx.pipeline.run import run

    return run(config, stage, progress)


STAGE = Flag(
    ["--stage"],
    type=click.Choice(["train", "slim", "eval"]),
    help="Run this stage only, on what the stages before it left.  [default: all]",
    section="Options",
)

command = StageCommand(
    "run",
    RunConfig,
    work,
    show_run,
    arguments={"config": "CONFIG.toml"},
    sections={"Options": ("output", "data_dir", "download")},
    metavars={"output": "OUT", "data_dir": "DIR"},
    extra=(STAGE,),
    hidden_keys=("train", "slim", "eval"),
    epilog=EPILOG,
)
