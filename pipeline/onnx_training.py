"""ONNX files in the ``train`` stage: as the network and as the teacher, and images that need no labels then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from prune_onnx.graph_ops import model_io, preprocessing
from prune_onnx.graph_ops.errors import ConfigError, DataError, ModelError
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.trainers.config import TrainConfig, is_onnx
from prune_onnx.trainers.data import Dataset, load_dataset
from prune_onnx.trainers.data.base import choose
from prune_onnx.trainers.data.pictures import PictureFiles, open_folder

from .count import count
from .data import Samples, image_input, open_samples, recipe_for

if TYPE_CHECKING:
    import torch
    from torch import nn

    from prune_onnx.trainers.from_onnx import OnnxModule

TEST_SHARE = 0.1
"""Of the user's own images, what is kept for the test."""

PIXEL = 255.0
"""What the training batches divide pixels by."""


def open_images(config: TrainConfig, progress: Progress) -> Dataset:
    """Read the images of a run: a listed data set, or the user's own, of which a tenth is for the test.

    Images of one's own without labels get the label -1; the teacher's answers take their place, see :func:`label`.

    Raises:
        ConfigError: images without labels, and no teacher.
        DataError: they cannot be read, or are too few.
    """
    if config.dataset is not None:
        found = load_dataset(config.dataset, config.data_dir, download=config.download, progress=progress)
        if config.train_size is None or config.train_size >= len(found.train_labels):
            return found
        chosen = choose(len(found.train_labels), config.train_size, config.seed)
        return replace(found, train_images=found.train_images[chosen], train_labels=found.train_labels[chosen])
    channels, size = image_input(model_io.load(config.model)) if is_onnx(config.model) else (None, None)
    if Path(config.data).is_dir():
        pictures, found = open_folder(Path(config.data), size=size, channels=channels, progress=progress)
        samples = Samples(str(config.data), pictures, labels=found)
    else:
        samples = open_samples(data=config.data, seed=config.seed, size=size, channels=channels, progress=progress)
    if samples.images is None:
        raise DataError(f"{samples.name} holds floats; training wants uint8 images, which it augments.")
    if samples.labels is None and config.teacher is None:
        raise ConfigError(f"the images of {samples.name} have no labels. Give a --teacher, or labels.")
    count = round(TEST_SHARE * len(samples))
    if not 0 < count < len(samples) - 1:
        raise DataError(f"{samples.name}: {len(samples)} images are too few to train on and to test with.")
    test = choose(len(samples), count, config.seed)
    rest = np.setdiff1d(np.arange(len(samples)), test)
    if config.train_size is not None and config.train_size < len(rest):
        rest = rest[choose(len(rest), config.train_size, config.seed)]
    labels = np.full(len(samples), -1) if samples.labels is None else samples.labels
    channels = samples.images.shape[1]
    return Dataset(
        samples.name,
        samples.images[rest],
        labels[rest],
        samples.images[test],
        labels[test],
        num_classes=int(labels.max()) + 1,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        class_names=(),
        augment="none",
    )


def in_memory(data: Dataset, config: TrainConfig, progress: Progress) -> Dataset:
    """Return the data set with its pictures read, unless they are more than ``config.memory`` gibibytes.

    Raises:
        DataError: a picture cannot be read.
    """
    parts = {"train_images": data.train_images, "test_images": data.test_images}
    files = {key: images for key, images in parts.items() if isinstance(images, PictureFiles)}
    if sum(images.nbytes for images in files.values()) > config.memory * 2**30:
        progress.note(f"pictures of {data.name} stay in their files, which {config.workers} processes read")
        return data
    return replace(data, **{key: images.read(progress) for key, images in files.items()})


def unlabelled(data: Dataset) -> bool:
    """Return whether the images have no labels."""
    return data.num_classes == 0


def with_recipe(config: TrainConfig, data: Dataset) -> tuple[TrainConfig, Dataset]:
    """Return both with mean and std as the ONNX files have them; what is given, or no file says, stays.

    Raises:
        ConfigError: network and teacher want other inputs, or nobody says which mean and std.
        DataError: the images do not fit the network.
        ModelError: a file cannot be read.
    """
    files = [str(name) for name in (config.model if is_onnx(config.model) else None, config.teacher) if name]
    own = config.dataset is None
    recipes = []
    for file in files:
        samples = Samples(data.name, data.train_images, mean=None if own else data.mean, std=None if own else data.std)
        recipes.append(recipe_for(model_io.load(file), samples, config.mean, config.std))
    if not recipes:
        if own and config.mean is None:
            raise ConfigError(f"no mean and std for the images of {data.name}. Pass --mean and --std (of pixel/255).")
        return config, data
    inputs = [_per_channel(recipe, data.train_images.shape[1]) for recipe in recipes]
    if config.mean is None and len(inputs) == 2 and not np.allclose(*inputs):
        raise ConfigError(f"{files[0]} and {files[1]} normalise their input differently. Pass --mean and --std.")
    mean, std = inputs[0]
    return config.model_copy(update={"mean": None, "std": None}), replace(data, mean=mean, std=std)


def _per_channel(recipe: Preprocessing, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of pixel/255, one a channel."""
    factor = recipe.scale / PIXEL
    mean, std = (
        tuple(value * factor for value in (values * channels if len(values) == 1 else values))
        for values in (recipe.mean, recipe.std)
    )
    return mean, std


def open_network(file: str | Path, images: tuple[int, ...], *, reinit: bool = False) -> OnnxModule:
    """Return an ONNX file as a network that takes images (N, C, H, W) and gives logits.

    Args:
        file: the file.
        images: (C, H, W) of an image.
        reinit: draw its weights anew, from torch's global generator.

    Raises:
        ModelError: not a valid model, operators that cannot be trained, no weights, or not one input and one output.
    """
    import torch

    from prune_onnx.trainers.from_onnx import OnnxModule, draw_weights

    network = OnnxModule(file, logits=True)
    for kind, names in (("inputs", network.input_names), ("outputs", network.output_names)):
        if len(names) != 1:
            raise ModelError(f"{file} has {len(names)} {kind} ({', '.join(names)}); training takes one.")
    if not network.parameters_by_name:
        raise ModelError(f"{file} has no weights to train: none of its constants is one of a layer.")
    carried = preprocessing.read(network.model)
    network.nhwc = (carried is not None and carried.layout == "NHWC") or _only_last(network.model, images)
    if network.batch.fixed:
        _check_batches(network, str(file), images)
    if reinit:
        draw_weights(network)
    return network.to(memory_format=torch.channels_last)


def saved_macs(file: str | Path, dense: Path, images: tuple[int, ...]) -> float:
    """Return how many times the MACs of a file its dense network takes, for one image.

    Args:
        file: the compact network.
        dense: the one that it comes from.
        images: (C, H, W) of an image.

    Raises:
        ConfigError: the dense network takes fewer MACs.
        ModelError: a file is not a valid model, or does not run on the images.
    """
    compact, whole = (_macs(path, images) for path in (file, dense))
    if whole < compact:
        raise ConfigError(f"--budget-of {dense}: its {whole:,} MACs are fewer than the {compact:,} of {file}.")
    return whole / compact


def _macs(file: str | Path, images: tuple[int, ...]) -> int:
    model = model_io.load(file)
    (name, sizes), *_ = _inputs(model)
    given = {}
    if len(sizes) == 4 and 0 in sizes[1:]:
        channels, *sides = images
        given = {name: (sizes[0] or 1, *((*sides, channels) if _only_last(model, images) else images))}
    return count(model, given).macs


def _inputs(model: onnx.ModelProto) -> list[tuple[str, list[int]]]:
    """Return names and declared sizes of the inputs, 0 where they are open."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    return [(value.name, [dim.dim_value for dim in value.type.tensor_type.shape.dim]) for value in inputs]


def _check_batches(network: OnnxModule, file: str, images: tuple[int, ...]) -> None:
    """Refuse a file that fixes its batch size in a way that cannot be undone: its answers depend on the batch.

    Raises:
        ModelError: several images together do not give what they give in batches of the file's size.
    """
    import torch

    size = network.batch.fixed
    noise = torch.rand(2 * size, *images, generator=torch.Generator().manual_seed(0))
    network.eval()
    with torch.no_grad():
        parts = [network(part) for part in noise.split(size)]
        try:
            agree = torch.allclose(network(noise), torch.cat(parts), rtol=1e-3, atol=1e-3)
        except (ModelError, RuntimeError):
            agree = False
    if not agree:
        raise ModelError(
            f"{file} is made for batches of {size} and works with no other size. Export it with a dynamic batch size."
        )


def _only_last(model: onnx.ModelProto, images: tuple[int, ...]) -> bool:
    """Return whether the input has its channels last, by its declared sizes."""
    (_, sizes), *_ = _inputs(model)
    return len(sizes) == 4 and sizes[3] == images[0] and sizes[1] not in (0, images[0])


def open_teacher(config: TrainConfig, data: Dataset, device: torch.device) -> OnnxModule:
    """Return the teacher, on the device, in evaluation mode.

    Raises:
        ConfigError: it does not take the images or does not answer with one row of logits an image.
        ModelError: not a valid model, or operators that torch does not run.
    """
    import torch

    shape = tuple(data.train_images.shape[1:])
    teacher = open_network(config.teacher, shape).eval()
    try:
        with torch.no_grad():
            answer = teacher(torch.zeros(2, *shape))
    except ModelError as error:
        raise ConfigError(f"teacher {config.teacher} cannot take the images of {data.name}: {error}") from error
    if answer.dim() != 2 or len(answer) != 2:
        raise ConfigError(
            f"teacher {config.teacher} gives outputs of shape {tuple(answer.shape)} for 2 images; "
            "it must give (2, classes)."
        )
    if not unlabelled(data) and answer.shape[1] < data.num_classes:
        raise ConfigError(
            f"teacher {config.teacher} knows {answer.shape[1]} classes, {data.name} has {data.num_classes}."
        )
    return teacher.to(device)


def label(data: Dataset, teacher: nn.Module, config: TrainConfig, device: torch.device) -> Dataset:
    """Return unlabelled images with the teacher's answers as labels: accuracy is then the agreement with it."""
    import torch

    from prune_onnx.trainers.batches import Batches
    from prune_onnx.trainers.loop import EVALUATION_BATCH

    answers = []
    for images in (data.train_images, data.test_images):
        batches = Batches(
            images, np.zeros(len(images), np.int64), mean=config.mean or data.mean, std=config.std or data.std,
            device=device, workers=config.workers,
        )  # fmt: skip
        with torch.no_grad():
            found = [teacher(x) for x, _ in batches.in_order(EVALUATION_BATCH)]
        answers.append(torch.cat(found).argmax(1).cpu().numpy())
        classes = found[0].shape[1]
    return replace(data, train_labels=answers[0], test_labels=answers[1], num_classes=classes)


def save_network(network: OnnxModule, path: Path, recipe: Preprocessing) -> None:
    """Write the trained weights into the file's own graph; a recipe only where it carries none.

    Raises:
        ModelError: what training made of it is not a valid model.
        OutputError: the file cannot be written.
    """
    from prune_onnx.trainers.from_onnx import trained_model

    model = trained_model(network)
    if preprocessing.read(model) is None:
        preprocessing.write(model, replace(recipe, layout="NHWC" if network.nhwc else "NCHW"))
    model_io.check(model, network.model)
    model_io.save(model, path)
