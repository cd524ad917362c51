"""Runs a result beside its reference in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.errors import VerificationError
from prune_onnx.graph_ops.graph import unmap

from .probing import Feeds
from .rounding import is_quantised, rounds_sums, without_rounding
from .runner import RunError, Runner
from .sessions import create_session, run_session
from .slim_schema import Verification

# What rounding alone may change, relative to the largest value of an output. Sums of a few thousand terms in another
# order differ by some units in the last place (float32: 6e-8); a wrong channel differs by far more.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


# ONNX Runtime's optimisations fuse and reorder sums; what they may change on top of rounding.
OPTIMISED = 10.0
# How much more than the reference's the result's outputs may move under them.
AMPLIFIED = 2.0
# What may come of values that are quantised to one step more or less, layer after layer.
STEPS = 0.25


def verify(reference: onnx.ModelProto, result: onnx.ModelProto, feeds: list[Feeds], kind: str) -> Verification:
    """Compare two models on the same inputs, and run the result once as its users will.

    The comparison runs both without graph optimisations, so that nothing but the cut can differ; quantised activations
    are not rounded in it where that can be done (see :mod:`.rounding`). Then the result is opened once more from its
    serialised bytes with all optimisations of the CPU provider (models above 2 GB, which have no such bytes, are left
    out here).

    Args:
        reference: what the result must compute.
        result: the cut model.
        feeds: inputs to run on.
        kind: ``original`` or ``masked``, for the report.

    Raises:
        VerificationError: an output differs by more than rounding explains, in shape, or is not finite where the
            reference is.
        ModelError: ONNX Runtime does not open the result.
    """
    worst = _Worst()
    least = STEPS if is_quantised(reference) else 0.0
    smooth = [without_rounding(model) for model in (reference, result)] if least and rounds_sums(reference) else []
    if smooth and None not in smooth:
        _compare(*smooth, feeds, kind, worst)
        names, expected = _expected(reference, feeds[:1])
    else:
        names, expected = _compare(reference, result, feeds, kind, worst, least if smooth else 0.0)
    found = Verification(
        reference=kind, max_abs_diff=worst.absolute, max_rel_diff=worst.relative, tolerance=worst.tolerance, passed=True
    )
    if model_io.total_bytes(result) < model_io.PROTOBUF_LIMIT:
        got = _optimised(result, feeds[0])
        try:
            worst.compare(names, expected[0], got, kind, OPTIMISED, least)
        except VerificationError:
            # Some nets amplify rounding so much that the optimisations change the reference as well: by how much they
            # do is what they may change in the result.
            own = _gap(expected[0], _optimised(reference, feeds[0]))
            worst.compare(names, expected[0], got, kind, OPTIMISED, max(least, AMPLIFIED * own))
    return found


def _optimised(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    """Outputs with all graph optimisations of the CPU provider."""
    return run_session(create_session(model_io.to_bytes(model), "cpu", arena=False), feeds)


def _gap(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Largest difference of two runs relative to each output's largest value; 0 where that is not a number."""
    gaps = [0.0]
    for x, y in zip(a, b, strict=True):
        if isinstance(x, np.ndarray) and x.dtype.kind not in "OUS" and x.size and x.shape == y.shape:
            x, y = x.astype(np.float64), y.astype(np.float64)
            gaps.append(float(np.abs(x - y).max() / max(np.abs(x).max(), np.finfo(np.float32).tiny)))
    return max(gap for gap in gaps if np.isfinite(gap))


def _expected(reference: onnx.ModelProto, feeds: list[Feeds]) -> tuple[list[str], list[list[np.ndarray]]]:
    """Names of the outputs, and their values on each of the inputs."""
    runner = Runner(reference)
    return runner.outputs, [_run(runner, runner.outputs, inputs) for inputs in feeds]


def _compare(
    reference: onnx.ModelProto,
    result: onnx.ModelProto,
    feeds: list[Feeds],
    kind: str,
    worst: _Worst,
    least: float = 0.0,
) -> tuple[list[str], list[list[np.ndarray]]]:
    """Run one model after the other, without optimisations; return what the reference computes."""
    names, expected = _expected(reference, feeds)
    unmap()  # the next session needs the room
    runner = Runner(result)
    for inputs, outputs in zip(feeds, expected, strict=True):
        worst.compare(names, outputs, _run(runner, names, inputs), kind, least=least)
    return names, expected


class _Worst:
    """The largest differences met so far."""

    def __init__(self) -> None:
        self.absolute = self.relative = self.tolerance = 0.0

    def compare(
        self,
        names: list[str],
        expected: list[np.ndarray],
        got: list[np.ndarray],
        kind: str,
        slack: float = 1.0,
        least: float = 0.0,
    ) -> None:
        """Take in one run's outputs.

        Args:
            names: of the outputs.
            expected: the reference's.
            got: the result's.
            kind: of the reference, for messages.
            slack: times the tolerance is how much they may differ.
            least: is allowed in any case.

        Raises:
            VerificationError: they differ by more.
        """
        for name, a, b in zip(names, expected, got, strict=True):
            if not isinstance(a, np.ndarray):
                continue
            if a.shape != b.shape:
                raise VerificationError(
                    f"output {name!r} has shape {b.shape} instead of {a.shape}. Nothing was written."
                )
            if a.dtype.kind in "OUS":  # text
                if not np.array_equal(a, b):
                    raise VerificationError(f"output {name!r} differs from the {kind} model's. Nothing was written.")
                continue
            allowed = max(slack * TOLERANCE.get(a.dtype.name, 0.0), least)
            x, y = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(x)
            if not np.array_equal(finite, np.isfinite(y)) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
                raise VerificationError(
                    f"output {name!r} is not finite where the {kind} model's is, or the other way round. "
                    "Nothing was written."
                )
            size = float(np.abs(x[finite]).max(initial=0.0))
            gap = float(np.abs(x[finite] - y[finite]).max(initial=0.0))
            relative = gap / size if size else gap
            if relative > allowed:
                raise VerificationError(
                    f"output {name!r} differs from the {kind} model's by {relative:.2e} of its largest value; "
                    f"rounding explains {allowed:.0e}. Nothing was written."
                )
            if relative >= self.relative:
                self.relative, self.tolerance = relative, allowed
            self.absolute = max(self.absolute, gap)


def _run(runner: Runner, names: list[str], feeds: Feeds) -> list[np.ndarray]:
    try:
        return runner.run(names, feeds)
    except RunError as error:
        raise VerificationError(
            f"a run of the result or of its reference failed: {error}. Nothing was written."
        ) from error
