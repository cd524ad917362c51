"""The gates of one model held against what was measured of it, and what to say about what could not be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prune_onnx.graph_ops.errors import DataError

from . import compare
from .bench import Interval
from .eval_results import Candidate, EvalResult, GateResult, Measured, PeakMemory, Speedup
from .eval_schema import EvalConfig
from .gates import GATES, Gate
from .quality import Quality


def hold_gates(
    config: EvalConfig, measured: Measured, p99: Interval, speedup: Speedup | None, quality: Quality
) -> list[GateResult]:
    """Hold every limit that was given against one model.

    Args:
        config: the limits.
        measured: the model.
        p99: its 99th percentile in ms.
        speedup: over the baseline.
        quality: what it gives, and how that changed.
    """

    def value_of(gate: Gate) -> Interval:
        if gate.field == "min_speedup":
            assert speedup is not None
            return Interval(speedup.p50, *speedup.ci95)
        if gate.field == "max_latency_ms":
            return Interval(measured.latency_ms.p50, *measured.latency_ms.p50_ci95)
        if gate.field == "max_p99_ms":
            return p99
        if gate.field == "max_size":
            return _fact(measured.bytes)
        if gate.field == "max_memory":
            return _fact(_memory(config, measured.peak_memory))
        if gate.field == "max_accuracy_drop":
            assert quality.accuracy_change is not None
            low, high = quality.accuracy_change.ci95
            # Nothing is 0, not -0.
            return Interval(*(round(-100 * change, 9) + 0.0 for change in (quality.accuracy_change.top1, high, low)))
        if gate.field == "max_metric_drop":
            assert quality.metric_change is not None
            value = quality.metric_change.value
            low, high = quality.metric_change.ci95 or (value, value)
            return Interval(0.0 - value, 0.0 - high, 0.0 - low)
        assert quality.agreement is not None
        assert quality.agreement.top1 is not None
        return _fact(quality.agreement.top1)

    results = []
    for gate in GATES:
        limit = getattr(config, gate.field)
        if limit is not None:
            value = value_of(gate)
            verdict = gate.judge(limit, value.value, value.low, value.high)
            results.append(
                GateResult(
                    name=gate.name,
                    limit=limit,
                    value=value.value,
                    ci95=(value.low, value.high),
                    unit=gate.unit,
                    passed=verdict == "passed",
                    verdict=verdict,
                )
            )
    return results


def check_gates(config: EvalConfig, qualities: Sequence[Quality], memories: Sequence[PeakMemory | None]) -> None:
    """Find out before the timing that a gate has nothing to hold.

    Args:
        config: the gates.
        qualities: of the models.
        memories: of the models.

    Raises:
        DataError: no labels, no classes, or no way to tell the peak memory.
    """
    if config.max_accuracy_drop is not None and any(quality.accuracy is None for quality in qualities):
        raise DataError("--max-accuracy-drop needs labels, and the data has none.")
    if config.min_agreement is not None and any(q.agreement is None or q.agreement.top1 is None for q in qualities):
        raise DataError("--min-agreement needs a model whose first output holds one score for each class.")
    if config.max_memory is not None:
        for memory in memories:
            _memory(config, memory)


def hints(
    config: EvalConfig,
    candidates: Sequence[Candidate],
    qualities: Sequence[Quality],
    environment: dict[str, Any],
    stored: EvalResult | None,
) -> list[str]:
    """Say what to do about what could not be told, and what else the reader should know."""
    found = []
    unclear = [gate for each in candidates for gate in each.gates if gate.verdict == "inconclusive"]
    stable = all(timing.stable for each in candidates for timing in each.timings)
    if not stable or any(gate.unit in ("x", "ms") for gate in unclear):
        threads = "" if config.threads == (1,) else ", pin --threads 1"
        found.append(
            f"The times vary a lot. For sharper figures stop other programs{threads}, "
            f"or measure longer (--min-time {4 * config.min_time:g})."
        )
    for what, unit in (("accuracy", "pp"), ("metric", "metric")):
        if any(gate.unit == unit for gate in unclear):
            samples = qualities[0].tally.samples if qualities[0].tally else 0
            found.append(f"{samples} samples are too few to tell the {what} drop from its limit: use more.")
    for each, quality in zip(candidates, qualities, strict=False):
        if quality.tally and quality.tally.not_finite:
            name = each.model.file if len(candidates) > 1 else "The model"
            bad, samples = quality.tally.not_finite, quality.tally.samples
            found.append(f"{name} gives NaN or infinity for {bad} of {samples} samples.")
    if stored is not None and (note := compare.runtime_note(stored, environment)):
        found.append(note)
    if reasons := (environment.get("gpu_after") or {}).get("slowed_by"):
        found.append(f"The GPU lowered its clocks: {', '.join(reasons)}. Lock them (nvidia-smi -lgc), or let it cool.")
    load, cores = environment["load_1min"] or 0.0, environment["cores"] or 1
    if load > cores:
        found.append(f"The machine was busy before: load {load:.1f} on {cores} cores.")
    return found


def _fact(value: float) -> Interval:
    return Interval(value, value, value)


def _memory(config: EvalConfig, peak: PeakMemory | None) -> int:
    """Return the peak memory of where the model runs."""
    bytes_ = None if peak is None else peak.host_bytes if config.provider == "cpu" else peak.device_bytes
    if bytes_ is None:
        why = "nvidia-ml-py is not installed" if peak else "this system does not tell how much a process takes"
        raise DataError(f"--max-memory: peak memory is not known: {why}. Leave the gate out.")
    return bytes_
