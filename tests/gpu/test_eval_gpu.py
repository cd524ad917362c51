"""``eval`` on a real GPU: right outputs in every mode, nothing left to the CPU, and figures that make sense."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from prune_onnx.graph_ops.errors import ConfigError, ProviderError
from prune_onnx.pipeline.eval_results import EvalResult
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.evaluate import evaluate
from prune_onnx.pipeline.execution import Execution, copy_times
from prune_onnx.pipeline.gpu import device_memory, gpu_facts, library_versions
from prune_onnx.pipeline.sessions import create_session

pytestmark = pytest.mark.gpu
Save = Callable[..., Path]
QUICK = {"provider": "cuda", "min_time": 0.05, "min_runs": 20}
MODES = [
    {"cuda_layout": layout, "tf32": tf32, "cuda_graph": graph}
    for layout, tf32, graph in itertools.product(("nchw", "nhwc"), (True, False), (False, True))
]


def run(model: Path, **options: Any) -> EvalResult:
    return evaluate(EvalConfig.model_validate({"model": model, **QUICK, **options}))


def outputs(execution: Execution, model: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    """Run as it is timed, three times, and return what lies in the output's buffer."""
    from onnxruntime import OrtValue

    from prune_onnx.pipeline import execution as module

    kept: list[OrtValue] = []
    real = module._bound

    def keep(*arguments: Any) -> Any:
        found = real(*arguments)
        kept.extend(found[2])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_bound", keep)
        once = execution.runner(model, feed)
    for _ in range(3):
        assert once() > 0
    return kept[0].numpy()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(f"{k}={v}" for k, v in mode.items()))
@pytest.mark.parametrize("batch", [1, 8])
def test_every_mode_computes_what_the_cpu_computes(save_net: Save, mode: dict[str, Any], batch: int) -> None:
    model = save_net()
    feed = {"x": np.random.default_rng(1).standard_normal((batch, 3, 32, 32)).astype(np.float32)}
    (expected,) = create_session(model).run(None, feed)
    found = outputs(Execution(provider="cuda", **mode), model, feed)
    # TF32 has 10 bits of mantissa, and errors of seven layers add up. Some versions of ONNX Runtime compute NHWC in
    # TF32 whatever they are told.
    exact = mode["cuda_layout"] == "nchw" and not mode["tf32"]
    assert np.abs(found - expected).max() <= (1e-4 if exact else 2e-2) * np.abs(expected).max()


def test_float16_models_run_as_they_are(save_net: Save) -> None:
    result = run(save_net(kind=onnx.TensorProto.FLOAT16))
    assert result.execution is not None
    assert result.execution.precision == "float16"


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_eval_tells_what_a_gpu_figure_depends_on(save_net: Save, cuda_graph: bool) -> None:
    result = run(save_net("a.onnx"), baseline=save_net("b.onnx", width=128), cuda_graph=cuda_graph, batch_size=(1, 16))
    assert result.provider == "CUDAExecutionProvider"
    assert result.execution is not None
    assert result.execution.timed == "device to device"
    assert result.model.copies_ms is not None
    assert 0 < result.model.copies_ms.to_device < 100
    versions = result.environment["libraries"]
    assert {"cuda", "cudnn"} <= set(versions)
    if gpu_facts() is not None:
        assert result.environment["gpu_after"]["clocks_mhz"]["sm"] > 0
        assert result.model.peak_memory is not None
        assert result.model.peak_memory.device_bytes is not None
        assert result.model.peak_memory.device_bytes > 0
    assert result.timings[1].model.p50 > 0


def test_copies_take_longer_for_more(save_net: Save) -> None:
    model = save_net()
    session = create_session(model, "cuda")
    one, many = (copy_times(session, {"x": np.zeros((n, 3, 32, 32), np.float32)}) for n in (1, 1024))
    assert many.to_device > one.to_device


def test_nodes_that_cuda_does_not_have_are_named(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[8] x) => (int64[N, 1] y) {
        r = Relu(x)  n = NonZero(r)  u = Unique(r)  [words] s = Cast<to = 8>(u)  [back] i = Cast<to = 1>(s)
        y = NonZero(i) }"""
    path = tmp_path / "words.onnx"
    onnx.save(parser.parse_model(text), path)
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider does not run every node: .*words \(Cast\)"):
        create_session(path, "cuda")


def test_control_flow_is_no_cuda_graph(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> g (bool c, float[3] x) => (float[3] y) {
        [choice] y = If (c) <then_branch = a () => (float[3] p) { p = Relu(x) },
                             else_branch = b () => (float[3] q) { q = Neg(x) }> }"""
    path = tmp_path / "if.onnx"
    onnx.save(parser.parse_model(text), path)
    with pytest.raises(ConfigError, match=r"choice \(If\)"):
        run(path, cuda_graph=True)


def test_identical_models_are_not_called_faster(save_net: Save) -> None:
    model = save_net()
    for _ in range(5):
        result = run(model, baseline=model, min_time=0.5)
        assert result.speedup is not None
        assert result.speedup.ci95[0] <= 1.01


@pytest.mark.skipif(device_memory() is None, reason="nvidia-ml-py is not installed, or there is no driver")
def test_the_driver_tells_the_device() -> None:
    facts = gpu_facts()
    assert facts is not None
    assert {"name", "driver", "cuda_driver", "compute_capability", "clocks_mhz"} <= set(facts)
    assert library_versions()["cuda"]


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("fp16", [False, True])
def test_tensorrt_builds_an_engine_once(save_net: Save, tmp_path: Path, fp16: bool) -> None:
    cache = tmp_path / "engines"
    model = save_net()
    first = run(model, provider="tensorrt", fp16=fp16, engine_cache=cache)
    assert first.provider == "TensorrtExecutionProvider"
    engines = {path: path.stat().st_mtime_ns for path in cache.rglob("*.engine")}
    assert engines
    run(model, provider="tensorrt", fp16=fp16, engine_cache=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.engine")} == engines
