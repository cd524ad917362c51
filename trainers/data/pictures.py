"""A folder of PNG and JPEG files, read through Pillow, at once or as they are needed. Sub-folders are classes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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

GREY = ("1", "L", "LA")

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
            raise DataError(_other_size(path, image.shape[1:], files[0].name, images[0].shape[1:]))
    depth = max(len(image) for image in images)
    return np.stack([np.broadcast_to(image, (depth, *image.shape[1:])) for image in images]), labels


class PictureFiles:
    """Pictures that stay in their files until they are wanted; has the shape of a uint8 array (N, C, H, W).

    Args:
        files: one a picture.
        channels: what they are converted to: 1, 3 or 4.
        size: (height, width).
        fit: scale them to ``size`` (see :func:`scaled`); otherwise they must have it.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, files: Sequence[Path], channels: int, size: Size, *, fit: bool = False) -> None:
        self.files = list(files)
        self.channels = channels
        self.size = size
        self.fit = fit

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return len(self), self.channels, *self.size

    @property
    def nbytes(self) -> int:
        """Bytes of the array that they would be."""
        return math.prod(self.shape)

    def __getitem__(self, chosen: np.ndarray | slice) -> PictureFiles:
        """Return some of the pictures, still in their files."""
        positions = np.arange(len(self))[chosen]
        return PictureFiles([self.files[index] for index in positions], self.channels, self.size, fit=self.fit)

    def picture(self, index: int) -> np.ndarray:
        """Return one picture as uint8 (C, H, W).

        Raises:
            DataError: it cannot be read, or has another size.
        """
        path = self.files[index]
        found = _read(path, self.size if self.fit else None, self.channels)
        if found.shape[1:] != self.size:
            (height, width), (tall, broad) = found.shape[1:], self.size
            raise DataError(f"{path} is {height}x{width} pixels, expected {tall}x{broad}. "
                            "Bring the pictures to one size.")
        return found

    def read(self, progress: Progress = SILENT) -> np.ndarray:
        """Return all of them, uint8 (N, C, H, W).

        Raises:
            DataError: as in :meth:`picture`.
        """
        images = np.empty(self.shape, np.uint8)
        with progress.task(f"reading {len(self):,} pictures", len(self)) as advance:
            for index in range(len(self)):
                images[index] = self.picture(index)
                advance(1)
        return images


def open_folder(
    folder: Path, *, size: Size | None = None, channels: int | None = None, progress: Progress = SILENT
) -> tuple[PictureFiles, np.ndarray | None]:
    """Return the pictures in a folder without their pixels, and their labels; see :func:`read_folder`.

    Where ``size`` or ``channels`` is not given, every file's header is read.

    Raises:
        DataError: as :func:`read_folder`, but what only pixels show comes up when they are read.
    """
    files, labels = _list(folder)
    if labels is not None:
        labels = check_labels(labels, len(files), None, folder)
    if size is not None and channels is not None:
        return PictureFiles(files, channels, size, fit=True), labels
    sizes, grey = [], True
    with progress.task(f"looking through {folder}", len(files)) as advance:
        for path in files:
            with _opened(path) as picture:
                sizes.append((picture.height, picture.width))
                grey = grey and picture.mode in GREY
            advance(1)
    if size is None:
        other = next((index for index, found in enumerate(sizes) if found != sizes[0]), None)
        if other is not None:
            raise DataError(_other_size(files[other], sizes[other], files[0].name, sizes[0]))
    return PictureFiles(files, channels or (1 if grey else 3), size or sizes[0], fit=size is not None), labels


def scaled(images: np.ndarray, size: Size) -> np.ndarray:
    """Return uint8 images (N, C, H, W) at another size: scaled to cover it, what stands out cut off on both sides."""
    from PIL import Image

    planes = [np.asarray(_fit(Image.fromarray(plane), size)) for plane in images.reshape(-1, *images.shape[2:])]
    return np.stack(planes).reshape(*images.shape[:2], *size)


def _list(folder: Path) -> tuple[list[Path], np.ndarray | None]:
    """Return the pictures in order, and their labels.

    Sub-folders that are all named by numbers are those labels; others count from 0 in alphabetical order.
    """
    direct = list_pictures(folder)
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


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures directly in a folder, in the order of their names."""
    return _pictures(folder.iterdir()) if folder.is_dir() else []


def _pictures(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


def _other_size(path: Path, size: Size, first: str, first_size: Size) -> str:
    """Return what is wrong with a picture that is not as large as the first."""
    found, wanted = ("x".join(map(str, pair)) for pair in (size, first_size))
    return (f"{path} is {found} pixels, but {first} is {wanted}, and the model takes any size. "
            "Bring the pictures to one size.")


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """Open a picture; its pixels are not read yet.

    Raises:
        DataError: here or in the body, it cannot be read, or has more than 8 bits a channel.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise DataError(f"{path} has more than 8 bits a channel (mode {opened.mode}). Convert it to 8 bits.")
            yield opened
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read picture {path}: {error or type(error).__name__}.") from error


def _read(path: Path, size: Size | None, channels: int | None) -> np.ndarray:
    """Return one picture as uint8 (C, H, W)."""
    with _opened(path) as opened:
        picture = opened.convert(MODES[channels or (1 if opened.mode in GREY else 3)])
    values = np.asarray(_fit(picture, size) if size else picture)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _fit(picture: Image, size: Size) -> Image:
    from PIL import Image, ImageOps

    height, width = size
    return ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
