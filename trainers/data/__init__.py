"""Data sets as plain numpy arrays: one reader a file, listed once, here. Never imports torch.

Files are read in the formats in which the data sets are published, and every file is checked before its content is
believed. Nothing is downloaded unless asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

from prune_onnx.graph_ops.progress import SILENT, Progress
from prune_onnx.graph_ops.registry import Registry

from .base import Dataset, Loader
from .cifar import CIFAR10, CIFAR100
from .digits import DIGITS
from .mnist import FASHION_MNIST, MNIST
from .tiny_imagenet import TINY_IMAGENET

__all__ = ["DATASETS", "Dataset", "load_dataset"]

DATASETS: Registry[Loader] = Registry("data set")
DATASETS.register("digits")(DIGITS)
DATASETS.register("mnist")(MNIST)
DATASETS.register("fashion-mnist")(FASHION_MNIST)
DATASETS.register("cifar10")(CIFAR10)
DATASETS.register("cifar100")(CIFAR100)
DATASETS.register("tiny-imagenet")(TINY_IMAGENET)


def load_dataset(
    name: str, data_dir: Path | None = None, *, download: bool = False, progress: Progress = SILENT
) -> Dataset:
    """Read the data set called ``name``.

    Args:
        name: a listed data set.
        data_dir: folder of the data files; default: the environment's ``PRUNE_ONNX_DATA``, else ``data`` here.
        download: fetch what is missing into ``data_dir``, checked against the published checksum.
        progress: hears of downloads.

    Raises:
        ConfigError: no such data set; close matches are named.
        DataError: files are missing, damaged or not what they should be.
        OutputError: downloaded files cannot be written.
    """
    load = DATASETS.get(name)
    return load(Path(data_dir or os.environ.get("PRUNE_ONNX_DATA") or "data"), download, progress)
