"""Tables of three papers on CIFAR and Tiny-ImageNet: what they publish, and the runs that measure the same."""

from __future__ import annotations

from typing import Any

from papers_common import Row
from papers_stages import Claim, Paper, Stage

# Proximal Network Slimming

SLIMMING = {"epochs": 160, "batch_size": 64, "lr": 0.1, "weight_decay": 1e-4, "validation": 0.0}
AGAIN = {**SLIMMING, "optimizer": "sgd", "schedule": "step"}
"""Fine-tuning is as long as training, at the same rates."""

CUT = {"align": 1, "min_keep": 0.0, "select_inputs": True}
CHANNELS, PARAMS, FLOPS, CUT_ACCURACY, TUNED_ACCURACY, EPOCH, TUNING_EPOCH = (
    "channels gone %", "parameters gone %", "FLOPs gone %", "accuracy, pruned", "accuracy, fine-tuned", "s an epoch",
    "s an epoch of tuning",
)  # fmt: skip


def published(*texts: str) -> dict[str, str]:
    """Return figures of Tables 1 and 2 (or 3) in the order of the columns."""
    columns = (CHANNELS, PARAMS, FLOPS, CUT_ACCURACY, TUNED_ACCURACY, EPOCH, TUNING_EPOCH)
    return dict(zip(columns, texts, strict=False))


def slimming_figures(results: dict[str, Row]) -> dict[str, float]:
    """Return the columns of a trained, pruned and fine-tuned network, or of a dense one."""
    first = next(iter(results.values()))
    found = {CUT_ACCURACY: first["accuracy"], EPOCH: first["epoch"]}
    for name, row in results.items():
        if name.endswith("-tuned"):
            found |= {TUNED_ACCURACY: row["accuracy"], TUNING_EPOCH: row["epoch"]}
        elif name.endswith("-slim"):
            found |= {CHANNELS: row["units"], PARAMS: row["params"], FLOPS: row["macs"]}
        elif name.endswith("-eval"):
            found[CUT_ACCURACY] = row["accuracy"]
    if first["dead_channels"]:  # the scales that are zero, as in the paper, removable or not
        found[CHANNELS] = 100 * first["dead_channels"] / first["channels"]
    return found


def dense(dataset: str, network: str, *texts: str) -> Claim:
    """Return the row of a baseline."""
    stages = (Stage("dense", "train", None, {**SLIMMING, "method": "plain"}),)
    return Claim(dataset, network, "baseline", published(*texts), stages, slimming_figures)


def pruned(dataset: str, network: str, method: str, keep: float | None, *texts: str) -> Claim:
    """Return the row of a pruned network.

    Args:
        dataset: listed name.
        network: listed name.
        method: of the training.
        keep: share of the channels that stays, chosen by their scales; ``None`` takes what the method made zero.
        texts: what is published.
    """
    how = {} if keep is None else {"keep_channels": keep, "criterion": "bn-gamma"}
    stages = (
        Stage(method, "train", None, {**SLIMMING, "method": method}),
        Stage(f"{method}-slim", "slim", method, {**CUT, **(how or {"exact": True})}),
        Stage(f"{method}-eval", "eval", f"{method}-slim", {}),
        Stage(f"{method}-tuned", "train", f"{method}-slim", AGAIN),
    )
    return Claim(dataset, network, method, published(*texts), stages, slimming_figures)


NS, PROX = "network-slimming", "proximal-ns"
PROXIMAL = Paper(
    "Proximal Network Slimming: Tables 1 to 3, and the cost of an epoch",
    "The paper's figures are means of five runs (accuracies of the epoch that is best on the test images; here of the "
    "last), seconds those of an RTX 2080, which only compare with each other. network-slimming gets the share of "
    "channels that the paper prunes; proximal-ns finds its own. The FLOPs here are multiply-accumulates. Which "
    "ResNet-110 the paper took is not stated: this is the one of its program.",
    (CHANNELS, PARAMS, FLOPS, CUT_ACCURACY, TUNED_ACCURACY, EPOCH, TUNING_EPOCH),
    (
        dense("cifar10", "vgg19", "", "", "", "93.83", "", "38.10"),
        pruned("cifar10", "vgg19", NS, 0.26, "74.00", "90.22", "54.67", "10.00", "93.81", "40.39", "29.40"),
        pruned("cifar10", "vgg19", PROX, None, "74.59", "91.17", "57.54", "93.71", "93.38", "42.71", "30.39"),
        dense("cifar10", "densenet40", "", "", "", "94.25", "", "117.45"),
        pruned("cifar10", "densenet40", NS, 0.2599, "74.01", "67.13", "60.46", "41.46", "93.94", "119.49", "74.45"),
        pruned("cifar10", "densenet40", PROX, None, "74.11", "67.75", "57.35", "93.58", "93.64", "118.86", "76.10"),
        dense("cifar10", "preresnet164", "", "", "", "94.75", "", "146.41"),
        pruned("cifar10", "preresnet164", NS, 0.2802, "71.98", "52.95", "59.27", "16.61", "93.21", "151.62", "112.80"),
        pruned("cifar10", "preresnet164", PROX, None, "72.37", "65.84", "63.54", "93.19", "93.41", "150.13", "114.26"),
        pruned("cifar10", "preresnet110", PROX, None, "", "50.70", "48.54", "93.25", "93.27"),
        dense("cifar100", "vgg19", "", "", "", "72.73", "", "37.83"),
        pruned("cifar100", "vgg19", NS, 0.45, "55.00", "78.53", "38.66", "1.00", "72.91", "39.98", "30.74"),
        pruned("cifar100", "vgg19", PROX, None, "55.54", "79.62", "41.17", "72.81", "72.70", "42.31", "30.04"),
        dense("cifar100", "densenet40", "", "", "", "74.55", "", "117.17"),
        pruned("cifar100", "densenet40", NS, 0.3499, "65.01", "59.29", "52.61", "25.96", "74.50", "119.32", "77.95"),
        pruned("cifar100", "densenet40", PROX, None, "64.87", "59.15", "45.00", "73.70", "73.98", "120.89", "82.92"),
        dense("cifar100", "preresnet164", "", "", "", "76.79", "", "145.37"),
        pruned("cifar100", "preresnet164", NS, 0.41, "59.00", "26.66", "45.17", "2.39", "76.68", "150.65", "115.95"),
        pruned("cifar100", "preresnet164", PROX, None, "58.75", "42.28", "47.93", "75.26", "75.68", "149.15", "117.88"),
    ),
)  # fmt: skip

# Hierarchical squared group sparsity

DROP, BASELINE = "drop, points", "accuracy, dense"
INITIAL = {
    "epochs": 200, "batch_size": 128, "lr": 0.1, "milestones": (0.3, 0.6, 0.8), "lr_decay": 0.2, "weight_decay": 5e-4,
    "nesterov": False, "validation": 0.0,
}  # fmt: skip
SPARSE = {**INITIAL, "epochs": 100, "lr": 0.01, "milestones": (0.3333, 0.6667), "lr_decay": 0.1, "method": "hsq-gl12"}
SELECTED = {
    "method": "backward-selection", "variant": "lazy", "epochs": 1, "rounds": 1, "retrain_epochs": 1, "batch_size": 128,
    "lr": 1e-6, "optimizer": "sgd", "rewind": False, "validation": 0.0,
}  # fmt: skip
"""The choice of filters; what is trained is what comes after it."""


def hsq_figures(results: dict[str, Row]) -> dict[str, float]:
    """Return the columns of a network that was trained from scratch after the filters were chosen."""
    before, after = results["dense"]["accuracy"], results["scratch"]["accuracy"]
    return {PARAMS: results["slim"]["params"], DROP: before - after, BASELINE: before, TUNED_ACCURACY: after}


def selected(dataset: str, network: str, gone: int, drop: str) -> Claim:
    """Return the row of a network with so many percent of its parameters gone.

    Filters go by number: in a VGG both sides of a layer shrink; in a ResNet only the inner channels of a block go.
    """
    share = gone / 100
    ratio = round(1 - (1 - share) ** 0.5 if network.startswith("vgg") else share, 3)
    large = {"batch_size": 256} if dataset == "tiny-imagenet" else {}
    at = f"{gone}"
    stages = (
        Stage("dense", "train", None, {**INITIAL, **large, "method": "plain"}),
        Stage("sparse", "train", "dense", {**SPARSE, **large, "optimizer": "sgd", "schedule": "step"}),
        Stage(f"selected-{at}", "train", "sparse", {**SELECTED, "prune_ratio": ratio}),
        Stage(f"slim-{at}", "slim", f"selected-{at}", {"exact": True, "align": 1}),
        Stage(f"scratch-{at}", "train", f"slim-{at}", {**INITIAL, **large, "reinit": True}),
    )

    def figures(results: dict[str, Row]) -> dict[str, float]:
        return hsq_figures({name.removesuffix(f"-{at}"): row for name, row in results.items()})

    return Claim(dataset, network, f"{gone} %", {PARAMS: f"{gone}", DROP: drop}, stages, figures)


HSQ = Paper(
    "Hierarchical group sparsity: parameters gone and accuracy lost",
    "The paper has curves; these are the figures of its text. Of its regularisers hsq-gl12 is taken, of its lambdas, "
    "which it does not give, the program's default. The text has a ResNet-20 with 54 % of the parameters left where "
    "its abstract has more than half of them gone, and a ResNet-32 on Tiny-ImageNet that must be the ResNet-34. "
    "A negative drop is a gain.",
    (PARAMS, DROP, BASELINE, TUNED_ACCURACY),
    (
        selected("cifar10", "vgg14", 85, "0.53"),
        selected("cifar10", "vgg14", 41, "a gain"),
        selected("cifar10", "resnet20", 54, "0.31"),
        selected("cifar10", "resnet20", 16, "a gain"),
        selected("cifar10", "resnet32", 54, "0.73"),
        selected("cifar100", "vgg14", 41, "0.85"),
        selected("cifar100", "resnet20", 15, "0.85"),
        selected("cifar100", "resnet32", 13, "1.2"),
        selected("tiny-imagenet", "vgg14", 37, "0.70"),
        selected("tiny-imagenet", "resnet18", 34, "a gain"),
        selected("tiny-imagenet", "resnet34", 16, "3.8"),
    ),
)

# NNrelief

LEFT, ACCURACY, PRUNINGS = "weights left %", "accuracy", "prunings"
BASIC = {"batch_size": 120, "weight_decay": 5e-4, "nesterov": False, "validation": 0.0}
OPTIMIZERS = {"SGD": {"optimizer": "sgd", "lr": 0.1}, "Adam": {"optimizer": "adam-l2", "lr": 1e-3}}
LENGTHS = {
    ("resnet", "Adam"): {"epochs": 200, "milestones": (0.6, 0.8)},
    ("resnet", "SGD"): {"epochs": 150, "milestones": (0.5333, 0.8)},
    ("vgg", "Adam"): {"epochs": 150, "milestones": (0.5333, 0.8)},
    ("vgg", "SGD"): {"epochs": 150, "milestones": (0.5333, 0.8)},
}  # fmt: skip


def relief_figures(results: dict[str, Row]) -> dict[str, float]:
    """Return the columns of a network that was pruned and retrained again and again."""
    before, after = (row for row in results.values() if "accuracy" in row)
    gone = next(row for row in results.values() if "macs" in row)
    return {
        LEFT: after["left"], FLOPS: gone["macs"], ACCURACY: after["accuracy"],
        DROP: before["accuracy"] - after["accuracy"],
    }  # fmt: skip


def relieved(dataset: str, network: str, optimizer: str, rounds: int, **printed: str) -> Claim:
    """Return the row of a network and optimiser; retraining takes 60 epochs, 50 on Tiny-ImageNet, 80 of some."""
    family = "vgg" if network.startswith("vgg") else "resnet"
    retrain, milestones = 60, (0.3333, 0.6667)
    if dataset == "tiny-imagenet":
        retrain, milestones = 50, (0.4, 0.8)
    elif dataset == "cifar100" and family == "resnet":
        retrain, milestones = 80, (0.375, 0.75)
    common = {**BASIC, **OPTIMIZERS[optimizer], "schedule": "step"}
    again: dict[str, Any] = {"epochs": rounds * retrain, "rounds": rounds, "retrain_epochs": retrain}
    if dataset == "tiny-imagenet":
        again["samples"] = 2000
    name = optimizer.lower()
    stages = (
        Stage(f"dense-{name}", "train", None, {**common, **LENGTHS[family, optimizer], "method": "plain"}),
        Stage(f"relief-{name}", "train", f"dense-{name}",
              {**common, **again, "milestones": milestones, "method": "nnrelief"}),
        Stage(f"relief-slim-{name}", "slim", f"relief-{name}", {"exact": True, "align": 1}),
    )  # fmt: skip
    texts = {PRUNINGS: str(rounds), **{COLUMNS[key]: text for key, text in printed.items()}}
    return Claim(dataset, network, optimizer, texts, stages, relief_figures)


COLUMNS = {"left": LEFT, "flops": FLOPS, "accuracy": ACCURACY, "drop": DROP}
RELIEF = Paper(
    "NNrelief on CIFAR and Tiny-ImageNet",
    "Accuracies of the last epoch; the paper's are of the best on the test images. The paper's FLOPs leave out filters "
    "that give a constant; here they are what is left after `slim --exact`, multiply-accumulates. The ResNet-18 of the "
    "paper has widths of 16 to 128; how often it is pruned is not given, here 5 times.",
    (PRUNINGS, LEFT, FLOPS, ACCURACY, DROP),
    (
        relieved("cifar10", "vgg-like", "Adam", 6, left="1.92 ± 0.02", flops="75.5 ± 0.4", accuracy="92.5", drop="0.1"),
        relieved("cifar10", "resnet20", "SGD", 7, left="36.32 ± 1.52", flops="25.85", accuracy="92.25", drop="1.15"),
        relieved("cifar10", "resnet20", "Adam", 10, left="31.25 ± 1.26", flops="13.81", accuracy="91.83", drop="0.39"),
        relieved("cifar10", "resnet56", "SGD", 6, left="23.8", flops="35.8", accuracy="93.6", drop="1.14"),
        relieved("cifar10", "resnet56", "Adam", 2, left="24.05", flops="32.5", accuracy="92.8", drop="0.03"),
        relieved("cifar100", "vgg13", "SGD", 5, left="1/4.5", drop="0.5"),
        relieved("cifar100", "vgg13", "Adam", 5, left="1/14.5", drop="0"),
        relieved("cifar100", "resnet20", "SGD", 7, left="45.46", flops="12.49", accuracy="68.75", drop="1.26"),
        relieved("cifar100", "resnet20", "Adam", 8, left="48.18", flops="3.42", accuracy="67.34", drop="0.41"),
        relieved("cifar100", "resnet56", "SGD", 6, left="41.38", flops="31.2", accuracy="71.43", drop="0.43"),
        relieved("cifar100", "resnet56", "Adam", 9, left="32.28", flops="13.79", accuracy="71.68", drop="0.88"),
        relieved("tiny-imagenet", "vgg-like", "Adam", 5, left="2.32 ± 0.06", flops="75 ± 0.32", accuracy="45.63",
                 drop="0.03"),
        relieved("tiny-imagenet", "resnet18-narrow", "SGD", 5, left="less than half"),
    ),
)  # fmt: skip
