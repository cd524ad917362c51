"""A stored result in the place of a baseline: what is refused, and what the intervals cover."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from prune_onnx.graph_ops.errors import ConfigError, DataError
from prune_onnx.pipeline import compare
from prune_onnx.pipeline.eval_results import Accuracy, EvalResult, Latency
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.evaluate import evaluate

QUICK = {"min_time": 0.002, "min_runs": 4, "warmup": 1, "threads": 1}
EYE = np.eye(6)

Save = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path) -> str:
    x = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x.argmax(1))
    return str(tmp_path / "data.npz")


@pytest.fixture
def stored(save_linear: Save, data: str, tmp_path: Path) -> Path:
    """The result of an earlier evaluation of a model that is always right."""
    path = tmp_path / "earlier.json"
    run(save_linear("earlier.onnx", EYE), data=data, report=path)
    return path


def run(model: Path, **options: Any) -> EvalResult:
    return evaluate(EvalConfig.model_validate({"model": model, **QUICK, **options}))


def edited(path: Path, **changes: Any) -> Path:
    """Change top-level keys of a stored result; ``environment`` is merged."""
    values = json.loads(path.read_text())
    values["environment"] |= changes.pop("environment", {})
    path.write_text(json.dumps(values | changes))
    return path


def test_the_stored_model_stands_for_the_baseline(save_linear: Save, stored: Path, data: str) -> None:
    model = save_linear("m.onnx", EYE[[1, 0, 2, 3, 4, 5]])
    result = run(model, compare=stored, data=data, max_accuracy_drop="1pp", min_speedup="0.001x")
    before = EvalResult.model_validate_json(stored.read_bytes())
    assert result.baseline == before.model
    assert result.compared_with is not None
    assert result.compared_with.date == before.environment["date"]
    assert result.compared_with.differences == []
    assert result.speedup is not None
    assert result.speedup.p50 == pytest.approx(before.model.latency_ms.p50 / result.model.latency_ms.p50)
    assert result.speedup.ci95[0] <= result.speedup.p50 <= result.speedup.ci95[1]
    assert result.timings[0].samples_ms.baseline == before.timings[0].samples_ms.model
    assert result.accuracy_change is not None
    assert result.model.accuracy is not None
    assert result.accuracy_change.top1 == pytest.approx(result.model.accuracy.top1 - 1)
    assert result.agreement is None
    assert [gate.name for gate in result.gates] == ["min-speedup", "max-accuracy-drop"]
    assert result.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {"cpu": "another"}}, "CPU another there, .* here"),
        ({"environment": {"cores": 512}}, "cores 512 there, "),
        ({"environment": {"gpu": {"name": "A GPU"}}}, "GPU A GPU there, None here"),
        ({"provider": "CUDAExecutionProvider"}, "provider CUDAExecutionProvider there, CPUExecutionProvider here"),
    ],
    ids=["cpu", "cores", "gpu", "provider"],
)
def test_what_was_measured_elsewhere_is_refused_unless_told(
    changes: dict[str, Any], message: str, save_linear: Save, stored: Path
) -> None:
    model, path = save_linear("m.onnx", EYE), edited(stored, **changes)
    with pytest.raises(ConfigError, match=f"measured otherwise: {message}.*\n.*--compare-anyway") as caught:
        run(model, compare=path)
    assert len(str(caught.value).splitlines()) == 2
    result = run(model, compare=path, compare_anyway=True)
    assert result.compared_with is not None
    assert len(result.compared_with.differences) == 1


def test_another_number_of_threads_is_refused(save_linear: Save, stored: Path) -> None:
    with pytest.raises(ConfigError, match="threads 1 there, 2 here"):
        run(save_linear("m.onnx", EYE), compare=stored, threads=2)
    assert run(save_linear("m.onnx", EYE), compare=stored, threads=2, compare_anyway=True).speedup is not None


def test_another_batch_size_is_refused(save_linear: Save, stored: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no times for batch 4, only for 1. Give --batch-size 1"):
        run(save_linear("m.onnx", EYE), compare=stored, batch_size=4, compare_anyway=True)


def test_another_runtime_is_a_note(save_linear: Save, stored: Path) -> None:
    versions = json.loads(stored.read_text())["environment"]["versions"]
    versions = {name: "1.2.3" if name.startswith("onnxruntime") else version for name, version in versions.items()}
    result = run(save_linear("m.onnx", EYE), compare=edited(stored, environment={"versions": versions}))
    assert any("ONNX Runtime 1.2.3" in hint for hint in result.hints)


def test_accuracy_on_other_data_is_not_compared(save_linear: Save, stored: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)
    np.savez(tmp_path / "other.npz", x=x, y=x.argmax(1))
    options = {"compare": stored, "data": str(tmp_path / "other.npz")}
    assert run(save_linear("m.onnx", EYE), **options).accuracy_change is None
    with pytest.raises(DataError, match=r"--max-accuracy-drop: .* has no accuracy on "):
        run(save_linear("m.onnx", EYE), **options, max_accuracy_drop="1pp")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "is not a result of eval"),
        ('{"command": "slim"}', "is the result of slim"),
        ('{"command": "eval"}', "is no complete result of eval"),
        ('{"command": "eval", "schema_version": 99}', "written by a newer prune-onnx"),
    ],
)
def test_other_files_are_refused_in_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        compare.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"baseline": "b.onnx", "compare": "r.json"}, "baseline and compare exclude each other"),
        ({"compare_anyway": True}, "compare_anyway needs compare"),
        ({"compare": "r.json", "data": "d.npz", "min_agreement": 0.9}, "min_agreement compares with a baseline"),
    ):
        with pytest.raises(ValidationError, match=message):
            EvalConfig.model_validate({"model": "m.onnx", **options})


def latency(p50: float, low: float, high: float) -> Latency:
    return Latency(mean=p50, p50=p50, p90=p50, p95=p50, p99=p50, cv=0.1, runs=9, p50_ci95=(low, high))


def test_speedup_is_as_wide_as_both_sides_together() -> None:
    found = compare.speedup(latency(2.0, 1.8, 2.2), latency(1.0, 0.9, 1.1))
    one = compare.speedup(latency(2.0, 1.8, 2.2), latency(1.0, 1.0, 1.0))
    assert found.p50 == one.p50 == pytest.approx(2)
    assert one.ci95 == pytest.approx((1.8, 2.2))
    assert found.ci95[0] < one.ci95[0] < one.ci95[1] < found.ci95[1]
    back = compare.speedup(latency(1.0, 0.9, 1.1), latency(2.0, 1.8, 2.2))
    assert back.ci95 == pytest.approx((1 / found.ci95[1], 1 / found.ci95[0]))


@pytest.mark.parametrize(("before", "after", "n"), [(0.9, 0.85, 400), (0.99, 0.99, 200), (0.5, 0.7, 100)])
def test_interval_of_independent_accuracies_covers_the_truth(before: float, after: float, n: int) -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for k, b in zip(rng.binomial(n, after, 2000), rng.binomial(n, before, 2000), strict=True):
        mine, theirs = (Accuracy(top1=hits / n, top5=1.0, samples=n) for hits in (k, b))
        _, low, high = compare.difference(*(compare.wilson(side.top1, n) for side in (mine, theirs)))
        inside += low <= after - before <= high
    assert 0.93 <= inside / 2000 <= 0.995
