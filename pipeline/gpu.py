"""NVIDIA GPUs and their libraries, as far as the machine tells; most of it through nvidia-ml-py."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# The files that a library may be, and its function that fills in a version, or returns it.
_CUDART = ("libcudart.so.13", "libcudart.so.12", "cudart64_13.dll", "cudart64_12.dll")
_CUDNN = ("libcudnn.so.9", "libcudnn.so.8", "cudnn64_9.dll", "cudnn64_8.dll")
_TENSORRT = ("libnvinfer.so.11", "libnvinfer.so.10", "nvinfer_11.dll", "nvinfer_10.dll")
_DRIVER = ("libcuda.so.1", "nvcuda.dll")
# Bits of NVML's reasons for lower clocks than asked for. Idling and settings of the user are none.
_SLOWED = {0x04: "power limit", 0x08: "hardware", 0x20: "temperature", 0x40: "temperature", 0x80: "power brake"}


def library_versions() -> dict[str, str]:
    """Return the versions of the CUDA runtime, cuDNN and TensorRT that a session of this process would use.

    Returns:
        ``cuda``, ``cudnn``, ``tensorrt``; what cannot be loaded is left out.
    """
    versions = {}
    if (library := _load(_CUDART)) is not None:
        number = ctypes.c_int()
        if library.cudaRuntimeGetVersion(ctypes.byref(number)) == 0:
            versions["cuda"] = _cuda(number.value)
    if (library := _load(_CUDNN)) is not None:
        library.cudnnGetVersion.restype = ctypes.c_size_t
        versions["cudnn"] = _dotted(library.cudnnGetVersion(), since=90000)
    if (library := _load(_TENSORRT)) is not None:
        versions["tensorrt"] = _dotted(library.getInferLibVersion(), since=100000)
    return versions


def gpu_facts() -> dict[str, Any] | None:
    """Return what the first CUDA device is and how it runs just now; ``None`` without a device or nvidia-ml-py.

    Returns:
        JSON-serialisable: ``name``, ``driver``, ``cuda_driver`` (the newest CUDA that the driver runs),
        ``compute_capability``, ``memory_bytes``, ``clocks_mhz`` and ``max_clocks_mhz`` (``sm``, ``memory``),
        ``temperature_c``, ``power_w``, and ``slowed_by``, why the clocks are lower than they could be. What the
        device does not tell is left out.
    """
    with _nvml() as (nvml, device):
        if nvml is None:
            return None
        clocks = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        asked: dict[str, Callable[[], Any]] = {
            "name": lambda: _text(nvml.nvmlDeviceGetName(device)),
            "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
            "cuda_driver": lambda: _cuda(nvml.nvmlSystemGetCudaDriverVersion_v2()),
            "compute_capability": lambda: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(device)),
            "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(device).total,
            "clocks_mhz": lambda: {k: nvml.nvmlDeviceGetClockInfo(device, c) for k, c in clocks.items()},
            "max_clocks_mhz": lambda: {k: nvml.nvmlDeviceGetMaxClockInfo(device, c) for k, c in clocks.items()},
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1e3,
            "slowed_by": lambda: _reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)),
        }
        facts = {}
        for name, ask in asked.items():
            with contextlib.suppress(nvml.NVMLError, AttributeError):  # the device or the package does not tell
                facts[name] = ask()
        return facts


def device_memory() -> int | None:
    """Return the bytes of the first CUDA device that are in use, by all processes; ``None`` where nobody tells."""
    with _nvml() as (nvml, device):
        return None if nvml is None else int(nvml.nvmlDeviceGetMemoryInfo(device).used)


@contextmanager
def _nvml() -> Iterator[tuple[Any, Any]]:
    """Open NVML and find the first CUDA device in it; both are ``None`` where that is impossible."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, or no driver
        yield None, None
        return
    try:
        device = None
        with contextlib.suppress(nvml.NVMLError):
            # NVML counts all devices in the order of the bus, CUDA those that are visible in an order of its own.
            name = _first_device()
            device = nvml.nvmlDeviceGetHandleByUUID(name) if name else nvml.nvmlDeviceGetHandleByIndex(0)
        yield (None, None) if device is None else (nvml, device)
    finally:
        nvml.nvmlShutdown()


def _first_device() -> str | None:
    """Return the UUID of CUDA's device 0, as NVML writes it; ``None`` without a driver or device."""
    driver = _load(_DRIVER)
    number, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if (
        driver is None
        or driver.cuInit(0) != 0
        or driver.cuDeviceGet(ctypes.byref(number), 0) != 0
        or driver.cuDeviceGetUuid(raw, number) != 0
    ):
        return None
    return f"GPU-{uuid.UUID(bytes=bytes(raw))}"


def _load(names: tuple[str, ...]) -> Any:
    """Return the first of these libraries that can be loaded, or is loaded already."""
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _dotted(number: int, since: int) -> str:
    """Return MAJOR.MINOR.PATCH of a version number; from ``since`` on, a major version has a digit more for each."""
    major, rest = divmod(number, 10000) if number >= since else divmod(number, 1000)
    minor, patch = divmod(rest, 100)
    return f"{major}.{minor}.{patch}"


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _reasons(bits: int) -> list[str]:
    return sorted({text for bit, text in _SLOWED.items() if bits & bit})


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
