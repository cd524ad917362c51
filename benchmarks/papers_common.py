"""What the pages of ``papers.py`` share: trained runs as rows, stored as soon as they are measured, and their commands.

A row is what one or more runs gave, and is known by its command: a page that is made again with ``--resume`` measures
what it has no row for, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from pydantic import BaseModel

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.files import write_text
from prune_onnx.graph_ops.graph import tensor_value
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline.environment import capture
from prune_onnx.pipeline.train import ARTIFACTS, train
from prune_onnx.trainers.config import TrainConfig

Row = dict[str, Any]

UNTOLD = ("resume", "force", "data_dir", "device")
"""Options that a command of a page leaves out: they say where it ran, not what it did."""


POSITIONAL = {"slim": "input", "eval": "model"}
"""Options that commands take without a flag."""


class Notes(Progress):
    """Shows what takes long: a line an epoch."""

    def note(self, message: str) -> None:
        print(f"  {message}", flush=True)

    def warn(self, message: str) -> None:
        print(f"  warning: {message}", flush=True)


@dataclass
class Sheet:
    """The rows of one page.

    Attributes:
        out: path of the page and of its rows, without suffix.
        command: what made it.
        body: makes the page's text from the rows.
        rows: in the order in which they were measured.
    """

    out: Path
    command: str
    body: Callable[[list[Row]], Sequence[str]]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, options: argparse.Namespace, body: Callable[[list[Row]], Sequence[str]]) -> Sheet:
        """Return the page of a sub-command; with ``--resume``, with the rows that it has."""
        sheet = cls(options.out or Path(f"benchmarks/results/papers-{options.paper}"), options.command, body)
        stored = sheet.out.with_suffix(".json")
        if options.resume and stored.exists():
            sheet.rows = json.loads(stored.read_text(encoding="utf-8"))["rows"]
        return sheet

    def has(self, commands: Sequence[str]) -> bool:
        """Return whether there is a row that begins with these commands."""
        return any(row["commands"][: len(commands)] == list(commands) for row in self.rows)

    def add(self, row: Row) -> None:
        """Store a row, and make the page again."""
        self.rows.append({**row, "made": self.command, "date": datetime.now(UTC).isoformat(timespec="seconds")})
        print(json.dumps({key: value for key, value in row.items() if key != "history"}), flush=True)
        self.write()

    def write(self) -> None:
        """Write rows and page."""
        environment = {**capture(), "argv": shlex.split(self.command)}
        found = {"rows": self.rows, "environment": environment}
        write_text(self.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
        title, *text = self.body(self.rows)
        page = [title, "", *self.head(environment), *text]
        write_text(self.out.with_suffix(".md"), "\n".join(page).rstrip() + "\n")

    def head(self, environment: dict[str, Any]) -> list[str]:
        """Return how, when and where the page was made."""
        made = list(dict.fromkeys(row["made"] for row in self.rows)) or [self.command]
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        dates = sorted(row["date"] for row in self.rows) or [environment["date"]]
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        return [
            "```sh",
            *made,
            "```",
            "",
            f"{when} · {environment['cpu']}, {environment['cores']} cores · {versions}",
            "",
        ]


def trained(options: argparse.Namespace, name: str, **settings: Any) -> tuple[TrainConfig, str]:
    """Return a run under the folder of runs, and the command that it is."""
    where = {"output": options.runs / name, "data_dir": options.data_dir, "device": options.device}
    config = TrainConfig(**settings, **where, resume=True)
    return config, command("train", config, options.runs)


def limited(options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``--images`` asks for, as options of a run."""
    return {"train_size": options.images} if options.images else {}


def run(config: TrainConfig) -> Row:
    """Train, or take what the run's folder has of it.

    Returns:
        ``error`` and ``accuracy`` on the test images in percent, ``left`` (weights and biases that are not zero, in
        percent), ``dead_channels`` and ``channels``, ``weights`` of kernels, ``seconds`` and ``history`` (see
        :mod:`prune_onnx.trainers.loop`).
    """
    result = train(config, Notes())
    history = [json.loads(line) for line in (config.output / ARTIFACTS["metrics"]).read_text().splitlines()]
    sizes = [(np.count_nonzero(value), value.size) for value in parameters(config.output / ARTIFACTS["model"]).values()]
    return {
        "accuracy": 100 * result.accuracy.test,
        "error": 100 * (1 - result.accuracy.test),
        "left": 100 * sum(live for live, _ in sizes) / sum(size for _, size in sizes),
        "channels": result.sparsity.channels,
        "dead_channels": result.sparsity.dead_channels,
        "weights": result.sparsity.weights,
        "seconds": sum(entry["seconds"] for entry in history),
        "history": history,
    }


def parameters(model: Path) -> dict[str, np.ndarray]:
    """Return the floating-point initializers of an ONNX file by name."""
    initializers = model_io.load(model).graph.initializer
    values = {tensor.name: tensor_value(tensor) for tensor in initializers}
    return {name: value for name, value in values.items() if value.dtype.kind == "f"}


def command(stage: str, config: BaseModel, runs: Path) -> str:
    """Return the command line of a configuration; files in the folder of runs are ``runs/...``."""
    given = config.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    words = ["prune-onnx", stage]
    if stage in POSITIONAL:
        words.append(_word(given.pop(POSITIONAL[stage]), runs))
    for key, value in given.items():
        flag = "--" + key.replace("_", "-")
        if key in UNTOLD:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, _word(value, runs)]
    return shlex.join(words)


def _word(value: Any, runs: Path) -> str:
    if isinstance(value, list):
        return ",".join(f"{each:.9g}" for each in value)
    if isinstance(value, str) and value.startswith(f"{runs}/"):
        return f"runs/{Path(value).relative_to(runs)}"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Return mean and standard deviation (of the sample), as papers print them."""
    found = list(values)
    middle = f"{mean(found):.{digits}f}"
    return middle if len(found) == 1 else f"{middle} ± {stdev(found):.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table; columns of which the head begins with ``>`` are set to the right."""
    rules = ["---:" if name.startswith(">") else "---" for name in head]
    lines = [[name.lstrip(">") for name in head], rules, *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def commands_list(rows: Iterable[Row]) -> list[str]:
    """Return the commands of the rows, once each."""
    lines = dict.fromkeys(line for row in rows for line in row["commands"])
    return ["```sh", *lines, "```"]
