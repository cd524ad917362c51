"""Where a run's time goes: ONNX Runtime's own profile of a few runs, node by node.

Profiled runs are slower than others, and the profiler counts whole microseconds, so these times are for comparing
nodes with each other. What a run takes is measured elsewhere (:mod:`.bench`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .eval_results import NodeTime
from .sessions import run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Runs that are looked at, if they do not take longer than this in all; those before them only warm up.
RUNS, LEAST_RUNS, SECONDS, WARM_UP = 20, 3, 0.3, 2
# What ONNX Runtime adds to the name of a node that it rewrote for its blocked layout, and to that of an event.
REWRITTEN, EVENT = "_nchwc", "_kernel_time"

Feed = Mapping[str, np.ndarray]


def node_times(open_session: Callable[[Path], InferenceSession], feed: Feed) -> tuple[list[NodeTime], int]:
    """Profile a model.

    Args:
        open_session: opens it so that its profile is written to files that begin so.
        feed: what it runs on.

    Returns:
        The time of every node that ran, in the order in which they ran first, and how many runs were looked at.

    Raises:
        ModelError: a run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(Path(folder) / "profile")
        runs, deadline = 0, time.perf_counter() + SECONDS
        while runs < WARM_UP + LEAST_RUNS or (runs < WARM_UP + RUNS and time.perf_counter() < deadline):
            run_session(session, feed)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_bytes())
    return times_of(events, skip=WARM_UP), runs - WARM_UP


def times_of(events: list[dict[str, Any]], skip: int = 0) -> list[NodeTime]:
    """Return the time of every node from the events of a profile.

    A node that runs several times in a run, as in a loop, counts with all of them. Over the runs the mean of the middle
    half is taken: whole microseconds are too coarse for a median.

    Args:
        events: as ONNX Runtime writes them, in microseconds.
        skip: runs at the beginning that are left out.
    """
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    spent: dict[tuple[str, str], np.ndarray] = {}
    for event in sorted((e for e in events if e.get("cat") == "Node" and e["name"].endswith(EVENT)), key=_start):
        run = int(np.searchsorted(starts, event["ts"], side="right")) - 1 - skip
        if run < 0:
            continue
        name = event["name"].removesuffix(EVENT).removesuffix(REWRITTEN)
        key = (name, event["args"].get("op_name", ""))
        spent.setdefault(key, np.zeros(len(starts) - skip))[run] += event["dur"]
    return [
        NodeTime(name=name, op_type=op_type, ms=round(_middle_mean(times) / 1e3, 6))
        for (name, op_type), times in spent.items()
    ]


def _start(event: Mapping[str, Any]) -> int:
    return event["ts"]


def _middle_mean(times: np.ndarray) -> float:
    ordered, quarter = np.sort(times), len(times) // 4
    return float(ordered[quarter : len(times) - quarter].mean())
