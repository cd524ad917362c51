"""How much of the known architectures ``slim`` can prune, how exactly, how fast; beside Torch-Pruning and onnxsim.

    python benchmarks/zoo.py ZOO_FOLDER
    python benchmarks/coverage.py ZOO_FOLDER [NAME ...] [--tools TOOL,...] [--resume] --out benchmarks/results/coverage

Half of every group goes, by L2 norm, without alignment and without a floor: what is left of the multiply-accumulates
(MACs) tells how many groups a tool found. Half of all channels everywhere leaves a quarter. Every result runs in ONNX
Runtime and ours is held against the masked original. Each model and tool has a process of its own and a time limit.
Writes OUT.md, OUT.json and OUT.png, after every model; figures of tools that are not run again are kept from
the OUT.json
that is there, and ``--resume`` runs only what has none. The tools are ``release`` and ``pin`` (ours) and
``torch-pruning`` and ``onnxsim``, which need torchvision, timm, torch-pruning and onnxsim, and an hour or two.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT_S = 150
TOOLS = ("release", "pin", "torch-pruning", "onnxsim")
# The files that onnxsim's pruning is run on: those of the comparison in its favour, plain convolutional nets.
ONNXSIM_MODELS = frozenset({
    "convnext_tiny", "densenet121", "efficientnet_b0", "ghostnet_100", "googlenet", "mobilenet_v2",
    "mobilenet_v3_large", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x1_0",
    "squeezenet1_1", "vgg16_bn",
})
ENGINE = ("load", "analyse", "plan", "cut", "write")
CHECKS = ("probe", "verify")
REPEATS = 3
# The bars that the summary holds the figures against.
MOST_ABOVE_PEER = 0.01
MOST_PLAIN = 0.30
MOST_MEAN = 0.28
MOST_ANALYSIS_S = 0.2
MOST_MEMORY = 3.0
LARGE_FILE = 100e6
FLOOR_FACTOR, FLOOR_SLACK_S = 2.0, 0.1

Row = dict[str, Any]


# -- one model and tool, in a process of its own ---------------------------------------------------------------------
def ours(file: Path, norms: str) -> Row:
    """Prune a file with ``slim``; seconds are the best of some runs, memory is that of the first."""
    from prune_onnx.pipeline.slim import slim
    from prune_onnx.pipeline.slim_schema import SlimConfig

    with tempfile.TemporaryDirectory() as folder:
        config = SlimConfig(input=file, output=Path(folder) / "small.onnx", keep_channels=0.5, scope="layer", align=1,
                            min_keep=0, norms=norms, criterion="l2", force=True)
        runs = [slim(config)]
        peak = peak_bytes()
        runs += [slim(config) for _ in range(REPEATS - 1 if norms == "release" else 0)]
        floors = [floor(file, Path(folder) / "floor.onnx") for _ in range(REPEATS)]
    result = runs[0]
    return {
        "macs": result.after.macs / result.before.macs, "params": result.after.params / result.before.params,
        "max_rel_diff": result.verification.max_rel_diff,
        "seconds": min(sum(r.timings[k] for k in ENGINE) for r in runs),
        "analysis_seconds": min(r.timings["analyse"] for r in runs),
        "check_seconds": min(sum(r.timings[k] for k in CHECKS) for r in runs),
        "floor_seconds": min(floors), "timings": runs[-1].timings, "peak_bytes": peak,
        "pinned": {g.name: g.pinned_by for g in result.groups if g.pinned_by and g.kept == g.channels},
    }


def floor(file: Path, output: Path) -> float:
    """Seconds of the least that any tool must do: load the file, slice every weight, save.

    The first two axes of every weight are halved, so that what is written has about the size of a pruned model.
    """
    import onnx
    from onnx import numpy_helper

    started = time.perf_counter()
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and array.ndim:
            sliced = array[tuple(slice(None, None, 2) if axis < 2 else slice(None) for axis in range(array.ndim))]
            tensor.CopyFrom(numpy_helper.from_array(sliced.copy(), tensor.name))
    onnx.save(model, output)
    return time.perf_counter() - started


def peak_bytes() -> int:
    """Largest resident memory of this process so far, mapped files included."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def worker(tool: str, name: str, file: Path) -> None:
    """Print one result as a line of JSON."""
    if tool in ("release", "pin"):
        row = ours(file, tool)
    else:
        import peers

        try:
            row = peers.TOOLS[tool](name, file)
        except peers.StageError as failure:
            row = {"failure": str(failure)}
        row["peak_bytes"] = peak_bytes()
    print(json.dumps(row))


def run_worker(tool: str, name: str, file: Path) -> Row:
    """Run one model and tool in a fresh process."""
    command = [sys.executable, __file__, str(file.parent), name, "--worker", tool]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failure": f"no result after {LIMIT_S} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failure": f"exit status {done.returncode}: {last[0]}"[:300]}
    return json.loads(done.stdout.splitlines()[-1]) | {"date": time.strftime("%Y-%m-%dT%H:%M:%S")}


# -- summary ---------------------------------------------------------------------------------------------------------
def summarise(rows: dict[str, Row]) -> dict[str, Any]:
    """Hold the figures against the bars."""
    release = {name: row["release"] for name, row in rows.items() if "macs" in row.get("release", {})}
    pinned = {name: row["pin"]["macs"] for name, row in rows.items() if "macs" in row.get("pin", {})}
    plain = [name for name in release if name in pinned and abs(pinned[name] - release[name]["macs"]) < 1e-9]
    peer = {name: row["torch-pruning"]["macs"] for name, row in rows.items() if "macs" in row.get("torch-pruning", {})}
    tried = [name for name, row in rows.items() if "torch-pruning" in row]
    simplified = {name: row["onnxsim"]["macs"] for name, row in rows.items() if "macs" in row.get("onnxsim", {})}
    simplify_tried = [name for name, row in rows.items() if "onnxsim" in row]
    late = [n for n, r in release.items() if r["seconds"] > FLOOR_FACTOR * r["floor_seconds"] + FLOOR_SLACK_S]
    big = {n: r["peak_bytes"] / rows[n]["bytes"] for n, r in release.items() if rows[n]["bytes"] > LARGE_FILE}
    return {
        "models": len(rows),
        "exact": len(release),
        "failed": sorted(set(rows) - set(release)),
        "max_rel_diff": max((r["max_rel_diff"] for r in release.values()), default=None),
        "mean_macs_released": mean(r["macs"] for r in release.values()),
        "mean_macs_pinned": mean(pinned.values()),
        "plain": sorted(plain),
        "plain_over_bar": {n: release[n]["macs"] for n in plain if release[n]["macs"] > MOST_PLAIN},
        "torch_pruning_tried": len(tried),
        "torch_pruning_ok": len(peer),
        "torch_pruning_mean_macs": mean(peer.values()),
        "ours_mean_macs_where_torch_pruning_ok": mean(release[n]["macs"] for n in peer if n in release),
        "above_torch_pruning": {n: [release[n]["macs"], peer[n]] for n in peer
                                if n in release and release[n]["macs"] > peer[n] + MOST_ABOVE_PEER},
        "onnxsim_tried": len(simplify_tried),
        "onnxsim_ok": len(simplified),
        "onnxsim_mean_macs": mean(simplified.values()),
        "ours_mean_macs_where_onnxsim_ok": mean(release[n]["macs"] for n in simplified if n in release),
        "over_time_bar": {n: [release[n]["seconds"], release[n]["floor_seconds"]] for n in late},
        "over_analysis_bar": {n: r["analysis_seconds"] for n, r in release.items()
                              if r["analysis_seconds"] > MOST_ANALYSIS_S},
        "over_memory_bar": {n: ratio for n, ratio in big.items() if ratio > MOST_MEMORY},
        "largest_memory_ratio": max(big.values(), default=None),
        "mean_seconds": mean(r["seconds"] for r in release.values()),
        "mean_floor_seconds": mean(r["floor_seconds"] for r in release.values()),
    }


def mean(values: Any) -> float | None:
    """Mean of some numbers, ``None`` without any."""
    values = list(values)
    return statistics.fmean(values) if values else None


def show(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash."""
    return "–" if value is None else format(value, form)


def markdown(report: dict[str, Any]) -> str:
    """Lay the report out as tables."""
    env = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Coverage: half of every channel group removed", "",
        f"`{' '.join(report['command'])}`, rows of several runs (each has its date in the JSON), the last one "
        f"{env['date']}, {env['cpu']}, {env['cores']} cores; {versions}.", "",
        "MACs left: share of the original's multiply-accumulates, counted on the resulting ONNX graph.",
        "*Released*: axes that a LayerNorm, GroupNorm or mean runs across are cut as well (`--norms release`);",
        "*pinned*: they stay. *Difference*: largest deviation from the masked original, relative to the largest",
        "output. *Engine*: load, analyse, plan, cut and write; *floor*: load the file, slice every weight, save; both",
        f"the best of {REPEATS} runs. *Check*: probe run and verification. *Memory*: peak resident size of the whole",
        "process, Python, ONNX Runtime and mapped files included, over the file's size.", "",
        "## Summary", "", "| | |", "|---|---|",
        *(f"| {name} | {value} |" for name, value in bars(report["summary"])), "",
        "## Models", "",
        "| model | MB | MACs left released | pinned | Torch-Pruning | onnxsim | difference | engine s | floor s "
        "| analysis s | check s | memory | Torch-Pruning s, MB | onnxsim s, MB |",
        "|---|" + "---:|" * 13,
        *(line(name, row) for name, row in report["models"].items()),
    ]
    failures = [f"| {name} | {tool} | {row[tool]['failure']} |" for name, row in report["models"].items()
                for tool in TOOLS if "failure" in row.get(tool, {})]
    if failures:
        lines += ["", "## Failures", "", "| model | tool | message |", "|---|---|---|", *failures]
    return "\n".join(lines) + "\n"


def bars(s: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the summary table."""
    rows = [
        ("written, run and exact", f"{s['exact']} of {s['models']}"),
        ("largest relative difference", show(s["max_rel_diff"], ".1e")),
        ("mean MACs left, released / pinned", f"{show(s['mean_macs_released'])} / {show(s['mean_macs_pinned'])}"),
        (f"nets without a normalised axis that keep more than {MOST_PLAIN:.0%}",
         f"{listed(s['plain_over_bar'])} (of {len(s['plain'])})"),
        ("mean engine seconds / floor", f"{show(s['mean_seconds'])} / {show(s['mean_floor_seconds'])}"),
        (f"engine over {FLOOR_FACTOR:g} x floor + {FLOOR_SLACK_S} s", listed(s["over_time_bar"])),
        (f"analysis over {MOST_ANALYSIS_S} s", listed(s["over_analysis_bar"])),
        (f"memory over {MOST_MEMORY:g} x the file (files over {LARGE_FILE / 1e6:.0f} MB)",
         f"{listed(s['over_memory_bar'])} (largest {show(s['largest_memory_ratio'], '.1f')})"),
    ]
    if s["torch_pruning_tried"]:
        rows += [
            ("Torch-Pruning succeeds", f"{s['torch_pruning_ok']} of {s['torch_pruning_tried']}"),
            ("mean MACs left there: ours / Torch-Pruning",
             f"{show(s['ours_mean_macs_where_torch_pruning_ok'])} / {show(s['torch_pruning_mean_macs'])}"),
            ("more than 1 point above Torch-Pruning", listed(s["above_torch_pruning"])),
        ]
    if s["onnxsim_tried"]:
        rows += [
            ("onnxsim's result runs", f"{s['onnxsim_ok']} of {s['onnxsim_tried']}"),
            ("mean MACs left there: ours / onnxsim",
             f"{show(s['ours_mean_macs_where_onnxsim_ok'])} / {show(s['onnxsim_mean_macs'])}"),
        ]
    return rows


def line(name: str, row: Row) -> str:
    """One model's row."""
    own, tp, sim = row.get("release", {}), row.get("torch-pruning", {}), row.get("onnxsim", {})
    seconds = [show(own.get(f"{part}seconds"), ".2f") for part in ("", "floor_", "analysis_", "check_")]
    memory = own["peak_bytes"] / row["bytes"] if "peak_bytes" in own else None
    return "| " + " | ".join([
        name, f"{row['bytes'] / 1e6:.0f}", cell(own), cell(row.get("pin", {})), cell(tp), cell(sim),
        show(own.get("max_rel_diff"), ".1e"), *seconds, show(memory, ".1f"), speed(tp), speed(sim)]) + " |"


def listed(names: dict[str, Any]) -> str:
    """Names with their figures, or *none*."""
    parts = []
    for name, value in names.items():
        figures = value if isinstance(value, list) else [value]
        parts.append(f"{name} ({' / '.join(f'{v:.3g}' for v in figures)})")
    return ", ".join(parts) or "none"


def cell(row: Row) -> str:
    """MACs left in percent, or how it failed."""
    if "failure" in row:
        return "fails"
    return f"{row['macs']:.1%}" if "macs" in row else ""


def speed(row: Row) -> str:
    """Seconds and peak memory."""
    return f"{row['seconds']:.2f}, {row['peak_bytes'] / 1e6:.0f}" if "seconds" in row else ""


def plot(report: dict[str, Any], path: Path) -> None:
    """One line a model, one mark a tool; marks at the right edge are failures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(report["models"].items(), key=lambda item: item[1].get("release", {}).get("macs", 2), reverse=True)
    figure, axes = pyplot.subplots(figsize=(8, 0.21 * len(rows) + 1.6))
    styles = {
        "onnxsim": ("onnxsim", "s", "#c77d1a"),
        "torch-pruning": ("Torch-Pruning", "D", "#3366aa"),
        "pin": ("prune-onnx, norms pinned", "|", "#2f8f4e"),
        "release": ("prune-onnx, norms released", "o", "#2f8f4e"),
    }
    for tool, (label, marker, color) in styles.items():
        points = [(row[tool]["macs"], i) for i, (_, row) in enumerate(rows) if "macs" in row.get(tool, {})]
        failed = [(1.03, i) for i, (_, row) in enumerate(rows) if "failure" in row.get(tool, {})]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, color=color, s=26, label=label, zorder=3)
        if failed:
            axes.scatter(*zip(*failed, strict=True), marker="x", color=color, s=22, zorder=3)
    axes.axvline(0.25, color="0.6", linewidth=0.8)
    axes.axvline(1.0, color="0.8", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    axes.set_xlim(0.2, 1.06)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("MACs left when half of every group goes (x at the right: failed)")
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(loc="upper right", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the files that zoo.py wrote")
    parser.add_argument("names", nargs="*", help="architectures (default: every file in the folder)")
    parser.add_argument("--tools", default=",".join(TOOLS[:2]), help="comma-separated (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="run only what has no figures yet")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/coverage"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.names[0], options.folder / f"{options.names[0]}.onnx")
        return
    tools = options.tools.split(",")
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"unknown tools: {', '.join(sorted(unknown))}")
    # Two threads fighting for a core would be measured otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    stored = options.out.with_suffix(".json")
    rows: dict[str, Row] = json.loads(stored.read_text())["models"] if stored.exists() else {}
    for file in sorted(options.folder.glob("*.onnx")):
        if options.names and file.stem not in options.names:
            continue
        row = rows.setdefault(file.stem, {})
        row["bytes"] = file.stat().st_size
        for tool in tools:
            if (tool == "onnxsim" and file.stem not in ONNXSIM_MODELS) or (options.resume and tool in row):
                continue
            row[tool] = run_worker(tool, file.stem, file)
            print(file.stem, tool, row[tool].get("macs", row[tool].get("failure")), flush=True)
            write(dict(sorted(rows.items())), options.out)


def write(rows: dict[str, Row], out: Path) -> None:
    """Write the report in its three forms."""
    from prune_onnx.pipeline.environment import capture

    environment = capture()
    versions = dict(environment["versions"])
    for package in ("torchvision", "timm", "torch-pruning", "onnxsim"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    command = ["python", "benchmarks/coverage.py", "ZOO_FOLDER", "--tools", ",".join(TOOLS)]
    environment["argv"] = command
    report = {"environment": environment, "versions": versions, "command": command,
              "summary": summarise(rows), "models": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(report))
    plot(report, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
