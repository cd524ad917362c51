"""What post-training pruning costs on a large network: seconds, and memory over the model's own.

    python benchmarks/calibration_cost.py RESNET50.onnx [--images 512] [--size 224] [--keep-macs 0.5]
                                          [--out benchmarks/results/calibration_cost]

The images are smooth random ones: what pruning costs does not depend on what they show. The command runs in a process
of its own, whose peak memory the operating system tells. Bars: under 4 minutes on 2 cores, 3 GB over the model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.files import write_text
from prune_onnx.pipeline.environment import capture

SECONDS, MEMORY = 240, 3e9
COMMAND = "from prune_onnx.cli.main import main; main()"


def images(count: int, size: int) -> np.ndarray:
    """Smooth random images, uint8 (count, size, size, 3)."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, size // 16 + 1, size // 16 + 1, 3), dtype=np.uint8)
    return coarse.repeat(16, 1).repeat(16, 2)[:, :size, :size]


def run(model: Path, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Prune in a process of its own."""
    data = folder / "images.npz"
    np.savez(data, x=images(options.images, options.size))
    out = folder / "out.onnx"
    command = [
        "slim", str(model), str(out), "--keep-macs", str(options.keep_macs), "--calibration", str(data),
        "--calibration-size", str(options.images), "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225",
        "--json",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", COMMAND, *command], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result = json.loads(done.stdout)
    return {
        "model": model.name,
        "model_bytes": model.stat().st_size,
        "images": options.images,
        "size": options.size,
        "seconds": seconds,
        "peak_bytes": peak,
        "macs": result["after"]["macs"] / result["before"]["macs"],
        "notes": result["notes"],
    }


def page(row: dict[str, object], environment: dict[str, object]) -> str:
    """The Markdown page."""
    over = row["peak_bytes"] - row["model_bytes"]
    met = "met" if row["seconds"] <= SECONDS and over <= MEMORY else "not met"
    return "\n".join(
        [
            "# Cost of post-training pruning",
            "",
            f"`{' '.join(environment['argv'])}` · {environment['date']} · {environment['cpu']}, "
            f"{environment['cores']} cores, load {environment['load_1min']:.1f} · "
            + ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
            "",
            "| model | images | MACs left | seconds | peak memory over the model | bars (240 s, 3 GB) |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
            f"| {row['model']} | {row['images']} of {row['size']}x{row['size']} | {row['macs']:.3f} | "
            f"{row['seconds']:.0f} | {over / 1e9:.2f} GB | {met} |",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--keep-macs", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/calibration_cost"))
    options = parser.parse_args()
    environment = capture()
    environment["argv"] = ["python", "benchmarks/calibration_cost.py", options.model.name]
    environment["cores"] = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        row = run(options.model, options, Path(folder))
    write_text(options.out.with_suffix(".json"), json.dumps({"row": row, "environment": environment}, indent=1) + "\n")
    write_text(options.out.with_suffix(".md"), page(row, environment))
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
