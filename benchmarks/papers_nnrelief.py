"""NNrelief on MNIST: its Table 1, and what of the network is active after one pruning (its Tables 6 and 7)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from papers_common import Row, Sheet, commands_list, limited, parameters, run, spread, table, trained

from prune_onnx.pipeline.train import ARTIFACTS
from prune_onnx.trainers.config import TrainConfig

PUBLISHED = {"lenet300": (1.98, 0.07, 1.51, 0.07, 11, 15), "lenet5": (0.97, 0.05, 0.65, 0.02, 20, 20)}
"""Error and weights left in percent, with standard deviations; prunings to that result, and prunings made."""

PAPERS_EPOCHS = 60
"""Of the training, and of each retraining."""

RECIPE = {
    "dataset": "mnist", "optimizer": "adam-l2", "lr": 1e-3, "milestones": (0.5,), "weight_decay": 5e-4,
    "batch_size": 120, "augment": "none", "mean": (0.0,), "std": (1.0,), "validation": 0.05,
}  # fmt: skip
"""The paper's, but for the twentieth of the training images that is held out."""

FASTER = {"lenet5": {"channels_last": True}}
"""Another layout in memory, which a CPU is faster with."""

NEURONS = {"importance scores": (380, 131, 96, 10), "magnitude, global": (530, 136, 97, 10)}
OVERLAPS = {"magnitude, global": (0.08, 0.18, 0.66), "magnitude, by layer": (0.08, 0.11, 0.16)}
SCOPES = {"magnitude, global": "global", "magnitude, by layer": "layer"}
KEPT = 15.5
"""Percent of the weights after one pruning, in the paper."""


def make(options: argparse.Namespace) -> None:
    """Measure what is asked for and not there yet."""
    sheet = Sheet.open(options, page)
    for network in options.networks:
        for seed in options.seeds:
            table_1(sheet, options, network, seed)
    if "lenet300" in options.networks:
        for seed in options.seeds:
            table_7(sheet, options, seed)
    sheet.write()


def table_1(sheet: Sheet, options: argparse.Namespace, network: str, seed: int) -> None:
    """Train, prune and retrain from the initial weights, as often as the paper does for its result."""
    rounds, length = options.rounds or PUBLISHED[network][4], options.epochs
    config, command = trained(
        options, f"{network}-{seed}-{rounds}x{length}", model=network, method="nnrelief", **RECIPE,
        **FASTER.get(network, {}),
        epochs=(rounds + 1) * length, rounds=rounds, retrain_epochs=length, seed=seed, **limited(options),
    )  # fmt: skip
    if not sheet.has([command]):
        found = run(config)
        row = {"table": 1, "network": network, "seed": seed, "rounds": rounds, "epochs": length, "commands": [command]}
        sheet.add({**row, **found, "history": ends(found["history"], length)})


def ends(history: Sequence[Row], length: int) -> list[Row]:
    """Return the last epoch but one of the training and of each retraining; of the last retraining, the last.

    The last epoch before a pruning is measured behind it.
    """
    before = [max(end - 1, 0) for end in range(length - 1, len(history) - length, length)]
    return [history[at] for at in (*before, len(history) - 1)]


def table_7(sheet: Sheet, options: argparse.Namespace, seed: int) -> None:
    """Prune one trained network by importance scores, and to as few weights by magnitudes."""
    length = options.epochs

    def config(name: str, **settings: Any) -> tuple[TrainConfig, str]:
        own = {"epochs": 1, "seed": seed, **settings}
        return trained(options, f"{name}-{seed}-{length}", model="lenet300", **RECIPE, **own, **limited(options))

    dense, first = config("dense", epochs=length)
    scored, second = config("scores", init=dense.output, method="nnrelief", rounds=1, rewind=False)
    if sheet.has([first, second]):
        return
    accuracy = run(dense)["accuracy"]
    left = run(scored)["left"]
    masks = {"importance scores": live(scored)}
    commands = [first, second]
    ours = masks["importance scores"]
    ratio = round(1 - float(sum(mask.sum() for mask in ours) / sum(mask.size for mask in ours)), 6)
    for name, scope in SCOPES.items():
        pruned, line = config(scope, init=dense.output, method="magnitude", rounds=1, scope=scope, prune_ratio=ratio)
        run(pruned)
        masks[name] = live(pruned)
        commands.append(line)
    sheet.add({
        "table": 7, "seed": seed, "epochs": length, "accuracy": accuracy, "left": left, "commands": commands,
        "neurons": {name: active(found) for name, found in masks.items()},
        "overlaps": {name: overlaps(ours, found) for name, found in masks.items()},
    })  # fmt: skip


def live(config: TrainConfig) -> list[np.ndarray]:
    """Return which weights of a run's layers are not zero, (out, in) each, from the input on."""
    found = parameters(config.output / ARTIFACTS["model"])
    return [value != 0 for value in found.values() if value.ndim == 2]


def active(masks: Sequence[np.ndarray]) -> list[int]:
    """Return how many neurons of each layer have connections on every side on which there are layers."""
    sides = [masks[0].any(0), *(a.any(1) & b.any(0) for a, b in pairwise(masks)), masks[-1].any(1)]
    return [int(side.sum()) for side in sides]


def overlaps(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> list[float]:
    """Return intersection over union of the connections left in each layer."""
    return [float((a & b).sum() / (a | b).sum()) for a, b in zip(one, other, strict=True)]


def page(rows: list[Row]) -> list[str]:
    """Return the text of the page."""
    first = [row for row in rows if row["table"] == 1]
    lines = [
        "# NNrelief on MNIST, beside the paper",
        "The recipe is the paper's: Adam with the weight decay of 5e-4 in the gradient, rate 1e-3 and a tenth of it"
        " from the middle on, batches of 120, pixels from 0 to 1, scores of 1000 images, retraining from the "
        f"initial weights. What differs: the epochs of the training and of each retraining ({PAPERS_EPOCHS} there, "
        "see the table), on which the share left depends, since the decay takes time to empty connections; and a "
        "twentieth of the training images is held out. Errors are those of the last epoch on all test images, by "
        "which nothing was chosen; the paper takes the best epoch on them. Weights left count biases.",
        "",
        "## Table 1: error and weights left",
        "",
    ]
    entries = []
    for network, (error, error_std, left, left_std, best, made) in PUBLISHED.items():
        entries.append([
            network, "paper", f"{best} of {made}", str(PAPERS_EPOCHS), "", f"{error:.2f} ± {error_std:.2f}",
            f"{left:.2f} ± {left_std:.2f}",
        ])  # fmt: skip
        for rounds, length in sorted({(r["rounds"], r["epochs"]) for r in first if r["network"] == network}):
            mine = [row for row in first if (row["network"], row["rounds"], row["epochs"]) == (network, rounds, length)]
            entries.append([
                network, "here", str(rounds), str(length), ", ".join(str(row["seed"]) for row in mine),
                f"**{spread(row['error'] for row in mine)}**", f"**{spread(row['left'] for row in mine)}**",
            ])  # fmt: skip
        if not any(row["network"] == network for row in first):
            entries.append([network, "here", "", "", "", "not run", "not run"])
    head = ["network", "", ">prunings", ">epochs each", ">seeds", ">error %", ">weights left %"]
    lines += table(head, entries)
    for row in first:
        if row["epochs"] == 1:  # its epochs are all measured behind a pruning
            continue
        about = f"{row['network']}, seed {row['seed']}, {row['epochs']} epochs each"
        lines += [f"{about}, one epoch before the next pruning:", ""]
        cells = [
            [str(n), f"{100 * (1 - at['zero_weights'] / row['weights']):.2f}",
             f"{100 * (1 - at['validation_accuracy']):.2f}"]
            for n, at in enumerate(row["history"])
        ]  # fmt: skip
        lines += table([">prunings", ">kernel weights left %", ">validation error %"], cells)
    lines += sevenths([row for row in rows if row["table"] == 7])
    return [*lines, "## Commands", "", *commands_list(rows)]


def sevenths(rows: list[Row]) -> list[str]:
    """Return the tables of one pruning."""
    lines = ["## Tables 6 and 7: LeNet-300-100 after one pruning", ""]
    entries = [[name, "paper, 60 epochs", f"{KEPT}", " - ".join(map(str, sizes))] for name, sizes in NEURONS.items()]
    entries += [
        [name, f"{row['epochs']} epochs, seed {row['seed']}", f"{row['left']:.1f}", " - ".join(map(str, sizes))]
        for row in rows
        for name, sizes in row["neurons"].items()
    ]
    lines += table(["by", "", ">weights left %", ">active neurons"], entries or [["", "", "", "not run"]])
    shared = [[name, "paper, 60 epochs", *(f"{value:.2f}" for value in values)] for name, values in OVERLAPS.items()]
    shared += [
        [name, f"{row['epochs']} epochs, seed {row['seed']}", *(f"{value:.2f}" for value in row["overlaps"][name])]
        for row in rows
        for name in OVERLAPS
    ]
    lines += ["Connections in common with those that importance scores leave, intersection over union:", ""]
    return lines + table(["by", "", ">784 to 300", ">300 to 100", ">100 to 10"], shared)
