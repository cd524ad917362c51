"""Figure 1 of the Frank-Wolfe pruning paper, with a dense control that trains as long as the pruned networks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from papers_common import Row, Sheet, commands_list, limited, run, spread, table, trained

PUBLISHED = {
    1: {"dense": ".78 to .79", "magnitude": ".78 to .79", "frank-wolfe": "middle .80s",
        "frank-wolfe-momentum": "middle .80s"},
    10: {"dense": ".85 to .86", "magnitude": ".85", "frank-wolfe": ".88", "frank-wolfe-momentum": ".94"},
}  # fmt: skip
"""Accuracies after so many epochs of pre-training, read off its text; it gives no retraining to the dense network."""

SAMPLES = 500
"""Images of which the loss is taken that chooses the weights, 20 times in each pruning."""

PUBLISHED_LEFT = {
    "dense": "100%", "magnitude": "about 50%", "frank-wolfe": "a little less", "frank-wolfe-momentum": "a little less",
}  # fmt: skip
"""Weights, of its Figure 2."""

METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "magnitude": {"rounds": 1},
    "frank-wolfe": {"rounds": 1, "samples": SAMPLES},
    "frank-wolfe-momentum": {"samples": SAMPLES},
}
RECIPE = {
    "model": "frank-wolfe-cnn", "dataset": "mnist", "optimizer": "sgd", "lr": 0.01, "momentum": 0.0, "nesterov": False,
    "batch_size": 32, "schedule": "constant", "weight_decay": 0.0, "augment": "none", "mean": (0.0,), "std": (1.0,),
    "validation": 0.2, "channels_last": True,
}  # fmt: skip
"""Pixels / 255 and plain SGD, as the paper says. It gives no rate and no batch: these are what Keras has by default."""


def make(options: argparse.Namespace) -> None:
    """Measure what is asked for and not there yet."""
    sheet = Sheet.open(options, page)
    retrain = options.retrain
    for seed in options.seeds:
        for before in options.pretrain:
            common = {**RECIPE, **limited(options), "seed": seed}
            dense, first = trained(options, f"dense-{seed}-{before}", **common, epochs=before)
            facts = {"seed": seed, "before": before, "images": options.images}
            if not sheet.has([first]):
                add(sheet, {**facts, "method": "dense", "ratio": 0.0, "after": 0, "commands": [first]}, run(dense))
            for ratio in options.ratios:
                for method, settings in METHODS.items():
                    own = {} if method == "plain" else {"prune_ratio": ratio, "rounds": retrain, **settings}
                    name = f"{method}-{seed}-{before}-{retrain}" + (f"-{ratio:g}" if own else "")
                    config, line = trained(
                        options, name, **common, **own, method=method, init=dense.output, epochs=retrain
                    )
                    if not sheet.has([line]):
                        of = {"method": method, "ratio": own.get("prune_ratio", 0.0), "after": retrain}
                        add(sheet, {**facts, **of, "commands": [line]}, run(config))
    sheet.write()
    draw(sheet.rows, sheet.out.with_suffix(".png"))


def add(sheet: Sheet, row: Row, found: Row) -> None:
    """Store a run, with the course of its accuracy on the validation images."""
    sheet.add({**row, **found, "history": [entry["validation_accuracy"] for entry in found["history"]]})


def page(rows: list[Row]) -> list[str]:
    """Return the text of the page."""
    images = ", ".join(dict.fromkeys(f"{row['images']:,}" if row["images"] else "all 60,000" for row in rows))
    lines = [
        "# Frank-Wolfe pruning with momentum on MNIST: Figure 1, with a dense control",
        f"Accuracy on all test images, in percent, mean ± standard deviation over the seeds; {images} training images, "
        "a fifth of them held out. Every network goes on from the same dense one, for the same epochs at the same "
        "rate: magnitude and frank-wolfe prune at once, frank-wolfe-momentum a part before each epoch; `plain` is the "
        "dense control. The paper's dense network is not trained on (`dense` here), its pruned ones are; it gives "
        "neither rates, rounds nor the length of retraining, so its figures are no targets.",
        "",
    ]
    columns = sorted({row["before"] for row in rows})
    heads = [f">{before} epoch{'s' * (before > 1)} before" for before in columns]
    entries = [
        [name, "paper", left, *(PUBLISHED.get(before, {}).get(name, "") for before in columns)]
        for name, left in PUBLISHED_LEFT.items()
    ]
    keys = dict.fromkeys((row["method"], row["ratio"], row["after"]) for row in rows)
    for method, ratio, after in sorted(keys, key=lambda key: (key[1], key[2])):
        cells = []
        for before in columns:
            mine = [
                r for r in rows if (r["method"], r["ratio"], r["after"], r["before"]) == (method, ratio, after, before)
            ]
            cells.append(f"**{spread(row['accuracy'] for row in mine)}** ({len(mine)})" if mine else "not run")
        entries.append([method, f"here, {after} epochs after", f"{1 - ratio:.0%}", *cells])
    lines += table(["method", "", ">weights left", *heads], entries)
    lines += [
        "In brackets: seeds. The plot has the validation images; the networks of frank-wolfe-momentum are measured "
        "right after each pruning there, before they are trained again.",
        "",
        "![Validation accuracy over epochs](papers-frank-wolfe.png)",
        "",
        "## Commands",
        "",
    ]
    return [*lines, *commands_list(rows)]


def draw(rows: list[Row], path: Path) -> None:
    """Validation accuracy over the epochs after the dense network was handed over, a panel for each length before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = sorted({(row["before"], row["ratio"]) for row in rows if row["ratio"]})
    figure, panels = pyplot.subplots(1, max(len(cells), 1), figsize=(4 * max(len(cells), 1), 3.4), squeeze=False)
    for (before, ratio), panel in zip(cells, panels[0], strict=False):
        dense = [row for row in rows if row["method"] == "dense" and row["before"] == before]
        start = [100 * row["history"][-1] for row in dense]
        for method in METHODS:
            mine = [row for row in rows if row["method"] == method and row["before"] == before
                    and row["ratio"] in (0.0, ratio)]  # fmt: skip
            if not mine or not start:
                continue
            courses = 100 * np.asarray([row["history"] for row in mine])
            epochs = before + np.arange(courses.shape[1] + 1)
            middle = np.concatenate([[np.mean(start)], courses.mean(0)])
            panel.plot(epochs, middle, marker="o", markersize=3, label="dense control" if method == "plain" else method)
            panel.fill_between(epochs[1:], courses.min(0), courses.max(0), alpha=0.15)
        panel.set_title(f"{before} epoch{'s' * (before > 1)} before, {1 - ratio:.0%} of the weights left", fontsize=9)
        panel.set_xlabel("epochs in all")
    panels[0][0].set_ylabel("validation accuracy, %")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
