"""Latency that can be compared: rounds that alternate in one process, fresh sessions, percentiles, intervals.

Models that are compared run in turns, in short rounds, so that whatever disturbs the machine disturbs all of
them. A round holds one block of runs of every model, in an order that is reversed from round to round.

A block is nothing but a bare loop over an ordinary session, so that its figures are those which a program has that
runs the model again and again. Two things would spoil the comparison, both measured. ONNX Runtime's idle threads keep
spinning for tens of milliseconds, so that the model at rest slows the one that runs down (2x and more on two cores).
Taking that from the sessions would change what is measured: told to stop spinning after each run, they wake their
threads for the next one (5 % of a run of 0.5 ms), told never to spin, small nets take twice as long. So only one
session is alive at a time, and where making one anew is too expensive, the others' threads are asleep before a block
begins. And two sessions of one and the same file can differ for as long as they live (18 % seen on a net of 30
microseconds, by the order in which they were made and the luck of memory and thread placement): new sessions for
the blocks make that luck part of the spread between rounds, which is what the bootstrap resamples.

The interval is the expanded percentile bootstrap of Hesterberg, "What Teachers Should Know About the Bootstrap",
The American Statistician 69(4), 2015: resampling few rounds gives intervals that are too narrow by about
``sqrt((n - 1) / n)`` and by the t distribution's tail, so percentiles further out are read. Where the figures are not
sharp after the time that was asked for, measuring goes on, up to a multiple of it.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from prune_onnx.graph_ops.progress import SILENT, Progress

Runner = Callable[[], float]
Rounds = list[np.ndarray]

ROUNDS = 20
# While the figures are less sharp than this (width of the interval, relative to its value), measuring goes on for so
# many times the time that was asked for.
SHARP_WIDTH = 0.15
MOST_TIMES = 3
RESAMPLES = 4000
# The level at which the bootstrap is read. Where other programs run, disturbances outlast a round, and rounds are not
# independent: intervals of two sessions of one file, read at 95 %, missed 1 in 3 of 16 repeats at a load of 7 on two
# cores. Read at 99 % they hold what an interval of 95 % promises.
LEVEL = 0.99
# Two windows of warm-up runs that agree this closely end the warm-up; so does the time.
WARM_AGREEMENT = 0.05
WARM_WINDOW = 5
WARM_SECONDS = 0.5
# Runs at the start of a block that are not counted: they bring back the caches of a session that was kept, and lay out
# the memory of one that was made anew (its third run is within 1 % of the thousandth).
SETTLE = 3
# Making sessions anew for every block may take this share of the measured time. Beyond that, one that takes less
# seconds than about the rest that keeping it takes still ends when another model's turn comes.
RENEWAL_SHARE = 0.1
CHEAP = 0.04
# Threads are asleep when this process uses less than this share of a core, for so many naps of so many seconds.
REST_LOAD, REST_NAPS, REST_NAP = 0.2, 2, 0.002
# Whatever else keeps this process busy, a block begins in the end.
REST_SECONDS = 0.2
# Resamples at a time, so that their table stays small.
CHUNK = 500
# The bootstrap reads at most about this many samples of a model.
BOOTSTRAP_SAMPLES = 4000


@dataclass
class Series:
    """What was measured of one model.

    Attributes:
        rounds: latencies in ms, float64, one array for each round.
        cpu_ms: for each round, CPU time of this process in a run, all threads together, spinning ones included.
        creation_ms: of each session that was made.
    """

    rounds: Rounds = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    creation_ms: list[float] = field(default_factory=list)


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


def measure(
    makers: Sequence[Callable[[], Runner]],
    *,
    min_time: float = 2.0,
    min_runs: int = 50,
    warmup: int | None = None,
    progress: Progress = SILENT,
) -> list[Series]:
    """Time several runners in alternating rounds.

    Args:
        makers: each makes a runner with a session of its own, which ends with the runner.
        min_time: seconds that each of them is timed at least; up to ``MOST_TIMES`` as long if the ratio of a runner's
            median to the last one's, or the median of one alone, is not known sharply by then.
        min_runs: runs of each that are timed at least.
        warmup: runs before the first timed one of each session; ``None`` runs until the time is stable.
        progress: told of every round.

    Returns:
        What was measured, for each maker.
    """
    rounds = min(ROUNDS, max(1, min_runs))
    block_time, block_runs = min_time / rounds, math.ceil(min_runs / rounds)
    series = [Series() for _ in makers]
    runners: dict[int, Runner] = {}
    cost = [0.0] * len(makers)
    renewing = measuring = 0.0
    last = None
    with _no_garbage_collection(), progress.task("timing", rounds) as advance:
        for number in range(MOST_TIMES * rounds):
            if number and number % rounds == 0 and _sharp(series):
                break
            # What making sessions costs is known when all have run once.
            anew = number > 0 and renewing + sum(cost) <= RENEWAL_SHARE * measuring
            alone = anew or (number > 0 and sum(cost) <= CHEAP * len(makers))
            for i in _order(makers, backwards=number % 2 == 1):
                start = time.perf_counter()
                if anew or (alone and i != last):
                    runners.clear()
                elif runners and i != last:
                    rest()
                if i not in runners:
                    # A session made anew does what the first one did, which ran until its time was stable.
                    runners[i], creation = _made(makers[i], SETTLE if warmup is None and number else warmup)
                    series[i].creation_ms.append(creation * 1e3)
                    # The first ones have to be made anyway, and are warmed up for longer.
                    cost[i] = time.perf_counter() - start if number else creation
                    renewing += cost[i] if number else 0.0
                elif i != last:
                    warm_up(runners[i], SETTLE)
                measuring += _block(runners[i], block_time, block_runs, series[i])
                last = i
                if anew:
                    del runners[i]
            advance(1 if number < rounds else 0)
    return series


def rest() -> None:
    """Wait until this process uses no CPU: until the threads of sessions that have run do not spin any more."""
    deadline = time.perf_counter() + REST_SECONDS
    quiet = 0
    while quiet < REST_NAPS and time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(REST_NAP)
        quiet = quiet + 1 if time.process_time() - before < REST_LOAD * REST_NAP else 0


def warm_up(run: Runner, runs: int | None = None) -> None:
    """Run ``runs`` times, or until the medians of two successive windows agree or half a second has passed."""
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


def _sharp(series: Sequence[Series]) -> bool:
    """Whether the figures that matter are known well: how all compare with the last one, or the median of one alone."""
    *rounds, last = [each.rounds for each in series]
    intervals = [speedup_interval(last, each) for each in rounds] or [quantile_interval(last, 0.5)]
    return all(interval.width <= SHARP_WIDTH for interval in intervals)


def _made(maker: Callable[[], Runner], warmup: int | None) -> tuple[Runner, float]:
    """Make a runner and warm it up; also return the seconds that making it took."""
    start = time.perf_counter()
    run = maker()
    creation = time.perf_counter() - start
    warm_up(run, warmup)
    return run, creation


def _block(run: Runner, seconds: float, runs: int, series: Series) -> float:
    """Run until both limits are reached, add the round to ``series`` and return the seconds that were timed."""
    samples: list[float] = []
    spent = 0.0
    cpu = time.process_time()
    while spent < seconds or len(samples) < runs:
        took = run()
        samples.append(took)
        spent += took
    series.cpu_ms.append((time.process_time() - cpu) * 1e3 / len(samples))
    series.rounds.append(np.asarray(samples) * 1e3)
    return spent


def _counts(rounds: int, seed: int) -> np.ndarray:
    """How often each round is drawn, shape (RESAMPLES, rounds)."""
    return np.random.default_rng(seed).multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES)


def _resampled(rounds: Rounds, quantile: float, counts: np.ndarray) -> np.ndarray:
    """Return the quantile of every resample, shape (RESAMPLES,).

    A resample only changes how often a round's samples count, so the samples are sorted once, and each resample's
    quantile is found in the weighted sum of the rounds' running counts.
    """
    step = max(1, sum(map(len, rounds)) // BOOTSTRAP_SAMPLES)
    thinned = [np.sort(samples)[(step - 1) // 2 :: step] for samples in rounds]
    values = np.concatenate(thinned)
    owner = np.repeat(np.arange(len(rounds)), [len(samples) for samples in thinned])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    result = np.empty(len(counts))
    # How many samples of each round are at most as large as each value, shape (rounds, values).
    below = np.cumsum(owner == np.arange(len(rounds))[:, None], axis=1, dtype=np.float32)
    for start in range(0, len(counts), CHUNK):
        weight = counts[start : start + CHUNK].astype(np.float32) @ below
        result[start : start + CHUNK] = values[(weight >= quantile * weight[:, -1:]).argmax(axis=1)]
    return result


def _limits(statistics: np.ndarray, rounds: int) -> tuple[float, float]:
    """Return the expanded percentile interval of a bootstrap distribution from so many rounds."""
    if rounds < 2:
        return 0.0, math.inf
    normal = NormalDist()
    z = normal.inv_cdf((1 + LEVEL) / 2)
    df = rounds - 1
    # Student's t quantile by its expansion in 1 / df (Abramowitz and Stegun 26.7.5), exact to 0.1 % for 20 rounds and
    # to 6 % for 5.
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    tail = normal.cdf(-t * math.sqrt(rounds / df))
    low, high = np.quantile(statistics, [tail, 1 - tail])
    return float(low), float(high)
