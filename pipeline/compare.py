"""A stored result in the place of a baseline: what it must have in common with now, and the intervals of the changes.

The two were measured at different times, so nothing is paired. The interval of a difference (or, on a logarithmic
scale, of a ratio) comes from the intervals of its two sides by square-and-add: Zou and Donner, "Construction of
confidence limits about effect measures: a general approach", Statistics in Medicine 27, 2008; for proportions, with
Wilson's intervals, it is method 10 of Newcombe, "Interval estimation for the difference between independent
proportions", Statistics in Medicine 17, 1998.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prune_onnx.graph_ops.errors import ConfigError, DataError

from .eval_results import Accuracy, AccuracyChange, EvalResult, Latency, MetricChange, Speedup, Stored, Timing
from .eval_schema import EvalConfig
from .execution import Execution
from .results import SCHEMA_VERSION

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
Z_95 = 1.959964
ANY = "any"

Bounds = tuple[float, float, float]
"""An estimate and both ends of its 95 % interval."""


def load(path: Path) -> EvalResult:
    """Read a result of ``eval``.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--compare: cannot read {path}: {error.strerror}.") from None
    except ValueError:
        raise ConfigError(f"--compare: {path} is not JSON. Give what eval --report has written.") from None
    command = values.get("command") if isinstance(values, dict) else None
    if command != "eval":
        what = f"the result of {command}" if command in ("slim", "train", "run") else "not a result of eval"
        raise ConfigError(f"--compare: {path} is {what}. Give what eval --report has written.")
    if values.get("schema_version", 0) > SCHEMA_VERSION:
        raise ConfigError(f"--compare: {path} was written by a newer prune-onnx. Measure it again with this one.")
    try:
        return EvalResult.model_validate(values)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(f"--compare: {path} is no complete result of eval ({place}). Measure it again.") from None


def check(
    config: EvalConfig,
    stored: EvalResult,
    environment: Mapping[str, Any],
    provider: str,
    settings: Sequence[tuple[Execution, int]],
) -> Stored:
    """Refuse a stored result whose times say nothing about the model's.

    Args:
        config: ``compare`` and ``compare_anyway``.
        stored: what ``compare`` holds.
        environment: of now.
        provider: ONNX Runtime's name of the provider of now.
        settings: how the model will be timed, and at which batch sizes.

    Returns:
        What the result says of it.

    Raises:
        ConfigError: measured elsewhere or otherwise; the message names what differs.
    """
    assert config.compare is not None
    there = list(dict.fromkeys(timing.batch_size for timing in stored.timings))
    asked = [(execution.threads, size) for execution, size in settings]
    missing = sorted({size for _, size in asked if size not in there})
    if missing:
        raise ConfigError(
            f"--compare: {config.compare} has no times for batch {', '.join(map(str, missing))}, only for "
            f"{', '.join(map(str, there))}. Give --batch-size {','.join(map(str, there))}."
        )
    now, then = _conditions(environment, provider), _conditions(stored.environment, stored.provider)
    differences = [f"{key} {then[key]} there, {now[key]} here" for key in now if then[key] != now[key]]
    threads = [str(timing.threads or "unset") for timing in stored.timings]
    other = [str(number or "unset") for number, size in asked if not _timing(stored, number, size)]
    if other:
        differences.append(f"threads {', '.join(dict.fromkeys(threads))} there, {', '.join(dict.fromkeys(other))} here")
    if differences and not config.compare_anyway:
        raise ConfigError(
            f"--compare: {config.compare} was measured otherwise: {'; '.join(differences)}.\n"
            "Measure the baseline here (--baseline), or pass --compare-anyway."
        )
    return Stored(file=str(config.compare), date=stored.environment.get("date"), differences=differences)


def beside(stored: EvalResult, timing: Timing) -> Timing:
    """Return a model's timing with the stored model's in the place of the baseline's."""
    before = _timing(stored, timing.threads, timing.batch_size) or _timing(stored, ANY, timing.batch_size)
    assert before is not None
    samples = timing.samples_ms.model_copy(update={"baseline": before.samples_ms.model})
    faster = speedup(before.model, timing.model)
    return timing.model_copy(update={"baseline": before.model, "speedup": faster, "samples_ms": samples})


def runtime_note(stored: EvalResult, environment: Mapping[str, Any]) -> str | None:
    """Say that ONNX Runtime was another version then: that is worth comparing, but also worth knowing."""
    then, now = (
        next((facts.get("versions", {}).get(name) for name in RUNTIMES if facts.get("versions", {}).get(name)), None)
        for facts in (stored.environment, environment)
    )
    return None if then == now else f"The stored result is of ONNX Runtime {then}, this one of {now}."


def speedup(before: Latency, after: Latency) -> Speedup:
    """Return how many times faster the model is than the stored one was, at the median."""
    sides = []
    for latency in (before, after):
        value, low, high = (math.log(max(part, 1e-12)) for part in (latency.p50, *latency.p50_ci95))
        sides.append((value, low, high))
    value, low, high = (math.exp(part) for part in difference(*sides))
    return Speedup(p50=value, ci95=(low, high))


def metric_change(stored: EvalResult | None, name: str, value: float) -> MetricChange | None:
    """Return the change of the user's metric since the stored result, where that has it."""
    if stored is None or stored.model.metric is None:
        return None
    return MetricChange(name=name, value=value - stored.model.metric, ci95=None)


def accuracy_change(stored: EvalResult, accuracy: Accuracy | None, data: str) -> AccuracyChange | None:
    """Return the change of accuracy since the stored result; ``None`` where one has none, or on other data."""
    before = stored.model.accuracy
    if accuracy is None or before is None or stored.data != data or before.samples != accuracy.samples:
        return None
    n = accuracy.samples
    top1 = difference(wilson(accuracy.top1, n), wilson(before.top1, n))
    top5 = difference(wilson(accuracy.top5, n), wilson(before.top5, n))
    return AccuracyChange(top1=top1[0], ci95=top1[1:], top5=top5[0], top5_ci95=top5[1:])


def check_gates(config: EvalConfig, stored: EvalResult, change: AccuracyChange | None, data: str) -> None:
    """Refuse gates for which the stored result has nothing to compare with.

    Raises:
        DataError: the accuracy or the metric of the stored result is missing, or of other data.
    """
    if config.max_accuracy_drop is not None and change is None:
        raise DataError(
            f"--max-accuracy-drop: {config.compare} has no accuracy on {data} (it was measured on {stored.data})."
        )
    if config.max_metric_drop is not None and (stored.model.metric is None or stored.data != data):
        raise DataError(
            f"--max-metric-drop: {config.compare} has no metric on {data} (it was measured on {stored.data})."
        )


def difference(a: Bounds, b: Bounds) -> Bounds:
    """Return ``a - b`` with its 95 % interval, for two independent estimates."""
    value = a[0] - b[0]
    return value, value - math.hypot(a[0] - a[1], b[2] - b[0]), value + math.hypot(a[2] - a[0], b[0] - b[1])


def wilson(fraction: float, samples: int) -> Bounds:
    """Return a proportion with Wilson's 95 % interval."""
    weight = Z_95**2 / samples
    middle = (fraction + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (fraction * (1 - fraction) + weight / 4)) / (1 + weight)
    return fraction, max(0.0, middle - half), min(1.0, middle + half)


def _conditions(environment: Mapping[str, Any], provider: str) -> dict[str, Any]:
    """Return what a time depends on beside the model: the machine and the provider."""
    gpu = environment.get("gpu") or {}
    return {
        "CPU": environment.get("cpu"),
        "cores": environment.get("cores"),
        "GPU": gpu.get("name"),
        "provider": provider,
    }


def _timing(stored: EvalResult, threads: int | str | None, size: int) -> Timing | None:
    """Return the stored times at a number of threads (``ANY``: the first) and a batch size."""
    fits = (each for each in stored.timings if each.batch_size == size and threads in (ANY, each.threads))
    return next(fits, None)
