"""Latency that can be compared: rounds that alternate in one process, fresh sessions, percentiles, intervals.

Models that are compared run in turns, in short rounds, so that whatever disturbs the machine disturbs all of
them. A round holds one block of runs of every model, in an order that is reversed from round to round.

Two things would spoil that, both measured. ONNX Runtime's idle thread pools keep spinning, so that the model at
rest slows the one that runs down (2x and more on two cores). ``session.force_spinning_stop`` ends the spinning with
each run, so that no pause is needed. It costs a run only the waking up of its threads (20 microseconds on two cores,
nothing on one), where switching spinning off altogether costs a small net half its speed. And two sessions of one and
the same file can differ for as long as they live (18 % seen on a net of 30 microseconds, by the order in which they
were made and the luck of memory and thread placement), so sessions are made anew for every round, in changing order,
as long as that is cheap. Their luck then is part of the spread between rounds, which is what the bootstrap resamples.

The interval is the expanded percentile bootstrap of Hesterberg, "What Teachers Should Know About the Bootstrap",
The American Statistician 69(4), 2015: resampling few rounds gives intervals that are too narrow by about
``sqrt((n - 1) / n)`` and by the t distribution's tail, so percentiles further out are read.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from prune_onnx.graph_ops.progress import SILENT, Progress

from .sessions import create_session

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

Runner = Callable[[], float]
Rounds = list[np.ndarray]
Count = Callable[[int], None]

ROUNDS = 20
RESAMPLES = 2000
CONFIDENCE = 0.95
# Two windows of warm-up runs that agree this closely end the warm-up; so does the time.
WARM_AGREEMENT = 0.05
WARM_WINDOW = 5
WARM_SECONDS = 1.0
# Runs at the start of a block that only bring the caches back; not counted.
SETTLE = 2
# Making sessions anew may take this share of the measured time.
RENEWAL_SHARE = 0.5
# The bootstrap reads at most about this many samples of a model.
BOOTSTRAP_SAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Width of the interval relative to the estimate."""
        return (self.high - self.low) / abs(self.value) if self.value else math.inf


def session_runner(
    model: str | Path | bytes | onnx.ModelProto,
    feed: Mapping[str, np.ndarray],
    provider: str = "cpu",
    threads: int | None = None,
) -> Runner:
    """Return a function that runs the model once on ``feed`` and returns the seconds it took.

    On the CPU that is ``session.run`` from host memory to host memory; on a GPU inputs and outputs lie in device
    memory, so that copies are not timed, and the clock stops when the device has finished.

    Raises:
        ConfigError, ModelError, ProviderError: see :func:`.sessions.create_session`.
    """
    session = create_session(model, provider, threads=threads, config={"session.force_spinning_stop": "1"})
    if provider != "cpu":
        return bound_runner(session, feed, "cuda")
    inputs = dict(feed)
    clock = time.perf_counter

    def run() -> float:
        start = clock()
        session.run(None, inputs)
        return clock() - start

    return run


def bound_runner(session: InferenceSession, feed: Mapping[str, np.ndarray], device: str) -> Runner:
    """Return a runner whose inputs and outputs stay in the memory of ``device``."""
    from onnxruntime import OrtValue

    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)
    binding.synchronize_inputs()
    clock = time.perf_counter

    def run() -> float:
        start = clock()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return clock() - start

    return run


def measure(
    makers: Sequence[Callable[[], Runner]],
    *,
    min_time: float = 2.0,
    min_runs: int = 50,
    warmup: int | None = None,
    progress: Progress = SILENT,
) -> list[Rounds]:
    """Time several runners in alternating rounds.

    Args:
        makers: each makes a runner with a session of its own.
        min_time: seconds that each of them is timed at least.
        min_runs: runs of each that are timed at least.
        warmup: runs before the first timed one of each session; ``None`` runs until their time is stable.
        progress: told of every round.

    Returns:
        For each maker its rounds, and for each round the latencies in ms, float64.
    """
    rounds = min(ROUNDS, max(1, min_runs))
    block_time, block_runs = min_time / rounds, math.ceil(min_runs / rounds)
    results: list[Rounds] = [[] for _ in makers]
    runners: list[Runner] = []
    preparing = renewal = measuring = 0.0
    with _no_garbage_collection(), progress.task("timing", rounds) as advance:
        for number in range(rounds):
            if not runners or preparing + renewal <= RENEWAL_SHARE * measuring:
                start = time.perf_counter()
                runners.clear()  # frees the old sessions first
                runners = _prepared(makers, warmup, backwards=number // 2 % 2 == 1)
                renewal = time.perf_counter() - start
                # The first sessions have to be made anyway.
                preparing += renewal if number else 0.0
            for i in _order(makers, backwards=number % 2 == 1):
                samples = _block(runners[i], block_time, block_runs)
                measuring += samples.sum()
                results[i].append(samples * 1e3)
            advance(1)
    return results


def warm_up(run: Runner, runs: int | None = None) -> None:
    """Run ``runs`` times, or until the medians of two successive windows agree or a second has passed."""
    if runs is not None:
        for _ in range(runs):
            run()
        return
    deadline = time.perf_counter() + WARM_SECONDS
    previous = math.inf
    while time.perf_counter() < deadline:
        window = []
        while len(window) < WARM_WINDOW and (not window or time.perf_counter() < deadline):
            window.append(run())
        median = float(np.median(window))
        if abs(median - previous) <= WARM_AGREEMENT * median:
            return
        previous = median


def quantile_interval(rounds: Rounds, quantile: float, seed: int = 0) -> Interval:
    """Return a quantile of all samples with its bootstrap interval over the rounds (same unit as the samples)."""
    value = float(np.quantile(np.concatenate(rounds), quantile))
    return Interval(value, *_limits(_resampled(rounds, quantile, _counts(len(rounds), seed)), len(rounds)))


def speedup_interval(baseline: Rounds, model: Rounds, quantile: float = 0.5, seed: int = 0) -> Interval:
    """Return how many times faster ``model`` is than ``baseline``, at a quantile, with its interval.

    A round of the one and the round of the other that ran beside it are resampled together, so a disturbance that
    hit both cancels.

    Raises:
        ValueError: the two have different numbers of rounds.
    """
    if len(baseline) != len(model):
        raise ValueError(f"{len(baseline)} rounds of the baseline, {len(model)} of the model")
    value = np.quantile(np.concatenate(baseline), quantile) / np.quantile(np.concatenate(model), quantile)
    counts = _counts(len(model), seed)
    ratios = _resampled(baseline, quantile, counts) / _resampled(model, quantile, counts)
    return Interval(float(value), *_limits(ratios, len(model)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _order(makers: Sequence[object], *, backwards: bool) -> list[int]:
    return list(range(len(makers)))[:: -1 if backwards else 1]


def _prepared(makers: Sequence[Callable[[], Runner]], warmup: int | None, *, backwards: bool) -> list[Runner]:
    """Make all runners and warm them up; the order matters, so it must not always be the same."""
    runners: dict[int, Runner] = {}
    for i in _order(makers, backwards=backwards):
        runners[i] = makers[i]()
        warm_up(runners[i], warmup)
    return [runners[i] for i in range(len(makers))]


def _block(run: Runner, seconds: float, runs: int) -> np.ndarray:
    for _ in range(SETTLE):
        run()
    samples: list[float] = []
    spent = 0.0
    while spent < seconds or len(samples) < runs:
        took = run()
        samples.append(took)
        spent += took
    return np.asarray(samples)


def _counts(rounds: int, seed: int) -> np.ndarray:
    """How often each round is drawn, shape (RESAMPLES, rounds)."""
    return np.random.default_rng(seed).multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES)


def _resampled(rounds: Rounds, quantile: float, counts: np.ndarray) -> np.ndarray:
    """Return the quantile of every resample, shape (RESAMPLES,).

    A resample only changes how often a sample counts, so the samples are sorted once and each resample's quantile
    is found in the running sum of the weights.
    """
    step = max(1, sum(map(len, rounds)) // BOOTSTRAP_SAMPLES)
    thinned = [np.sort(samples)[(step - 1) // 2 :: step] for samples in rounds]
    values = np.concatenate(thinned)
    owner = np.repeat(np.arange(len(rounds)), [len(samples) for samples in thinned])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    result = np.empty(len(counts))
    for i, count in enumerate(counts):
        weight = np.cumsum(count[owner])
        result[i] = values[np.searchsorted(weight, quantile * weight[-1])]
    return result


def _limits(statistics: np.ndarray, rounds: int) -> tuple[float, float]:
    """Return the expanded percentile interval of a bootstrap distribution from so many rounds."""
    if rounds < 2:
        return 0.0, math.inf
    normal = NormalDist()
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    df = rounds - 1
    # Student's t quantile by its expansion in 1 / df (Abramowitz and Stegun 26.7.5), exact to 1 % from 5 rounds on.
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    tail = normal.cdf(-t * math.sqrt(rounds / df))
    low, high = np.quantile(statistics, [tail, 1 - tail])
    return float(low), float(high)
