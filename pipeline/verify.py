"""Runs a result beside its reference in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx

from prune_onnx.graph_ops.errors import VerificationError

from .probing import Feeds
from .runner import RunError, Runner
from .slim_schema import Verification

# What rounding alone may change, relative to the largest value of an output. Sums of a few thousand terms in another
# order differ by some units in the last place (float32: 6e-8); a wrong channel differs by far more.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def verify(reference: onnx.ModelProto, result: onnx.ModelProto, feeds: list[Feeds], kind: str) -> Verification:
    """Compare two models on the same inputs.

    Args:
        reference: what the result must compute.
        result: the cut model.
        feeds: inputs to run on.
        kind: ``original`` or ``masked``, for the report.

    Raises:
        VerificationError: an output differs by more than rounding explains, in shape, or is not finite where the
            reference is.
    """
    runners = [Runner(m) for m in (reference, result)]
    names = runners[0].outputs
    worst_abs, worst_rel, tolerance = 0.0, 0.0, 0.0
    for inputs in feeds:
        pair = [_run(runner, names, inputs) for runner in runners]
        for name, a, b in zip(names, *pair, strict=True):
            if not isinstance(a, np.ndarray):
                continue
            if a.shape != b.shape:
                raise VerificationError(f"output {name!r} has shape {b.shape} instead of {a.shape}.")
            allowed = TOLERANCE.get(a.dtype.name, 0.0)
            x, y = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(x)
            if not np.array_equal(finite, np.isfinite(y)) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
                raise VerificationError(f"output {name!r} is not finite where the {kind} model's is.")
            size = float(np.abs(x[finite]).max(initial=0.0))
            gap = float(np.abs(x[finite] - y[finite]).max(initial=0.0))
            relative = gap / size if size else gap
            if relative > allowed:
                raise VerificationError(f"output {name!r} differs from the {kind} model's by {relative:.2e} of its largest "
                                        f"value; rounding explains {allowed:.0e}. Nothing was written.")
            if relative >= worst_rel:
                worst_rel, tolerance = relative, allowed
            worst_abs = max(worst_abs, gap)
    return Verification(reference=kind, max_abs_diff=worst_abs, max_rel_diff=worst_rel, tolerance=tolerance, passed=True)


def _run(runner: Runner, names: list[str], feeds: Feeds) -> list[np.ndarray]:
    try:
        return runner.run(names, feeds)
    except RunError as error:
        raise VerificationError(f"a run of the result or of its reference failed: {error}. Nothing was written.") from error
