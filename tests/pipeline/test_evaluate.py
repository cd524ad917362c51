"""The ``eval`` stage from files to result, on models whose answers are known. No timing is asserted."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser
from pydantic import ValidationError

from prune_onnx.graph_ops import preprocessing
from prune_onnx.graph_ops.errors import ConfigError, DataError, ModelError, OutputError, ProviderError
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline import bench, environment, evaluate, execution, memory
from prune_onnx.pipeline.bench import Series
from prune_onnx.pipeline.eval_results import EvalResult
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.evaluate import evaluate as run_evaluate
from prune_onnx.pipeline.execution import Execution
from prune_onnx.pipeline.sessions import create_session

QUICK = {"min_time": 0.002, "min_runs": 4, "warmup": 1, "threads": 1}
CLASSES = 6
EYE = np.eye(CLASSES)
# Takes the first two classes for each other.
SWAPPED = EYE[[1, 0, 2, 3, 4, 5]]

Save = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """200 samples that the identity gets right but for every tenth."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, CLASSES)).astype(np.float32)
    y = x.argmax(1)
    y[::10] = (y[::10] + 3) % CLASSES
    path = tmp_path / "data.npz"
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the memory, which takes a process for every model."""
    monkeypatch.setattr(memory, "can_tell", lambda: False)


def run(model: Path, **options: Any) -> EvalResult:
    return run_evaluate(EvalConfig.model_validate({"model": model, **QUICK, **options}))


def test_result_has_the_keys_of_the_contract(save_linear: Save, data: Path) -> None:
    model, baseline = save_linear("m.onnx", SWAPPED), save_linear("b.onnx", EYE)
    result = run(model, baseline=baseline, data=str(data), batch_size=(1, 3), max_size="1MB", min_agreement=0.01)
    found = json.loads(result.to_json())
    assert found["schema_version"] == 1
    assert found["command"] == "eval"
    for side in ("model", "baseline"):
        assert {"params", "macs", "bytes", "latency_ms", "throughput_per_s", "accuracy"} <= set(found[side])
        assert {"mean", "p50", "p90", "p95", "p99", "cv", "runs"} <= set(found[side]["latency_ms"])
        assert set(found[side]["accuracy"]) == {"top1", "top5", "samples"}
    assert found["provider"] == "CPUExecutionProvider"
    assert set(found["speedup"]) == {"p50", "ci95"}
    assert {"top1", "max_abs_diff"} <= set(found["agreement"])
    assert all({"name", "limit", "value", "passed"} <= set(gate) for gate in found["gates"])
    assert [gate["name"] for gate in found["gates"]] == ["min-agreement", "max-size"]
    assert found["verdict"] == "passed"
    assert EvalResult.model_validate(found) == result


def test_figures_are_the_models(save_linear: Save, data: Path) -> None:
    model, baseline = save_linear("m.onnx", SWAPPED), save_linear("b.onnx", EYE)
    result = run(model, baseline=baseline, data=str(data))
    with np.load(data) as arrays:
        x, y = arrays["x"], arrays["y"]
    mine = (x @ SWAPPED).argmax(1)
    assert result.model.accuracy is not None
    assert result.model.accuracy.top1 == np.mean(mine == y)
    assert result.baseline is not None
    assert result.baseline.accuracy is not None
    assert result.baseline.accuracy.top1 == 0.9
    assert result.accuracy_change is not None
    assert result.accuracy_change.top1 == pytest.approx(np.mean(mine == y) - 0.9)
    assert result.agreement is not None
    assert result.agreement.top1 == np.mean(mine == x.argmax(1))
    assert (result.model.params, result.model.macs) == (CLASSES**2, CLASSES**2)
    assert result.model.bytes == model.stat().st_size
    latency = result.model.latency_ms
    assert 0 < latency.p50 <= latency.p90 <= latency.p95 <= latency.p99
    samples = np.concatenate(result.timings[0].samples_ms.model)
    assert latency.runs == len(samples)
    assert latency.p50 == pytest.approx(np.median(samples), abs=1e-5)
    assert result.model.throughput_per_s == pytest.approx(1e3 / latency.mean)


def test_batch_sizes_are_timed_one_by_one(save_linear: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Execution.runner
    monkeypatch.setattr(Execution, "runner", lambda self, model, feed: seen.append(feed["x"].shape) or real(
        self, model, feed))  # fmt: skip
    result = run(save_linear("m.onnx", EYE), batch_size=(2, 5))
    assert [timing.batch_size for timing in result.timings] == [2, 5]
    assert set(seen) == {(2, CLASSES), (5, CLASSES)}
    assert result.model.macs == CLASSES**2
    assert result.model.throughput_per_s == pytest.approx(2e3 / result.timings[0].model.mean)


def test_threads_are_swept_too_and_the_first_ones_count(save_linear: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Execution.session
    monkeypatch.setattr(Execution, "session", lambda self, *rest: seen.append(self.threads) or real(self, *rest))
    result = run(save_linear("m.onnx", EYE), threads=(2, 1), batch_size=(1, 4))
    assert [(each.threads, each.batch_size) for each in result.timings] == [(2, 1), (2, 4), (1, 1), (1, 4)]
    assert set(seen) == {1, 2}
    assert result.threads == 2
    assert result.model.latency_ms == result.timings[0].model
    assert run(save_linear("m.onnx", EYE), threads=1).threads == 1  # as a configuration file may say it


def test_what_a_run_and_a_session_take_is_told(save_linear: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    result = run(save_linear("m.onnx", EYE), baseline=save_linear("b.onnx", np.ones((CLASSES, 10**6))[:, :CLASSES]))
    for side in (result.model, result.baseline):
        assert side is not None
        assert side.creation_ms is not None
        assert 0 < side.creation_ms < 1e4
        assert side.latency_ms.cpu_ms is not None
        assert 0 < side.latency_ms.cpu_ms < 1e3
        assert side.copies_ms is None
        if memory.can_tell():
            assert side.peak_memory is not None
            assert 0 < side.peak_memory.host_bytes < 1e8
            assert side.peak_memory.device_bytes is None
    facts = result.execution
    assert facts is not None
    assert (facts.timed, facts.precision, facts.tf32, facts.layout) == ("host to host", "float", None, None)
    assert "gpu" not in result.environment


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads")
def test_pinned_threads_are_told_and_freed(save_linear: Save) -> None:
    before = os.sched_getaffinity(0)
    result = run(save_linear("m.onnx", EYE), threads=1, pin=True)
    assert result.execution is not None
    assert result.execution.pinned == [min(before)]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ConfigError, match="--pin: 10000 threads"):
        run(save_linear("m.onnx", EYE), threads=10_000, pin=True)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_is_timed_from_device_to_device_and_all_that_matters_is_recorded(
    provider: str, save_linear: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the place of the GPU."""
    opened = []

    def session(self: Execution, model: Path, feed: Any = None) -> Any:
        opened.append((self.cuda_graph, feed is not None))
        return create_session(model)

    monkeypatch.setattr(Execution, "session", session)
    monkeypatch.setattr(execution, "device_runner", functools.partial(execution.device_runner, device="cpu"))
    monkeypatch.setattr(evaluate, "copy_times", functools.partial(evaluate.copy_times, device="cpu"))
    facts = {"name": "Card", "slowed_by": ["temperature"]}
    monkeypatch.setattr(environment, "gpu_facts", lambda: facts)
    monkeypatch.setattr(environment, "library_versions", lambda: {"cudnn": "9.1.0"})
    cuda = {"cuda_layout": "nhwc", "tf32": False} if provider == "cuda" else {"engine_cache": tmp_path / "engines"}
    model = save_linear("m.onnx", EYE)
    result = run(model, baseline=save_linear("b.onnx", EYE), provider=provider, cuda_graph=True, **cuda)
    # What counts right answers is not recorded as a graph: its batches have several sizes.
    assert opened[:2] == [(False, False)] * 2
    assert set(opened[2:]) == {(True, True)}
    for side in (result.model, result.baseline):
        assert side is not None
        assert side.copies_ms is not None
        assert min(side.copies_ms.to_device, side.copies_ms.to_host) > 0
    told = result.execution
    assert told is not None
    assert (told.timed, told.cuda_graph) == ("device to device", True)
    if provider == "cuda":
        assert (told.layout, told.tf32, told.conv_search) == ("nhwc", False, "exhaustive")
        assert told.options["prefer_nhwc"] == told.options["enable_cuda_graph"] == "1"
    else:
        assert told.options["trt_engine_cache_enable"] == "True"
    assert result.environment["gpu"] == result.environment["gpu_after"] == facts
    assert result.environment["libraries"] == {"cudnn": "9.1.0"}
    assert any("GPU lowered its clocks: temperature" in hint for hint in result.hints)


def test_control_flow_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "if.onnx"
    text = """<ir_version: 9, opset_import: ["" : 17]> g (bool c, float[3] x) => (float[3] y) {
        [choice] y = If (c) <then_branch = a () => (float[3] p) { p = Relu(x) },
                             else_branch = b () => (float[3] q) { q = Neg(x) }> }"""
    onnx.save(parser.parse_model(text), path)
    with pytest.raises(ConfigError, match=r"choice \(If\)"):
        run(path, provider="cuda", cuda_graph=True)


def test_model_of_fixed_batch_is_fed_as_it_wants(save_linear: Save, data: Path) -> None:
    fixed, free = save_linear("f.onnx", EYE, batch=16), save_linear("m.onnx", EYE)
    result = run(fixed, baseline=free, data=str(data))
    assert result.timings[0].batch_size == 16
    assert result.model.accuracy == result.baseline.accuracy  # type: ignore[union-attr]
    assert result.model.accuracy.samples == 200  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"--batch-size 1, 4: the model takes batches of 16 only"):
        run(fixed, batch_size=(1, 4))


def test_without_data_random_inputs_of_the_models_own_shape(save_linear: Save) -> None:
    result = run(save_linear("m.onnx", EYE), baseline=save_linear("b.onnx", EYE))
    assert result.data == "random inputs"
    assert result.model.accuracy is None
    assert result.accuracy_change is None
    assert result.agreement is not None
    assert result.agreement.max_abs_diff == 0


def test_models_with_several_inputs_run_on_random_numbers_only(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "two.onnx"
    text = '<ir_version: 9, opset_import: ["" : 17]> g (float[N, 3] a, int64[N, 3] b) => (float[N, 3] y) {'
    onnx.save(parser.parse_model(text + " c = Cast<to = 1>(b)  y = Add(a, c) }"), path)
    assert run(path, batch_size=(4,)).timings[0].batch_size == 4
    with pytest.raises(ConfigError, match=r"one input only; this one has 2: a, b"):
        run(path, data=str(data))


def test_limit_takes_so_many_samples(save_linear: Save, data: Path) -> None:
    result = run(save_linear("m.onnx", EYE), data=str(data), limit=37)
    assert result.model.accuracy is not None
    assert result.model.accuracy.samples == 37


def test_the_baselines_preprocessing_serves_a_model_that_lost_its_own(tmp_path: Path, save_linear: Save) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 3, 2), np.uint8)
    recipe = Preprocessing(mean=(0.25,), std=(0.5,))
    text = f"""<ir_version: 9, opset_import: ["" : 17]> g (float[N, 1, 3, 2] x) => (float[N, {CLASSES}] y) {{
        f = Flatten(x)  y = MatMul(f, w) }}"""
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(EYE.astype(np.float32), "w"))
    bare, whole = tmp_path / "bare.onnx", tmp_path / "whole.onnx"
    onnx.save(model, bare)
    preprocessing.write(model, recipe)
    onnx.save(model, whole)
    archive = tmp_path / "images.npz"
    np.savez(archive, images=images, labels=recipe.apply(images).reshape(40, -1).argmax(1))
    result = run(bare, baseline=whole, data=str(archive))
    assert result.model.accuracy is not None
    assert result.model.accuracy.top1 == 1

    class Ears(Progress):
        said: list[str] = []  # noqa: RUF012

        def warn(self, message: str) -> None:
            self.said.append(message)

    preprocessing.write(model, Preprocessing(mean=(0.0,), std=(1.0,)))
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    run_evaluate(EvalConfig.model_validate({"model": other, "baseline": whole, "data": str(archive), **QUICK}), Ears())
    assert "different preprocessing" in Ears.said[0]


@pytest.mark.parametrize(
    ("gates", "verdict", "code"),
    [
        ({"max_size": "1MB", "max_accuracy_drop": "100pp"}, "passed", 0),
        ({"max_size": "10B", "max_accuracy_drop": "100pp"}, "failed", 3),
        ({"max_accuracy_drop": "1pp"}, "failed", 3),
        ({"min_agreement": "99%"}, "failed", 3),
        ({"max_latency_ms": "100s", "max_p99_ms": "1000s"}, "passed", 0),
        ({"max_latency_ms": "0.000001us"}, "failed", 3),
        ({"min_speedup": "1000x"}, "failed", 3),
        ({"min_speedup": "0.001x"}, "passed", 0),
    ],
)
def test_gates_make_the_verdict_and_the_exit_code(
    gates: dict[str, str], verdict: str, code: int, save_linear: Save, data: Path
) -> None:
    result = run(save_linear("m.onnx", SWAPPED), baseline=save_linear("b.onnx", EYE), data=str(data), **gates)
    assert (result.verdict, result.exit_code) == (verdict, code)
    assert all(gate.passed == (gate.verdict == "passed") for gate in result.gates)


def test_a_drop_that_the_samples_cannot_tell_from_the_limit_is_inconclusive(save_linear: Save, tmp_path: Path) -> None:
    x = np.eye(CLASSES, dtype=np.float32)[[0, *[2] * 30]]
    path = tmp_path / "few.npz"
    np.savez(path, x=x, y=x.argmax(1))
    model, baseline = save_linear("m.onnx", SWAPPED), save_linear("b.onnx", EYE)
    result = run(model, baseline=baseline, data=str(path), max_accuracy_drop="1pp")
    assert result.gates[0].value == pytest.approx(100 / 31)
    assert result.exit_code == 4
    assert "31 samples are too few" in " ".join(result.hints)


def steps(*seconds: float) -> Series:
    rounds = [np.full(10, t) for t in seconds * (20 // len(seconds))]
    return Series(rounds, [1.0] * 20, [1.0])


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict"),
    [
        (steps(1.0), steps(2.0), "passed"),
        (steps(1.0, 3.0), steps(2.0), "inconclusive"),
        (steps(1.0, 3.0), steps(2.0, 6.0), "passed"),
    ],
    ids=["steady", "noisy", "noisy-together"],
)
def test_unstable_times_without_gates_are_inconclusive(
    mine: Any, theirs: Any, verdict: str, save_linear: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, **__: [mine, theirs])
    result = run(save_linear("m.onnx", EYE), baseline=save_linear("b.onnx", EYE))
    assert result.verdict == verdict
    assert ("vary a lot" in " ".join(result.hints)) == (verdict == "inconclusive")


def test_p99_gate_takes_enough_runs_for_a_percentile(save_linear: Save) -> None:
    assert run(save_linear("m.onnx", EYE), max_p99_ms="10s").model.latency_ms.runs >= 200


# ---- what goes wrong


def test_models_that_differ_in_their_interface_are_refused(save_linear: Save) -> None:
    model = save_linear("m.onnx", EYE)
    for options in ({"source": "image"}, {"target": "logits"}):
        with pytest.raises(ModelError, match="cannot be compared"):
            run(model, baseline=save_linear("b.onnx", EYE, **options))
    with pytest.raises(ModelError, match="cannot be compared"):
        run(model, baseline=save_linear("b.onnx", np.eye(5)))


def test_a_gate_without_what_it_needs_is_refused_at_once(save_linear: Save, data: Path, tmp_path: Path) -> None:
    model = save_linear("m.onnx", EYE)
    with pytest.raises(ValidationError, match="min_speedup compares with a baseline"):
        run(model, min_speedup="1.3x")
    with pytest.raises(ValidationError, match="max_accuracy_drop needs data"):
        run(model, baseline=model, max_accuracy_drop="1pp")
    unlabelled = tmp_path / "x.npy"
    np.save(unlabelled, np.ones((3, CLASSES), np.float32))
    with pytest.raises(DataError, match="--max-accuracy-drop needs labels"):
        run(model, baseline=model, data=str(unlabelled), max_accuracy_drop="1pp")
    with pytest.raises(ValidationError, match="dataset and data exclude each other"):
        run(model, dataset="digits", data=str(data))


@pytest.mark.parametrize("option", ["html", "markdown", "report"])
def test_existing_outputs_are_refused_before_any_work(
    option: str, save_linear: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(evaluate.Execution, "session", no_work)
    model, there = save_linear("m.onnx", EYE), tmp_path / "there"
    there.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        run(model, **{option: there})
    with pytest.raises(OutputError, match="an input file is never changed"):
        run(model, **{option: model, "force": True})
    assert there.read_text() == "precious"


def test_reports_are_written_and_the_summary_is_appended(
    save_linear: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = {"html": tmp_path / "new" / "r.html", "markdown": tmp_path / "r.md", "report": tmp_path / "r.json"}
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    result = run(save_linear("m.onnx", EYE), github_summary=True, **outputs)
    assert "<!doctype html>" in outputs["html"].read_text()
    assert json.loads(outputs["report"].read_text()) == json.loads(result.to_json())
    assert summary.read_text() == "before\n" + outputs["markdown"].read_text() + "\n"
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    with pytest.raises(ConfigError, match="inside GitHub Actions only"):
        run(save_linear("m.onnx", EYE), github_summary=True)


def test_a_missing_provider_is_an_error_and_writes_nothing(save_linear: Save, tmp_path: Path) -> None:
    try:
        onnxruntime.InferenceSession(
            save_linear("m.onnx", EYE), providers=["CUDAExecutionProvider"], enable_fallback=0
        ).get_providers().index("CUDAExecutionProvider")
    except Exception:
        with pytest.raises(ProviderError, match="cuda was asked for"):
            run(save_linear("m.onnx", EYE), provider="cuda", html=tmp_path / "r.html")
        assert not (tmp_path / "r.html").exists()
    else:
        pytest.skip("CUDA works on this machine")


def test_external_data_counts_as_size(tmp_path: Path, save_linear: Save) -> None:
    weight = np.ones((64, 64))
    model = onnx.load(save_linear("m.onnx", weight))
    outside = tmp_path / "e.onnx"
    onnx.save(model, outside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = run(outside, baseline=tmp_path / "m.onnx")
    assert result.model.bytes == outside.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    assert result.model.bytes > weight.size * 4
    assert result.agreement is not None
    assert result.agreement.max_abs_diff == 0


def test_json_keeps_numbers_together_and_texts_as_they_are(save_linear: Save) -> None:
    result = run(save_linear("m.onnx", EYE))
    result.hints = ["limits [1,  2]\n[\n3 ]"]
    text = result.to_json()
    assert json.loads(text) == json.loads(result.model_dump_json())
    assert len(text.splitlines()) < 150
