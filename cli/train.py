"""``prune-onnx train``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click.exceptions import Exit

from prune_onnx.graph_ops.progress import Progress
from prune_onnx.trainers.config import TrainConfig

from .command import StageCommand
from .listing import Listing, Rows, described_unimported
from .output import show_train

if TYPE_CHECKING:
    from prune_onnx.pipeline.train import TrainResult

EPILOG = """\b
Examples:
  prune-onnx train --model bn-cnn --dataset digits --method proximal-ns -o runs/digits
  prune-onnx train --model vgg16 --dataset cifar10 --method network-slimming --data-dir data -o runs/vgg16
  prune-onnx train --model vgg16 --dataset cifar10 --init runs/vgg16 --method taylor -o runs/pruned
                                                        prunes a trained network
  prune-onnx train --model small.onnx --dataset cifar10 --method plain -o runs/tuned
                                                        fine-tunes any ONNX file
  prune-onnx train --model small.onnx --reinit --budget-of dense.onnx --dataset cifar10 --epochs 160 -o runs/scratch
                                                        trains it anew, with the computation of 160 dense epochs
  prune-onnx train --model small.onnx --teacher dense.onnx --data images/ -o runs/tuned
                                                        the same without labels
  torchrun --nproc-per-node 4 -m prune_onnx.cli.main train --model vgg16 ...
                                                        on four GPUs; --batch-size is that of all together
  prune-onnx train -o runs/vgg16 --resume               goes on with the run's own options
"""


def work(config: TrainConfig, progress: Progress) -> TrainResult:
    """Train a network whose channels die by construction, and write it as ONNX.

    The run folder gets model.onnx (with its BatchNorm layers, which slim needs), config.toml, metrics.jsonl,
    checkpoint.pt, environment.json and result.json. Ctrl-C saves first; --resume goes on bit for bit.
    """
    from prune_onnx.pipeline.train import train
    from prune_onnx.trainers.distributed import is_first

    result = train(config, progress)
    if not is_first():
        raise Exit(0)
    return result


def models() -> Rows:
    """Return the networks."""
    from prune_onnx.trainers.models import MODELS

    return described_unimported(MODELS, "prune_onnx.trainers.models")


def datasets() -> Rows:
    """Return the data sets."""
    from prune_onnx.trainers.data import DATASETS

    return [(name, DATASETS.get(name).summary) for name in DATASETS]


def methods() -> Rows:
    """Return the training methods."""
    from prune_onnx.trainers.methods import METHODS

    return described_unimported(METHODS, "prune_onnx.trainers.methods")


def own_config(given: Mapping[str, Any]) -> Path | None:
    """Return the options of the run that is resumed."""
    if given.get("resume") and "output" in given:
        path = Path(given["output"]) / "config.toml"
        return path if path.exists() else None
    return None


command = StageCommand(
    "train",
    TrainConfig,
    work,
    show_train,
    arguments={},
    sections={
        "What to train": ("model", "dataset", "method", "output", "resume", "epochs", "width", "init",
                          "reinit", "budget_of", "stretch"),
        "Distillation: another network's answers in the place of labels": ("teacher", "temperature", "cutmix"),
        "Data": ("data", "train_size", "data_dir", "download", "validation", "augment", "mean", "std", "memory",
                 "workers"),
        "Optimisation": (
            "batch_size", "optimizer", "lr", "momentum", "nesterov", "weight_decay", "norm_decay", "schedule",
            "milestones", "lr_decay", "warmup_epochs", "clip", "early_stop",
        ),
        "Machine": (
            "device", "precision", "compile", "channels_last", "sync_bn", "checkpoint_every", "tensorboard",
        ),
        "Sparsity (the method's own)": (
            "lambda", "penalty", "every", "init_gamma", "direction", "layers", "prox", "prune_ratio",
            "prune_ratio_start", "scope", "rounds", "retrain_epochs", "rewind", "samples", "alpha", "conv_alpha",
            "variant", "rho", "fw_steps", "norm_share", "coupled",
            "residual",
        ),
    },
    metavars={"model": "NAME|FILE.onnx", "dataset": "NAME", "method": "NAME", "output": "RUN_DIR", "data_dir": "DIR",
              "teacher": "FILE.onnx", "data": "SPEC", "budget_of": "DENSE.onnx", "init": "RUN_DIR|FILE.pt"},
    listings=(
        Listing("--list-models", "List the networks, and stop.", models),
        Listing("--list-datasets", "List the data sets, and stop.", datasets),
        Listing("--list-methods", "List the training methods, and stop.", methods),
    ),
    config_of=own_config,
    epilog=EPILOG,
)  # fmt: skip
