"""How a model runs. The GPU's way of running is tested with the CPU as its device, options and refusals without one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from prune_onnx.graph_ops.errors import ConfigError, OutputError, ProviderError
from prune_onnx.pipeline import execution
from prune_onnx.pipeline.execution import (
    Execution,
    check_recordable,
    copy_times,
    device_runner,
    engine_folder,
    pinned,
    pinned_cores,
    tf32_allowed,
    weight_type,
)
from prune_onnx.pipeline.sessions import create_session

Save = Callable[..., Path]
FEED = {"x": np.arange(12, dtype=np.float32).reshape(2, 6)}
MODEL = Path("m.onnx")

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads")


# ---- options


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        ({"cuda_layout": "nhwc"}, {"prefer_nhwc": "1"}),
        ({"tf32": False}, {"use_tf32": "0"}),
        ({"cuda_graph": True}, {"enable_cuda_graph": "1"}),
        ({"conv_search": "heuristic"}, {"cudnn_conv_algo_search": "HEURISTIC"}),
    ],
)
def test_every_setting_is_an_option_of_cuda(settings: dict[str, Any], changes: dict[str, str]) -> None:
    common = {
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "prefer_nhwc": "0",
        "use_tf32": "1",
        "enable_cuda_graph": "0",
    }
    assert Execution(provider="cuda", **settings).provider_options(MODEL) == common | changes
    assert Execution(provider="cpu", **settings).provider_options(MODEL) == {}


def test_tensorrt_keeps_its_engines_where_it_is_told(save_linear: Save, tmp_path: Path) -> None:
    model = save_linear("m.onnx", np.eye(6))
    plain = Execution(provider="tensorrt").provider_options(model)
    assert plain == {"trt_fp16_enable": "False", "trt_cuda_graph_enable": "False"}
    cached = Execution(provider="tensorrt", fp16=True, cuda_graph=True, engine_cache=tmp_path / "cache")
    options = cached.provider_options(model, FEED)
    assert options["trt_fp16_enable"] == options["trt_cuda_graph_enable"] == "True"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "True"
    folder = Path(options["trt_engine_cache_path"])
    assert folder.parent == tmp_path / "cache"
    assert folder.is_dir()


def test_models_share_engines_only_with_their_own_content_and_shape(save_linear: Save, tmp_path: Path) -> None:
    one, same, other = (save_linear(name, np.eye(6) * factor) for name, factor in (("a", 1), ("b", 1), ("c", 2)))
    folders = {engine_folder(tmp_path / "cache", model, FEED) for model in (one, same)}
    assert len(folders) == 1
    folders.add(engine_folder(tmp_path / "cache", other, FEED))
    folders.add(engine_folder(tmp_path / "cache", one, {"x": np.zeros((3, 6), np.float32)}))
    folders.add(engine_folder(tmp_path / "cache", one, None))
    assert len(folders) == 4
    outside = []
    for name, factor in (("d", 1), ("e", 2)):
        path = tmp_path / name / "m.onnx"
        path.parent.mkdir()
        model = onnx.load(save_linear(f"{name}.onnx", np.eye(64) * factor))
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        outside.append(path)
    assert outside[0].read_bytes() == outside[1].read_bytes()
    assert engine_folder(tmp_path, outside[0], FEED) != engine_folder(tmp_path, outside[1], FEED)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Give another --engine-cache"):
        engine_folder(tmp_path / "file", one, FEED)


def test_tf32_is_allowed_unless_an_option_or_nvidias_variable_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert tf32_allowed(Execution(provider="cuda"))
    assert not tf32_allowed(Execution(provider="cuda", tf32=False))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert not tf32_allowed(Execution(provider="cuda"))


@pytest.mark.parametrize("kind", ["float", "float16", "double"])
def test_the_type_of_the_weights_is_named(kind: str) -> None:
    text = f'<ir_version: 9, opset_import: ["" : 17]> g ({kind}[N, 3] x) => ({kind}[N, 3] y)'
    weighted = parser.parse_model(text + " <int64[1] axes = {0}, " + kind + "[3] w = {1, 2, 3}> { y = Mul(x, w) }")
    assert weight_type(weighted) == kind
    assert weight_type(parser.parse_model(text + " { y = Relu(x) }")) == kind


def test_control_flow_is_no_cuda_graph() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> g (bool c, float[3] x) => (float[3] y) {
        [choice] y = If (c) <then_branch = a () => (float[3] p) { p = Relu(x) },
                             else_branch = b () => (float[3] q) { q = Neg(x) }> }"""
    with pytest.raises(ConfigError, match=r"--cuda-graph: m\.onnx has control flow.*: choice \(If\)\. Leave"):
        check_recordable("m.onnx", parser.parse_model(text))
    check_recordable("m.onnx", parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[3] x) => (float[3] y) { y = Relu(x) }'))  # fmt: skip


# ---- pinning


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two cores of two processors each, 0 and 2, 1 and 3; and processor 4, of which nothing is known."""
    for core, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(execution, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 3, 2, 1, 0})


@linux
@pytest.mark.usefixtures("processors")
def test_threads_get_cores_of_their_own_as_long_as_there_are_any() -> None:
    assert pinned_cores(None) == (0, 1, 4)
    assert pinned_cores(2) == (0, 1)
    assert pinned_cores(5) == (0, 1, 4, 2, 3)
    with pytest.raises(ConfigError, match="--pin: 6 threads, but only 5 processors"):
        pinned_cores(6)


def test_a_system_that_cannot_bind_threads_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(ConfigError, match="cannot bind threads"):
        pinned_cores(1)


@linux
def test_all_threads_are_bound_while_pinned_and_free_afterwards(save_linear: Save) -> None:
    model = save_linear("m.onnx", np.eye(6))
    Execution(threads=1).session(model)  # threads of ONNX Runtime itself come with the first session
    before = os.sched_getaffinity(0)
    cores = pinned_cores(min(2, len(before)))
    known = set(Path("/proc/self/task").iterdir())
    with pinned(cores):
        session = Execution(threads=len(cores), cores=cores).session(model)
        assert os.sched_getaffinity(0) == {cores[0]}
        workers = set(Path("/proc/self/task").iterdir()) - known
        expected = [{core} for core in cores[1:]]
        for _ in range(200):  # a thread binds itself when it first runs
            if [os.sched_getaffinity(int(task.name)) for task in workers] == expected:
                break
            time.sleep(0.01)
        assert [os.sched_getaffinity(int(task.name)) for task in workers] == expected
        del session
    assert os.sched_getaffinity(0) == before
    with pinned(()):
        assert os.sched_getaffinity(0) == before


# ---- buffers of a device


def test_runs_on_a_device_write_to_the_same_buffer_and_are_right(save_linear: Save) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4))
    session: Any = create_session(save_linear("m.onnx", weight))
    seen: list[tuple[int, str | None]] = []
    real = session.run_with_iobinding

    def spy(binding: Any, options: Any = None) -> None:
        real(binding, options)
        graph = options and options.get_run_config_entry("gpu_graph_id")
        seen.append((binding.get_outputs()[0].data_ptr(), graph))
        np.testing.assert_allclose(binding.get_outputs()[0].numpy(), FEED["x"] @ weight, rtol=1e-5)

    session.run_with_iobinding = spy
    run = device_runner(session, FEED, "cpu")
    assert run() > 0
    assert run() > 0
    # The run that finds out the sizes is not recorded; it makes the buffer that all others use.
    assert [graph for _, graph in seen] == ["-1", None, None]
    assert len({address for address, _ in seen}) == 1


def test_a_failing_run_on_a_device_is_the_providers_error_in_one_line(save_linear: Save) -> None:
    session = create_session(save_linear("m.onnx", np.eye(6)))
    with pytest.raises(ProviderError, match=r"CPUExecutionProvider fails to run the model: .*\.$") as caught:
        device_runner(session, {"x": np.zeros((2, 5), np.float32)}, "cpu")
    assert "\n" not in str(caught.value)


def test_copies_are_timed_apart(save_linear: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(execution.time, "perf_counter", lambda: next(now) ** 2 * 1e-3)
    times = copy_times(create_session(save_linear("m.onnx", np.eye(6))), FEED, "cpu")
    # The clock's steps grow by 2 ms, two readings a copy: 4k + 1 ms for the k-th; those at the start do not count.
    runs = execution.FIRST_COPIES + execution.COPIES
    assert times.to_device == pytest.approx(np.median([4 * k + 1 for k in range(execution.FIRST_COPIES, runs)]))
    assert times.to_host == pytest.approx(times.to_device + 4 * runs)
