"""Measured speed of pruned models on the CPU provider: budgets in latency, and in MACs with and without alignment.

    python benchmarks/speed.py MODEL.onnx ... [--vgg16] [--budgets 0.9 0.7 0.5] [--threads 1] [--resume]
                               [--out benchmarks/results/speed]

For every model and budget F, four files are made: F of the latency; F of the MACs with the steps of the measured
tables; F of the MACs with --align 8; F of the MACs without alignment. They and the original are timed together, in
turns. Channels are chosen by weight norms: speed does not depend on which ones go. --vgg16 adds a VGG-16 for CIFAR-10
with random weights. Each row is stored as soon as it is measured; --resume keeps the rows that are there.

Bars: the measured latency within 5 % of the one asked for, never slower than the original, and, for nets of wide
layers, a speed-up of at least 0.9 of the MACs ratio. Narrow nets (fewer than 64 output channels on the MACs' average)
are bound by blocks of 16 channels and by what a launch costs: for them the column of what the table allows is to be
looked at, the best quotient that any plan of that predicted latency has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.allocate import FractionalCost
from prune_onnx.graph_ops.analysis import Analysis, analyse
from prune_onnx.graph_ops.errors import PlanError
from prune_onnx.graph_ops.files import write_text
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.latency_model import LatencyModel
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline.environment import capture
from prune_onnx.pipeline.latency import ProviderStopwatch, batched, measured_steps
from prune_onnx.pipeline.probing import probe
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig, SlimResult

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
VARIANTS = {
    "latency": {},
    "macs, measured steps": {},
    "macs, --align 8": {"align": 8},
    "macs, --align 1": {"align": 1},
}
WITHIN = 0.05
LEAST_QUOTIENT = 0.9
NARROW = 64
# Two models that take the same time differ by this much in one measurement.
NOISE = 0.01


def vgg16(folder: Path) -> Path:
    """Write a VGG-16 for CIFAR-10 with random weights."""
    import torch

    from prune_onnx.trainers.export import export_onnx
    from prune_onnx.trainers.models import build_model

    torch.manual_seed(0)
    shape = (3, 32, 32)
    recipe = Preprocessing((0.5,) * 3, (0.5,) * 3)
    export_onnx(build_model("vgg16", 10, shape), shape, folder / "vgg16-cifar10.onnx", recipe, {})
    return folder / "vgg16-cifar10.onnx"


def best_quotient(analysis: Analysis, model: LatencyModel, latency: float) -> float:
    """The largest (speed-up / MACs ratio) found among plans that the table predicts to take the share ``latency``.

    From the whole model down, always the step of one group that costs the fewest MACs for the time it saves.
    """
    time, macs = FractionalCost(analysis, "latency", model.cost), FractionalCost(analysis, "macs")
    kept = np.ones(time.groups)
    full_time, full_macs = time.total(kept), macs.total(kept)
    shares = {
        g: np.asarray(model.steps[g]) / model.steps[g][-1]
        for g, group in enumerate(analysis.groups)
        if not analysis.pinned[group.units].any()
    }
    best = 0.0
    while time.total(kept) > latency * full_time:
        moves = []
        for g, all_shares in shares.items():
            below = all_shares[all_shares < kept[g]]
            if len(below):
                saved = time.total(kept) - time.along(kept, g, below)
                lost = macs.total(kept) - macs.along(kept, g, below)
                worth = lost / np.maximum(saved, 1e-12)
                moves.append((worth.min(), g, below[int(np.argmin(worth))]))
        if not moves:
            return best
        _, g, share = min(moves)
        kept[g] = share
        best = macs.total(kept) / full_macs / (time.total(kept) / full_time)
    return best


def mean_width(analysis: Analysis, shapes: dict[str, tuple[int, ...]]) -> float:
    """Output channels of the convolutions and matrices, averaged over the multiply-accumulates."""
    macs = [work.scale * float(np.prod([len(v) for v in work.factors])) for work in analysis.works]
    return float(np.average([shapes[work.node.outputs[0]][1] for work in analysis.works], weights=macs))


def prune(model: Path, variant: str, budget: float, folder: Path, options: argparse.Namespace) -> SlimResult | str:
    """Make one variant; the message when its budget cannot be reached."""
    kind = {"keep_latency": budget} if variant == "latency" else {"keep_macs": budget}
    steps = {"cost_cache": options.cost_cache} if variant in ("latency", "macs, measured steps") else {}
    config = {
        "input": model, "output": folder / f"{list(VARIANTS).index(variant)}.onnx", "threads": options.threads,
        "force": True, **kind, **steps, **VARIANTS[variant],
    }  # fmt: skip
    try:
        return slim(SlimConfig(**config), Notes())
    except PlanError as error:
        return str(error)


class Notes(Progress):
    """Shows what takes long."""

    def note(self, message: str) -> None:
        """Print a line."""
        print(f"  {message}", flush=True)


def measure(model: Path, budget: float, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One model at one budget: a row of the table."""
    graph = Graph(model_io.load(model))
    found, feeds, _ = probe(graph)
    made = {variant: prune(model, variant, budget, folder, options) for variant in VARIANTS}
    results = {variant: result for variant, result in made.items() if isinstance(result, SlimResult)}
    models = [onnx.load(model), *(onnx.load(result.output) for result in results.values())]
    stopwatch = ProviderStopwatch("cpu", options.threads)
    times = stopwatch.together(models, batched(graph, feeds, 1))
    analysis = analyse(graph, found)
    table = measured_steps(SlimConfig(input=model, dry_run=True, cost_cache=options.cost_cache,
                                      threads=options.threads), analysis, Notes())  # fmt: skip
    row: dict[str, Any] = {"model": model.stem, "budget": budget, "original_ms": times[0], "variants": {}}
    row["narrow"] = mean_width(analysis, found.shapes) < NARROW
    row["refused"] = {variant: text for variant, text in made.items() if isinstance(text, str)}
    for (variant, result), ms in zip(results.items(), times[1:], strict=True):
        macs = result.after.macs / result.before.macs
        row["variants"][variant] = {
            "ms": ms,
            "share": ms / times[0],
            "macs": macs,
            "quotient": macs * times[0] / ms,
            "seconds": result.seconds,
            "latency": result.latency.model_dump() if result.latency else None,
        }
    if "latency" in row["variants"]:
        row["best_quotient"] = best_quotient(analysis, table, row["variants"]["latency"]["share"])
    return row


def verdict(row: dict[str, Any]) -> str:
    """Which bars the row's latency budget misses."""
    if "latency" not in row["variants"]:
        return "cannot be reached"
    found = row["variants"]["latency"]
    bars = {
        "off": abs(found["share"] / row["budget"] - 1) <= WITHIN,
        "slower": found["share"] <= 1 + NOISE,
        "quotient": row["narrow"] or found["quotient"] >= LEAST_QUOTIENT,
    }
    return ", ".join(name for name, met in bars.items() if not met) or "met"


def page(rows: list[dict[str, Any]], environment: dict[str, Any], command: str) -> str:
    """The Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        "# Speed of pruned models, CPU provider",
        "",
        f"`{command}` · {environment['date']} · {environment['cpu']}, {environment['cores']} cores, "
        f"load {environment['load_1min']:.1f} · {versions}",
        "",
        "Share of the original's latency, measured in turns with it; in brackets speed-up / MACs ratio.",
        "",
        "| model | original ms | asked | " + " | ".join(VARIANTS) + " | table's best | bars |",
        "| --- | ---: | ---: |" + " ---: |" * len(VARIANTS) + " ---: | --- |",
    ]
    for row in rows:
        cells = []
        for variant in VARIANTS:
            found = row["variants"].get(variant)
            cells.append(f"{found['share']:.3f} ({found['quotient']:.2f})" if found else "not reachable")
        best = f"{row['best_quotient']:.2f}" if "best_quotient" in row else ""
        name = row["model"] + (" (narrow)" if row["narrow"] else "")
        cells = [name, f"{row['original_ms']:.3g}", f"{row['budget']:g}", *cells, best, verdict(row)]
        lines.append(f"| {' | '.join(cells)} |")
    refused = [f"- {row['model']} at {row['budget']:g}, {name}: {text}" for row in rows
               for name, text in row["refused"].items()]  # fmt: skip
    return "\n".join([*lines, *(["", *refused] if refused else [])]) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured against asked-for share of the latency, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 3.4), squeeze=False, sharey=True)
    for name, panel in zip(names, panels[0], strict=True):
        mine = sorted((row for row in rows if row["model"] == name), key=lambda row: row["budget"])
        asked = [row["budget"] for row in mine]
        panel.plot(asked, asked, color="0.8", linewidth=4, label="asked for")
        for variant in VARIANTS:
            shares = [row["variants"].get(variant, {}).get("share", np.nan) for row in mine]
            panel.plot(asked, shares, marker="o", markersize=4, label=variant)
        panel.axhline(1, color="0.4", linestyle=":", linewidth=1)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("budget")
    panels[0][0].set_ylabel("measured share of the latency")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--vgg16", action="store_true")
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cost-cache", type=Path, help="folder of the layers' times (default: beside --out)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed"))
    options = parser.parse_args()
    options.cost_cache = options.cost_cache or options.out.with_name("speed-tables")
    results = options.out.with_suffix(".json")
    rows = json.loads(results.read_text())["rows"] if options.resume and results.exists() else []
    done = {(row["model"], row["budget"]) for row in rows}
    environment = capture()
    command = "python benchmarks/speed.py " + " ".join(
        [*(m.name for m in options.models), *(["--vgg16"] if options.vgg16 else []), f"--threads {options.threads}"]
    )
    with tempfile.TemporaryDirectory() as folder:
        models = [*options.models, *([vgg16(Path(folder))] if options.vgg16 else [])]
        for model in models:
            for budget in options.budgets:
                if (model.stem, budget) in done:
                    continue
                print(f"{model.stem} at {budget:g}", flush=True)
                row = measure(model, budget, Path(folder), options)
                rows.append(row)
                environment["argv"] = command.split()[1:]
                write_text(results, json.dumps({"rows": rows, "environment": environment}, indent=1) + "\n")
                write_text(options.out.with_suffix(".md"), page(rows, environment, command))
                print(page([row], environment, command).splitlines()[-1 - len(row["refused"])], flush=True)
    draw(rows, options.out.with_suffix(".png"))
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
