"""What a data set is, how its files are looked for, and the checks that all readers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.progress import Progress

if TYPE_CHECKING:
    from .pictures import PictureFiles


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in two parts. The test part is for the last measurement only, never for a choice.

    Attributes:
        name: its name in the registry.
        train_images: uint8, shape (N, C, H, W); of large sets, pictures that are read when they are needed.
        train_labels: int64, shape (N,).
        test_images: likewise, M of them.
        test_labels: int64, shape (M,).
        num_classes: labels are ``0 .. num_classes - 1``.
        mean: per channel, of pixel/255 over the training images.
        std: likewise.
        class_names: one name a class.
        augment: what training does to the images by default: ``none``, ``shift`` or ``flip-crop``.
    """

    name: str
    train_images: np.ndarray | PictureFiles
    train_labels: np.ndarray
    test_images: np.ndarray | PictureFiles
    test_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    augment: str


class Loader(Protocol):
    """Reads a data set.

    Attributes:
        summary: one line about the data set.
    """

    summary: str

    def __call__(self, data_dir: Path, fetch: bool, progress: Progress) -> Dataset:
        """Read it.

        Args:
            data_dir: folder of the data files.
            fetch: whether to download what is missing.
            progress: hears of downloads.
        """
        ...


Place = Sequence[Sequence[Path]]
"""One place where a data set may lie: for each of its files, the paths that it may have there."""


def locate(places: Sequence[Place]) -> list[Path] | None:
    """Return the files of the first place that has them all, or ``None``."""
    for place in places:
        found = [next((path for path in paths if path.is_file()), None) for paths in place]
        if None not in found:
            return found
    return None


def missing(name: str, places: Sequence[Place], megabytes: int) -> DataError:
    """Return the error for a data set that :func:`locate` did not find.

    Args:
        name: the data set.
        places: where it was looked for.
        megabytes: size of the download.
    """
    advice = f"Pass --data-dir DIR, or --download to fetch it ({megabytes} MB)."
    for place in places:
        absent = [paths[0] for paths in place if not any(path.is_file() for path in paths)]
        if len(absent) < len(place):
            names = ", ".join(path.name for path in absent)
            return DataError(f"data set {name!r} is incomplete: {absent[0].parent} has no {names}. {advice}")
    folders = ", ".join(dict.fromkeys(str(place[0][0].parent) for place in places))
    return DataError(f"data set {name!r} not found; looked in {folders}. {advice}")


def read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def check_labels(labels: np.ndarray, samples: int, num_classes: int | None, path: Path) -> np.ndarray:
    """Return ``labels`` as int64.

    Args:
        labels: what should be integers, shape (samples,).
        samples: number of samples that they belong to.
        num_classes: labels must be ``0 .. num_classes - 1``; ``None`` lets them be as large as they like.
        path: where they come from, for the error.

    Raises:
        DataError: not one integer for each sample, or a label out of range.
    """
    if labels.dtype.kind not in "iu" or labels.shape != (samples,):
        raise DataError(f"{path}: labels are {labels.dtype} of shape {labels.shape}, but {samples} samples need one "
                        "integer each. Are images and labels from different files?")
    end = np.iinfo(np.int64).max if num_classes is None else num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= end))
    if len(wrong):
        expected = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise DataError(f"{path}: label {labels[wrong[0]]} at position {wrong[0]}, expected {expected}. "
                        "Is it damaged, or made for other classes?")
    return labels.astype(np.int64)


def choose(total: int, limit: int, seed: int) -> np.ndarray:
    """Return ``limit`` of ``total`` positions, at random and in order."""
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))
