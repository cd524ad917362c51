"""The ``eval`` stage: accuracy, agreement, latency and size of models against a baseline, and the gates.

check -> open sessions -> open data -> accuracy and agreement -> timing -> gates -> profile -> reports
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from pydantic import ValidationError

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.errors import ConfigError, OutputError
from prune_onnx.graph_ops.files import check_output, write_text
from prune_onnx.graph_ops.progress import SILENT, Progress

from . import bench, compare
from .bench import Interval, Series
from .count import Counted, count
from .environment import capture, device_facts
from .eval_results import (
    Candidate,
    Copies,
    EvalResult,
    Latency,
    Measured,
    PeakMemory,
    Profile,
    Speedup,
    Timing,
    TimingSamples,
)
from .eval_results import Execution as ExecutionFacts
from .eval_schema import EvalConfig
from .execution import (
    Execution,
    check_recordable,
    copy_times,
    default_engine_cache,
    pinned,
    pinned_cores,
    tf32_allowed,
    weight_type,
)
from .gates import overall
from .inputs import open_inputs
from .layers import layers
from .memory import peak_memory
from .metrics import Metric
from .pareto import on_front
from .profiles import node_times
from .quality import Quality, judge
from .sessions import check_same_interface
from .slim_schema import SlimResult
from .verdicts import check_gates, hints, hold_gates

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# A median or speed-up whose interval is wider than this, relative to its value, says too little.
STABLE_WIDTH = 0.3
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def evaluate(config: EvalConfig, progress: Progress = SILENT) -> EvalResult:
    """Judge one model or several.

    Args:
        config: what to measure, on what, and the limits to keep.
        progress: told what is being done.

    Returns:
        The result; the reports are written by then. A gate that fails is no error: see ``EvalResult.exit_code``.

    Raises:
        ConfigError: options that do not fit the model or the data, or a stored result that was measured otherwise.
        ModelError: a file cannot be read or run, or model and baseline cannot be compared.
        ProviderError: the provider is not there, or did not take every node.
        DataError: the data is missing, corrupt, or does not fit the model; or the user's metric fails.
        OutputError: an output exists or cannot be written.
    """
    started, environment = time.perf_counter(), capture()
    _check_outputs(config)
    metric = Metric.find(config.metric) if config.metric else None
    stored = compare.load(config.compare) if config.compare else None
    slim = _slim_result(config.slim_report) if config.slim_report else None
    paths = [*config.models, *([config.baseline] if config.baseline else [])]
    protos = [model_io.load(path) for path in paths]
    executions = _executions(config, paths, protos)
    sessions = _sessions(executions[0], paths)
    provider = sessions[0].get_providers()[0]
    environment |= device_facts(config.provider)
    inputs, batch_sizes = open_inputs(config, protos, sessions[0], progress)
    settings = [(execution, size) for execution in executions for size in batch_sizes]
    compared_with = compare.check(config, stored, environment, provider, settings) if stored else None
    with peak_memory(executions[0], paths, inputs.feed(batch_sizes[0])) as peaks:
        qualities = judge(config, inputs, sessions, metric, stored, progress)
        shapes = {name: array.shape for name, array in inputs.feed(1).items()}
        counts = [count(proto, shapes) for proto in protos]
        memories = [PeakMemory(host_bytes=p.host, device_bytes=p.device) if p else None for p in peaks()]
    check_gates(config, qualities[: len(config.models)], memories)
    sessions.clear()  # their thread pools would only disturb

    series = [_time(config, execution, paths, inputs.feed(size), progress) for execution, size in settings]
    environment |= device_facts(config.provider, key="gpu_after")
    timings = [_timings(config, settings, series, which, stored) for which in range(len(config.models))]
    measured = [
        _measured(
            path,
            counts[which],
            timings[which][0].model if which < len(timings) else timings[0][0].baseline,
            batch_sizes[0],
            series[0][which],
            memories[which],
            _copies(executions[0], path, inputs.feed(batch_sizes[0])),
            qualities[which],
        )
        for which, path in enumerate(paths)
    ]
    baseline = stored.model if stored else measured[-1] if config.baseline else None
    candidates = [
        _candidate(config, measured[which], own, series[0][which], qualities[which])
        for which, own in enumerate(timings)
    ]
    best = on_front([(each.model, each.agreement) for each in candidates], baseline)
    candidates = [each.model_copy(update={"on_front": on}) for each, on in zip(candidates, best, strict=True)]
    shown = candidates[0]
    result = EvalResult(
        seconds=0.0,
        environment=environment,
        model=shown.model,
        baseline=baseline,
        compared_with=compared_with,
        provider=provider,
        threads=executions[0].threads,
        execution=_facts(executions[0], protos[0], paths[0]),
        data=inputs.name,
        speedup=shown.speedup,
        accuracy_change=shown.accuracy_change,
        metric_change=shown.metric_change,
        agreement=shown.agreement,
        timings=shown.timings,
        gates=shown.gates,
        verdict=overall(
            [gate.verdict for each in candidates for gate in each.gates],
            stable=all(timing.stable for each in candidates for timing in each.timings),
        ),
        hints=hints(config, candidates, qualities, environment, stored),
        candidates=[_lean(each) for each in candidates] if config.more else [],
        layers=layers(counts[-1], counts[0]) if config.baseline else [],
        profile=_profile(config, executions[0], paths, inputs.feed(batch_sizes[0]), progress),
    )
    result.seconds = round(time.perf_counter() - started, 3)
    _write(config, result, slim)
    return result


def _check_outputs(config: EvalConfig) -> None:
    inputs = [*config.models, config.baseline, config.compare, config.slim_report]
    for path in (config.html, config.markdown, config.report):
        if path is not None:
            check_output(path, force=config.force)
            if path.resolve() in {p.resolve() for p in inputs if p is not None}:
                raise OutputError(f"{path} is an input; an input file is never changed. Give another output.")
    if config.github_summary and not os.environ.get(SUMMARY_VARIABLE):
        raise ConfigError(f"--github-summary works inside GitHub Actions only: ${SUMMARY_VARIABLE} is not set.")


def _slim_result(path: Path) -> SlimResult:
    """Read what ``slim --report`` has written."""
    try:
        return SlimResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--slim-report: cannot read {path}: {error.strerror}.") from None
    except ValidationError:
        raise ConfigError(f"--slim-report: {path} is not what slim --report writes.") from None


def _sessions(execution: Execution, paths: list[Path]) -> list[InferenceSession]:
    """Open all models to see what they give, and refuse those that cannot be compared."""
    # Batches of several sizes cannot be recorded.
    sessions = [replace(execution, cuda_graph=False).session(path) for path in paths]
    for model in sessions[:-1]:
        check_same_interface(model, sessions[-1])
    return sessions


def _timings(
    config: EvalConfig,
    settings: list[tuple[Execution, int]],
    series: list[list[Series]],
    which: int,
    stored: EvalResult | None,
) -> list[Timing]:
    """Return one model's timings beside those of the baseline, or of the stored result."""
    found = []
    for (execution, size), each in zip(settings, series, strict=True):
        chosen = [each[which], each[-1]] if config.baseline else [each[which]]
        timing = _timing(execution, size, chosen, config.seed)
        found.append(compare.beside(stored, timing) if stored else timing)
    return found


def _measured(
    path: Path,
    counted: Counted,
    latency: Latency | None,
    batch_size: int,
    series: Series,
    memory: PeakMemory | None,
    copies: Copies | None,
    quality: Quality,
) -> Measured:
    assert latency is not None
    return Measured(
        file=str(path),
        params=counted.params,
        macs=counted.macs,
        bytes=model_io.bytes_on_disk(path),
        latency_ms=latency,
        throughput_per_s=batch_size * 1e3 / latency.mean,
        accuracy=quality.accuracy,
        metric=quality.metric,
        creation_ms=float(np.median(series.creation_ms)),
        peak_memory=memory,
        copies_ms=copies,
    )


def _candidate(
    config: EvalConfig, measured: Measured, timings: list[Timing], series: Series, quality: Quality
) -> Candidate:
    """Hold one model against its gates; whether it is on the front is known when all models are."""
    p99 = bench.quantile_interval(series.rounds, 0.99, config.seed)
    gates = hold_gates(config, measured, p99, timings[0].speedup, quality)
    return Candidate(
        model=measured,
        speedup=timings[0].speedup,
        accuracy_change=quality.accuracy_change,
        metric_change=quality.metric_change,
        agreement=quality.agreement,
        timings=timings,
        gates=gates,
        verdict=overall([gate.verdict for gate in gates], stable=all(timing.stable for timing in timings)),
        on_front=False,
    )


def _lean(candidate: Candidate) -> Candidate:
    """Return a model without the samples of the baseline, which would be the same for all models."""
    timings = [
        timing.model_copy(update={"samples_ms": timing.samples_ms.model_copy(update={"baseline": None})})
        for timing in candidate.timings
    ]
    return candidate.model_copy(update={"timings": timings})


def _profile(
    config: EvalConfig, execution: Execution, paths: list[Path], feed: dict[str, np.ndarray], progress: Progress
) -> Profile | None:
    """Profile the first model and the baseline, where that is wanted."""
    if not (config.for_people if config.profile is None else config.profile):
        return None
    chosen = [paths[0], *([paths[-1]] if config.baseline else [])]
    found = []
    # What is launched as one graph has no times of its own nodes.
    plain = replace(execution, cuda_graph=False)
    with progress.task("profile", len(chosen)) as advance, pinned(execution.cores):
        for path in chosen:
            found.append(node_times(functools.partial(plain.session, path, feed), feed))
            advance(1)
    return Profile(
        runs=min(runs for _, runs in found), model=found[0][0], baseline=found[1][0] if config.baseline else None
    )


def _executions(config: EvalConfig, paths: list[Path], protos: list[onnx.ModelProto]) -> list[Execution]:
    """Return how the models run, for each number of threads that was asked for."""
    if config.cuda_graph:
        for path, proto in zip(paths, protos, strict=True):
            check_recordable(str(path), proto)
    cache = config.engine_cache or default_engine_cache()
    common = Execution(
        provider=config.provider,
        cuda_layout=config.cuda_layout,
        tf32=config.tf32,
        conv_search=config.conv_search,
        cuda_graph=config.cuda_graph,
        fp16=config.fp16,
        engine_cache=cache if config.provider == "tensorrt" else None,
    )
    return [
        replace(common, threads=threads, cores=pinned_cores(threads) if config.pin else ())
        for threads in config.threads or (None,)
    ]


def _time(
    config: EvalConfig, execution: Execution, paths: list[Path], feed: dict[str, np.ndarray], progress: Progress
) -> list[Series]:
    """Time all models on one input, in turns."""
    makers = [functools.partial(execution.runner, path, feed) for path in paths]
    # The 99th percentile of fewer runs is little more than their maximum.
    min_runs = config.min_runs if config.max_p99_ms is None else max(config.min_runs, 200)
    with pinned(execution.cores):
        return bench.measure(
            makers, min_time=config.min_time, min_runs=min_runs, warmup=config.warmup, progress=progress
        )


def _copies(execution: Execution, path: Path, feed: dict[str, np.ndarray]) -> Copies | None:
    """Time the copies between host and device, which the runs on a GPU leave out."""
    if execution.provider == "cpu":
        return None
    return Copies(**asdict(copy_times(execution.session(path, feed), feed)))


def _facts(execution: Execution, proto: onnx.ModelProto, path: Path) -> ExecutionFacts:
    """Record how the models ran."""
    on_cpu, on_cuda = execution.provider == "cpu", execution.provider == "cuda"
    return ExecutionFacts(
        timed="host to host" if on_cpu else "device to device",
        precision=weight_type(proto),
        tf32=None if on_cpu else tf32_allowed(execution),
        fp16=execution.fp16,
        layout=execution.cuda_layout if on_cuda else None,
        conv_search=execution.conv_search if on_cuda else None,
        cuda_graph=execution.cuda_graph,
        pinned=list(execution.cores) or None,
        options=execution.provider_options(path),
    )


def _timing(execution: Execution, batch_size: int, series: list[Series], seed: int) -> Timing:
    rounds = [each.rounds for each in series]
    medians = [bench.quantile_interval(each, 0.5, seed) for each in rounds]
    latencies = [_latency(each, median) for each, median in zip(series, medians, strict=True)]
    compared = len(rounds) == 2
    ratio = bench.speedup_interval(rounds[1], rounds[0], seed=seed) if compared else None
    samples = [[np.round(block, 5).tolist() for block in each] for each in rounds]
    return Timing(
        batch_size=batch_size,
        threads=execution.threads,
        model=latencies[0],
        baseline=latencies[1] if compared else None,
        speedup=Speedup(p50=ratio.value, ci95=(ratio.low, ratio.high)) if ratio else None,
        # What is asked of two models is how they compare; that can be steady where both of them drift.
        stable=(ratio or medians[0]).width <= STABLE_WIDTH,
        samples_ms=TimingSamples(model=samples[0], baseline=samples[1] if compared else None),
    )


def _latency(series: Series, median: Interval) -> Latency:
    samples = np.concatenate(series.rounds)
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
        cpu_ms=float(np.mean(series.cpu_ms)),
    )


def _write(config: EvalConfig, result: EvalResult, slim: SlimResult | None) -> None:
    if config.report is not None:
        result.write(config.report)
    if not config.for_people:
        return
    from .report import to_markdown, write_html

    if config.html is not None:
        write_html(config.html, eval_result=result, slim_result=slim)
    if config.markdown is not None:
        write_text(config.markdown, to_markdown(eval_result=result, slim_result=slim))
    if config.github_summary:
        try:
            with open(os.environ[SUMMARY_VARIABLE], "a", encoding="utf-8") as summary:
                summary.write(to_markdown(eval_result=result, slim_result=slim) + "\n")
        except OSError as error:
            raise OutputError(f"cannot append to ${SUMMARY_VARIABLE}: {error.strerror}.") from error
