"""Rows of tables whose networks take hours on a GPU: published figures, and the commands that measure ours.

A row is a chain of ``train``, ``slim`` and ``eval``. ``--run`` carries the chains out; without it, and where data is
missing, a row says that it was not run, why, and by which commands it would be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from papers_common import Notes, Row, Sheet, command, commands_list, limited, run, spread, table, trained

from prune_onnx.graph_ops.errors import DataError, PruneOnnxError
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.evaluate import evaluate
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.trainers.config import TrainConfig
from prune_onnx.trainers.data import load_dataset

Config = TrainConfig | SlimConfig | EvalConfig


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage; of stages with the same name, data and network only one is carried out.
        kind: ``train``, ``slim`` or ``eval``.
        source: name of the stage whose model it takes, or ``None``.
        settings: options of the command.
    """

    name: str
    kind: str
    source: str | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One row of a table.

    Attributes:
        dataset: listed name.
        network: listed name.
        method: as the paper calls it.
        published: figures by column, as they are printed.
        stages: in order.
        figures: what the stages' results say, by column, in the units of the paper.
    """

    dataset: str
    network: str
    method: str
    published: dict[str, str]
    stages: tuple[Stage, ...]
    figures: Callable[[dict[str, Row]], dict[str, float]]

    @property
    def label(self) -> list[str]:
        return [self.dataset, self.network, self.method]


@dataclass(frozen=True)
class Paper:
    """A page: its title, what has to be known about it, its columns and its rows."""

    title: str
    notes: str
    columns: tuple[str, ...]
    claims: tuple[Claim, ...]


def make(paper: Paper, options: argparse.Namespace) -> None:
    """Make the page; with ``--run``, measure the rows that are asked for and not there yet."""
    reasons: dict[int, str] = {}
    sheet = Sheet.open(options, partial(page, paper, reasons, options))
    for number, claim in enumerate(paper.claims):
        reasons[number] = missing(claim, options)
    for number, claim in enumerate(paper.claims):
        if not reasons[number]:
            try:
                measure(sheet, claim, options)
            except PruneOnnxError as error:
                reasons[number] = str(error)
                print(f"  {', '.join(claim.label)}: {error}", flush=True)
    sheet.write()


def missing(claim: Claim, options: argparse.Namespace) -> str:
    """Return why a row is not measured; empty when it is to be."""
    wanted = not options.only or all(word in " ".join(claim.label).lower() for word in options.only)
    if not options.run:
        return lacks_data(claim.dataset, options.data_dir) or "needs a GPU"
    return lacks_data(claim.dataset, options.data_dir) if wanted else "not asked for"


@cache
def lacks_data(dataset: str, data_dir: Path) -> str:
    """Return what is said of a row whose data set is absent; empty when it is there."""
    try:
        load_dataset(dataset, data_dir)
    except DataError:
        return f"needs the data set {dataset}"
    return ""


def measure(sheet: Sheet, claim: Claim, options: argparse.Namespace) -> None:
    """Carry a row's stages out, for each seed."""
    for seed in options.seeds:
        planned = plan(claim, seed, options)
        commands = [line for _, _, line in planned]
        if sheet.has(commands):
            continue
        results = {stage.name: carried_out(config) for stage, config, _ in planned}
        histories = {name: [entry["seconds"] for entry in found.pop("history", [])] for name, found in results.items()}
        for name, seconds in histories.items():
            if seconds:
                results[name]["epoch"] = median(seconds)
        sheet.add({
            "label": claim.label, "seed": seed, "figures": claim.figures(results), "stages": results,
            "commands": commands,
        })  # fmt: skip


def plan(claim: Claim, seed: int, options: argparse.Namespace) -> list[tuple[Stage, Config, str]]:
    """Return the stages with their configurations and commands."""
    planned: list[tuple[Stage, Config, str]] = []
    kinds = {stage.name: stage.kind for stage in claim.stages}
    for stage in claim.stages:
        name, made = f"{claim.dataset}-{claim.network}-{stage.name}-{seed}", None
        if stage.source is not None:
            source = f"{claim.dataset}-{claim.network}-{stage.source}-{seed}"
            made = options.runs / (source if kinds[stage.source] == "train" else f"{source}.onnx")
        file = made / "model.onnx" if made is not None and made.suffix != ".onnx" else made
        if stage.kind == "train":
            own = {"seed": seed, **stage.settings, **shortened(stage.settings, options), **limited(options)}
            if made is None or made.suffix != ".onnx":  # a graph has its widths
                own |= {"width": options.width} if options.width != 1 else {}
                own |= {"init": made} if made is not None else {}
            config, line = trained(options, name, model=str(file if made and made.suffix == ".onnx" else claim.network),
                                   dataset=claim.dataset, **own)  # fmt: skip
        elif stage.kind == "slim":
            config = SlimConfig(input=file, output=options.runs / f"{name}.onnx", force=True, **stage.settings)
            line = command("slim", config, options.runs)
        else:
            provider = "cuda" if options.device == "cuda" else "cpu"
            config = EvalConfig(model=file, dataset=claim.dataset, data_dir=options.data_dir, provider=provider,
                                min_time=0.1, min_runs=2, **stage.settings)  # fmt: skip
            line = command("eval", config, options.runs)
        planned.append((stage, config, line))
    return planned


def shortened(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``--epochs`` makes of a training: as many epochs, with one behind each pruning."""
    if options.epochs is None:
        return {}
    rounds = min(settings.get("rounds", 0), options.epochs)
    return {"epochs": options.epochs, **({"rounds": rounds, "retrain_epochs": 1} if rounds else {})}


def carried_out(config: Config) -> Row:
    """Return what a stage found: see :func:`.papers_common.run`; of ``slim``, percent of what is gone."""
    print(f"  {config.output if not isinstance(config, EvalConfig) else config.model}", flush=True)
    if isinstance(config, TrainConfig):
        return run(config)
    if isinstance(config, EvalConfig):
        found = evaluate(config, Notes()).model.accuracy
        assert found is not None  # data sets have labels
        return {"accuracy": 100 * found.top1}
    result = slim(config, Notes())
    units = sum(group.channels for group in result.groups), sum(group.kept for group in result.groups)
    return {
        "units": 100 * (1 - units[1] / units[0]),
        "params": 100 * (1 - result.after.params / result.before.params),
        "macs": 100 * (1 - result.after.macs / result.before.macs),
    }


def page(paper: Paper, reasons: dict[int, str], options: argparse.Namespace, rows: list[Row]) -> list[str]:
    """Return the text of the page."""
    head = ["data", "network", "method", "", *(f">{column}" for column in paper.columns)]
    entries, wanting = [], []
    for number, claim in enumerate(paper.claims):
        entries.append([*claim.label, "paper", *(claim.published.get(column, "") for column in paper.columns)])
        mine = [row["figures"] for row in rows if row["label"] == claim.label]
        cells = [
            f"**{spread(found[column] for found in mine)}**" if mine and column in mine[0] else ""
            for column in paper.columns
        ]
        if not mine:
            why = reasons.get(number) or "not reached yet"
            cells = [f"not run ({why})", *cells[1:]]
            wanting.append(claim)
        entries.append([*claim.label, "here" + (f", {len(mine)} seeds" if len(mine) > 1 else ""), *cells])
    lines = [f"# {paper.title}", paper.notes, "", *table(head, entries)]
    if rows:
        lines += ["## Commands of the rows that were run", "", *commands_list(rows), ""]
    if wanting:
        chains = [{"commands": [line for _, _, line in plan(claim, options.seeds[0], options)]} for claim in wanting]
        lines += ["## Commands of the rows that were not run", ""]
        lines += ["`--run` carries them out, a seed after the other; `--only WORD ...` takes some rows.", ""]
        lines += commands_list(chains)
    return lines
