"""Limits as users write them, and verdicts at their edges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.gates import GATES, overall

BY_NAME = {gate.name: gate for gate in GATES}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("min-speedup", "1.3x", 1.3),
        ("min-speedup", "1.3", 1.3),
        ("min-speedup", 2, 2),
        ("min-speedup", " 1.05 X ", 1.05),
        ("min-speedup", "2×", 2),
        ("max-latency-ms", "2.5", 2.5),
        ("max-latency-ms", "800us", 0.8),
        ("max-latency-ms", ".5 s", 500),
        ("max-p99-ms", "1e1ms", 10),
        ("max-accuracy-drop", "0.5pp", 0.5),
        ("max-accuracy-drop", "0", 0),
        ("max-size", "2MB", 2e6),
        ("max-size", "500kB", 5e5),
        ("max-size", "1MiB", 2**20),
        ("max-size", 123456, 123456),
        ("min-agreement", "99%", 0.99),
        ("min-agreement", "0.985", 0.985),
        ("min-agreement", None, None),
    ],
)
def test_limits_are_read(name: str, text: object, value: float | None) -> None:
    assert BY_NAME[name].parse(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("min-speedup", "30%"),
        ("min-speedup", "fast"),
        ("min-speedup", "-2x"),
        ("min-speedup", "0"),
        ("min-speedup", True),
        ("min-speedup", "nan"),
        ("max-accuracy-drop", "0.5%"),
        ("max-size", "2 mb/s"),
        ("max-size", ""),
        ("max-latency-ms", "2 min"),
        ("min-agreement", "0.99pp"),
    ],
)
def test_what_is_no_limit_names_the_flag_and_shows_a_good_one(name: str, text: object) -> None:
    with pytest.raises(ConfigError, match=rf"^--{name} .*give a number like ") as caught:
        BY_NAME[name].parse(text)
    assert str(text) in str(caught.value)


def test_every_example_is_a_limit_of_its_gate() -> None:
    for gate in GATES:
        for example in gate.example.split(" (")[0].split(" or "):
            assert gate.parse(example)


def test_every_gate_is_an_option_and_parses_there() -> None:
    for gate in GATES:
        given_limit = EvalConfig.model_validate(
            {"model": "m.onnx", "baseline": "b.onnx", "dataset": "digits", "metric": "m:f"}
            | {gate.field: gate.example.split(" ")[0]}
        )
        assert getattr(given_limit, gate.field) == gate.parse(gate.example.split(" ")[0])
        with pytest.raises(ConfigError, match=f"--{gate.name} nonsense"):
            EvalConfig.model_validate({"model": "m.onnx", gate.field: "nonsense"})


@pytest.mark.parametrize(
    ("low", "value", "high", "verdict"),
    [(1.31, 1.4, 1.5, "passed"), (1.3, 1.3, 1.3, "passed"), (1.2, 1.3, 1.4, "inconclusive"), (1.1, 1.2, 1.2, "failed")],
)
def test_speedup_passes_with_its_whole_interval_only(low: float, value: float, high: float, verdict: str) -> None:
    assert BY_NAME["min-speedup"].judge(1.3, value, low, high) == verdict


@pytest.mark.parametrize(
    ("low", "value", "high", "verdict"),
    [(1.8, 1.9, 2.0, "passed"), (1.9, 1.95, 2.1, "inconclusive"), (2.05, 2.1, 2.2, "failed")],
)
def test_latency_passes_with_its_whole_interval_only(low: float, value: float, high: float, verdict: str) -> None:
    assert BY_NAME["max-latency-ms"].judge(2.0, value, low, high) == verdict


@pytest.mark.parametrize(
    ("low", "value", "high", "verdict"),
    [(-0.3, 0.2, 0.7, "passed"), (0.0, 0.5, 1.0, "passed"), (0.1, 0.6, 1.1, "inconclusive"), (0.6, 0.9, 1.2, "failed")],
)
def test_accuracy_drop_passes_by_what_was_measured_and_fails_beyond_doubt(
    low: float, value: float, high: float, verdict: str
) -> None:
    assert BY_NAME["max-accuracy-drop"].judge(0.5, value, low, high) == verdict


def test_rounding_does_not_break_a_limit_that_is_met() -> None:
    drop = 100 * (0.981 - 0.976)
    assert drop > 0.5
    assert BY_NAME["max-accuracy-drop"].judge(0.5, drop, drop, drop) == "passed"


@given(
    st.sampled_from(GATES),
    st.floats(0.01, 1e6),
    st.tuples(*[st.floats(0.01, 1e6)] * 3).map(sorted),
)
def test_verdicts_follow_the_interval(gate: object, limit: float, measured: list[float]) -> None:
    """Never passed when nothing keeps the limit, never failed when everything does, and a point is never unclear."""
    low, value, high = measured
    verdict = gate.judge(limit, value, low, high)  # type: ignore[attr-defined]
    keeps = [edge >= limit if gate.at_least else edge <= limit for edge in (low, high)]  # type: ignore[attr-defined]
    if all(keeps):
        assert verdict == "passed"
    if not any(keeps) and all(abs(edge - limit) > 1e-6 * limit for edge in (low, high)):
        assert verdict == "failed"
    assert gate.judge(limit, value, value, value) != "inconclusive"  # type: ignore[attr-defined]


def test_gates_decide_and_without_them_the_measurement_is_judged() -> None:
    assert overall(["passed", "inconclusive", "failed"], stable=True) == "failed"
    assert overall(["passed", "inconclusive"], stable=True) == "inconclusive"
    assert overall(["passed", "passed"], stable=False) == "passed"
    assert overall([], stable=True) == "passed"
    assert overall([], stable=False) == "inconclusive"
