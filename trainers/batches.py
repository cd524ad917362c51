"""Images on the device as uint8, normalised and augmented there a batch at a time, in an order that a seed decides.

Small data sets fit on the device whole, which spares worker processes and copies. Pictures that do not are read by the
workers of a DataLoader, and go through the same steps on the device from there. Everything random about an epoch
(order, shifts, flips) is drawn when it begins, from a generator that depends on seed and epoch alone: a run that is
resumed in the middle of an epoch needs its position and nothing else to see the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils import data

from prune_onnx.graph_ops.errors import ConfigError, DataError

from .data.pictures import PictureFiles
from .distributed import Ranks

Batch = tuple[torch.Tensor, torch.Tensor]

ALONE = Ranks()
"""The only process."""


def generator(seed: int, stream: object) -> torch.Generator:
    """Return a CPU generator of its own for each ``stream`` of a seed (``"xi"``, ``("epoch", 3)``, ...)."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a training set into training and validation, each class in proportion.

    Args:
        labels: class of every image, shape (N,).
        fraction: share that is held out; every class keeps at least one training image.
        seed: decides which images.

    Returns:
        Sorted indices of the training and of the validation images.
    """
    draws = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = draws.permutation(np.flatnonzero(labels == label))
        held[members[: min(round(fraction * len(members)), len(members) - 1)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


class Batches:
    """A set of labelled images on one device.

    Args:
        images: uint8, shape (N, C, H, W), or pictures of that shape in their files.
        labels: integer classes, shape (N,).
        mean: per channel, of pixel/255.
        std: likewise.
        augment: ``"none"``; ``"shift"``: by up to 1 pixel either way (2 from 16 pixels on), filled with 0;
            ``"flip"``: horizontal flip; ``"flip-crop"``: also a crop after padding by 4 zeros. For :meth:`shuffled`.
        cutmix: share of the images into which :meth:`shuffled` pastes a patch of another one; their labels are then
            no longer right.
        seed: of order and augmentation.
        device: where the images live.
        workers: processes that read pictures from their files; 0 reads them here.

    Raises:
        ConfigError: the images do not fit on the device.
    """

    def __init__(
        self,
        images: np.ndarray | PictureFiles,
        labels: np.ndarray,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: str = "none",
        cutmix: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        try:
            files = isinstance(images, PictureFiles)
            self.images = images if files else torch.from_numpy(np.ascontiguousarray(images)).to(device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"{images.nbytes / 2**30:.1f} GiB of images do not fit on {device}.") from error
        self.workers = workers
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.seed, self.cutmix = seed, cutmix
        self.flip = augment in ("flip", "flip-crop")
        self.margin = {"none": 0, "shift": 2 if min(images.shape[2:]) >= 16 else 1, "flip": 0, "flip-crop": 4}[augment]

    def __len__(self) -> int:
        return len(self.labels)

    def in_order(self, batch_size: int, ranks: Ranks = ALONE) -> Iterator[Batch]:
        """Yield (inputs, labels) as they come, without augmentation; each process has batches of its own."""
        parts = torch.arange(len(self)).split(batch_size)[ranks.rank :: ranks.size]
        yield from self._plain(parts)

    def at(self, indices: torch.Tensor, batch_size: int) -> Iterator[Batch]:
        """Yield (inputs, labels) of chosen images, in that order, without augmentation."""
        yield from self._plain(indices.split(batch_size))

    def _plain(self, parts: Sequence[torch.Tensor]) -> Iterator[Batch]:
        parts = [part.to(self.labels.device) for part in parts]
        for part, images in zip(parts, self._pixels(parts), strict=True):
            yield self._normalise(images), self.labels[part]

    def shuffled(
        self, epoch: int, batch_size: int, steps: int, start: int = 0, ranks: Ranks = ALONE
    ) -> Iterator[Batch]:
        """Yield the batches ``start`` to ``steps`` of an epoch, shuffled and augmented; the shares of this process.

        Yields:
            float32 inputs of shape (batch_size, C, H, W) and int64 labels; the last batch may be smaller.
        """
        device, n = self.labels.device, len(self)
        draws = generator(self.seed, ("epoch", epoch))
        order = torch.randperm(n, generator=draws).to(device)
        offsets = torch.randint(0, 2 * self.margin + 1, (2, n), generator=draws).to(device)
        flips = (torch.rand(n, generator=draws) < 0.5).to(device)
        boxes = torch.rand(4, n, generator=draws).to(device)
        bounds = [(step * batch_size, min((step + 1) * batch_size, n)) for step in range(start, steps)]
        parts = [ranks.share(*pair) for pair in bounds]
        for part, images in zip(parts, self._pixels([order[part] for part in parts]), strict=True):
            if self.margin:
                images = _crop(images, self.margin, *offsets[:, part])
            if self.flip:
                images = torch.where(flips[part].view(-1, 1, 1, 1), images.flip(3), images)
            if self.cutmix:
                chosen, *box = boxes[:, part]
                images = torch.where((chosen < self.cutmix).view(-1, 1, 1, 1), _pasted(images, *box), images)
            yield self._normalise(images), self.labels[order[part]]

    def _pixels(self, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the images at each of ``parts``, uint8 on the device.

        Raises:
            DataError: a picture cannot be read.
        """
        if isinstance(self.images, torch.Tensor):
            for part in parts:
                yield self.images[part]
            return
        loader = data.DataLoader(
            _Pictures(self.images),
            batch_sampler=[part.tolist() for part in parts],
            num_workers=self.workers,
            collate_fn=_stacked,
            generator=torch.Generator(),  # torch's own would be drawn from, which dropout depends on
        )
        for found in loader:
            if isinstance(found, DataError):
                raise found
            yield found.to(self.labels.device)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 input, by the same operations in the same order as ``Preprocessing.apply``."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class _Pictures(data.Dataset):
    """Pictures for a DataLoader; errors are values, since a worker's exceptions come back as their tracebacks' text."""

    def __init__(self, files: PictureFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray | DataError:
        try:
            return self.files.picture(index)
        except DataError as error:
            return error


def _stacked(found: list[np.ndarray | DataError]) -> torch.Tensor | DataError:
    """Return pictures as one tensor, or the first error among them."""
    error = next((item for item in found if isinstance(item, DataError)), None)
    return torch.from_numpy(np.stack(found)) if error is None else error


def _pasted(images: torch.Tensor, area: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Paste a box of the image before into each image of a batch, at the same place.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers", 2019.

    Args:
        images: (N, C, H, W).
        area: part of the image that the box takes, (N,), as are the others.
        top, left: where the box lies, from 0 (at the upper or left edge) to 1.
    """
    side = area.sqrt()
    inside = []
    for size, place in zip(images.shape[2:], (top, left), strict=True):
        start = place * (1 - side)
        centre = ((torch.arange(size, device=images.device) + 0.5) / size).expand(len(images), size)
        inside.append((centre > start[:, None]) & (centre < (start + side)[:, None]))
    box = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(box, images.roll(1, 0), images)


def _crop(images: torch.Tensor, margin: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Pad each image by ``margin`` zeros on all sides and cut its own size out at (row, column)."""
    n, _, height, width = images.shape
    padded = F.pad(images, (margin, margin, margin, margin))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2m+1, 2m+1, H, W), a view
    return windows[torch.arange(n, device=images.device), :, rows, columns]
