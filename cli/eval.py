"""``prune-onnx eval``."""

from __future__ import annotations

from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline.eval_schema import EvalConfig, EvalResult
from prune_onnx.pipeline.gates import GATES

from .command import StageCommand
from .output import show_eval

EPILOG = """\b
Examples:
  prune-onnx eval slim.onnx --baseline model.onnx --dataset digits
  prune-onnx eval slim.onnx --baseline model.onnx --data images/ --min-speedup 1.3x --max-accuracy-drop 0.5pp
  prune-onnx eval slim.onnx --provider cuda --batch-size 1,32 --html report.html

A gate that fails ends with exit code 3, a measurement that cannot tell with 4. On shared machines take gates that are
ratios: model and baseline are timed in turns.
"""


def work(config: EvalConfig, progress: Progress) -> EvalResult:
    """Measure a model's speed, accuracy and size in ONNX Runtime, next to a baseline, and gate on them.

    The provider that was asked for runs every node, or it is an error.
    """
    from prune_onnx.pipeline.evaluate import evaluate

    return evaluate(config, progress)


command = StageCommand(
    "eval",
    EvalConfig,
    work,
    show_eval,
    arguments={"model": "MODEL.onnx"},
    sections={
        "What to compare": ("baseline", "dataset", "data", "data_dir", "download", "mean", "std", "size",
                            "layout", "limit"),
        "Measuring": ("provider", "batch_size", "threads", "input_shape", "min_time", "min_runs", "warmup"),
        "Gates": [gate.field for gate in GATES],
        "Reports": ("html", "markdown", "github_summary"),
    },
    metavars={"baseline": "BASE.onnx", "dataset": "NAME", "data": "SPEC", "data_dir": "DIR", "size": "H,W",
              "html": "FILE", "markdown": "FILE", "min_time": "SECONDS"} | {gate.field: "LIMIT" for gate in GATES},
    exclusive=("dataset", "data"),
    epilog=EPILOG,
)
