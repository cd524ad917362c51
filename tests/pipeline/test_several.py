"""Several models in one evaluation, their Pareto front, the layers, the profile and the user's metric."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_onnx.graph_ops.errors import DataError, ModelError
from prune_onnx.pipeline.count import count
from prune_onnx.pipeline.eval_results import EvalResult
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.evaluate import evaluate
from prune_onnx.pipeline.layers import layers
from prune_onnx.pipeline.pareto import front
from prune_onnx.pipeline.profiles import node_times, times_of
from prune_onnx.pipeline.sessions import create_session

from ..graph_ops.builder import Net

QUICK = {"min_time": 0.002, "min_runs": 4, "warmup": 1, "threads": 1}
EYE = np.eye(6)
SWAPPED = EYE[[1, 0, 2, 3, 4, 5]]

Save = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path) -> str:
    x = np.random.default_rng(0).standard_normal((90, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x.argmax(1))
    return str(tmp_path / "data.npz")


def run(model: Path, **options: Any) -> EvalResult:
    return evaluate(EvalConfig.model_validate({"model": model, **QUICK, **options}))


# ---- several models


def test_each_is_judged_as_it_would_be_alone(save_linear: Save, data: str, tmp_path: Path) -> None:
    base, a, b = save_linear("base.onnx", EYE), save_linear("a.onnx", SWAPPED), save_linear("b.onnx", EYE)
    gates = {"max_accuracy_drop": "1pp", "min_agreement": 0.99}
    result = run(a, more=[b], baseline=base, data=data, report=tmp_path / "r.json", **gates)
    alone = run(a, baseline=base, data=data, **gates)
    assert [Path(each.model.file) for each in result.candidates] == [a, b]
    first, second = result.candidates
    assert first.accuracy_change == result.accuracy_change == alone.accuracy_change
    assert first.agreement == alone.agreement
    assert first.gates == result.gates == alone.gates
    assert (first.verdict, second.verdict) == ("failed", "passed")
    assert (result.verdict, result.exit_code) == ("failed", 3)
    assert second.accuracy_change is not None
    assert second.accuracy_change.top1 == 0
    assert all(each.speedup is not None for each in result.candidates)
    found = json.loads((tmp_path / "r.json").read_text())
    assert EvalResult.model_validate(found) == result
    assert set(found) == set(json.loads(alone.to_json())), "the contract of one model holds for several"
    assert alone.candidates == []


def test_several_without_a_baseline_or_data_are_just_measured(save_linear: Save) -> None:
    result = run(save_linear("a.onnx", EYE), more=[save_linear("b.onnx", EYE)])
    assert [each.speedup for each in result.candidates] == [None, None]
    assert sum(each.on_front for each in result.candidates) >= 1


def test_a_model_that_cannot_be_compared_is_refused(save_linear: Save) -> None:
    other = save_linear("b.onnx", EYE, source="image")
    with pytest.raises(ModelError, match="cannot be compared"):
        run(save_linear("a.onnx", EYE), more=[other], baseline=save_linear("base.onnx", EYE))


points = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points)
def test_the_front_is_what_nothing_beats_and_beats_all_else(models: list[tuple[int, int]]) -> None:
    chosen = front(models)

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    best = [model for model, on in zip(models, chosen, strict=True) if on]
    assert best
    for model, on in zip(models, chosen, strict=True):
        assert on == (not any(beats(other, model) for other in models))
        assert on or any(beats(other, model) for other in best)


# ---- the user's metric


def test_a_metric_stands_beside_accuracy_and_has_a_gate(
    save_linear: Save, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_scores.py").write_text(
        "def right(outputs, labels):\n    return (outputs[0].argmax(1) == labels).mean()\n"
        "def fails(outputs, labels):\n    raise RuntimeError('no such class')\n"
    )
    monkeypatch.chdir(tmp_path)
    model, base = save_linear("m.onnx", SWAPPED), save_linear("b.onnx", EYE)
    result = run(model, baseline=base, data=data, metric="own_scores:right", max_metric_drop=0.01)
    assert result.model.accuracy is not None
    assert result.model.metric == result.model.accuracy.top1
    assert result.metric_change is not None
    assert result.accuracy_change is not None
    assert result.metric_change.value == pytest.approx(result.accuracy_change.top1)
    (gate,) = result.gates
    assert (gate.name, gate.verdict) == ("max-metric-drop", "failed")
    assert gate.value == pytest.approx(-result.metric_change.value)
    assert gate.ci95[0] <= gate.value <= gate.ci95[1]
    alone = run(model, data=data, metric="own_scores:right")
    assert (alone.model.metric, alone.metric_change) == (result.model.metric, None)
    with pytest.raises(DataError, match=r"metric own_scores:fails fails: RuntimeError: no such class \(own_scores.py"):
        run(model, data=data, metric="own_scores:fails")


# ---- memory


def test_a_limit_on_memory_holds_the_peak_of_a_process_of_its_own(save_linear: Save) -> None:
    model = save_linear("m.onnx", EYE)
    assert run(model, max_memory="2GiB").verdict == "passed"
    result = run(model, max_memory="1B")
    assert result.model.peak_memory is not None
    assert (result.verdict, result.gates[0].value) == ("failed", result.model.peak_memory.host_bytes)


# ---- layers


def net(widths: tuple[int, int]) -> onnx.ModelProto:
    made = Net()
    y = made.relu(made.conv(made.input(1, 3, 8, 8), widths[0]))
    return made.model(made.head(made.conv(y, widths[1])))


def test_layers_keep_their_names_and_order() -> None:
    before, after = count(net((8, 6))), count(net((4, 6)))
    found = layers(before, after)
    assert [(layer.op_type, layer.before, layer.after) for layer in found][:2] == [("Conv", 8, 4), ("Conv", 6, 6)]
    assert [layer.before for layer in found] == [layer.after for layer in layers(before, before)]
    assert len({layer.name for layer in found}) == len(found)


def test_a_layer_that_is_gone_keeps_nothing() -> None:
    after = count(net((4, 6)))
    for node in after.graph.nodes:
        node.name += "_renamed"
    assert all(layer.after == 0 for layer in layers(count(net((8, 6))), after))


# ---- profile


def test_times_of_nodes_come_from_the_middle_of_the_runs() -> None:
    events = []
    for run_, durations in enumerate(([90, 90], [10, 5], [12, 5], [11, 5], [99, 5])):
        start = 1000 * run_
        events.append({"cat": "Session", "name": "model_run", "ts": start, "dur": 500})
        for node, (name, duration) in enumerate(zip(("conv_nchwc", "add"), durations, strict=True)):
            event = {"cat": "Node", "ts": start + node + 1, "dur": duration, "args": {"op_name": "Op"}}
            events.append({**event, "name": f"{name}_kernel_time"})
            events.append({**event, "name": f"{name}_fence_before"})
    conv, add = times_of(events, skip=1)
    assert (conv.name, add.name) == ("conv", "add")
    assert (conv.ms, add.ms) == (0.0115, 0.005)


def test_a_node_that_runs_twice_in_a_run_counts_twice() -> None:
    events = [{"cat": "Session", "name": "model_run", "ts": 0, "dur": 50}]
    events += [
        {"cat": "Node", "name": "body_kernel_time", "ts": ts, "dur": 10, "args": {"op_name": "Add"}} for ts in (1, 20)
    ]
    assert times_of(events)[0].ms == 0.02


def test_every_node_that_ran_is_in_the_profile(tmp_path: Path) -> None:
    onnx.save(net((8, 6)), tmp_path / "net.onnx")
    feed = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    before = set(tmp_path.iterdir())
    found, runs = node_times(
        lambda profile: create_session(tmp_path / "net.onnx", threads=1, profile=profile), feed
    )
    assert 3 <= runs <= 20
    assert sum(node.op_type in ("Conv", "FusedConv") for node in found) == 2
    assert all(node.ms >= 0 for node in found)
    assert set(tmp_path.iterdir()) == before


def test_profile_is_made_for_reports_and_when_asked(save_linear: Save, tmp_path: Path) -> None:
    model, base = save_linear("m.onnx", EYE), save_linear("b.onnx", EYE)
    assert run(model).profile is None
    assert run(model, profile=False, html=tmp_path / "a.html").profile is None
    profile = run(model, baseline=base, profile=True).profile
    assert profile is not None
    assert profile.baseline is not None
    assert {node.op_type for node in profile.model} == {node.op_type for node in profile.baseline}
    assert "Where the time goes" in (run(model, html=tmp_path / "b.html"), (tmp_path / "b.html").read_text())[1]
