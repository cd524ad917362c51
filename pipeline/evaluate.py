"""The ``eval`` stage: accuracy, agreement, latency and size of a model against its baseline, and the gates.

check -> open sessions -> open data -> accuracy and agreement -> timing -> gates -> reports
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from prune_onnx.graph_ops import model_io, preprocessing
from prune_onnx.graph_ops.errors import ConfigError, DataError, OutputError
from prune_onnx.graph_ops.files import check_output, write_text
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.progress import SILENT, Progress

from . import bench
from .accuracy import Tally, compare_outputs, tally
from .bench import Interval, Rounds
from .count import count
from .data import Samples, image_input, open_samples, recipe_for
from .environment import capture
from .eval_schema import EvalConfig, EvalResult, GateResult, Latency, Measured, Speedup, Timing, TimingSamples
from .gates import GATES, Gate, overall
from .probing import probe, random_feeds
from .sessions import TensorSpec, check_same_interface, create_session, input_specs

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Samples a run when accuracy is counted; bounded by the activations of large images.
ACCURACY_BATCH = 64
# Random inputs on which two models are compared when there is no data.
RANDOM_INPUTS = 16
# A median or speed-up whose interval is wider than this, relative to its value, says too little.
STABLE_WIDTH = 0.3
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def evaluate(config: EvalConfig, progress: Progress = SILENT) -> EvalResult:
    """Judge a model.

    Args:
        config: what to measure, on what, and the limits to keep.
        progress: told what is being done.

    Returns:
        The result; the reports are written by then. A gate that fails is no error: see ``EvalResult.exit_code``.

    Raises:
        ConfigError: options that do not fit the model or the data.
        ModelError: a file cannot be read or run, or model and baseline cannot be compared.
        ProviderError: the provider is not there, or did not take every node.
        DataError: the data is missing, corrupt, or does not fit the model.
        OutputError: an output exists or cannot be written.
    """
    started, environment = time.perf_counter(), capture()
    _check_outputs(config)
    paths = [config.model] if config.baseline is None else [config.model, config.baseline]
    protos = [model_io.load(path) for path in paths]
    sessions = [create_session(path, config.provider, threads=config.threads) for path in paths]
    if len(sessions) == 2:
        check_same_interface(*sessions)
    provider = sessions[0].get_providers()[0]
    inputs, batch_sizes = _inputs(config, protos, sessions[0], progress)
    quality = inputs.judge(sessions, progress)
    _check_labels(config, quality)
    sessions.clear()  # their thread pools would only disturb
    shapes = {name: array.shape for name, array in inputs.feed(1).items()}
    files = zip(paths, protos, strict=True)
    sizes = [_Size(*count(proto, shapes), model_io.bytes_on_disk(path)) for path, proto in files]

    rounds = [_time(config, paths, inputs.feed(size), progress) for size in batch_sizes]
    timings = [_timing(size, pair, config.seed) for size, pair in zip(batch_sizes, rounds, strict=True)]
    first = timings[0]
    compared = quality if config.baseline is not None else None
    gates = _gates(config, sizes[0], compared, rounds[0], first)
    result = EvalResult(
        seconds=round(time.perf_counter() - started, 3),
        environment=environment,
        model=_measured(config.model, sizes[0], first, quality, 0),
        baseline=_measured(config.baseline, sizes[1], first, quality, 1) if config.baseline else None,
        provider=provider,
        threads=config.threads,
        data=inputs.name,
        speedup=first.speedup,
        accuracy_change=compared.change if compared else None,
        agreement=compared.agreement if compared else None,
        timings=timings,
        gates=gates,
        verdict=overall([gate.verdict for gate in gates], stable=all(timing.stable for timing in timings)),
        hints=_hints(config, gates, timings, quality, environment),
    )
    _write(config, result)
    return result


@dataclass(frozen=True)
class _Size:
    """What a model costs by count."""

    params: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class _Data:
    """Samples from files, turned into the model's one input by a recipe."""

    spec: TensorSpec
    samples: Samples
    recipe: Preprocessing
    name: str

    def feed(self, batch_size: int) -> dict[str, np.ndarray]:
        """Return the first samples as one run's input, repeated where there are too few."""
        size = _fixed_batch(self.spec) or batch_size
        array, _ = next(self.samples.batches(self.recipe, size))
        return {self.spec.name: np.resize(array, (size, *array.shape[1:])).astype(self.spec.dtype)}

    def judge(self, sessions: list[InferenceSession], progress: Progress) -> Tally:
        """Count right answers and differences over all samples."""
        size = _fixed_batch(self.spec) or 1
        batches = self.samples.batches(self.recipe, max(1, ACCURACY_BATCH // size) * size)
        with progress.task(f"accuracy on {self.name}", len(self.samples)) as advance:
            return tally(sessions[0], sessions[1] if len(sessions) == 2 else None, batches, advance)


@dataclass(frozen=True)
class _Random:
    """Random inputs of a shape that the model is known to run at."""

    specs: list[TensorSpec]
    graph: Graph
    shapes: Mapping[str, tuple[int, ...]]
    seed: int
    name: str = "random inputs"

    def feed(self, batch_size: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Return random inputs of ``batch_size`` samples where the model leaves their number open."""
        shapes = {
            spec.name: (_fixed_batch(spec) or batch_size, *self.shapes[spec.name][1:]) if spec.shape else ()
            for spec in self.specs
        }
        return random_feeds(self.graph, shapes, self.seed + seed)

    def judge(self, sessions: list[InferenceSession], progress: Progress) -> Tally | None:
        """Compare the outputs of model and baseline; a model alone has nothing to be compared with."""
        if len(sessions) < 2:
            return None
        return compare_outputs(*sessions, (self.feed(1, seed) for seed in range(RANDOM_INPUTS)))


def _check_outputs(config: EvalConfig) -> None:
    for path in (config.html, config.markdown, config.report):
        if path is not None:
            check_output(path, force=config.force)
            if path.resolve() in {p.resolve() for p in (config.model, config.baseline) if p is not None}:
                raise OutputError(f"{path} is an input; an input file is never changed. Give another output.")
    if config.github_summary and not os.environ.get(SUMMARY_VARIABLE):
        raise ConfigError(f"--github-summary works inside GitHub Actions only: ${SUMMARY_VARIABLE} is not set.")


def _fixed_batch(spec: TensorSpec) -> int | None:
    """Samples that a run takes, where the model fixes them."""
    return spec.shape[0] if spec.shape else 1


def _inputs(
    config: EvalConfig, protos: list[onnx.ModelProto], session: InferenceSession, progress: Progress
) -> tuple[_Data | _Random, tuple[int, ...]]:
    """Return what the models run on, and the batch sizes that are timed."""
    specs = input_specs(session)
    fixed = _fixed_batch(specs[0])
    if fixed is not None and config.batch_size not in ((1,), (fixed,)):
        asked = ", ".join(map(str, config.batch_size))
        raise ConfigError(f"--batch-size {asked}: the model takes batches of {fixed} only ({specs[0]}).")
    sizes = config.batch_size if fixed is None else (fixed,)
    if config.dataset is None and config.data is None:
        graph = Graph(protos[0])
        _, feeds, _ = probe(graph, dict(config.input_shape), config.seed)
        shapes = {name: array.shape for name, array in feeds.items()}
        return _Random(specs, graph, shapes, config.seed), sizes
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise ConfigError(f"data can be fed to models with one input only; this one has {len(specs)}: {names}.")
    channels, size = image_input(protos[0], config.layout)
    samples = open_samples(
        dataset=config.dataset,
        data=config.data,
        data_dir=config.data_dir,
        download=config.download,
        split="test",
        limit=config.limit,
        seed=config.seed,
        size=config.size or size,
        channels=channels,
        progress=progress,
    )
    # Some tools drop a model's metadata; its baseline still says how both want their input.
    carrier = next((proto for proto in protos if preprocessing.read(proto) is not None), protos[0])
    recipe = recipe_for(carrier, samples, config.mean, config.std, config.layout)
    for other in protos:
        if config.mean is None and preprocessing.read(other) not in (None, recipe):
            progress.warn(
                "model and baseline carry different preprocessing in their metadata; the model's is used for both. "
                "Give --mean and --std to choose."
            )
    return _Data(specs[0], samples, recipe, f"{samples.name}, {len(samples):,} samples"), sizes


def _check_labels(config: EvalConfig, quality: Tally | None) -> None:
    """Find out before the timing that a gate has nothing to hold."""
    if config.max_accuracy_drop is not None and (quality is None or not quality.labelled):
        raise DataError("--max-accuracy-drop needs labels, and the data has none.")
    if config.min_agreement is not None and (quality is None or quality.same is None):
        raise DataError("--min-agreement needs a model whose first output holds one score for each class.")


def _time(config: EvalConfig, paths: list[Path], feed: dict[str, np.ndarray], progress: Progress) -> list[Rounds]:
    """Time all models on one input, in turns."""
    makers = [
        functools.partial(bench.session_runner, path, feed, config.provider, config.threads) for path in paths
    ]
    # The 99th percentile of fewer runs is little more than their maximum.
    min_runs = config.min_runs if config.max_p99_ms is None else max(config.min_runs, 200)
    return bench.measure(
        makers, min_time=config.min_time, min_runs=min_runs, warmup=config.warmup, progress=progress
    )


def _timing(batch_size: int, rounds: list[Rounds], seed: int) -> Timing:
    medians = [bench.quantile_interval(each, 0.5, seed) for each in rounds]
    latencies = [_latency(each, median) for each, median in zip(rounds, medians, strict=True)]
    compared = len(rounds) == 2
    ratio = bench.speedup_interval(rounds[1], rounds[0], seed=seed) if compared else None
    samples = [[np.round(block, 5).tolist() for block in each] for each in rounds]
    return Timing(
        batch_size=batch_size,
        model=latencies[0],
        baseline=latencies[1] if compared else None,
        speedup=Speedup(p50=ratio.value, ci95=(ratio.low, ratio.high)) if ratio else None,
        # What is asked of two models is how they compare; that can be steady where both of them drift.
        stable=(ratio or medians[0]).width <= STABLE_WIDTH,
        samples_ms=TimingSamples(model=samples[0], baseline=samples[1] if compared else None),
    )


def _latency(rounds: Rounds, median: Interval) -> Latency:
    samples = np.concatenate(rounds)
    mean = float(samples.mean())
    p90, p95, p99 = (float(q) for q in np.quantile(samples, (0.9, 0.95, 0.99)))
    return Latency(
        mean=mean,
        p50=median.value,
        p90=p90,
        p95=p95,
        p99=p99,
        cv=float(samples.std() / mean),
        runs=len(samples),
        p50_ci95=(median.low, median.high),
    )


def _measured(path: Path, size: _Size, timing: Timing, quality: Tally | None, which: int) -> Measured:
    latency = (timing.model, timing.baseline)[which]
    assert latency is not None
    return Measured(
        file=str(path),
        **asdict(size),
        latency_ms=latency,
        throughput_per_s=timing.batch_size * 1e3 / latency.mean,
        accuracy=quality.accuracy(which) if quality else None,
    )


def _gates(
    config: EvalConfig, size: _Size, compared: Tally | None, rounds: list[Rounds], timing: Timing
) -> list[GateResult]:
    """Hold every limit that was given against what was measured."""

    def measured(gate: Gate) -> Interval:
        if gate.field == "min_speedup":
            assert timing.speedup is not None
            return Interval(timing.speedup.p50, *timing.speedup.ci95)
        if gate.field == "max_latency_ms":
            return Interval(timing.model.p50, *timing.model.p50_ci95)
        if gate.field == "max_p99_ms":
            return bench.quantile_interval(rounds[0], 0.99, config.seed)
        if gate.field == "max_size":
            return Interval(size.bytes, size.bytes, size.bytes)
        assert compared is not None
        if gate.field == "max_accuracy_drop":
            assert compared.change is not None
            low, high = compared.change.ci95
            return Interval(*(round(-100 * change, 9) for change in (compared.change.top1, high, low)))
        agreement = compared.agreement.top1
        assert agreement is not None
        return Interval(agreement, agreement, agreement)

    results = []
    for gate in GATES:
        limit = getattr(config, gate.field)
        if limit is not None:
            value = measured(gate)
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


def _hints(
    config: EvalConfig,
    gates: list[GateResult],
    timings: list[Timing],
    quality: Tally | None,
    environment: dict[str, Any],
) -> list[str]:
    """Say what to do about what could not be told."""
    hints = []
    in_time = any(gate.verdict == "inconclusive" and gate.unit in ("x", "ms") for gate in gates)
    if in_time or not all(timing.stable for timing in timings):
        threads = "" if config.threads == 1 else ", pin --threads 1"
        hints.append(
            f"The times vary a lot. For sharper figures stop other programs{threads}, "
            f"or measure longer (--min-time {4 * config.min_time:g})."
        )
    if any(gate.verdict == "inconclusive" and gate.unit == "pp" for gate in gates):
        assert quality is not None
        hints.append(f"{quality.labelled} samples are too few to tell the accuracy drop from its limit: use more.")
    if quality is not None and quality.not_finite:
        hints.append(f"The model gives NaN or infinity for {quality.not_finite} of {quality.samples} samples.")
    load, cores = environment["load_1min"] or 0.0, environment["cores"] or 1
    if load > cores:
        hints.append(f"The machine was busy before: load {load:.1f} on {cores} cores.")
    return hints


def _write(config: EvalConfig, result: EvalResult) -> None:
    if config.html is None and config.markdown is None and not config.github_summary and config.report is None:
        return
    from .report import to_markdown, write_html

    if config.report is not None:
        result.write(config.report)
    if config.html is not None:
        write_html(config.html, eval_result=result)
    if config.markdown is not None:
        write_text(config.markdown, to_markdown(eval_result=result))
    if config.github_summary:
        try:
            with open(os.environ[SUMMARY_VARIABLE], "a", encoding="utf-8") as summary:
                summary.write(to_markdown(eval_result=result) + "\n")
        except OSError as error:
            raise OutputError(f"cannot append to ${SUMMARY_VARIABLE}: {error.strerror}.") from error
