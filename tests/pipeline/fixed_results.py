"""Results of all stages that no machine had to measure."""

from __future__ import annotations

from typing import Any

import numpy as np

from prune_onnx.pipeline.eval_results import (
    Accuracy,
    AccuracyChange,
    Agreement,
    Candidate,
    EvalResult,
    GateResult,
    Latency,
    Layer,
    Measured,
    MetricChange,
    NodeTime,
    Profile,
    Speedup,
    Stored,
    Timing,
    TimingSamples,
)
from prune_onnx.pipeline.slim_schema import Cost, Group, Removed, SlimResult, Verification
from prune_onnx.pipeline.train import TrainResult

EPOCHS = [
    {
        "epoch": e,
        "loss": 2.2 * 0.8**e + 0.05,
        "lr": 0.1,
        "validation_loss": 0.3,
        "validation_accuracy": 0.985 - 0.5 * 0.75**e,
        "dead_channels": max(0, 30 * (e - 4)),
        "seconds": 3.0,
    }
    for e in range(1, 21)
]


def latency(blocks: list[list[float]]) -> Latency:
    every = np.concatenate(blocks)
    p50, p90, p95, p99 = np.quantile(every, (0.5, 0.9, 0.95, 0.99))
    return Latency(mean=every.mean(), p50=p50, p90=p90, p95=p95, p99=p99, cv=every.std() / every.mean(),
                   runs=len(every), p50_ci95=(p50 * 0.99, p50 * 1.01))  # fmt: skip


def timing(batch_size: int = 1, *, baseline: bool = True) -> Timing:
    rng = np.random.default_rng(batch_size)

    def blocks(center: float) -> list[list[float]]:
        return [(center * batch_size * (1 + rng.gamma(2, 0.02, 40)) * rng.normal(1, 0.01)).tolist() for _ in range(20)]

    mine, theirs = blocks(0.41), blocks(0.98)
    before = latency(theirs) if baseline else None
    return Timing(
        batch_size=batch_size,
        model=latency(mine),
        baseline=before,
        speedup=Speedup(p50=before.p50 / latency(mine).p50, ci95=(2.31, 2.44)) if before else None,
        stable=True,
        samples_ms=TimingSamples(model=mine, baseline=theirs if baseline else None),
    )


def eval_result(*, baseline: bool = True, batch_sizes: tuple[int, ...] = (1,), **changes: Any) -> EvalResult:
    timings = [timing(size, baseline=baseline) for size in batch_sizes]
    first = timings[0]

    def measured(file: str, params: int, macs: int, size: int, times: Latency, top1: float) -> Measured:
        return Measured(file=file, params=params, macs=macs, bytes=size, latency_ms=times,
                        throughput_per_s=1e3 / times.mean,
                        accuracy=Accuracy(top1=top1, top5=0.9961, samples=10_000))  # fmt: skip

    values: dict[str, Any] = {
        "seconds": 21.3,
        "environment": {
            "versions": {"prune-onnx": "0.1.0", "onnx": "1.19.0", "onnxruntime-gpu": "1.23.0", "numpy": "2.3.1"},
            "python": "3.11.9",
            "platform": "Linux-6.8-x86_64-with-glibc2.39",
            "cpu": "AMD EPYC 9354 32-Core Processor",
            "cores": 2,
            "load_1min": 0.31,
            "argv": ["/usr/bin/prune-onnx", "eval", "runs/my model/slim.onnx", "--baseline", "runs/base.onnx"],
            "date": "2026-01-31T12:00:00+00:00",
        },
        "model": measured("runs/slim.onnx", 121_410, 28_400_000, 498_112, first.model, 0.9142),
        "baseline": measured("runs/base.onnx", 271_098, 40_551_040, 1_096_534, first.baseline, 0.9173)
        if first.baseline
        else None,
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "data": "cifar10, 10,000 test images",
        "speedup": first.speedup,
        "accuracy_change": AccuracyChange(top1=-0.0031, ci95=(-0.0058, -0.0004)) if baseline else None,
        "agreement": Agreement(top1=0.9711, max_abs_diff=6.1, samples=10_000) if baseline else None,
        "timings": timings,
        "gates": [],
        "verdict": "passed",
        "hints": [],
    }
    return EvalResult(**(values | changes))


GATES = [
    GateResult(name="min-speedup", limit=1.3, value=2.38, ci95=(2.31, 2.44), unit="x", passed=True, verdict="passed"),
    GateResult(name="max-accuracy-drop", limit=0.25, value=0.31, ci95=(0.04, 0.58), unit="pp", passed=False,
               verdict="inconclusive"),
    GateResult(name="max-size", limit=4e5, value=498_112, ci95=(498_112, 498_112), unit="bytes", passed=False,
               verdict="failed"),
]  # fmt: skip


def slim_result(count: int = 19) -> SlimResult:
    rng = np.random.default_rng(0)
    groups = []
    for i in range(count):
        channels = 16 * 2 ** (3 * i // count)
        pinned = [f"Softmax node 'head.{i}' runs across the axis"] if i % 8 == 7 else []
        kept = channels if pinned else int(channels * rng.uniform(0.3, 1))
        groups.append(Group(name=f"layer{i // 6}.{i % 6}.conv1", nodes=[f"conv{i}"], channels=channels, kept=kept,
                            pinned_by=pinned))  # fmt: skip
    return SlimResult(
        seconds=1.2,
        input="base.onnx",
        output="slim.onnx",
        dry_run=False,
        budget="keep_macs",
        criterion="l2",
        before=Cost(params=271_098, macs=40_551_040, bytes=1_096_534),
        after=Cost(params=121_410, macs=28_400_000, bytes=498_112),
        removed=Removed(channels=312, groups=17),
        constants={"dropped": 1, "absorbed": 2, "merged": 0},
        groups=groups,
        timings={"analyse": 0.1},
        verification=Verification(
            reference="masked", max_abs_diff=1e-6, max_rel_diff=2.4e-7, tolerance=1e-4, passed=True
        ),
        notes=[],
    )


def several(*, baseline: bool = True, **changes: Any) -> EvalResult:
    """Three models on one baseline, the last beaten by the first."""
    result = eval_result(baseline=baseline, gates=GATES, verdict="failed", **changes)
    candidates = []
    for number, (factor, top1) in enumerate(((1.0, 0.9142), (0.6, 0.88), (1.4, 0.9))):
        own = result.model.latency_ms
        ends = (own.p50_ci95[0] * factor, own.p50_ci95[1] * factor)
        latency_ms = own.model_copy(update={"p50": own.p50 * factor, "p50_ci95": ends})
        accuracy = Accuracy(top1=top1, top5=0.99, samples=10_000)
        shown = {"file": f"runs/model{number}.onnx", "latency_ms": latency_ms, "accuracy": accuracy}
        change = AccuracyChange(top1=top1 - 0.9173, ci95=(top1 - 0.92, top1 - 0.915)) if baseline else None
        candidates.append(
            Candidate(
                model=result.model.model_copy(update=shown),
                speedup=result.speedup,
                accuracy_change=change,
                metric_change=None,
                agreement=result.agreement,
                timings=result.timings,
                gates=GATES[: number + 1],
                verdict="failed",
                on_front=number < 2,
            )
        )
    return result.model_copy(update={"candidates": candidates})


WIDTHS = [16, 16, 16, 32, 32, 32, 64, 64, 64]
LAYERS = [Layer(name=f"conv{i}", op_type="Conv", before=n, after=n - 3 * i // 2) for i, n in enumerate(WIDTHS)]
PROFILE = Profile(
    runs=20,
    model=[NodeTime(name="conv1", op_type="Conv", ms=0.2), NodeTime(name="reorder", op_type="ReorderInput", ms=0.01)],
    baseline=[NodeTime(name="conv1", op_type="Conv", ms=0.5), NodeTime(name="conv|2", op_type="Conv", ms=0.1)],
)
STORED = Stored(file="earlier.json", date="2026-01-01T00:00:00+00:00", differences=["cores 4 there, 2 here"])
METRIC = MetricChange(name="scores:dice", value=-0.0123, ci95=(-0.02, -0.004))


def train_result() -> TrainResult:
    return TrainResult(
        seconds=61.0,
        model="bn-cnn",
        dataset="mnist",
        method="proximal-ns",
        epochs=20,
        accuracy={"validation": 0.9902, "test": 0.9911},
        accuracy_before_finish={"validation": 0.9902, "test": 0.9911},
        sparsity={"channels": 480, "dead_channels": 291},
        artifacts={"model": "runs/base.onnx"},
    )
