"""Peak memory of a model, measured in a process of its own that does nothing else.

In the process that measures everything else, memory that was freed is used again, and the peak belongs to whatever
took most. The child (:mod:`.memory_child`) opens the model as it is timed, runs it, and tells by how much it grew.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.errors import ModelError

from .execution import Execution
from .sessions import one_line, provider_name

_CHILD = ("-m", "prune_onnx.pipeline.memory_child")


@dataclass(frozen=True)
class PeakMemory:
    """By how much opening and running a model raised a process's memory at most.

    Attributes:
        host: bytes of resident memory: weights, ONNX Runtime's copies of them in another layout, activations.
        device: bytes on the GPU, CUDA's own context included; ``None`` on the CPU, or where nobody tells.
    """

    host: int
    device: int | None


@contextmanager
def peak_memory(
    execution: Execution, models: Sequence[Path], feed: Mapping[str, np.ndarray]
) -> Iterator[Callable[[], list[PeakMemory | None]]]:
    """Measure while the block runs; what it is given waits for the figures, one for each model.

    On the CPU the models are measured at the same time, on a GPU, whose memory is only known as a whole, one after
    the other before the block begins.

    Raises:
        ModelError: a model does not run in a process of its own.
    """
    if not can_tell():
        yield lambda: [None] * len(models)
        return
    processes: list[tuple[Path, subprocess.Popen[str]]] = []
    results: list[PeakMemory | None] = []
    try:
        for model in models:
            processes.append((model, _start(execution, model, feed)))
            if execution.provider != "cpu":
                results.append(_result(*processes.pop()))
        yield lambda: results or [_result(*process) for process in processes]
    finally:
        for _, process in processes:
            process.kill()
            process.communicate()


def can_tell() -> bool:
    """Whether this system tells how much memory a process takes."""
    return os.path.exists("/proc/self/status")


def _start(execution: Execution, model: Path, feed: Mapping[str, np.ndarray]) -> subprocess.Popen[str]:
    # A CUDA graph only adds what it takes to fix addresses.
    plain = replace(execution, cuda_graph=False)
    options = {
        "model": str(model),
        "provider": provider_name(execution.provider),
        "options": plain.provider_options(model, feed),
        "threads": execution.thread_count,
        "entries": execution.entries,
    }
    # The child finds what this process finds, wherever it was imported from.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as stdin:
        np.savez(stdin, **feed)
        stdin.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", *_CHILD, json.dumps(options)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )


def _result(model: Path, process: subprocess.Popen[str]) -> PeakMemory:
    out, err = process.communicate()
    try:
        return PeakMemory(**json.loads(out))
    except ValueError:
        code = process.returncode
        last = (err.strip().splitlines() or [f"exit code {code}"])[-1]
        why = f"killed by {signal.Signals(-code).name}" if code < 0 else one_line(last.partition(": ")[2] or last)
        raise ModelError(f"{model} does not run in a process of its own: {why}.") from None
