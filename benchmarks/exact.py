"""Exact removal on networks of sparse training, against dropping BatchNorm's shift as the reference code does.

    python benchmarks/exact.py DATA_DIR [NAME ...] [--runs FOLDER] [--resume] [--out benchmarks/results/exact]

DATA_DIR has the files of Fashion-MNIST and CIFAR-10. Every network is trained with proximal-ns, as long as one CPU core
affords, and loses its dead channels twice: by `slim --exact`, which carries their constants on, and as the reference
code of network slimming does, which takes scale and shift of a dead channel for zero. --runs keeps the trained networks
and takes those that are there; --resume keeps the rows that are stored.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from stored import Lines, Row, Store, outputs, table, top1

from prune_onnx.pipeline.data import Samples, open_samples
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig, SlimResult
from prune_onnx.pipeline.train import train
from prune_onnx.trainers.config import TrainConfig

NETS: dict[str, dict[str, Any]] = {
    "bn-cnn, digits": {"model": "bn-cnn", "dataset": "digits", "epochs": 20},
    "bn-cnn, Fashion-MNIST": {"model": "bn-cnn", "dataset": "fashion-mnist", "epochs": 3},
    "vgg11 x 1/4, CIFAR-10": {"model": "vgg11", "dataset": "cifar10", "width": 0.25, "epochs": 5},
    "resnet20 x 1/2, CIFAR-10": {"model": "resnet20", "dataset": "cifar10", "width": 0.5, "epochs": 3},
}


def without_shift(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a copy in which every BatchNorm channel with scale 0 has shift 0 as well, and how many had another one.

    The reference code multiplies both by the mask of the channels that stay, before it copies what stays into a smaller
    network.

    Raises:
        ValueError: the model has no BatchNormalization, so that nothing can be dropped.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    norms = [node for node in made.graph.node if node.op_type == "BatchNormalization"]
    if not norms:
        raise ValueError("the model has no BatchNormalization")
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    count = 0
    for index, node in enumerate(norms):
        scale, shift = (numpy_helper.to_array(tensors[name]) for name in node.input[1:3])
        dead = scale == 0
        count += int((dead & (shift != 0)).sum())
        name = f"{node.input[2]}_masked_{index}"  # another node may read the same tensor
        made.graph.initializer.append(numpy_helper.from_array(np.where(dead, 0, shift).astype(shift.dtype), name))
        node.input[2] = name
    used = {name for node in made.graph.node for name in node.input}
    kept = [tensor for tensor in made.graph.initializer if tensor.name in used]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return made, count


def shrink(model: Path, out: Path) -> SlimResult:
    """Take out every channel that can go without a change."""
    return slim(SlimConfig(input=model, output=out, exact=True, force=True))


def measured(result: SlimResult, path: Path, dense: np.ndarray, samples: Samples) -> Row:
    """Size, accuracy and difference of a result on the test images."""
    logits = outputs(path, samples)[0]
    difference = float(np.abs(logits - dense).max())
    return {
        "channels": result.removed.channels,
        "macs": result.after.macs,
        "params": result.after.params,
        "constants": result.constants,
        "max_abs_diff": difference,
        "max_rel_diff": difference / float(np.abs(dense).max()),
        "agreement": 100 * float((logits.argmax(1) == dense.argmax(1)).mean()),
        "top1": top1(logits, samples.labels),
        "seconds": result.seconds,
    }


def measure(name: str, data_dir: Path, runs: Path) -> Row:
    """Train a network, or take the trained one, and remove its dead channels in both ways."""
    options = NETS[name]
    run = runs / f"{options['model']}-{options['dataset']}"
    config = TrainConfig(
        method="proximal-ns", data_dir=data_dir, output=run, device="cpu", resume=run.exists(), **options
    )
    trained = train(config, Lines())
    path = Path(trained.artifacts["model"])
    samples = open_samples(dataset=options["dataset"], data_dir=data_dir)
    dense = outputs(path, samples)[0]
    masked, shifted = without_shift(onnx.load(path))
    row: Row = {
        "net": name,
        "epochs": trained.epochs,
        "train_seconds": trained.seconds,
        "bn_channels": trained.sparsity.channels,
        "dead_channels": trained.sparsity.dead_channels,
        "shifted": shifted,
        "images": len(samples),
        "top1": top1(dense, samples.labels),
    }
    with tempfile.TemporaryDirectory() as folder:
        exact, reference, small = (Path(folder) / f"{part}.onnx" for part in ("exact", "masked", "reference"))
        result = shrink(path, exact)
        row |= {"macs": result.before.macs, "params": result.before.params}
        row["exact"] = measured(result, exact, dense, samples)
        onnx.save(masked, reference)
        row["dropped"] = measured(shrink(reference, small), small, dense, samples)
    return row


def page(rows: list[Row], origin: str) -> str:
    """The Markdown page."""
    size = [
        [
            r["net"], str(r["epochs"]), f"{r['dead_channels']} of {r['bn_channels']}", str(r["shifted"]),
            *(
                f"{r[way]['channels']}, {r[way]['macs'] / r['macs']:.1%}, {r[way]['params'] / r['params']:.1%}"
                for way in ("exact", "dropped")
            ),
            " + ".join(str(r["exact"]["constants"][kind]) for kind in ("dropped", "absorbed", "merged")),
        ]
        for r in rows
    ]  # fmt: skip
    quality = [
        [
            r["net"], f"{r['images']:,}", f"{r['top1']:.2f}",
            *(
                cell
                for way in ("exact", "dropped")
                for cell in (
                    f"{r[way]['top1']:.2f}", f"{r[way]['max_abs_diff']:.2g} ({r[way]['max_rel_diff']:.1g})",
                    f"{r[way]['agreement']:.2f}",
                )
            ),
        ]
        for r in rows
    ]  # fmt: skip
    lines = [
        "# Exact removal after sparse training",
        "",
        origin,
        "",
        "Networks trained with `--method proximal-ns` on a CPU, a few epochs each: what counts is the difference that",
        "removal makes, not the accuracy. *Dead*: channels with a BatchNorm scale of 0, of all; *shifted*: those whose",
        "shift is not 0. *`slim --exact`* carries constants on. *β dropped*: the reference code's way, scale and shift",
        "of a dead channel are 0 and the channel goes.",
        "",
        "## What goes",
        "",
        *table(
            [
                "net", "epochs", "dead", "shifted", "`slim --exact`: channels removed, MACs left, params left",
                "β dropped: the same", "constants dropped (zero or unread) + absorbed + merged",
            ],
            size,
        ),
        "",
        "## What it costs",
        "",
        "On all test images: top-1 in percent; largest difference of any logit from the trained network's (in brackets",
        "relative to the largest logit); images that get the same class, in percent.",
        "",
        *table(
            [
                "net", "images", "trained: top-1", "`slim --exact`: top-1", "difference", "same class",
                "β dropped: top-1", "difference", "same class",
            ],
            quality,
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {'; '.join(NETS)} (default: all)")
    parser.add_argument("--runs", type=Path, help="folder of the trained networks (default: a temporary one)")
    parser.add_argument("--resume", action="store_true", help="run only what has no row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exact"))
    options = parser.parse_args()
    if unknown := set(options.names) - set(NETS):
        parser.error(f"unknown networks: {', '.join(sorted(unknown))}")
    store = Store(options.out, ["python", "benchmarks/exact.py", "DATA_DIR"], ("net",), page).resume()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or NETS:
            if options.resume and store.get(net=name) is not None:
                continue
            print(name, flush=True)
            store.add(measure(name, options.data_dir, options.runs or Path(folder)))
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
