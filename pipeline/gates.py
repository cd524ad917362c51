"""Limits that a model must keep, and the verdict of each.

A figure that was measured in time has an interval, and a gate on it passes only when the whole interval keeps the
limit, fails only when none of it does, and is inconclusive in between. The measured accuracy drop is the same in every
run on the same samples, so it passes when it keeps the limit; beyond the limit, the gate fails if the samples are
enough to tell, and is inconclusive if they are not; so it is with a metric. Sizes and agreement are plain facts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from prune_onnx.graph_ops.errors import ConfigError

Verdict = Literal["passed", "failed", "inconclusive"]

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([^\s0-9]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Gate:
    """One kind of limit.

    Attributes:
        name: the flag without its dashes, and the gate's name in the report.
        field: the field of ``EvalConfig`` that holds the limit.
        unit: of limit and value in the report: ``x``, ``pp`` (percentage points), ``ms``, ``bytes`` or ``fraction``.
        units: what a limit may end with, and the factor to the report's unit; ``""`` is no unit.
        example: a well-formed limit, for messages.
        at_least: whether the value must reach the limit (else it must not exceed it).
        needs: what has to be given for the value to exist: ``baseline``, ``reference`` (a baseline, or a stored result
            in its place), ``data``, ``labels``, ``metric``.
        fact: the value decides by itself where it keeps the limit, whatever its interval.
    """

    name: str
    field: str
    unit: str
    units: Mapping[str, float]
    example: str
    at_least: bool = False
    needs: tuple[str, ...] = ()
    fact: bool = False

    def parse(self, text: object) -> float | None:
        """Return a limit in the report's unit; ``None`` stays ``None``.

        Raises:
            ConfigError: not a positive number, or a unit that does not belong to this gate.
        """
        if text is None:
            return None
        found = _NUMBER.fullmatch(str(text)) if not isinstance(text, bool) else None
        units = {unit.lower(): factor for unit, factor in self.units.items()}
        if found is None or found[2].lower() not in units:
            raise ConfigError(f"--{self.name} {text}: give a number like {self.example}.")
        value = float(found[1]) * units[found[2].lower()]
        if value == 0 and self.at_least:
            raise ConfigError(f"--{self.name} {text}: every model passes that; give a number like {self.example}.")
        return value

    def judge(self, limit: float, value: float, low: float, high: float) -> Verdict:
        """Hold a measured value, known to lie between ``low`` and ``high``, against its limit."""
        sign = 1.0 if self.at_least else -1.0
        worst, best = sorted((sign * low, sign * high))
        # A value that equals its limit keeps it, also after rounding.
        limit = sign * limit - 1e-9 * abs(limit)
        if worst >= limit or (self.fact and sign * value >= limit):
            return "passed"
        return "failed" if best < limit else "inconclusive"


_MS = {"": 1.0, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "s": 1e3}
_BYTES = {
    **{"": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9},
    **{"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}

GATES = (
    Gate("min-speedup", "min_speedup", "x", {"": 1.0, "x": 1.0, "×": 1.0}, "1.3x", at_least=True, needs=("reference",)),
    Gate("max-latency-ms", "max_latency_ms", "ms", _MS, "2.5"),
    Gate("max-p99-ms", "max_p99_ms", "ms", _MS, "4"),
    Gate(
        "max-accuracy-drop", "max_accuracy_drop", "pp", {"": 1.0, "pp": 1.0}, "0.5pp (percentage points)",
        needs=("reference", "labels"), fact=True,
    ),
    Gate("max-metric-drop", "max_metric_drop", "metric", {"": 1.0}, "0.01", needs=("reference", "metric"), fact=True),
    Gate(
        "min-agreement", "min_agreement", "fraction", {"": 1.0, "%": 0.01}, "0.99 or 99%",
        at_least=True, needs=("baseline", "data"), fact=True,
    ),
    Gate("max-size", "max_size", "bytes", _BYTES, "2MB or 500kB", fact=True),
    Gate("max-memory", "max_memory", "bytes", _BYTES, "200MB or 1.5GiB", fact=True),
)  # fmt: skip


def overall(verdicts: list[Verdict], *, stable: bool) -> Verdict:
    """Return the verdict of a whole evaluation.

    Where gates are given, they alone decide: a noisy measurement may still be clear about a limit. Without gates the
    measurement itself is judged.

    Args:
        verdicts: of the gates.
        stable: whether the figures that were measured in time are known well enough to be reported.
    """
    for verdict in ("failed", "inconclusive"):
        if verdict in verdicts:
            return verdict
    return "passed" if verdicts or stable else "inconclusive"


def limit_parser(name: str) -> Callable[[object], float | None]:
    """Return the parser of the gate called ``name``, for use as a validator."""
    return next(gate.parse for gate in GATES if gate.name == name)
