"""Measures how far ``prune-onnx eval`` can be trusted on this machine, and holds it against what it promises.

    python benchmarks/eval_bars.py MODEL.onnx [--repeats 20] [--out benchmarks/results/eval_bars]

1. The model against itself: the interval contains 1 in at least 19 of 20 repeats, and never is it called faster.
2. A copy that takes 20 % longer (matrix products on the side, as many as that takes): called slower every time.
3. The median of a bare loop, and that of the measurement, in turns: the same within 3 %, for one thread and for two.
4. What the command takes beyond the runs that it timed, from start to end: under 2 s.

The whole takes five minutes for a model of a millisecond. Load on the machine is part of the test; it is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bars
import numpy as np
import onnx
from onnx import helper, numpy_helper

from prune_onnx.pipeline import bench
from prune_onnx.pipeline.environment import capture
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.evaluate import evaluate
from prune_onnx.pipeline.execution import Execution
from prune_onnx.pipeline.sessions import create_session, input_specs

SLOWER = 1.2
SIDE = 256
TURNS, TURN_SECONDS = 20, 0.5
CALLS = 5
WITHIN, MOST_SECONDS, MOST_MISSES = 0.03, 2.0, 0.05


def with_side_work(model: onnx.ModelProto, products: int) -> onnx.ModelProto:
    """Return the model with so many matrix products on the side, whose result is added to the output times zero."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    kind = graph.input[0].type.tensor_type.elem_type
    weight = np.eye(SIDE, dtype=helper.tensor_dtype_to_np_dtype(kind))
    one, nothing = np.ones((1, SIDE), weight.dtype), np.zeros(1, weight.dtype)
    for name, array in (("side_w", weight), ("side_one", one), ("side_nothing", nothing)):
        graph.initializer.append(numpy_helper.from_array(array, name))
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = [f"{output}_before" if name == output else name for name in node.output]
    rank = len(graph.input[0].type.tensor_type.shape.dim)
    axes = numpy_helper.from_array(np.arange(rank), "side_axes")
    graph.initializer.append(axes)
    nodes = [
        helper.make_node("Shape", [graph.input[0].name], ["side_shape"]),
        helper.make_node("ReduceProd", ["side_shape"], ["side_count"], keepdims=1),
        helper.make_node("Cast", ["side_count"], ["side_number"], to=kind),
        helper.make_node("Mul", ["side_one", "side_number"], ["side_0"]),
    ]
    nodes += [helper.make_node("MatMul", [f"side_{i}", "side_w"], [f"side_{i + 1}"]) for i in range(products)]
    nodes += [
        helper.make_node("ReduceMax", [f"side_{products}"], ["side_max"], keepdims=0),
        helper.make_node("Mul", ["side_max", "side_nothing"], ["side_zero"]),
        helper.make_node("Add", [f"{output}_before", "side_zero"], [output]),
    ]
    graph.node.extend(nodes)
    return result


def planted(model: Path, folder: Path, feed: dict[str, np.ndarray]) -> Path:
    """Write a copy of the model that takes 20 % longer, and return its path."""
    proto = onnx.load(model)
    few, many = folder / "few.onnx", folder / "many.onnx"
    probes = 10, 110
    for path, products in zip((few, many), probes, strict=True):
        onnx.save(with_side_work(proto, products), path)
    makers = [lambda path=path: Execution().runner(path, feed) for path in (model, few, many)]
    base, low, high = (np.median(np.concatenate(each.rounds)) for each in bench.measure(makers, min_time=2.0))
    each = (high - low) / (probes[1] - probes[0])
    products = round(probes[0] + (SLOWER * base - low) / each)
    path = folder / "slower.onnx"
    onnx.save(with_side_work(proto, max(1, products)), path)
    return path


def compared(model: Path, baseline: Path, seed: int) -> dict[str, Any]:
    """Run ``eval`` once and return what it said and took."""
    start = time.perf_counter()
    result = evaluate(EvalConfig(model=model, baseline=baseline, seed=seed))
    seconds = time.perf_counter() - start
    samples = result.timings[0].samples_ms
    timed = sum(sum(map(sum, side)) for side in (samples.model, samples.baseline or [])) / 1e3
    assert result.speedup is not None
    return {
        "speedup": result.speedup.p50, "ci95": result.speedup.ci95, "verdict": result.verdict,
        "rounds": len(samples.model), "seconds": seconds, "overhead_s": seconds - timed,
        "load_1min": os.getloadavg()[0],
    }  # fmt: skip


def command_overhead(model: Path) -> tuple[float, float]:
    """Run the command as a person does; return what it took beyond the runs that it timed, seconds and CPU seconds."""
    start, cpu = time.perf_counter(), children_cpu()
    command = ["-c", "from prune_onnx.cli.main import main; main()", "eval", model, "--baseline", model, "--json"]
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, check=False)
    seconds, cpu = time.perf_counter() - start, children_cpu() - cpu
    (timing,) = json.loads(done.stdout)["timings"]
    sides = [timing["samples_ms"][side] for side in ("model", "baseline")]
    seconds -= sum(sum(map(sum, side)) for side in sides) / 1e3
    cpu -= sum(timing[side]["cpu_ms"] * timing[side]["runs"] for side in ("model", "baseline")) / 1e3
    return seconds, cpu


def children_cpu() -> float:
    """Return the CPU seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bare_loop(model: Path, feed: dict[str, np.ndarray], threads: int, seconds: float) -> np.ndarray:
    """Time a loop over ``session.run`` as any program has it, in ms, with nothing of the project in it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    for _ in range(10):
        session.run(None, feed)
    samples = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, feed)
        samples.append(time.perf_counter() - start)
    return np.asarray(samples) * 1e3


def against_bare_loop(model: Path, feed: dict[str, np.ndarray], threads: int) -> dict[str, Any]:
    """Compare medians of the bare loop and of the measurement, which take turns."""
    bare: list[np.ndarray] = []
    ours: list[np.ndarray] = []
    execution = Execution(threads=threads)
    # Turns of one length, in blocks as long as those that eval makes.
    rounds = round(TURN_SECONDS / EvalConfig.model_fields["min_time"].default * bench.ROUNDS)
    before, bench.MOST_TIMES, bench.ROUNDS = (bench.MOST_TIMES, bench.ROUNDS), 1, rounds
    for turn in range(TURNS):
        for which in ("bare", "ours") if turn % 2 else ("ours", "bare"):
            if which == "bare":
                bare.append(bare_loop(model, feed, threads, TURN_SECONDS))
            else:
                (series,) = bench.measure([lambda: execution.runner(model, feed)], min_time=TURN_SECONDS)
                ours.append(np.concatenate(series.rounds))
    bench.MOST_TIMES, bench.ROUNDS = before
    ratio = bench.speedup_interval(ours, bare)
    return {
        "threads": threads, "bare_p50_ms": float(np.median(np.concatenate(bare))),
        "our_p50_ms": float(np.median(np.concatenate(ours))), "ratio": ratio.value, "ci95": (ratio.low, ratio.high),
    }  # fmt: skip


def verdicts(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return each bar, what was measured, and whether it is met."""
    same, slower, loops = found["identical"], found["slower"], found["bare_loop"]
    inside = sum(run["ci95"][0] <= 1 <= run["ci95"][1] for run in same)
    faster = sum(run["ci95"][0] > 1 for run in same)
    called = sum(run["ci95"][1] < 1 for run in slower)
    overheads, cpu = zip(*found["command_overhead_s"], strict=True)
    middle = statistics.median(run["speedup"] for run in slower)
    return [
        ("identical models: the interval contains 1", f"{inside} of {len(same)}",
         len(same) - inside <= MOST_MISSES * len(same)),
        ("identical models: called faster", f"{faster} of {len(same)}", faster == 0),
        (f"planted slow-down ({1 / middle:.2f}x): called slower", f"{called} of {len(slower)}", called == len(slower)),
        *((f"p50 against a bare loop, {loop['threads']} threads",
           f"{loop['our_p50_ms']:.3f} ms and {loop['bare_p50_ms']:.3f} ms: {100 * (loop['ratio'] - 1):+.1f} % "
           f"({100 * (loop['ci95'][0] - 1):+.1f} to {100 * (loop['ci95'][1] - 1):+.1f})",
           abs(loop["ratio"] - 1) <= WITHIN) for loop in loops),
        ("the command beyond the runs that it timed",
         f"{statistics.median(overheads):.2f} s ({min(overheads):.2f} to {max(overheads):.2f} s), "
         f"of which {statistics.median(cpu):.2f} s of CPU",
         statistics.median(overheads) < MOST_SECONDS),
    ]  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """Return the page."""
    facts = found["environment"]
    loads = [run["load_1min"] for run in [*found["identical"], *found["slower"]]]
    command = f"python benchmarks/eval_bars.py {found['model']}"
    load = f"load {min(loads):.1f} to {max(loads):.1f}"
    return bars.page("How far eval can be trusted", command, facts, load, verdicts(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the figures to OUT.md and OUT.json as well")
    options = parser.parse_args()
    environment = capture()
    environment["argv"] = ["benchmarks/eval_bars.py", options.model.name]
    spec = input_specs(create_session(options.model))[0]
    shape = [1 if size is None else size for size in spec.shape]
    feed = {spec.name: np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)}
    with tempfile.TemporaryDirectory() as folder:
        slower = planted(options.model, Path(folder), feed)
        found: dict[str, Any] = {"environment": environment, "model": options.model.name, "identical": [], "slower": []}
        for repeat in range(options.repeats):
            found["identical"].append(compared(options.model, options.model, repeat))
            if repeat % 2:
                found["slower"].append(compared(slower, options.model, repeat))
            print(f"{repeat + 1} of {options.repeats}", file=sys.stderr)
    found["command_overhead_s"] = [command_overhead(options.model) for _ in range(CALLS)]
    threads = [1, 2] if (environment["cores"] or 1) > 1 else [1]
    found["bare_loop"] = [against_bare_loop(options.model, feed, count) for count in threads]
    bars.finish(markdown(found), found, verdicts(found), options.out)


if __name__ == "__main__":
    main()
