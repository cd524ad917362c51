"""Damaged files: an error with a message or a result, in bounded time and memory, and never a file left behind.

Each batch runs in a process of its own under a memory limit (see :mod:`.fuzzing`), so that a crash of native code is
seen and does not end the tests. ``PRUNE_ONNX_FUZZ`` sets how many files are tried, ``PRUNE_ONNX_FUZZ_SEED`` which.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .bombs import BOMBS

pytest.importorskip("resource", reason="memory limits are POSIX")

ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("PRUNE_ONNX_FUZZ", "2000"))
SEED = int(os.environ.get("PRUNE_ONNX_FUZZ_SEED", "0"))
BATCH = 500
# One case takes some hundredths of a second; this much only on a machine that does many other things.
CASE_CPU_S = 10.0
BATCH_S = 600


def run_batch(first: int, total: int = CASES, *options: str) -> list[dict[str, Any]]:
    """Run a batch; go on behind a case that took its process down."""
    results: list[dict[str, Any]] = []
    last = min(first + BATCH, total)
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    while first < last:
        command = [
            sys.executable,
            "-W",
            "error",
            "-m",
            "tests.graph_ops.fuzzing",
            "--seed",
            str(SEED),
            "--first",
            str(first),
            "--last",
            str(last),
            "--core",
            str(first // BATCH),
            *options,
        ]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=BATCH_S,
                check=False,
            )
            output, how = done.stdout, f"exit status {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired as error:
            output, how = (error.stdout or b"").decode(), f"no end after {BATCH_S} s"
        lines = [json.loads(text) for text in output.splitlines() if text.endswith("}")]
        found = [line for line in lines if "case" in line]
        results += found
        first += len(found)
        if first < last:
            results.append({"case": first, "end": "crash", "seconds": 0.0, "fault": how})
            first += 1
    return results


def test_small_files_that_ask_for_much() -> None:
    results = run_batch(0, len(BOMBS), "--bombs")
    assert [r.get("made") for r in results] == list(BOMBS)
    assert not [r for r in results if "fault" in r or r["seconds"] > CASE_CPU_S]
    # The history of a model is not needed to cut it; everything else cannot be run or is no model.
    assert {r["made"] for r in results if r["end"] != "ModelError"} == {"long_history"}


@pytest.mark.slow
def test_damaged_files() -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = [r for batch in pool.map(run_batch, range(0, CASES, BATCH)) for r in batch]
    assert len(results) == CASES
    faults = [f"case {r['case']} ({r.get('made')}): {r['fault']}" for r in results if "fault" in r]
    assert not faults, "\n".join([f"{len(faults)} of {CASES} cases:", *faults[:5]])
    slow = [r for r in results if r["seconds"] > CASE_CPU_S]
    assert not slow, slow
    ends = collections.Counter(r["end"] for r in results)
    # Damage that does nothing, or that nothing notices, would test nothing.
    assert ends["ModelError"] > CASES / 2, ends
    assert ends["written"] > CASES / 20, ends
    # A changed model is still a model, so what is cut out of it must be exact; quantised ones are no exception.
    wrong = [r["message"] for r in results if r["end"] == "VerificationError"]
    assert not wrong, wrong
