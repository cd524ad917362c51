"""What is told about a GPU, with stand-ins for the driver's libraries."""

from __future__ import annotations

import ctypes
import sys
import types
import uuid
from typing import Any

import pytest

from prune_onnx.pipeline import environment, gpu
from prune_onnx.pipeline.gpu import device_memory, gpu_facts, library_versions

ID = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A machine of two cards, of which CUDA's first is the one with ``ID``."""

    def by_uuid(name: str) -> str:
        if name != f"GPU-{ID}":
            raise NVMLError(name)
        return "second"

    def power(device: str) -> int:
        raise NVMLError("not supported")

    def memory(device: str) -> Any:
        return types.SimpleNamespace(total=16_000, used={"first": 1, "second": 5_000}[device])

    fake = types.SimpleNamespace(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0, open=0,
        nvmlDeviceGetHandleByIndex=lambda index: "first",
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetName=lambda device: f"{device} card".encode(),
        nvmlSystemGetDriverVersion=lambda: "570.1",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 12080,
        nvmlDeviceGetCudaComputeCapability=lambda device: (9, 0),
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetClockInfo=lambda device, kind: 1000 * kind,
        nvmlDeviceGetMaxClockInfo=lambda device, kind: 2000 * kind,
        nvmlDeviceGetTemperature=lambda device, kind: 61,
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda device: 0x1 | 0x4 | 0x20 | 0x40,
    )  # fmt: skip

    def count(step: int) -> None:
        fake.open += step

    fake.nvmlInit, fake.nvmlShutdown = lambda: count(1), lambda: count(-1)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu, "_load", lambda names: driver())
    return fake


def driver(answer: int = 0) -> Any:
    """CUDA's driver, which has one device; other answers are errors."""

    def device_uuid(raw: Any, number: Any) -> int:
        raw[:] = list(ID.bytes)
        return answer

    return types.SimpleNamespace(
        cuInit=lambda flags: 0, cuDeviceGet=lambda number, index: 0, cuDeviceGetUuid=device_uuid
    )


def test_cudas_first_device_is_described(nvml: types.SimpleNamespace) -> None:
    assert gpu_facts() == {
        "name": "second card",
        "driver": "570.1",
        "cuda_driver": "12.8",
        "compute_capability": "9.0",
        "memory_bytes": 16_000,
        "clocks_mhz": {"sm": 1000, "memory": 2000},
        "max_clocks_mhz": {"sm": 2000, "memory": 4000},
        "temperature_c": 61,
        "slowed_by": ["power limit", "temperature"],
    }
    assert device_memory() == 5_000
    assert nvml.open == 0


def test_without_cudas_driver_the_first_card_is_taken(
    nvml: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in (None, driver(answer=100)):
        monkeypatch.setattr(gpu, "_load", lambda names, library=library: library)
        facts = gpu_facts()
        assert facts is not None
        assert facts["name"] == "first card"


def test_what_nobody_tells_is_none(nvml: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise NVMLError("no such device")

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByUUID", fails)
    assert gpu_facts() is None
    assert device_memory() is None
    assert nvml.open == 0
    monkeypatch.setattr(nvml, "nvmlInit", fails)
    assert gpu_facts() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_facts() is None
    assert device_memory() is None


def test_versions_of_the_libraries_are_read_in_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Function:
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def __call__(self, *arguments: Any) -> Any:
            return self.answer(*arguments)

    def cuda(pointer: Any) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = 12060
        return 0

    libraries = {
        gpu._CUDART: types.SimpleNamespace(cudaRuntimeGetVersion=Function(cuda)),
        gpu._CUDNN: types.SimpleNamespace(cudnnGetVersion=Function(lambda: 90102)),
        gpu._TENSORRT: types.SimpleNamespace(getInferLibVersion=Function(lambda: 100300)),
    }
    monkeypatch.setattr(gpu, "_load", libraries.get)
    assert library_versions() == {"cuda": "12.6", "cudnn": "9.1.2", "tensorrt": "10.3.0"}
    libraries[gpu._CUDNN].cudnnGetVersion.answer = lambda: 8907
    libraries[gpu._TENSORRT].getInferLibVersion.answer = lambda: 8601
    del libraries[gpu._CUDART]
    assert library_versions() == {"cudnn": "8.9.7", "tensorrt": "8.6.1"}


def test_only_gpu_providers_ask_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpu_facts", lambda: None)
    monkeypatch.setattr(environment, "library_versions", dict)
    assert environment.device_facts("cpu") == {}
    assert environment.device_facts("cuda") == {"libraries": {}, "gpu": None}
    assert environment.device_facts("tensorrt", key="gpu_after") == {"libraries": {}, "gpu_after": None}
