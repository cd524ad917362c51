"""The statistics on samples whose answers are known, and the measuring loop on a clock that does not flake."""

from __future__ import annotations

import gc
import itertools
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prune_onnx.pipeline import bench
from prune_onnx.pipeline.bench import Interval, Rounds, Runner, measure, quantile_interval, speedup_interval, warm_up
from prune_onnx.pipeline.execution import Execution

# ---- statistics


def noisy(rng: np.random.Generator, latency: float, drift: np.ndarray, runs: int = 30) -> Rounds:
    """Rounds with what real ones have: a common drift, luck of each session, and a heavy tail."""
    rounds = []
    for common in drift:
        center = latency * np.exp(common + rng.normal(0, 0.02))
        tail = np.where(rng.random(runs) < 0.1, rng.uniform(1, 3, runs), 1)
        rounds.append(center * (1 + rng.exponential(0.02, runs)) * tail)
    return rounds


def test_interval_of_the_speedup_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RESAMPLES", 400)  # enough for coverage, and five times faster
    rng = np.random.default_rng(0)
    repeats = 120
    hits = wrongly_faster = 0
    for repeat in range(repeats):
        drift = np.cumsum(rng.normal(0, 0.01, bench.ROUNDS))
        found = speedup_interval(noisy(rng, 1.3, drift), noisy(rng, 1.0, drift), seed=repeat)
        hits += found.low <= 1.3 <= found.high
        same = speedup_interval(noisy(rng, 1.0, drift), noisy(rng, 1.0, drift), seed=repeat)
        wrongly_faster += same.low > 1
    # With 95 % coverage, less than 90 % of 120 happens in 1 of 100 series; the seed is fixed.
    assert hits / repeats >= 0.95
    assert wrongly_faster / repeats <= 0.02


def test_planted_slowdown_is_called_slower_every_time() -> None:
    rng = np.random.default_rng(1)
    for repeat in range(30):
        drift = np.cumsum(rng.normal(0, 0.01, bench.ROUNDS))
        found = speedup_interval(noisy(rng, 1.0, drift), noisy(rng, 1.2, drift), seed=repeat)
        assert found.high < 1, repeat


def test_constant_samples_have_no_width() -> None:
    two, one = [np.full(5, 2.0)] * 20, [np.full(7, 1.0)] * 20
    assert speedup_interval(two, one) == Interval(2.0, 2.0, 2.0)
    assert quantile_interval(two, 0.99) == Interval(2.0, 2.0, 2.0)
    assert quantile_interval(two, 0.5).width == 0


def test_drift_that_hits_both_models_cancels() -> None:
    drift = np.exp(np.linspace(0, 1, 20))
    base, model = [np.full(9, 2 * d) for d in drift], [np.full(9, d) for d in drift]
    assert speedup_interval(base, model).low == pytest.approx(2)
    assert speedup_interval(base, model).high == pytest.approx(2)
    assert quantile_interval(model, 0.5).width > 0.2


def test_interval_is_the_bootstrap_over_whole_rounds() -> None:
    """Against the definition: draw rounds with repetition, pool their samples, take the quantile."""
    rng = np.random.default_rng(3)
    rounds = [rng.gamma(5, 1 + 0.2 * r, rng.integers(20, 60)) for r in range(12)]
    draws = [np.concatenate([rounds[i] for i in rng.integers(0, 12, 12)]) for _ in range(4000)]
    for quantile in (0.5, 0.9):
        medians = [np.quantile(draw, quantile, method="inverted_cdf") for draw in draws]
        found = quantile_interval(rounds, quantile)
        low, high = np.quantile(medians, [0.005, 0.995])
        # Read further out than the plain percentiles, by Student's t with 11 degrees of freedom: 3.106 * sqrt(12 / 11).
        assert found.low <= low * 1.01
        assert found.high >= high * 0.99
        spread = np.std(medians)
        assert found.high - found.low == pytest.approx(2 * 3.244 * spread, rel=0.2)


def test_many_samples_are_thinned_without_moving_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    rounds = [rng.gamma(9, 1 + 0.05 * r, 2500) for r in range(20)]
    thinned = quantile_interval(rounds, 0.9)
    monkeypatch.setattr(bench, "BOOTSTRAP_SAMPLES", 10**9)
    exact = quantile_interval(rounds, 0.9)
    assert thinned.value == exact.value
    assert (thinned.low, thinned.high) == pytest.approx((exact.low, exact.high), rel=5e-3)


def test_same_seed_same_interval_and_one_round_tells_nothing() -> None:
    rounds = noisy(np.random.default_rng(5), 1.0, np.zeros(20))
    assert quantile_interval(rounds, 0.5, seed=7) == quantile_interval(rounds, 0.5, seed=7)
    alone = quantile_interval(rounds[:1], 0.5)
    assert (alone.low, alone.high) == (0, np.inf)
    with pytest.raises(ValueError, match="20 rounds of the baseline, 1 of the model"):
        speedup_interval(rounds, rounds[:1])


# ---- the loop


class Clock:
    """A clock that only runners and makers advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.cpu = 0.0
        self.alive: set[str] = set()
        self.spinning: set[str] = set()
        self.together: list[set[str]] = []
        fake = types.SimpleNamespace(perf_counter=lambda: self.now, process_time=lambda: self.cpu, sleep=self.sleep)
        monkeypatch.setattr(bench, "time", fake)

    def sleep(self, seconds: float) -> None:
        """Sessions that have run spin for the first nap, and use a core each."""
        self.now += seconds
        self.cpu += seconds * len(self.spinning)
        self.spinning.clear()

    def maker(self, name: str, seconds: float, creation: float = 0.0) -> Callable[[], Runner]:
        def make() -> Runner:
            self.now += creation
            self.log.append(f"make {name}")
            self.alive.add(name)
            return Session(self, name, seconds)

        return make

    def blocks(self) -> list[str]:
        """Who ran, without repetitions."""
        return [entry for i, entry in enumerate(self.log) if i == 0 or entry != self.log[i - 1]]


class Session:
    """A runner whose session ends with it."""

    def __init__(self, clock: Clock, name: str, seconds: float) -> None:
        self.clock, self.name, self.seconds = clock, name, seconds

    def __call__(self) -> float:
        clock = self.clock
        clock.together.append(clock.spinning - {self.name})
        clock.now += self.seconds
        clock.cpu += 2 * self.seconds
        clock.log.append(self.name)
        clock.spinning.add(self.name)
        return self.seconds

    def __del__(self) -> None:
        self.clock.alive.discard(self.name)
        self.clock.spinning.discard(self.name)
        self.clock.log.append(f"end {self.name}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(("seconds", "min_time", "min_runs"), [(0.001, 0.5, 50), (0.5, 0.1, 30), (0.01, 1.0, 7)])
def test_time_and_runs_are_reached_and_every_sample_is_kept(
    clock: Clock, seconds: float, min_time: float, min_runs: int
) -> None:
    pair = measure([clock.maker("a", seconds), clock.maker("b", 2 * seconds)], min_time=min_time, min_runs=min_runs)
    for series, each in zip(pair, (seconds, 2 * seconds), strict=True):
        rounds = series.rounds
        samples = np.concatenate(rounds)
        np.testing.assert_allclose(series.cpu_ms, [2e3 * each] * len(rounds))  # what the run takes of two cores
        assert len(rounds) == min(bench.ROUNDS, min_runs)
        assert len(samples) >= min_runs
        assert samples.sum() / 1e3 >= min_time - 1e-9
        np.testing.assert_allclose(samples, each * 1e3)
        # Neither by much: a round ends with the run that reaches its share.
        assert samples.sum() / 1e3 < max(min_time + len(rounds) * each, 2 * min_runs * each)


def test_models_take_turns_in_changing_order(clock: Clock) -> None:
    measure([clock.maker("a", 0.01), clock.maker("b", 0.01)], min_time=0.8, min_runs=8, warmup=0)
    order = [entry for entry in clock.log if " " not in entry]
    rounds = np.array(order).reshape(8, -1)
    firsts = rounds[:, 0].tolist()
    assert firsts == ["a", "b"] * 4
    for line in rounds:
        assert sorted(set(line)) == ["a", "b"]
        assert (line[: len(line) // 2] == line[0]).all()
        assert (line[len(line) // 2 :] == line[-1]).all()


def test_sessions_that_cost_little_are_made_anew_for_every_block_and_end_with_it(clock: Clock) -> None:
    pair = measure([clock.maker("a", 0.001, 0.001), clock.maker("b", 0.001, 0.002)], min_time=2, min_runs=20, warmup=1)
    made = [entry for entry in clock.log if entry.startswith("make")]
    assert len(made) == 2 * bench.ROUNDS
    assert made[:8] == ["make a", "make b", "make b", "make a", "make a", "make b", "make b", "make a"]
    # From the second round on, one ends before the other is made.
    events = [entry for entry in clock.log if " " in entry][4:]
    assert all(end == make.replace("make", "end") for make, end in zip(events[::2], events[1::2], strict=True))
    for series, creation in zip(pair, (1.0, 2.0), strict=True):
        np.testing.assert_allclose(series.creation_ms, [creation] * bench.ROUNDS)


def test_sessions_that_cost_more_end_when_the_other_ones_turn_comes(clock: Clock) -> None:
    measure([clock.maker("a", 0.001, 0.02), clock.maker("b", 0.001, 0.03)], min_time=1, min_runs=20, warmup=1)
    events = [entry for entry in clock.log if " " in entry]
    # Each of the first two is alive when the second round begins; a session then serves the blocks on both sides of
    # a change of rounds.
    assert len(events) < 2.6 * bench.ROUNDS
    alive: set[str] = set()
    for event in events[events.index("end a") :]:
        kind, name = event.split()
        alive = alive | {name} if kind == "make" else alive - {name}
        assert len(alive) <= 1


def test_expensive_sessions_are_kept(clock: Clock) -> None:
    measure([clock.maker("a", 0.01, creation=100.0)], min_time=1, min_runs=20, warmup=1)
    assert clock.log.count("make a") == 1


@pytest.mark.parametrize("creation", [0.0, 100.0], ids=["anew", "kept"])
def test_no_session_runs_while_the_threads_of_another_spin(clock: Clock, creation: float) -> None:
    measure([clock.maker("a", 0.01, creation), clock.maker("b", 0.01, creation)], min_time=1, min_runs=20)
    assert {"a", "b"} <= set(clock.log)
    assert not any(clock.together)


def test_rest_ends_though_the_process_is_never_idle(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "sleep", None)

    def sleep(seconds: float) -> None:
        clock.now += seconds
        clock.cpu += seconds

    bench.time.sleep = sleep  # type: ignore[assignment]
    bench.rest()
    assert bench.REST_SECONDS <= clock.now < 1.1 * bench.REST_SECONDS


def test_kept_sessions_settle_after_another_one_ran_and_only_then(clock: Clock) -> None:
    measure([clock.maker("a", 0.01, 100.0), clock.maker("b", 0.01, 100.0)], min_time=0.01, min_runs=4, warmup=0)
    runs = [len(list(group)) for _, group in itertools.groupby(e for e in clock.log if " " not in e)]
    # a | b b | a a | b b | a: every block one run long; the first two are settled by their own warm-up.
    assert runs == [1, 2, 2 + bench.SETTLE, 2 + bench.SETTLE, 1 + bench.SETTLE]


def test_measuring_goes_on_while_the_figures_are_not_sharp(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)

    class Erratic(Session):
        def __call__(self) -> float:
            self.seconds = 0.01 * rng.uniform(0.2, spread)
            return super().__call__()

    def rounds(models: int) -> int:
        makers = [lambda name=name: Erratic(clock, name, 0.0) for name in "ab"[:models]]
        return len(measure(makers, min_time=0.01, min_runs=40, warmup=0)[0].rounds)  # type: ignore[arg-type]

    spread = 0.21
    assert rounds(1) == rounds(2) == bench.ROUNDS
    spread = 4.0
    assert rounds(1) == rounds(2) == bench.MOST_TIMES * bench.ROUNDS
    monkeypatch.setattr(bench, "SHARP_WIDTH", 1.0)
    assert bench.ROUNDS <= rounds(2) < bench.MOST_TIMES * bench.ROUNDS


def test_renewal_takes_no_more_than_its_share(clock: Clock) -> None:
    (series,) = measure([clock.maker("a", 0.01, creation=0.05)], min_time=5, min_runs=20, warmup=1)
    cost = 0.05 + 0.01
    spent = (clock.log.count("make a") - 1) * cost
    measured = np.concatenate(series.rounds).sum() / 1e3
    share = bench.RENEWAL_SHARE * measured
    # A session that ended with its block has to be made anew once more.
    assert share - 2 * cost < spent < share + cost


def test_warm_up_ends_when_stable_when_told_or_when_time_is_up(clock: Clock) -> None:
    falling = iter([0.05, 0.04, 0.03, 0.02, 0.02] + [0.01] * 1000)

    def run() -> float:
        took = next(falling)
        clock.now += took
        clock.log.append("run")
        return took

    warm_up(run)
    assert len(clock.log) == 3 * bench.WARM_WINDOW
    clock.log.clear()
    warm_up(run, 3)
    assert len(clock.log) == 3
    erratic = iter(0.01 * 2**i for i in range(100))

    def never_stable() -> float:
        took = next(erratic)
        clock.now += took
        return took

    before = clock.now
    warm_up(never_stable)
    assert bench.WARM_SECONDS <= clock.now - before < 2.1 * bench.WARM_SECONDS + 0.1


def test_garbage_collection_is_off_inside_and_back_on_outside() -> None:
    seen = []

    def make() -> Runner:
        def run() -> float:
            seen.append(gc.isenabled())
            return 0.01

        return run

    assert gc.isenabled()
    measure([make], min_time=0.01, min_runs=2, warmup=0)
    assert gc.isenabled()
    assert seen
    assert not any(seen)


# ---- real sessions


def test_real_sessions_are_timed(save_linear: Callable[..., Path]) -> None:
    path = save_linear("m.onnx", np.ones((64, 64)))
    feed = {"x": np.ones((4, 64), np.float32)}
    (series,) = measure([lambda: Execution(threads=1).runner(path, feed)], min_time=0.02, min_runs=20)
    samples = np.concatenate(series.rounds)
    assert len(samples) >= 20
    assert (samples > 0).all()
    assert samples.min() < 1e3
    assert all(0 < cpu < 1e3 for cpu in series.cpu_ms)
    assert all(0 < creation < 1e4 for creation in series.creation_ms)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to count threads in")
def test_a_sessions_threads_end_with_its_runner(save_linear: Callable[..., Path]) -> None:
    path = save_linear("m.onnx", np.ones((64, 64)))
    feed = {"x": np.ones((4, 64), np.float32)}

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    gc.disable()
    try:
        before = threads()
        run = Execution(threads=3).runner(path, feed)
        run()
        assert threads() == before + 2
        del run
        assert threads() == before
    finally:
        gc.enable()
