"""Versions and machine: what a figure is worth nothing without."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from datetime import UTC, datetime
from typing import Any

from .gpu import gpu_facts, library_versions

PACKAGES = (
    "prune-onnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx-graphsurgeon",
    "torch",
    "numpy",
    "nvidia-ml-py",
)


def capture() -> dict[str, Any]:
    """Return versions, CPU and command line, without importing any of the packages named.

    Returns:
        JSON-serialisable: ``versions``, ``python``, ``platform``, ``cpu``, ``cores``, ``load``, ``argv``, ``date``.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "argv": sys.argv,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_facts(provider: str, key: str = "gpu") -> dict[str, Any]:
    """Return what figures of a GPU depend on; empty on the CPU.

    Args:
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        key: under which the device's facts stand, which change while it works.

    Returns:
        JSON-serialisable: ``libraries`` and the device's facts (see :mod:`.gpu`), ``None`` where nobody tells.
    """
    if provider == "cpu":
        return {}
    return {"libraries": library_versions(), key: gpu_facts()}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
