"""What the accuracy benchmarks share: rows that are stored as soon as they are measured, and logits of a file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.files import write_text
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline.data import Samples, recipe_for
from prune_onnx.pipeline.environment import capture
from prune_onnx.pipeline.latency import ProviderStopwatch
from prune_onnx.pipeline.probing import batch_of, probe
from prune_onnx.pipeline.sessions import create_session

Row = dict[str, Any]
BATCH = 500
REPEATS = 3
"""Measurements of the latency, of which the median counts."""


class Lines(Progress):
    """Prints what happens."""

    def note(self, message: str) -> None:
        """Print a line."""
        print(f"  {message}", flush=True)

    def warn(self, message: str) -> None:
        """Print a warning."""
        print(f"  Warning: {message}", flush=True)


@dataclass
class Store:
    """Rows of a page, in OUT.json and OUT.md after each of them.

    Attributes:
        out: the results without suffix.
        command: that made them, for the page.
        keys: what tells one row from another.
        page: Markdown of the rows and the line that says how they came about.
        rows: what is stored.
    """

    out: Path
    command: list[str]
    keys: tuple[str, ...]
    page: Callable[[list[Row], str], str]
    rows: list[Row] = field(default_factory=list)

    def resume(self) -> Store:
        """Take the rows that are stored already."""
        path = self.out.with_suffix(".json")
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        self.rows = [row for row in rows if set(self.keys) <= set(row)]
        return self

    def get(self, **key: Any) -> Row | None:
        """Return the row of that key, if there is one."""
        return next((row for row in self.rows if all(row[name] == value for name, value in key.items())), None)

    def add(self, row: Row) -> None:
        """Put a row in the place of the one with the same key, and write both files."""
        old = self.get(**{name: row[name] for name in self.keys})
        row = {**row, "date": time.strftime("%Y-%m-%dT%H:%M:%S")}
        if old is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(old)] = row
        self.write()

    def write(self) -> None:
        """Write OUT.json and OUT.md."""
        environment = capture()
        environment["argv"] = self.command
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            environment["versions"]["torch-pruning"] = importlib.metadata.version("torch-pruning")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        found = {"rows": self.rows, "environment": environment}
        write_text(self.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
        write_text(self.out.with_suffix(".md"), self.page(self.rows, origin(environment)))


def origin(environment: dict[str, Any]) -> str:
    """One line: the command, when and where it ran last, and with what."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"`{' '.join(environment['argv'])}` · rows of several runs, each with its date in the JSON; the last one "
        f"{environment['date']} · {environment['cpu']}, {environment['cores']} cores · {versions}"
    )


def table(header: list[str], rows: list[list[str]], text: int = 1) -> list[str]:
    """Lines of a Markdown table; the first ``text`` columns are text, the others numbers."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def outputs(
    model: Path | onnx.ModelProto,
    samples: Samples,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> list[np.ndarray]:
    """All outputs of a network over samples, each with the samples along its first axis."""
    model = onnx.load(model) if isinstance(model, Path) else model
    session = create_session(model, "cpu")
    name = session.get_inputs()[0].name
    recipe = recipe_for(model, samples, mean, std)
    batches = samples.batches(recipe, batch_of(Graph(model)) or BATCH)
    runs = [session.run(None, {name: x}) for x, _ in batches]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers in percent."""
    return 100 * float((logits.argmax(1) == labels).mean())


def shares(original: Path, files: list[Path], threads: int) -> list[float]:
    """Latencies over the original's, medians of several measurements of all of them in turns."""
    feeds = probe(Graph(model_io.load(original)))[1]
    models = [onnx.load(path) for path in (original, *files)]
    stopwatch = ProviderStopwatch("cpu", threads)
    times = np.asarray([stopwatch.together(models, feeds) for _ in range(REPEATS)])
    return np.median(times[:, 1:] / times[:, :1], axis=0).tolist()
