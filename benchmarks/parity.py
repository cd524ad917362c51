"""ONNX files as torch modules: do they give what ONNX Runtime gives?

    python benchmarks/parity.py FOLDER ... [--largest 400] [--out benchmarks/results/parity]

Every .onnx file of the folders, in a process of its own, one after the other: random inputs through ONNX Runtime and
through :class:`OnnxModule` in evaluation mode. The difference is that of the values that differ most, relative to the
largest value of their output; integers must be equal, NaN and infinity in place. Bar: 1e-4, for every file whose
operators can be trained. Files over --largest MB are left out and named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.graph_ops.files import write_text
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.pipeline.environment import capture
from prune_onnx.pipeline.probing import probe
from prune_onnx.pipeline.sessions import create_session, run_session

MOST = 1e-4


def difference(wanted: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value wanted; infinite where the rest does not agree."""
    x, y = wanted.astype(np.float64), found.astype(np.float64)
    if x.shape != y.shape:
        return float("inf")
    finite = np.isfinite(x)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
        return float("inf")
    size = np.abs(x[finite]).max(initial=0.0) or 1.0
    return float(np.abs(x - y)[finite].max(initial=0.0) / size)


def compared(path: Path) -> dict[str, Any]:
    """Return a file's row; without a difference where it cannot be trained."""
    import torch

    from prune_onnx.trainers.from_onnx import OnnxModule

    start = time.perf_counter()
    model = model_io.load(path)
    graph = Graph(model)
    row: dict[str, Any] = {"file": path.name, "nodes": len(graph.nodes), "mb": round(path.stat().st_size / 1e6, 1)}
    try:
        module = OnnxModule(model).eval()
    except ModelError as error:
        return row | {"refused": " ".join(str(error).split())}
    row["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    _, feeds, _ = probe(graph)
    session = create_session(path)
    wanted = run_session(session, feeds)
    inputs = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in module.input_names]
    with torch.no_grad():
        found = module(*(x.float() if x.dtype == torch.float16 else x for x in inputs))
    found = found if isinstance(found, tuple) else (found,)
    row["difference"] = max(difference(a, b.numpy()) for a, b in zip(wanted, found, strict=True))
    row["half"] = any(a.dtype == np.float16 for a in wanted)
    return row | {"seconds": time.perf_counter() - start}


def alone(path: Path) -> dict[str, Any]:
    """Return a file's row, made by a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was ended"])[-1]
        return {"file": path.name, "failed": last}
    return json.loads(done.stdout)


def markdown(found: dict[str, Any]) -> str:
    """Return the page."""
    facts, rows = found["environment"], found["rows"]
    compared_rows = [row for row in rows if "difference" in row]
    within = sum(row["difference"] <= MOST for row in compared_rows)
    lines = [
        "# ONNX files as torch modules", "",
        f"`{' '.join(['python', *facts['argv']])}` · {facts['date']} · {facts['cpu']}, {facts['cores']} cores · "
        + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()), "",
        f"{within} of {len(compared_rows)} files give what ONNX Runtime gives to {MOST:g} of the largest value; "
        f"{sum('refused' in row for row in rows)} cannot be trained.", "",
        "| file | nodes | parameters | largest difference | seconds | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: row["file"]):
        if "difference" in row:
            cells = [f"{row['parameters']:,}", f"{row['difference']:.1e}", f"{row['seconds']:.1f}"]
            cells.append("" if row["difference"] <= MOST else "**over**")
        else:
            cells = ["", "", "", row.get("refused") or row.get("failed") or row["left_out"]]
        lines.append(f"| {' | '.join([row['file'], str(row.get('nodes', '')), *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--largest", type=float, default=400, help="MB of a file, at most")
    parser.add_argument("--out", type=Path, help="write the figures to OUT.md and OUT.json as well")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compared(options.one)))
        return
    environment = capture()
    environment["argv"] = ["benchmarks/parity.py", *(folder.name for folder in options.folders)]
    rows: list[dict[str, Any]] = []
    for path in sorted(file for folder in options.folders for file in folder.glob("*.onnx")):
        mb = sum(part.stat().st_size for part in (path, path.with_name(path.name + ".data")) if part.exists()) / 1e6
        rows.append({"file": path.name, "left_out": f"{mb:.0f} MB"} if mb > options.largest else alone(path))
        found = {"environment": environment, "rows": rows}
        print(markdown({**found, "rows": rows[-1:]}).splitlines()[-1], flush=True)
        if options.out:
            write_text(options.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
            write_text(options.out.with_suffix(".md"), markdown(found))
    if any("failed" in row or row.get("difference", 0) > MOST for row in rows):
        sys.exit("a file differs")


if __name__ == "__main__":
    main()
