"""The program in-process, and whole results without running a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from prune_onnx.cli.main import program
from prune_onnx.pipeline.environment import capture
from prune_onnx.pipeline.eval_results import EvalResult
from prune_onnx.pipeline.slim_schema import Cost, Group, Removed, SlimResult, Verification


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Run ``prune-onnx`` with the given arguments; ``stdout`` and ``stderr`` are apart."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(program, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def slim_result() -> SlimResult:
    return SlimResult(
        seconds=1.25,
        environment=capture(),
        input="in.onnx",
        output="out.onnx",
        dry_run=False,
        budget="keep_macs",
        criterion="l2",
        before=Cost(params=270_410, macs=40_810_000, bytes=1_080_000),
        after=Cost(params=135_205, macs=20_405_000, bytes=540_000),
        removed=Removed(channels=24, groups=1),
        constants={"dropped": 0, "absorbed": 0, "merged": 0},
        groups=[
            Group(name="conv[red]1", nodes=["conv[red]1"], channels=32, kept=8, pinned_by=[]),
            Group(name="stem", nodes=["stem"], channels=16, kept=16, pinned_by=["the graph output 'y' reads it"]),
        ],
        timings={"cut": 0.1},
        verification=Verification(
            reference="masked", max_abs_diff=1e-6, max_rel_diff=2e-7, tolerance=1e-5, passed=True
        ),
        notes=["folded 1 BatchNormalization nodes"],
    )


@pytest.fixture
def eval_result() -> Callable[..., EvalResult]:
    """Make a result of ``eval`` with the given verdict; the model is twice as fast as its baseline."""

    def latency(p50: float) -> dict[str, Any]:
        tails = {"p90": p50 * 1.1, "p95": p50 * 1.2, "p99": p50 * 1.5}
        return {"mean": p50, "p50": p50, **tails, "cv": 0.02, "runs": 500, "p50_ci95": (p50 * 0.99, p50 * 1.01)}

    def measured(file: str, p50: float, top1: float) -> dict[str, Any]:
        costs = {"params": int(p50 * 1000), "macs": int(p50 * 1e6), "bytes": int(p50 * 4000)}
        accuracy = {"top1": top1, "top5": 1.0, "samples": 450}
        speed = {"latency_ms": latency(p50), "throughput_per_s": 1000 / p50}
        return {"file": file, **costs, **speed, "accuracy": accuracy}

    def make(verdict: str = "passed", gates: list[dict[str, Any]] | None = None) -> EvalResult:
        speedup = {"p50": 2.0, "ci95": (1.9, 2.1)}
        timing = {
            "batch_size": 1,
            "model": latency(1.0),
            "baseline": latency(2.0),
            "speedup": speedup,
            "stable": True,
            "samples_ms": {"model": [[1.0]], "baseline": [[2.0]]},
        }
        return EvalResult(
            seconds=3.0,
            environment=capture(),
            model=measured("slim.onnx", 1.0, 0.97),
            baseline=measured("base.onnx", 2.0, 0.98),
            provider="CPUExecutionProvider",
            threads=None,
            data="digits",
            speedup=speedup,
            accuracy_change={"top1": -0.01, "ci95": (-0.02, 0.0)},
            agreement={"top1": 0.985, "max_abs_diff": 0.5, "samples": 450},
            timings=[timing, {**timing, "batch_size": 8, "stable": False}],
            gates=gates or [],
            verdict=verdict,
            hints=["The machine was busy."],
        )

    return make
