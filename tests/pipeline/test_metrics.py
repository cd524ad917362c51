"""A metric of the user's own: how it is found and called, its interval, and whose fault an error is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prune_onnx.graph_ops.errors import ConfigError, DataError
from prune_onnx.pipeline import metrics
from prune_onnx.pipeline.metrics import Metric


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, which is not on the path; its name is new in every test."""
    name = f"scores_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "def right(outputs, labels):\n"
        "    return (outputs[0].argmax(1) == labels).mean()\n"
        "def broken(outputs, labels):\n"
        "    values = []\n"
        "    return values[3]\n"
        "def text(outputs, labels):\n"
        "    return 'good'\n"
        "def infinite(outputs, labels):\n"
        "    return float('inf')\n"
        "def needs_class_0(outputs, labels):\n"
        "    if not (labels == 0).any():\n"
        "        raise ValueError('no sample of class 0')\n"
        "    return 0.5\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def scores(seed: int, right: float, labels: np.ndarray) -> list[np.ndarray]:
    """Outputs that give the label with probability ``right``."""
    rng = np.random.default_rng(seed)
    answers = np.where(rng.random(len(labels)) < right, labels, (labels + 1) % 5)
    return [np.eye(5)[answers]]


def test_the_function_of_the_current_folder_is_called_with_all_samples(module: str) -> None:
    labels = np.arange(50) % 5
    assert Metric.find(f"{module}:right")(scores(0, 1.0, labels), labels) == 1


def test_change_has_a_paired_interval_that_covers_the_truth(module: str) -> None:
    metric, inside = Metric.find(f"{module}:right"), 0
    labels = np.arange(400) % 5
    for seed in range(20):
        mine, theirs, change = metric.change(scores(2 * seed, 0.8, labels), scores(2 * seed + 1, 0.9, labels), labels)
        assert change.value == mine - theirs
        assert change.ci95 is not None
        inside += change.ci95[0] <= -0.1 <= change.ci95[1]
    assert inside >= 17


def test_models_that_answer_alike_have_a_change_of_exactly_nothing(module: str) -> None:
    labels = np.arange(100) % 5
    outputs = scores(0, 0.7, labels)
    assert Metric.find(f"{module}:right").change(outputs, outputs, labels)[2].ci95 == (0, 0)


def test_slow_functions_and_those_that_a_resample_breaks_have_no_interval(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.array([0, 1, 2, 3, 4])
    outputs = scores(0, 1.0, labels)
    assert Metric.find(f"{module}:needs_class_0").change(outputs, outputs, labels)[2].ci95 is None
    assert Metric.find(f"{module}:right").change(outputs, outputs, labels)[2].ci95 is not None
    monkeypatch.setattr(metrics, "BUDGET_S", 0.0)
    assert Metric.find(f"{module}:right").change(outputs, outputs, labels)[2].ci95 is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("right", "give package.module:function"),
        (":right", "give package.module:function"),
        ("no_such_module:right", "cannot import 'no_such_module' of metric"),
        ("{module}:rigth", "has no function 'rigth'. Did you mean 'right'"),
        ("{module}:number", "has no function 'number'"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_usage_error(module: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Metric.find(name.format(module=module))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", r"fails: IndexError: list index out of range \(\w+\.py, line 5\)\.$"),
        ("text", "must return a number, not str"),
        ("infinite", "returned inf; it must return a finite number"),
    ],
)
def test_an_error_in_the_function_is_one_line_that_says_where(module: str, function: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Metric.find(f"{module}:{function}")([np.zeros((2, 3))], None)
    assert "\n" not in str(caught.value)
