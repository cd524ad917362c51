"""The same post-training pruning, without a change, on networks of other kinds than ResNets.

    python benchmarks/other_nets.py DATA_DIR [NAME ...] [--ultraface FILE --pictures FOLDER] [--runs FOLDER] [--train]
        [--resume] [--out benchmarks/results/other_nets]

DATA_DIR has the files of Fashion-MNIST and CIFAR-10. A VGG and a MobileNetV2 are trained on CIFAR-10 and a small
encoder-decoder segments garments (segmentation.py), each as long as one CPU core affords; --runs keeps the trained
networks and takes those that are there, and --train only makes them. FILE is the face detector version-slim-320.onnx of
Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB, FOLDER has photographs: every second one calibrates, the others show
what becomes of the outputs. Each network is pruned by weight norms (l2) and with calibration inputs, with the options'
defaults. Rows are stored as soon as they are measured; --resume runs only what has none.
"""

from __future__ import annotations

import argparse
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import segmentation
from stored import Lines, Row, Store, outputs, table, top1

from prune_onnx.pipeline.data import Samples, open_samples
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.pipeline.train import train
from prune_onnx.trainers.config import TrainConfig

IMAGES = 1024
"""Calibration inputs, where there are as many."""
RATIOS = (1.5, 2.0, 3.0)
DENSE = "dense"
VARIANTS: dict[str, str] = {"l2": "L2 norm, nothing else", "calibrated": "calibrated"}

Metrics = dict[str, float]


class Net(ABC):
    """A network, its calibration data, and what its outputs are worth.

    Attributes:
        name: in the table.
        ratios: of the MACs, before to after.
        columns: metric to its heading.
        about: one sentence for the page.
    """

    name: str
    ratios: tuple[float, ...] = RATIOS
    columns: dict[str, str]
    about: str

    @abstractmethod
    def prepare(self) -> Path:
        """Return the network's file; train it where it is not there yet."""

    @abstractmethod
    def calibration(self) -> dict[str, Any]:
        """Return the options that give ``slim`` its calibration data."""

    @abstractmethod
    def metrics(self, path: Path) -> Metrics:
        """Measure a file against the data and the dense network."""


class Cifar(Net):
    """A network that classifies CIFAR-10."""

    columns: ClassVar = {"top1": "top-1, %", "same": "same class as dense, %"}

    def __init__(self, name: str, about: str, data_dir: Path, runs: Path, **options: Any) -> None:
        self.name, self.about, self.data_dir = name, about, data_dir
        self.run, self.options = runs / name, options
        self.samples: Samples | None = None

    def prepare(self) -> Path:
        config = TrainConfig(
            dataset="cifar10", data_dir=self.data_dir, output=self.run, device="cpu", schedule="cosine",
            channels_last=True, resume=self.run.exists(), **self.options,
        )  # fmt: skip
        return Path(train(config, Lines()).artifacts["model"])

    def calibration(self) -> dict[str, Any]:
        return {"calibration": "cifar10", "calibration_size": IMAGES, "data_dir": self.data_dir}

    def metrics(self, path: Path) -> Metrics:
        if self.samples is None:
            self.samples = open_samples(dataset="cifar10", data_dir=self.data_dir)
            self.dense = outputs(self.run / "model.onnx", self.samples)[0]
        logits = outputs(path, self.samples)[0]
        same = 100 * float((logits.argmax(1) == self.dense.argmax(1)).mean())
        return {"top1": top1(logits, self.samples.labels), "same": same}


class Segmenter(Net):
    """The encoder-decoder of segmentation.py."""

    name = "encoder-decoder"
    about = (
        "Garments of Fashion-MNIST on coloured backgrounds, 48x48 pixels, 11 classes; ConvTranspose, Resize and two "
        "skips that are concatenated."
    )
    columns: ClassVar = {"iou": "mean IoU, %", "pixels": "right pixels, %", "same": "same class as dense, %"}
    images, epochs, test_images = 4000, 8, 1000

    def __init__(self, data_dir: Path, runs: Path) -> None:
        self.data_dir, self.path, self.inputs = data_dir, runs / f"{self.name}.onnx", runs / f"{self.name}.npz"
        self.dense: np.ndarray | None = None

    def prepare(self) -> Path:
        if not self.path.exists():
            segmentation.train(self.data_dir, self.path, self.images, self.epochs, Lines())
        return self.path

    def calibration(self) -> dict[str, Any]:
        np.savez(self.inputs, images=segmentation.pictures(self.data_dir, "train", IMAGES, seed=1)[0])
        return {"calibration": str(self.inputs), "calibration_size": IMAGES}

    def metrics(self, path: Path) -> Metrics:
        if self.dense is None:
            images, self.classes = segmentation.pictures(self.data_dir, "test", self.test_images, seed=2)
            self.samples = Samples("garments", images)
            self.dense = outputs(self.path, self.samples)[0].argmax(1)
        found = outputs(path, self.samples)[0].argmax(1)
        shares = []
        for kind in range(segmentation.GARMENTS + 1):
            one, other = found == kind, self.classes == kind
            shares.append((one & other).sum() / max(1, (one | other).sum()))
        return {
            "iou": 100 * float(np.mean(shares)),
            "pixels": 100 * float((found == self.classes).mean()),
            "same": 100 * float((found == self.dense).mean()),
        }


class Detector(Net):
    """UltraFace: scores and boxes of 4420 anchors."""

    name = "ultraface-slim-320"
    about = (
        "Face detector as its authors published it. Error: root mean square of the difference from the dense network's "
        "output, over that of the output about its mean over the pictures (1: no better than a constant). Same "
        "detections: F1 of the anchors with a score above 0.5, dense against pruned."
    )
    ratios = (1 / 0.7, 1 / 0.5)
    columns: ClassVar = {
        "scores": "error of scores", "boxes": "error of boxes", "f1": "same detections, %", "count": "detections"
    }  # fmt: skip
    mean, std = (127 / 255,), (128 / 255,)
    size = (240, 320)
    crops = 4
    certain = 0.5

    def __init__(self, path: Path, pictures: Path, runs: Path) -> None:
        self.path, self.inputs = path, runs / f"{self.name}.npz"
        files = sorted(file for file in pictures.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.files = {"calibration": files[::2], "test": files[1::2]}
        self.dense: list[np.ndarray] | None = None

    def prepare(self) -> Path:
        return self.path

    def crop(self, part: str) -> np.ndarray:
        """Return random crops of the photographs of one part, half of them mirrored; uint8 (N, 3, H, W)."""
        from PIL import Image

        rng = np.random.default_rng(0)
        height, width = self.size
        images = []
        for file in self.files[part]:
            with Image.open(file) as picture:
                for _ in range(self.crops):
                    side = rng.uniform(0.5, 1, 2) * picture.size
                    left, top = rng.uniform(0, 1, 2) * (picture.size - side)
                    box = (left, top, left + side[0], top + side[1])
                    found = np.asarray(picture.convert("RGB").resize((width, height), box=box))
                    images.append(found[:, :: rng.choice((-1, 1))].transpose(2, 0, 1))
        return np.stack(images)

    def calibration(self) -> dict[str, Any]:
        images = self.crop("calibration")
        np.savez(self.inputs, images=images)
        scaling = {"mean": self.mean, "std": self.std}
        return {"calibration": str(self.inputs), "calibration_size": len(images), **scaling}

    def run(self, path: Path) -> list[np.ndarray]:
        """Scores (N, anchors) of a face, and boxes (N, anchors, 4)."""
        scores, boxes = outputs(path, self.samples, self.mean, self.std)
        return [scores[:, :, 1], boxes]

    def metrics(self, path: Path) -> Metrics:
        if self.dense is None:
            self.samples = Samples("photographs", self.crop("test"))
            self.dense = self.run(self.path)
        found = self.run(path)
        errors = [float(np.sqrt(((a - b) ** 2).sum() / ((b - b.mean(0)) ** 2).sum()))
                  for a, b in zip(found, self.dense, strict=True)]  # fmt: skip
        seen, wanted = (scores > self.certain for scores in (found[0], self.dense[0]))
        f1 = 2 * (seen & wanted).sum() / max(1, seen.sum() + wanted.sum())
        return {"scores": errors[0], "boxes": errors[1], "f1": 100 * float(f1), "count": int(seen.sum())}


def networks(options: argparse.Namespace, runs: Path) -> dict[str, Net]:
    """All networks that there is data for, by name."""
    nets: list[Net] = [
        Cifar("vgg11-cifar10", "VGG-11 of 3/8 of the width, 4 epochs.", options.data_dir, runs,
              model="vgg11", width=0.375, epochs=4, lr=0.05),
        Cifar("mobilenetv2-cifar10", "MobileNetV2 of half the width (mobilenet.py), 5 epochs.", options.data_dir, runs,
              model="mobilenet:mobilenet_v2", width=0.5, epochs=5, lr=0.1),
        Segmenter(options.data_dir, runs),
    ]  # fmt: skip
    if options.ultraface is not None:
        nets.append(Detector(options.ultraface, options.pictures, runs))
    return {net.name: net for net in nets}


def measure(net: Net, store: Store, resume: bool) -> None:
    """Measure the rows of one network."""
    model = net.prepare()
    about = {"net": net.name, "about": net.about, "columns": net.columns}
    if not (resume and store.get(net=net.name, ratio=1.0, variant=DENSE)):
        dense = slim(SlimConfig(input=model, exact=True, dry_run=True)).before
        store.add({**about, "ratio": 1.0, "variant": DENSE, "macs": dense.macs, "params": dense.params,
                   "metrics": net.metrics(model)})  # fmt: skip
    for ratio in net.ratios:
        for variant in VARIANTS:
            if resume and store.get(net=net.name, ratio=ratio, variant=variant):
                continue
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "small.onnx"
                options = {"criterion": "l2"} if variant == "l2" else net.calibration()
                result = slim(SlimConfig(input=model, output=path, keep_macs=1 / ratio, **options), Lines())
                metrics = net.metrics(path)
            row = {
                **about,
                "ratio": ratio,
                "variant": variant,
                "macs": result.after.macs / result.before.macs,
                "params": result.after.params / result.before.params,
                "max_rel_diff": result.verification.max_rel_diff,
                "seconds": result.seconds,
                "notes": result.notes,
                "metrics": metrics,
            }
            store.add(row)
            print(net.name, f"{ratio:.3g}", variant, metrics, flush=True)


def page(rows: list[Row], origin: str) -> str:
    """The Markdown page: a table for each network."""
    lines = [
        "# Post-training pruning of networks of other kinds",
        "",
        origin,
        "",
        "No labels, no gradient step, default options: `slim --keep-macs F`, with `--criterion l2` or with",
        "`--calibration`. The networks were trained for a few epochs on a CPU: what counts is the difference from the",
        "dense network.",
        "",
    ]
    for net in dict.fromkeys(row["net"] for row in rows):
        mine = [row for row in rows if row["net"] == net]
        columns = mine[0]["columns"]
        cells = [
            [
                VARIANTS.get(row["variant"], row["variant"]),
                f"{row['macs'] / 1e6:.1f} M" if row["variant"] == DENSE else f"{row['macs']:.1%}",
                f"{row['params'] / 1e3:.0f} k" if row["variant"] == DENSE else f"{row['params']:.1%}",
                *(_number(row["metrics"][key]) for key in columns),
                f"{row['seconds']:.0f}" if "seconds" in row else "",
            ]
            for row in mine
        ]
        lines += [f"## {net}", "", mine[0]["about"], ""]
        lines += [*table(["", "MACs", "parameters", *columns.values(), "seconds"], cells), ""]
    return "\n".join(lines).rstrip() + "\n"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("names", nargs="*", help="networks (default: all)")
    parser.add_argument("--ultraface", type=Path, metavar="FILE")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    parser.add_argument("--runs", type=Path, help="folder of the trained networks (default: a temporary one)")
    parser.add_argument("--train", action="store_true", help="only train what is not there yet")
    parser.add_argument("--resume", action="store_true", help="run only what has no row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/other_nets"))
    options = parser.parse_args()
    if (options.ultraface is None) != (options.pictures is None):
        parser.error("--ultraface and --pictures go together")
    command = ["python", "benchmarks/other_nets.py", "DATA_DIR", "--ultraface", "FILE", "--pictures", "FOLDER"]
    store = Store(options.out, command, ("net", "ratio", "variant"), page).resume()
    with tempfile.TemporaryDirectory() as temporary:
        runs = options.runs or Path(temporary)
        runs.mkdir(parents=True, exist_ok=True)
        nets = networks(options, runs)
        if unknown := set(options.names) - set(nets):
            parser.error(f"unknown networks: {', '.join(sorted(unknown))}; there are {', '.join(nets)}")
        for name in options.names or nets:
            if options.train:
                print(nets[name].prepare(), flush=True)
            else:
                measure(nets[name], store, options.resume)
    if not options.train:
        print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
