"""A folder of PNG and JPEG files, read through Pillow. Sub-folders are classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.progress import SILENT, Progress

from .base import check_labels, choose

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's colour mode by the number of channels."""

Size = tuple[int, int]
"""(height, width)."""


def read_folder(
    folder: Path,
    *,
    size: Size | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the pictures in a folder, and their labels when they lie in sub-folders, one a class.

    Args:
        folder: where they are.
        size: what they are scaled to, see :func:`scaled`; ``None`` leaves them, and then they must be of one size.
        channels: what they are converted to (1, 3 or 4); default: grey when all of them are, else RGB.
        num_classes: labels must be smaller than this.
        limit: read this many only, at random.
        seed: decides which.
        progress: hears of every picture.

    Returns:
        uint8 images, shape (N, C, H, W); labels, int64 of shape (N,).

    Raises:
        DataError: no pictures, one that cannot be read, different sizes, or an order of folders that gives no labels.
    """
    files, labels = _list(folder)
    if labels is not None:
        labels = check_labels(labels, len(files), num_classes, folder)
    if limit is not None and limit < len(files):
        chosen = choose(len(files), limit, seed)
        files = [files[index] for index in chosen]
        labels = labels if labels is None else labels[chosen]
    images: list[np.ndarray] = []
    with progress.task(f"reading {folder}", len(files)) as advance:
        for path in files:
            images.append(_read(path, size, channels))
            advance(1)
    for path, image in zip(files, images, strict=True):
        if image.shape[1:] != images[0].shape[1:]:
            (height, width), (first_height, first_width) = image.shape[1:], images[0].shape[1:]
            raise DataError(f"{path} is {height}x{width} pixels, but {files[0].name} is {first_height}x{first_width}, "
                            "and the model takes any size. Bring the pictures to one size.")
    depth = max(len(image) for image in images)
    return np.stack([np.broadcast_to(image, (depth, *image.shape[1:])) for image in images]), labels


def scaled(images: np.ndarray, size: Size) -> np.ndarray:
    """Return uint8 images (N, C, H, W) at another size: scaled to cover it, what stands out cut off on both sides."""
    from PIL import Image

    planes = [np.asarray(_fit(Image.fromarray(plane), size)) for plane in images.reshape(-1, *images.shape[2:])]
    return np.stack(planes).reshape(*images.shape[:2], *size)


def _list(folder: Path) -> tuple[list[Path], np.ndarray | None]:
    """Return the pictures in order, and their labels.

    Sub-folders that are all named by numbers are those labels; others count from 0 in alphabetical order.
    """
    direct = _pictures(folder.iterdir())
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside = [_pictures(path.rglob("*")) for path in classes]
    if direct and any(inside):
        raise DataError(f"{folder} holds pictures both directly and in sub-folders. "
                        "Put all of them into sub-folders, one a class, or none.")
    if direct:
        return direct, None
    if not any(inside):
        raise DataError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
    empty = next((path for path, found in zip(classes, inside, strict=True) if not found), None)
    if empty is not None:
        raise DataError(f"{empty} holds no pictures, but every sub-folder of {folder} stands for a class. Remove it.")
    numbered = all(re.fullmatch("[0-9]{1,9}", path.name) for path in classes)
    numbers = [int(path.name) for path in classes] if numbered else range(len(classes))
    files = [path for found in inside for path in found]
    return files, np.repeat(np.array(numbers, np.int64), [len(found) for found in inside])


def _pictures(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


def _read(path: Path, size: Size | None, channels: int | None) -> np.ndarray:
    """Return one picture as uint8 (C, H, W)."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise DataError(f"{path} has more than 8 bits a channel (mode {opened.mode}). Convert it to 8 bits.")
            grey = opened.mode in ("1", "L", "LA")
            picture = opened.convert(MODES[channels or (1 if grey else 3)])
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read picture {path}: {error or type(error).__name__}.") from error
    values = np.asarray(_fit(picture, size) if size else picture)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _fit(picture: Image, size: Size) -> Image:
    from PIL import Image, ImageOps

    height, width = size
    return ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
