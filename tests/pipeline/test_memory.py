"""Peak memory in a process of its own, on models whose memory is known."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.pipeline import memory
from prune_onnx.pipeline.execution import Execution
from prune_onnx.pipeline.memory import peak_memory

Save = Callable[..., Path]
pytestmark = pytest.mark.skipif(not memory.can_tell(), reason="this system does not tell a process's memory")


def test_peak_grows_with_weights_and_with_inputs(save_linear: Save) -> None:
    small, large = save_linear("s.onnx", np.ones((4, 4))), save_linear("l.onnx", np.ones((4, 2_000_000)))
    one = {"x": np.ones((1, 4), np.float32)}
    with peak_memory(Execution(threads=1), [small, large], one) as peaks:
        little, much = peaks()
    with peak_memory(Execution(threads=1), [large], {"x": np.ones((16, 4), np.float32)}) as peaks:
        (batch,) = peaks()
    assert little is not None
    assert much is not None
    assert batch is not None
    assert little.device is None
    assert 0 < little.host < 30e6
    # 32 MB of weights at least, and an output of 8 MB for each sample.
    assert much.host > little.host + 32e6
    assert batch.host > 32e6 + 16 * 8e6
    assert batch.host < 2 * 32e6 + 2 * 16 * 8e6


def test_what_fails_in_the_child_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model at all")
    feed = {"x": np.ones(1, np.float32)}
    with (
        pytest.raises(ModelError, match=r"broken\.onnx does not run in a process of its own: .*parsing failed\.$"),
        peak_memory(Execution(), [broken], feed) as peaks,
    ):
        peaks()
    monkeypatch.setattr(memory, "_CHILD", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    with (
        pytest.raises(ModelError, match=r"broken\.onnx does not run in a process of its own: killed by SIGKILL"),
        peak_memory(Execution(), [broken], feed) as peaks,
    ):
        peaks()
    monkeypatch.setattr(memory, "_CHILD", ("-c", "raise SystemExit('out of order')"))
    with pytest.raises(ModelError, match="out of order"), peak_memory(Execution(), [broken], feed) as peaks:
        peaks()


def test_processes_end_when_the_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    monkeypatch.setattr(memory, "_CHILD", ("-c", "import time; time.sleep(100)"))
    with (
        pytest.raises(KeyboardInterrupt),
        peak_memory(Execution(), [tmp_path, tmp_path], {"x": np.ones(1, np.float32)}),
    ):
        raise KeyboardInterrupt
    assert [process.returncode for process in started] == [-9, -9]


def test_models_are_measured_together_on_the_cpu_and_one_by_one_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setattr(memory, "_start", lambda _, model, __: log.append(f"start {model}"))
    monkeypatch.setattr(memory, "_result", lambda model, _: log.append(f"result {model}"))
    for provider, order in (("cpu", "start start result result"), ("cuda", "start result start result")):
        log.clear()
        try:
            with peak_memory(Execution(provider=provider), [Path("a"), Path("b")], {}) as peaks:
                peaks()
        except AttributeError:  # there is no process to end
            assert provider == "cpu"
        assert [entry.split()[0] for entry in log] == order.split()


def test_a_system_that_does_not_tell_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "can_tell", lambda: False)
    with peak_memory(Execution(), [Path("a"), Path("b")], {}) as peaks:
        assert peaks() == [None, None]
