"""Prunes a model larger than protobuf's 2 GB and says what that took.

    python benchmarks/scale.py [--gigabytes 2.4] [--folder FOLDER] [--out benchmarks/results/scale.json]

The engine loads, analyses, plans, cuts and writes; the probe run, and the verification that runs the original and the
result, are timed apart. Makes a model of four large layers (two convolutions, two matrices) with external data, in a
temporary folder that goes in the end, halves every group's channels, and prints seconds and peak memory of the process
that did it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

ENGINE = ("load", "analyse", "plan", "cut", "write")
MOST_SECONDS = 15.0
MOST_BYTES = 6e9
PAGE = 4096


def make(path: Path, gigabytes: float) -> None:
    """Write the model; its weights go to the data file one by one and are never in memory together."""
    width = int(np.sqrt(gigabytes * 1e9 / 4 / (2 * 9 + 2)) // 16 * 16)
    rng = np.random.default_rng(0)
    tensors, offset = [], 0
    with path.with_suffix(".bin").open("wb") as data:
        for name, shape in (
            ("first", (width, 64, 3, 3)), ("conv1", (width, width, 3, 3)), ("conv2", (width, width, 3, 3)),
            ("matrix1", (width, width)), ("matrix2", (width, width)), ("head", (width, 10)),
        ):
            scale = np.float32(np.prod(shape[1:]) ** -0.5 if len(shape) == 4 else shape[0] ** -0.5)
            rows = (scale * rng.standard_normal(shape[1:], np.float32) for _ in range(shape[0]))
            data.write(b"\0" * (-data.tell() % PAGE))
            offset = data.tell()
            for row in rows:
                data.write(row.tobytes())
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
            where = {"location": path.with_suffix(".bin").name, "offset": offset, "length": data.tell() - offset}
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], name="first", **pads), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "conv1"], ["c"], name="conv1", **pads), helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "conv2"], ["e"], name="conv2", **pads), helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("GlobalAveragePool", ["f"], ["g"]), helper.make_node("Flatten", ["g"], ["h"]),
        helper.make_node("MatMul", ["h", "matrix1"], ["i"], name="matrix1"), helper.make_node("Relu", ["i"], ["j"]),
        helper.make_node("MatMul", ["j", "matrix2"], ["k"], name="matrix2"), helper.make_node("Relu", ["k"], ["l"]),
        helper.make_node("MatMul", ["l", "head"], ["y"], name="head"),
    ]
    graph = helper.make_graph(
        nodes, "large", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])], tensors)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)


def prune(path: Path, output: Path) -> None:
    """Halve every group and print the figures as JSON."""
    from prune_onnx.pipeline.environment import capture
    from prune_onnx.pipeline.slim import slim
    from prune_onnx.pipeline.slim_schema import SlimConfig

    started, cpu = time.perf_counter(), time.process_time()
    result = slim(SlimConfig(input=path, output=output, keep_channels=0.5, scope="layer"))
    with open("/proc/self/status") as lines:
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(json.dumps({
        "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu, "peak_bytes": peak,
        "bytes": [result.before.bytes, result.after.bytes], "macs": result.after.macs / result.before.macs,
        "max_rel_diff": result.verification.max_rel_diff, "timings": result.timings, "environment": capture(),
    }))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.4)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--out", type=Path, help="write the figures there as well")
    parser.add_argument("--prune", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prune:
        prune(*options.prune)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "large.onnx"
        make(path, options.gigabytes)
        command = [sys.executable, __file__, "--prune", str(path), str(Path(folder) / "small.onnx")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    report["environment"]["argv"] = ["benchmarks/scale.py"]
    before, after = (size / 1e9 for size in report["bytes"])
    print(f"{before:.2f} GB to {after:.2f} GB, {report['macs']:.1%} of the MACs left, "
          f"largest difference {report['max_rel_diff']:.1e}")
    engine = sum(report["timings"][name] for name in ENGINE)
    print(f"{engine:.1f} s (bar: {MOST_SECONDS:g} s), with checks {report['seconds']:.1f} s: " + ", ".join(
        f"{name} {seconds:.1f}" for name, seconds in report["timings"].items()))
    print(f"{report['peak_bytes'] / 1e9:.2f} GB of memory (bar: {MOST_BYTES / 1e9:g}), mapped files included")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if engine > MOST_SECONDS or report["peak_bytes"] > MOST_BYTES:
        sys.exit("a bar is not met")


if __name__ == "__main__":
    main()
