"""``prune-onnx eval``."""

from __future__ import annotations

from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline.eval_results import EvalResult
from prune_onnx.pipeline.eval_schema import PROVIDERS_OF, EvalConfig
from prune_onnx.pipeline.gates import GATES

from .command import StageCommand
from .output import show_eval

EPILOG = """\b
Examples:
  prune-onnx eval slim.onnx --baseline model.onnx --dataset digits
  prune-onnx eval slim.onnx --baseline model.onnx --data images/ --min-speedup 1.3x --max-accuracy-drop 0.5pp
  prune-onnx eval slim.onnx --provider cuda --batch-size 1,32 --html report.html
  prune-onnx eval a.onnx b.onnx c.onnx --baseline model.onnx --dataset digits --html trade-off.html
  prune-onnx eval slim.onnx --data pairs.npz --metric scores:dice --compare main.json --max-metric-drop 0.01

A metric of your own is a function in a module that is installed or lies in the current folder. It is called as
function(outputs, labels): outputs is a list of arrays, the model's outputs for all samples, labels an integer array
or None; it returns a number of which more is better.

A gate that fails ends with exit code 3, a measurement that cannot tell with 4. On shared machines take gates that are
ratios: model and baseline are timed in turns.
"""


def work(config: EvalConfig, progress: Progress) -> EvalResult:
    """Measure models' speed, accuracy and size in ONNX Runtime, next to a baseline, and gate on them.

    The provider that was asked for runs every node, or it is an error.
    """
    from prune_onnx.pipeline.evaluate import evaluate

    return evaluate(config, progress)


command = StageCommand(
    "eval",
    EvalConfig,
    work,
    show_eval,
    arguments={"model": "MODEL.onnx", "more": "[MORE.onnx ...]"},
    sections={
        "What to compare": (
            "baseline", "compare", "compare_anyway", "dataset", "data", "data_dir", "download", "mean", "std", "size",
            "layout", "limit", "metric",
        ),
        "Measuring": ("batch_size", "input_shape", "min_time", "min_runs", "warmup"),
        "Execution": ("provider", "threads", *PROVIDERS_OF),
        "Gates": [gate.field for gate in GATES],
        "Reports": ("html", "markdown", "github_summary", "profile", "slim_report"),
    },
    metavars={"baseline": "BASE.onnx", "dataset": "NAME", "data": "SPEC", "data_dir": "DIR", "size": "H,W",
              "html": "FILE", "markdown": "FILE", "compare": "RESULT.json", "slim_report": "SLIM.json",
              "metric": "MODULE:FUNCTION", "min_time": "SECONDS", "engine_cache": "DIR"}
    | {gate.field: "LIMIT" for gate in GATES},
    exclusive=("dataset", "data"),
    epilog=EPILOG,
)
