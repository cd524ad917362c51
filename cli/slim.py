"""``prune-onnx slim``."""

from __future__ import annotations

from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline.slim_schema import BUDGETS, SlimConfig, SlimResult

from .command import StageCommand
from .listing import Listing, Rows, described
from .output import show_slim

EPILOG = """\b
Examples:
  prune-onnx slim model.onnx small.onnx                        only what changes no output
  prune-onnx slim model.onnx small.onnx --keep-macs 0.5        down to half of the multiply-accumulates
  prune-onnx slim model.onnx small.onnx --keep-macs 0.5 --calibration images/
                                                               the same, and most of the accuracy kept
  prune-onnx slim model.onnx small.onnx --keep-latency 0.5     down to half of the time that it takes on this machine
  prune-onnx slim model.onnx --keep-channels 0.7 --dry-run --plan plan.json
  prune-onnx slim model.onnx small.onnx --plan plan.json
"""


def work(config: SlimConfig, progress: Progress) -> SlimResult:
    """Remove channels from any ONNX file and write a smaller one.

    Without a budget, only channels go whose removal leaves the output as it is. The result is always checked, and run
    in ONNX Runtime against its reference; when that fails, no file is written.
    """
    from prune_onnx.pipeline.slim import slim

    return slim(config, progress)


def criteria() -> Rows:
    """Return the importance criteria."""
    from prune_onnx.graph_ops.importance import CRITERIA

    return described(CRITERIA)


def operators() -> Rows:
    """Return the operators that have a rule."""
    from prune_onnx.graph_ops.rules import table

    return table()


command = StageCommand(
    "slim",
    SlimConfig,
    work,
    show_slim,
    arguments={"input": "IN.onnx", "output": "OUT.onnx"},
    sections={
        "Budget, one of (F is the fraction that stays)": BUDGETS,
        "Calibration: unlabelled inputs keep the accuracy": (
            "calibration", "calibration_size", "compensate", "data_dir", "download", "mean", "std", "size",
            "layout"),
        "Latency: what is measured": ("provider", "threads", "batch_size", "cost_cache"),
        "Which channels": ("criterion", "scope", "align", "min_keep", "norms", "select_inputs", "ignore"),
        "Plan and output": ("dry_run", "plan", "output", "fold_bn", "fp16", "int8", "input_shape"),
    },
    metavars={"keep_channels": "F", "keep_macs": "F", "keep_params": "F", "keep_latency": "F",
              "latency_ms": "MS", "cost_cache": "DIR", "criterion": "NAME", "align": "N|auto",
              "calibration": "SPEC", "data_dir": "DIR", "mean": "A,B,...", "std": "A,B,...", "size": "H,W",
              "ignore": "GLOB", "plan": "PLAN.json", "output": "OUT.onnx"},
    exclusive=BUDGETS,
    listings=(
        Listing("--list-criteria", "List the importance criteria, and stop.", criteria),
        Listing("--list-ops", "List the operators that can be cut through, and stop.", operators),
    ),
    epilog=EPILOG,
)
