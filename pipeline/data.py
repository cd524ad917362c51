"""Samples to measure and calibrate on, and how they become a model's input.

They come from a listed data set, from an array file, or from a folder of pictures. uint8 samples are images and are
normalised by the model's recipe; floats are network input that is ready. Nothing is guessed: what could be read in two
ways is an error that says how to settle it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from prune_onnx.graph_ops import preprocessing
from prune_onnx.graph_ops.errors import ConfigError, DataError
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.progress import SILENT, Progress
from prune_onnx.graph_ops.registry import close_matches
from prune_onnx.trainers.data import DATASETS, load_dataset
from prune_onnx.trainers.data.arrays import CHANNELS, read_arrays
from prune_onnx.trainers.data.base import choose
from prune_onnx.trainers.data.pictures import PictureFiles, Size, read_folder, scaled

Dims = tuple[int | None, ...]
"""Sizes of a model's input; ``None`` where its file leaves them open."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of one kind: either ``images`` or ``inputs`` is set.

    Attributes:
        name: where they come from, for messages and reports.
        images: uint8, shape (N, C, H, W).
        inputs: network input that is ready, float32, shape (N, ...).
        labels: int64, shape (N,); ``None`` where there are none.
        mean: per channel, of pixel/255: the data set's own; ``None`` for the user's files.
        std: likewise.
    """

    name: str
    images: np.ndarray | None = None
    inputs: np.ndarray | None = None
    labels: np.ndarray | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def values(self) -> np.ndarray:
        """The images or the inputs, whichever there are."""
        return self.inputs if self.images is None else self.images

    def __len__(self) -> int:
        return len(self.values)

    def batches(self, recipe: Preprocessing, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield (float32 network input, labels or ``None``) in order; the last batch may be smaller.

        Args:
            recipe: turns images into input; samples that are input already pass as they are.
            batch_size: samples a batch.
        """
        for first in range(0, len(self), batch_size):
            part = slice(first, first + batch_size)
            inputs = self.inputs[part] if self.images is None else recipe.apply(self.images[part])
            yield inputs, None if self.labels is None else self.labels[part]

    def subset(self, limit: int | None, seed: int) -> Samples:
        """Return ``limit`` samples, at random and in their old order; all of them when there are no more."""
        if limit is None or limit >= len(self):
            return self
        return self._take(choose(len(self), limit, seed))

    def first(self, count: int) -> Samples:
        """Return the first ``count`` samples; all of them when there are no more."""
        return self if count >= len(self) else self._take(slice(count))

    def _take(self, chosen: np.ndarray | slice) -> Samples:
        arrays = {"images": self.images, "inputs": self.inputs, "labels": self.labels}
        return replace(self, **{key: array[chosen] for key, array in arrays.items() if array is not None})


def open_samples(
    *,
    dataset: str | None = None,
    data: str | Path | None = None,
    data_dir: Path | None = None,
    download: bool = False,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    size: Size | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    progress: Progress = SILENT,
) -> Samples:
    """Read samples from a data set or from the user's own files.

    Args:
        dataset: a listed data set.
        data: the user's own instead: a folder of PNG and JPEG files (sub-folders are classes), an .npz with ``x`` or
            ``images`` and perhaps ``y`` or ``labels``, or an .npy; the name of a listed data set does as well.
        data_dir: folder of the data sets' files.
        download: fetch missing files of a data set.
        split: ``train`` or ``test``, of a data set.
        limit: take this many, at random.
        seed: decides which.
        size: (height, width) that the user's pictures and uint8 arrays are scaled to; see :func:`image_input`.
        channels: what pictures are converted to; default: grey when all of them are, else RGB.
        num_classes: labels of the user's own files must be smaller than this.
        progress: hears of downloads, and of pictures read.

    Raises:
        ConfigError: both or none of ``dataset`` and ``data``, an unknown data set or split, a limit below 1.
        DataError: missing, damaged, empty, or not what it should be; the message names the file.
    """
    if (dataset is None) == (data is None):
        raise ConfigError("samples come either from a data set or from your own files: "
                          "give one of --dataset NAME and --data SPEC.")
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of samples must be at least 1, not {limit}.")
    if dataset is None and not Path(data).exists() and str(data) in DATASETS:
        dataset = str(data)
    if dataset is not None:
        if split not in ("train", "test"):
            raise ConfigError(f"unknown split {split!r}; a data set has 'train' and 'test'.")
        found = load_dataset(dataset, data_dir, download=download, progress=progress)
        images, labels = getattr(found, f"{split}_images"), getattr(found, f"{split}_labels")
        samples = Samples(dataset, images, labels=labels, mean=found.mean, std=found.std).subset(limit, seed)
        return replace(samples, images=samples.images.read(progress)) if isinstance(images, PictureFiles) else samples
    path = Path(data)
    if path.is_dir():
        images, labels = read_folder(path, size=size, channels=channels, num_classes=num_classes, limit=limit,
                                     seed=seed, progress=progress)
        return Samples(str(path), images, labels=labels)
    if path.suffix.lower() not in (".npz", ".npy") or not path.is_file():
        what = "is neither a folder nor an .npz or .npy file" if path.exists() else "does not exist"
        raise DataError(f"data {path} {what}, nor is it a data set ({', '.join(DATASETS)})."
                        f"{close_matches(str(path), DATASETS.names())}")
    values, labels = read_arrays(path, num_classes)
    if values.dtype != np.uint8:
        return Samples(str(path), inputs=values, labels=labels).subset(limit, seed)
    samples = Samples(str(path), values, labels=labels).subset(limit, seed)
    return samples if size in (None, values.shape[2:]) else replace(samples, images=scaled(samples.images, size))


def recipe_for(
    model: onnx.ModelProto,
    samples: Samples,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    layout: str | None = None,
) -> Preprocessing:
    """Return how ``samples`` become input of ``model``, and check that they fit.

    Mean and std are the given ones, else those of the recipe in the model's metadata, else the data set's own.

    Args:
        model: a network with one input.
        samples: what it will run on.
        mean: of pixel/255, per channel or one for all.
        std: likewise.
        layout: of the model's input, ``NCHW`` or ``NHWC``; default: the recipe's, else what its shape says.

    Raises:
        ConfigError: mean without std, for another number of channels, or a std that is not positive.
        DataError: no mean and std to be had, or samples of a shape that the model does not take.
        ModelError: the model's recipe cannot be read.
    """
    if (mean is None) != (std is None):
        raise ConfigError("--mean and --std go together: give both or neither.")
    if std is not None and not all(value > 0 for value in std):
        raise ConfigError(f"--std must be positive, not {', '.join(map(str, std))}.")
    carried, dims = preprocessing.read(model), _input_dims(model)
    if samples.images is None:
        _check_fit(samples.name, samples.values.shape, dims)
        return carried or Preprocessing((0.0,), (1.0,))
    _, channels, height, width = samples.images.shape
    layout = _layout(dims, carried, layout)
    if mean is not None:
        recipe = Preprocessing(tuple(mean), tuple(std), layout=layout)
    elif carried is not None:
        recipe = carried
    elif samples.mean is not None:
        recipe = Preprocessing(samples.mean, samples.std, layout=layout)
    else:
        raise DataError(f"no mean and std for the images of {samples.name}: the model carries none. "
                        "Pass --mean and --std (of pixel/255), or give floats that are network input.")
    for name, numbers in (("mean", recipe.mean), ("std", recipe.std)):
        if len(numbers) not in (1, channels):
            raise ConfigError(f"{name} has {len(numbers)} values, but the images of {samples.name} have {channels} "
                              "channels.")
    image = (height, width, channels) if layout == "NHWC" else (channels, height, width)
    _check_fit(samples.name, (len(samples), *image), dims)
    return replace(recipe, size=(height, width), layout=layout)


def image_input(model: onnx.ModelProto, layout: str | None = None) -> tuple[int | None, Size | None]:
    """Return (channels, (height, width)) of the images that ``model`` takes; ``None`` for what its file leaves open.

    Args:
        model: a network with one input.
        layout: as in :func:`recipe_for`.

    They are the ``channels`` and the ``size`` to give to :func:`open_samples`.

    Raises:
        DataError: the model has another number of inputs than one.
        ModelError: the model's recipe cannot be read.
    """
    dims, carried = _input_dims(model), preprocessing.read(model)
    if dims is None or len(dims) != 4:
        return None, None
    if _layout(dims, carried, layout) == "NHWC":
        _, height, width, channels = dims
    else:
        _, channels, height, width = dims
    size = (height, width) if height and width else carried.size if carried else None
    return channels if channels in CHANNELS else None, size


def _input_dims(model: onnx.ModelProto) -> Dims | None:
    """Return the sizes of the model's only input; ``None`` when even its rank is open."""
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise DataError(f"the model has {len(inputs)} inputs ({', '.join(value.name for value in inputs)}); "
                        "samples go into models with one input only.")
    tensor = inputs[0].type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)


def _layout(dims: Dims | None, carried: Preprocessing | None, given: str | None) -> str:
    """Return the given or the recipe's layout; without one, NHWC where only the last axis can be the channels."""
    if given is not None:
        return given
    if carried is not None:
        return carried.layout
    return "NHWC" if dims and len(dims) == 4 and dims[1] not in CHANNELS and dims[3] in CHANNELS else "NCHW"


def _check_fit(name: str, shape: tuple[int, ...], dims: Dims | None) -> None:
    """Refuse samples of a shape that the model does not take; the first axis is the batch, which may be any."""
    if dims is None:
        return
    if len(shape) != len(dims) or any(want not in (None, have) for have, want in zip(shape[1:], dims[1:], strict=True)):
        have, want = ("x".join("?" if size is None else str(size) for size in sizes[1:]) for sizes in (shape, dims))
        raise DataError(f"{name}: a sample is {have}, but the model takes {want}. Give data of that shape.")
