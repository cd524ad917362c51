"""Accuracy after pruning without labels or gradients, on all CIFAR-10 test images.

    python benchmarks/posttraining.py DATA_DIR MODEL_DIR [--out benchmarks/results/posttraining]

DATA_DIR has cifar-10-batches-bin; MODEL_DIR has resnet20-cifar10.onnx and resnet56-cifar10.onnx. For every budget the
network is pruned to that fraction of its MACs, by weight norms alone and with unlabelled training images; widths are
not aligned, so that the budgets are those of the literature.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx

from prune_onnx.graph_ops.files import write_text
from prune_onnx.pipeline.data import open_samples, recipe_for
from prune_onnx.pipeline.environment import capture
from prune_onnx.pipeline.sessions import create_session
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BUDGETS = {"resnet20": (1.5, 2.11, 2.55), "resnet56": (1.5, 2.11, 2.55, 4.0)}


def accuracy(path: Path, data_dir: Path) -> float:
    """Top-1 in percent on the whole test set."""
    samples = open_samples(dataset="cifar10", data_dir=data_dir)
    session = create_session(path)
    name = session.get_inputs()[0].name
    recipe = recipe_for(onnx.load(path), samples, MEAN, STD)
    hits = [session.run(None, {name: x})[0].argmax(1) == y for x, y in samples.batches(recipe, 500)]
    return 100 * float(np.concatenate(hits).mean())


def run(net: str, ratio: float, models: Path, data_dir: Path, images: int, folder: Path) -> dict[str, object]:
    """One network at one budget."""
    row: dict[str, object] = {"net": net, "ratio": ratio}
    common = {
        "input": models / f"{net}-cifar10.onnx",
        "keep_macs": 1 / ratio,
        "align": 1,
        "min_keep": 0.0,
        "force": True,
    }
    for label, options in (
        ("l2", {"criterion": "l2"}),
        (
            "calibrated",
            {"calibration": "cifar10", "calibration_size": images, "data_dir": data_dir, "mean": MEAN, "std": STD},
        ),
    ):
        out = folder / f"{net}-{ratio}-{label}.onnx"
        result = slim(SlimConfig(output=out, **common, **options))
        row[label] = {
            "top1": accuracy(out, data_dir),
            "macs_ratio": result.before.macs / result.after.macs,
            "params_ratio": result.before.params / result.after.params,
            "seconds": result.seconds,
            "max_rel_diff": result.verification.max_rel_diff,
        }
    print(json.dumps(row), flush=True)
    return row


def table(rows: list[dict], dense: dict[str, float], images: int, environment: dict) -> str:
    """The Markdown page."""
    lines = [
        "# Post-training pruning, CIFAR-10, all 10,000 test images",
        "",
        f"`python benchmarks/posttraining.py DATA_DIR MODEL_DIR --images {images}` · {environment['date']} · "
        f"{environment['cpu']}, {environment['cores']} cores · "
        + ", ".join(f"{k} {v}" for k, v in environment["versions"].items()),
        "",
        f"{images} unlabelled training images, no labels, no gradient step.",
        "",
        "| net | MACs | params | by weight norm (l2) | with calibration | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {net} | dense | | {top1:.2f} | {top1:.2f} | |" for net, top1 in dense.items()]
    lines += [
        f"| {r['net']} | 1/{r['calibrated']['macs_ratio']:.2f} | 1/{r['calibrated']['params_ratio']:.2f} | "
        f"{r['l2']['top1']:.2f} | **{r['calibrated']['top1']:.2f}** | {r['calibrated']['seconds']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--nets", nargs="*", default=list(BUDGETS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/posttraining"))
    options = parser.parse_args()
    dense = {net: accuracy(options.models / f"{net}-cifar10.onnx", options.data_dir) for net in options.nets}
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            run(net, ratio, options.models, options.data_dir, options.images, Path(folder))
            for net in options.nets
            for ratio in BUDGETS[net]
        ]
    environment = capture()
    environment["argv"] = ["benchmarks/posttraining.py"]
    found = {"dense_top1": dense, "images": options.images, "rows": rows, "environment": environment}
    write_text(options.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    write_text(options.out.with_suffix(".md"), table(rows, dense, options.images, environment))
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
