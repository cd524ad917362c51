"""The statistics on samples whose answers are known, and the measuring loop on a clock that does not flake."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prune_onnx.pipeline import bench
from prune_onnx.pipeline.bench import Interval, Rounds, Runner, measure, quantile_interval, speedup_interval, warm_up
from prune_onnx.pipeline.sessions import create_session

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
    assert hits / repeats >= 0.9
    assert wrongly_faster / repeats <= 0.05


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
        low, high = np.quantile(medians, [0.025, 0.975])
        # Read further out than the plain percentiles, by Student's t with 11 degrees of freedom: 2.201 * sqrt(12 / 11).
        assert found.low <= low * 1.01
        assert found.high >= high * 0.99
        spread = np.std(medians)
        assert found.high - found.low == pytest.approx(2 * 2.299 * spread, rel=0.15)


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
        monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def maker(self, name: str, seconds: float, creation: float = 0.0) -> Callable[[], Runner]:
        def make() -> Runner:
            self.now += creation
            self.log.append(f"make {name}")

            def run() -> float:
                self.now += seconds
                self.log.append(name)
                return seconds

            return run

        return make

    def blocks(self) -> list[str]:
        """Who ran, without repetitions."""
        return [entry for i, entry in enumerate(self.log) if i == 0 or entry != self.log[i - 1]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(("seconds", "min_time", "min_runs"), [(0.001, 0.5, 50), (0.5, 0.1, 30), (0.01, 1.0, 7)])
def test_time_and_runs_are_reached_and_every_sample_is_kept(
    clock: Clock, seconds: float, min_time: float, min_runs: int
) -> None:
    pair = measure([clock.maker("a", seconds), clock.maker("b", 2 * seconds)], min_time=min_time, min_runs=min_runs)
    for rounds, each in zip(pair, (seconds, 2 * seconds), strict=True):
        samples = np.concatenate(rounds)
        assert len(rounds) == min(bench.ROUNDS, min_runs)
        assert len(samples) >= min_runs
        assert samples.sum() / 1e3 >= min_time - 1e-9
        np.testing.assert_allclose(samples, each * 1e3)
        # Neither by much: a round ends with the run that reaches its share.
        assert samples.sum() / 1e3 < max(min_time + len(rounds) * each, 2 * min_runs * each)


def test_models_take_turns_in_changing_order(clock: Clock) -> None:
    measure([clock.maker("a", 0.01), clock.maker("b", 0.01)], min_time=0.8, min_runs=8, warmup=0)
    order = [entry for entry in clock.log if not entry.startswith("make")]
    rounds = np.array(order).reshape(8, -1)
    firsts = rounds[:, 0].tolist()
    assert firsts == ["a", "b"] * 4
    for line in rounds:
        assert sorted(set(line)) == ["a", "b"]
        assert (line[: len(line) // 2] == line[0]).all()
        assert (line[len(line) // 2 :] == line[-1]).all()


def test_cheap_sessions_are_made_anew_every_round_in_changing_order(clock: Clock) -> None:
    measure([clock.maker("a", 0.01, 0.001), clock.maker("b", 0.01, 0.001)], min_time=1, min_runs=20, warmup=1)
    made = [entry.removeprefix("make ") for entry in clock.log if entry.startswith("make")]
    assert len(made) == 2 * bench.ROUNDS
    assert made[:8] == ["a", "b", "a", "b", "b", "a", "b", "a"]


def test_expensive_sessions_are_kept(clock: Clock) -> None:
    measure([clock.maker("a", 0.01, creation=100.0)], min_time=1, min_runs=20, warmup=1)
    assert clock.log.count("make a") == 1


def test_renewal_takes_no_more_than_its_share(clock: Clock) -> None:
    (rounds,) = measure([clock.maker("a", 0.01, creation=0.08)], min_time=2, min_runs=20, warmup=1)
    spent = (clock.log.count("make a") - 1) * (0.08 + 0.01)
    measured = np.concatenate(rounds).sum() / 1e3
    assert 0 < spent <= bench.RENEWAL_SHARE * measured
    assert spent > 0.8 * bench.RENEWAL_SHARE * measured - 0.09


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
    (rounds,) = measure([lambda: bench.session_runner(path, feed, threads=1)], min_time=0.02, min_runs=20)
    samples = np.concatenate(rounds)
    assert len(samples) >= 20
    assert (samples > 0).all()
    assert samples.min() < 1e3


def test_bound_inputs_and_outputs_run(save_linear: Callable[..., Path]) -> None:
    """The GPU's way of running, with the CPU as the device."""
    session = create_session(save_linear("m.onnx", np.ones((64, 64))))
    run = bench.bound_runner(session, {"x": np.ones((4, 64), np.float32)}, "cpu")
    assert run() > 0
    assert run() > 0
