"""Accuracy at equal measured latency: a budget in latency against one in MACs with --align 8, CIFAR-10.

    python benchmarks/speed_accuracy.py DATA_DIR MODEL.onnx ... [--macs 0.66 0.47] [--images 1024] [--threads 1]
                                        [--out benchmarks/results/speed-accuracy]

DATA_DIR has cifar-10-batches-bin; the models are CIFAR-10 networks. Each is pruned with unlabelled training images to a
fraction of its MACs at multiples of 8 channels; the share of the latency that this file takes, measured in turns with
the original, is then the budget of the second one. Accuracy is that of all 10,000 test images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from posttraining import MEAN, STD, accuracy
from stored import shares

from prune_onnx.graph_ops.files import write_text
from prune_onnx.pipeline.environment import capture
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig


def compare(model: Path, macs: float, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One network at one budget."""
    by_macs, by_latency = folder / "macs.onnx", folder / "latency.onnx"
    common = {
        "input": model, "calibration": "cifar10", "calibration_size": options.images, "data_dir": options.data_dir,
        "mean": MEAN, "std": STD, "min_keep": 0.0, "threads": options.threads, "force": True,
    }  # fmt: skip
    first = slim(SlimConfig(output=by_macs, keep_macs=macs, align=8, **common))
    (asked,) = shares(model, [by_macs], options.threads)
    second = slim(SlimConfig(output=by_latency, keep_latency=min(asked, 1.0), **common))
    found = shares(model, [by_macs, by_latency], options.threads)
    row: dict[str, Any] = {"model": model.stem, "budget": macs, "images": options.images}
    for name, result, share, path in zip(
        ("macs", "latency"), (first, second), found, (by_macs, by_latency), strict=True
    ):
        row[name] = {
            "share": share,
            "macs": result.after.macs / result.before.macs,
            "top1": accuracy(path, options.data_dir),
            "seconds": result.seconds,
        }
    print(json.dumps(row), flush=True)
    return row


def page(rows: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# Accuracy at equal measured latency, CIFAR-10, all 10,000 test images",
        "",
        f"`{' '.join(environment['argv'])}` · {environment['date']} · {environment['cpu']}, "
        + ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        "",
        "| model | keep-macs, align 8: latency, MACs, top-1 | keep-latency: latency, MACs, top-1 | gain |",
        "| --- | --- | --- | ---: |",
    ]
    for row in rows:
        cells = [f"{r['share']:.3f}, {r['macs']:.3f}, **{r['top1']:.2f}**" for r in (row["macs"], row["latency"])]
        gain = row["latency"]["top1"] - row["macs"]["top1"]
        lines.append(f"| {row['model']} | {' | '.join(cells)} | {gain:+.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--macs", nargs="*", type=float, default=[0.66, 0.47])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed-accuracy"))
    options = parser.parse_args()
    environment = capture()
    names = [model.name for model in options.models]
    budgets = ["--macs", *map(str, options.macs), "--images", str(options.images), "--threads", str(options.threads)]
    environment["argv"] = ["python", "benchmarks/speed_accuracy.py", "DATA_DIR", *names, *budgets]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            for macs in options.macs:
                rows.append(compare(model, macs, Path(folder), options))
                found = {"rows": rows, "environment": environment}
                write_text(options.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
                write_text(options.out.with_suffix(".md"), page(rows, environment))
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
