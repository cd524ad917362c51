"""The scripts that measure ``eval`` itself: their models, their verdicts, and the GPU's benchmark on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from prune_onnx.pipeline.sessions import create_session, run_session

FOLDER = Path(__file__).parents[2] / "benchmarks"
Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scripts find the modules beside them, as ``python benchmarks/NAME.py`` does."""
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_side_work_is_done_and_changes_nothing(save_linear: Save, tmp_path: Path) -> None:
    model = onnx.load(save_linear("m.onnx", np.random.default_rng(0).standard_normal((6, 4))))
    slower = script("eval_bars").with_side_work(model, 5)
    onnx.checker.check_model(slower)
    feed = {"x": np.random.default_rng(1).standard_normal((2, 6)).astype(np.float32)}
    (before,), (after,) = (run_session(create_session(each), feed) for each in (model, slower))
    np.testing.assert_array_equal(before, after)
    # What ONNX Runtime makes of it still has the products.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(slower.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    assert sum(node.op_type == "MatMul" for node in optimized.graph.node) == 6


def test_every_bar_can_be_missed() -> None:
    bars = script("eval_bars")

    def runs(*intervals: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"ci95": each, "speedup": sum(each) / 2} for each in intervals]

    def met(**changes: Any) -> list[bool]:
        good = {
            "identical": runs(*[(0.98, 1.03)] * 20),
            "slower": runs((0.8, 0.9)),
            "bare_loop": [{"threads": 1, "our_p50_ms": 1.0, "bare_p50_ms": 1.0, "ratio": 1.01, "ci95": (1.0, 1.02)}],
            "command_overhead_s": [(1.0, 0.5), (5.0, 0.5), (1.5, 0.5)],
        }
        return [each for _, _, each in bars.verdicts(good | changes)]

    assert met() == [True] * 5
    one, two = [(0.9, 0.99)], [(0.9, 0.99)] * 2
    assert met(identical=runs(*one, *[(0.9, 1.1)] * 19)) == [True] * 5
    assert met(identical=runs(*two, *[(0.9, 1.1)] * 18)) == [False, True, True, True, True]
    assert met(identical=runs((1.01, 1.1), *[(0.9, 1.1)] * 19)) == [True, False, True, True, True]
    assert met(slower=runs((0.8, 0.9), (0.8, 1.01))) == [True, True, False, True, True]
    far = {"threads": 1, "our_p50_ms": 1.0, "bare_p50_ms": 1.0, "ratio": 0.96, "ci95": (0.9, 1.02)}
    assert met(bare_loop=[far]) == [True, True, True, False, True]
    assert met(command_overhead_s=[(2.5, 0.5), (1.0, 0.5), (2.5, 0.5)]) == [True, True, True, True, False]


def test_the_gpus_benchmark_writes_both_files_and_names_what_is_missing(save_linear: Save, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        provider, reason = "cuda", "cuda was asked for, but"
    else:
        provider, reason = "tensorrt", "is built without"
    # Two layers, so that there is a group to slim.
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[N, 16] x) => (float[N, 4] y) {
        h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, b) }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("a", (16, 64)), ("b", (64, 4))):
        weight = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    path, out = tmp_path / "two.onnx", tmp_path / "gpu"
    onnx.save(model, path)
    options = ["--batch-size", "1,3", "--min-time", "0.01", "--out", str(out)]
    command = [sys.executable, str(FOLDER / "gpu.py"), str(path), *options, "--providers"]
    done = subprocess.run([*command, f"cpu,{provider}"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(out.with_suffix(".json").read_text())
    assert [(row["provider"], row["batch"]) for row in found["rows"]][:2] == [("cpu", 1), ("cpu", 3)]
    assert all(row["macs_ratio"] == pytest.approx(2, rel=0.1) for row in found["rows"])
    shown = out.with_suffix(".md").read_text()
    assert shown.count("| two | cpu | ") == 2
    assert done.stdout.strip() == shown.strip()
    if found["missing"]:
        assert f"* Not measured: two, {provider}, " in shown
        assert reason in shown


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.parametrize("name", ["eval_bars", "train_cost"])
def test_pages_of_bars_say_what_is_stored(name: str) -> None:
    path = FOLDER / "results" / f"{name}.json"
    assert script(name).markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text()
