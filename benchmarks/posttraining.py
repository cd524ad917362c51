"""Accuracy after pruning without labels, on all CIFAR-10 test images, over MACs and over measured latency.

    python benchmarks/posttraining.py DATA_DIR MODEL_DIR [--nets NET ...] [--variants VARIANT ...] [--ratios R ...]
        [--images 1024] [--files FOLDER] [--resume] [--times] [--out benchmarks/results/posttraining]

DATA_DIR has cifar-10-batches-bin; MODEL_DIR has resnet20-cifar10.onnx and resnet56-cifar10.onnx. A NET is resnet20,
resnet56, or the path of any other CIFAR-10 network's ONNX file. For every ratio R the network is pruned to 1/R of its
MACs in every variant; widths are not aligned, so that the budgets are those of the literature.

Each row is stored as soon as it is measured. Rows of other runs stay: those of the same network, ratio and variant are
replaced, or kept with --resume. --files keeps the pruned networks, which `distilled` starts from (it prunes anew where
there is none), and --times measures nothing but the latency of what is there, all files of a network in turns. The
variants tp-l1 and tp-bn need torch-pruning 1.6.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from stored import Lines, Row, Store, outputs, shares, table, top1

from prune_onnx.graph_ops import cost, preprocessing
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.pipeline.data import open_samples
from prune_onnx.pipeline.probing import probe
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.pipeline.train import train
from prune_onnx.trainers.config import TrainConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the two ResNets, whose files do not say it."""

BUDGETS = {"resnet20": (1.5, 2.11, 2.55), "resnet56": (1.5, 2.11, 2.55, 4.0)}
OTHER_BUDGETS = (1.5, 2.0, 3.0)
DISTILLING = {"precision": "bf16", "epochs": 170}
"""For CPUs that compute in bfloat16; about twelve minutes of two cores for ResNet-56 at 1/2.11."""
DENSE = "dense"

SLIM: dict[str, dict[str, Any]] = {
    "l2": {"criterion": "l2"},
    "l1": {"criterion": "l1"},
    "bias": {"criterion": "l2", "compensate": "bias"},
    "bn": {"criterion": "l2", "compensate": "bn"},
    "ls": {"criterion": "l2", "compensate": "least-squares"},
    "obs": {},
}
"""Variants that ``slim`` makes, and its options; the last one is the default with calibration."""

LABELS = {
    "l1": "L1 norm, nothing else",
    "l2": "L2 norm, nothing else",
    "bias": "L2 norm, bias correction",
    "bn": "L2 norm, BatchNorm statistics again",
    "ls": "L2 norm, least squares",
    "obs": "**calibrated** (OBS and least squares, the default)",
    "distilled": "calibrated, then `train --teacher`",
    "tp-l1": "Torch-Pruning, L1",
    "tp-bn": "Torch-Pruning, BatchNorm scales",
}
PLAIN = frozenset({"l1", "l2"})
"""Variants without calibration."""
PEERS = {"tp-l1": "l1", "tp-bn": "bn"}

BARS = {
    "obs": {
        "resnet20": dict(zip(BUDGETS["resnet20"], (90.5, 87.0, 84.0), strict=True)),
        "resnet56": dict(zip(BUDGETS["resnet56"], (93.1, 92.0, 90.5, 85.5), strict=True)),
    },
    "distilled": {"resnet56": {2.11: 92.5, 2.55: 91.0, 4.0: 87.0}},
}
"""Top-1 to go for."""


def scaling(model: Path) -> dict[str, tuple[float, ...]]:
    """Return mean and std to give along; none for a file that says them itself."""
    return {} if preprocessing.read(onnx.load(model)) is not None else {"mean": MEAN, "std": STD}


def accuracy(
    path: Path, data_dir: Path, mean: tuple[float, ...] | None = MEAN, std: tuple[float, ...] | None = STD
) -> float:
    """Top-1 in percent on the whole test set."""
    samples = open_samples(dataset="cifar10", data_dir=data_dir)
    return top1(outputs(path, samples, mean, std)[0], samples.labels)


def size(path: Path) -> tuple[int, int]:
    """MACs and parameters of a file."""
    graph = Graph(onnx.load(path))
    return cost.macs(graph, probe(graph)[0].shapes), cost.params(graph)


class Bench:
    """One network: its file, and how each variant is made of it."""

    def __init__(self, net: str, options: argparse.Namespace, folder: Path) -> None:
        listed = net in BUDGETS
        self.name = net if listed else Path(net).stem
        self.model = options.models / f"{net}-cifar10.onnx" if listed else Path(net)
        self.ratios = options.ratios or BUDGETS.get(net, OTHER_BUDGETS)
        self.options, self.folder = options, folder
        self.scaling = scaling(self.model)
        carried = preprocessing.read(onnx.load(self.model))
        self.recipe = carried or Preprocessing(MEAN, STD, size=(32, 32))
        self.size = size(self.model)

    def file(self, ratio: float, variant: str) -> Path:
        """Where the result of a variant is."""
        return self.folder / f"{self.name}-{ratio:g}-{variant}.onnx"

    def dense(self) -> Row:
        """The row of the network itself."""
        macs, params = self.size
        return self._row(1.0, DENSE) | {
            "macs": macs, "params": params, "latency_share": 1.0,
            "top1": self._top1(self.model),
        }  # fmt: skip

    def measure(self, ratio: float, variant: str) -> Row:
        """Make a variant at a ratio and measure it."""
        path = self.file(ratio, variant)
        make: Callable[[float, str, Path], Row] = (
            self._distilled if variant == "distilled" else self._peer if variant in PEERS else self._slim
        )
        row = self._row(ratio, variant) | make(ratio, variant, path)
        macs, params = size(path)
        return row | {
            "macs_ratio": self.size[0] / macs,
            "params_ratio": self.size[1] / params,
            "top1": self._top1(path),
            "latency_share": shares(self.model, [path], self.options.threads)[0],
        }

    def _row(self, ratio: float, variant: str) -> Row:
        return {"net": self.name, "ratio": ratio, "variant": variant, "images": self.options.images}

    def _top1(self, path: Path) -> float:
        return accuracy(path, self.options.data_dir, self.recipe.mean, self.recipe.std)

    def _slim(self, ratio: float, variant: str, path: Path) -> Row:
        data = {
            "calibration": "cifar10", "calibration_size": self.options.images, "data_dir": self.options.data_dir,
            **self.scaling,
        }  # fmt: skip
        result = slim(
            SlimConfig(
                input=self.model, output=path, keep_macs=1 / ratio, align=1, min_keep=0.0, force=True,
                **SLIM[variant], **({} if variant in PLAIN else data),
            )
        )  # fmt: skip
        return {"seconds": result.seconds, "max_rel_diff": result.verification.max_rel_diff, "notes": result.notes}

    def _distilled(self, ratio: float, variant: str, path: Path) -> Row:
        """Go on from the calibrated result with the dense network's answers to the same images."""
        import torch

        pruned = self.file(ratio, "obs")
        if not pruned.exists():
            self._slim(ratio, "obs", pruned)
        with tempfile.TemporaryDirectory() as run:
            result = train(
                TrainConfig(
                    model=str(pruned), teacher=self.model, dataset="cifar10", train_size=self.options.images,
                    data_dir=self.options.data_dir, output=Path(run), device="cpu", force=True, mean=self.recipe.mean,
                    std=self.recipe.std, **DISTILLING,
                )
            )  # fmt: skip
            path.write_bytes(Path(result.artifacts["model"]).read_bytes())
        how = f"{result.epochs} epochs, {DISTILLING['precision']}, {torch.get_num_threads()} threads"
        return {"seconds": result.seconds, "epochs": result.epochs, "how": how}

    def _peer(self, ratio: float, variant: str, path: Path) -> Row:
        import time

        import trained_peers

        started = time.perf_counter()
        trained_peers.prune(self.name, self.model, path, PEERS[variant], 1 / ratio, self.recipe)
        return {"seconds": time.perf_counter() - started}


def times(bench: Bench, store: Store) -> None:
    """Measure the latency of all files of a network again."""
    rows = [row for row in store.rows if row["net"] == bench.name and row["variant"] != DENSE]
    rows = [row for row in rows if bench.file(row["ratio"], row["variant"]).exists()]
    files = [bench.file(row["ratio"], row["variant"]) for row in rows]
    for row, share in zip(rows, shares(bench.model, files, bench.options.threads), strict=True):
        row["latency_share"] = share
    store.write()


# -- page ------------------------------------------------------------------------------------------------------------
def page(rows: list[Row], origin: str) -> str:
    """The Markdown page: for each network a table of top-1 and one of the latency, a column for each budget."""
    images = ", ".join(f"{count:,}" for count in sorted({row["images"] for row in rows}))
    lines = [
        "# Post-training pruning, CIFAR-10, all 10,000 test images",
        "",
        origin,
        "",
        f"{images} unlabelled training images, no labels; no gradient step but in `train --teacher`, which learns the",
        "answers of the dense network to the same images. Top-1 in percent; *bar*: the figure to go for. Seconds are",
        "those of one core, which other runs shared, unless threads are named. Latency: CPU provider, batch of one, "
        "measured in turns with the original. "
        f"The MACs are within {_furthest(rows):.1%} of those asked for.",
        "",
        "![top-1 over MACs](posttraining-macs.png)",
        "",
        "![top-1 over latency](posttraining-latency.png)",
        "",
    ]
    for net in dict.fromkeys(row["net"] for row in rows):
        mine = [row for row in rows if row["net"] == net]
        lines += [f"## {net}", "", *_dense_line(mine), *_tables(net, mine), "", *_how(mine)]
    return "\n".join(lines).rstrip() + "\n"


def _how(rows: list[Row]) -> list[str]:
    """How long each network learned from its teacher."""
    found = {f"1/{row['ratio']:g}": row.get("how", f"{row['epochs']} epochs") for row in rows if "epochs" in row}
    if not found:
        return []
    return ["`train --teacher`: " + "; ".join(f"{ratio}: {how}" for ratio, how in found.items()) + ".", ""]


def _furthest(rows: list[Row]) -> float:
    """How far the MACs are from the budget at most."""
    return max((abs(row["ratio"] / row["macs_ratio"] - 1) for row in rows if row["variant"] != DENSE), default=0.0)


def _dense_line(rows: list[Row]) -> list[str]:
    dense = next((row for row in rows if row["variant"] == DENSE), None)
    if dense is None:
        return []
    text = f"Dense: {dense['top1']:.2f} %, {dense['macs'] / 1e6:.1f} M MACs, {dense['params'] / 1e3:.0f} k parameters."
    return [text, ""]


def _tables(net: str, rows: list[Row]) -> list[str]:
    found = {(row["variant"], row["ratio"]): row for row in rows if row["variant"] != DENSE}
    ratios = sorted({ratio for _, ratio in found})
    variants = [variant for variant in LABELS if any(name == variant for name, _ in found)]
    accuracies, speeds = [], []
    for variant in variants:
        cells = [LABELS[variant]]
        for ratio in ratios:
            row = found.get((variant, ratio))
            cells.append(f"{row['top1']:.2f}" if row else "")
        seconds = [row["seconds"] for (name, _), row in found.items() if name == variant]
        accuracies.append([*cells, "–".join(dict.fromkeys(f"{end(seconds):.0f}" for end in (min, max)))])
        if bars := BARS.get(variant, {}).get(net):
            accuracies.append(["bar", *(f"*{bars[ratio]:.1f}*" if ratio in bars else "" for ratio in ratios), ""])
        cells = [LABELS[variant]]
        for ratio in ratios:
            row = found.get((variant, ratio))
            cells.append(f"{row['latency_share']:.2f}, 1/{row['params_ratio']:.2f}" if row else "")
        speeds.append(cells)
    return [
        *table(["top-1", *(f"1/{ratio:g} of the MACs" for ratio in ratios), "seconds"], accuracies),
        "",
        *table(["latency share, parameters", *(f"1/{ratio:g} of the MACs" for ratio in ratios)], speeds),
    ]


NEAR = 12.0
"""Points below the dense network that the lower panels show."""


def draw(rows: list[Row], out: Path) -> None:
    """Top-1 over what is left of the MACs, and of the latency: a column for each network, its upper end below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    nets = list(dict.fromkeys(row["net"] for row in rows))
    kinds: dict[str, tuple[str, Callable[[Row], float]]] = {
        "macs": ("share of the MACs", lambda row: 1 / row["macs_ratio"]),
        "latency": ("share of the measured latency", lambda row: row["latency_share"]),
    }
    for kind, (label, share) in kinds.items():
        figure, panels = pyplot.subplots(2, len(nets), figsize=(5 * len(nets), 7.6), squeeze=False, sharex="col")
        for column, net in enumerate(nets):
            mine = [row for row in rows if row["net"] == net]
            dense = [(1.0, row["top1"]) for row in mine if row["variant"] == DENSE]
            for panel in panels[:, column]:
                for color, (variant, name) in enumerate(LABELS.items()):
                    points = sorted((share(row), row["top1"]) for row in mine if row["variant"] == variant)
                    if points:
                        look = {"marker": "o", "markersize": 4, "color": f"C{color}"}
                        style, plain = "--" if variant in PEERS else "-", name.replace("**", "").replace("`", "")
                        panel.plot(*zip(*points, *dense, strict=True), style, label=plain, **look)
                panel.plot(*zip(*dense, strict=True), "k*", markersize=11) if dense else None
                panel.grid(linewidth=0.3)
            panels[0][column].set_title(net, fontsize=10)
            panels[1][column].set_xlabel(label)
            if dense:
                panels[1][column].set_ylim(dense[0][1] - NEAR, dense[0][1] + 1)
        for panel in panels[:, 0]:
            panel.set_ylabel("top-1, %")
        handles = [panel.get_legend_handles_labels() for panel in panels.flat]
        named = {text: line for lines, texts in handles for line, text in zip(lines, texts, strict=True)}
        figure.tight_layout(rect=(0, 0.09, 1, 1))
        figure.legend(named.values(), named, loc="lower center", ncols=3, fontsize=8, frameon=False)
        figure.savefig(out.with_name(f"{out.name}-{kind}.png"), dpi=130)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--nets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--variants", nargs="+", default=list(SLIM), choices=list(LABELS), metavar="VARIANT",
                        help=f"of {', '.join(LABELS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--ratios", nargs="+", type=float, help="default: the bars' budgets")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU provider, for the latency")
    parser.add_argument("--files", type=Path, help="folder of the pruned networks (default: a temporary one)")
    parser.add_argument("--resume", action="store_true", help="run only what has no row")
    parser.add_argument("--times", action="store_true", help="only measure the latency of what is in --files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/posttraining"))
    options = parser.parse_args()
    if options.times and options.files is None:
        parser.error("--times needs --files")
    command = ["python", "benchmarks/posttraining.py", "DATA_DIR", "MODEL_DIR", "--images", str(options.images)]
    store = Store(options.out, command, ("net", "ratio", "variant"), page).resume()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for net in options.nets:
            bench = Bench(net, options, folder)
            if options.times:
                times(bench, store)
                continue
            run(bench, store, options)
    draw(store.rows, options.out)
    print(options.out.with_suffix(".md").read_text())


def run(bench: Bench, store: Store, options: argparse.Namespace) -> None:
    """Measure the rows of one network."""
    if store.get(net=bench.name, variant=DENSE) is None:
        store.add(bench.dense())
    for variant in options.variants:
        if variant in PEERS and bench.name not in BUDGETS:
            Lines().note(f"{variant} does not apply to {bench.name}: it needs the torch module of the network")
            continue
        for ratio in bench.ratios:
            if options.resume and store.get(net=bench.name, ratio=ratio, variant=variant) is not None:
                continue
            row = bench.measure(ratio, variant)
            store.add(row)
            print(bench.name, ratio, variant, f"{row['top1']:.2f}", f"{row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
