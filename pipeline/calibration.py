"""Calibration data: a few hundred inputs, checked before anything runs on them, in batches that the model takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper

from prune_onnx.graph_ops import preprocessing
from prune_onnx.graph_ops.errors import ConfigError, DataError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.probe import Probe
from prune_onnx.graph_ops.progress import Progress

from .data import Samples, image_input, open_samples, recipe_for
from .formats import size as bytes_text
from .probing import Feeds, batch_of
from .slim_schema import SlimConfig
from .streams import alive

BATCH = 128
CHUNK = 2**27
"""Bytes of activations that a batch may take; a single input may take more."""
MEMORY = 9 * 2**27
"""Bytes that cached activations may take: where all inputs would take more, some join in later layers."""
STREAMS = 2
"""Networks that are run side by side, the dense and the pruned one."""
BEYOND = 3.0
"""Floats this many times outside the range that the recipe gives images are another scale, not a strong contrast."""


@dataclass(frozen=True)
class Calibration:
    """Inputs in batches.

    Attributes:
        chunks: feeds of the model.
        labels: int64, of each batch; ``None`` where the data has none.
        recipe: that made input of images; ``None`` for data that was input already.
    """

    chunks: list[Feeds]
    labels: list[np.ndarray] | None = None
    recipe: Preprocessing | None = None

    def __len__(self) -> int:
        return sum(size_of(chunk) for chunk in self.chunks)

    def only(self, chunks: list[Feeds]) -> Calibration:
        """Return the same with the first inputs alone; a batch may be the first part of what it was."""
        if self.labels is None:
            return replace(self, chunks=chunks)
        labels = [y[: size_of(chunk)] for y, chunk in zip(self.labels, chunks, strict=False)]
        return replace(self, chunks=chunks, labels=labels)


def size_of(feeds: Feeds) -> int:
    """Return how many inputs a batch has."""
    return len(next(iter(feeds.values())))


def first(chunks: list[Feeds], count: int) -> list[Feeds]:
    """Return the first batches, of ``count`` inputs or a few more."""
    sizes = np.cumsum([size_of(chunk) for chunk in chunks])
    return chunks[: int(np.searchsorted(sizes, count)) + 1]


def open_calibration(
    config: SlimConfig, model: onnx.ModelProto, graph: Graph, probe: Probe, progress: Progress
) -> Calibration:
    """Read the calibration data, make network input of it, and say what it will take.

    Args:
        config: which data, and how images become input.
        model: carries the recipe.
        graph: the network that will run.
        probe: its shapes.
        progress: hears of reading, of the memory that the activations take, and of data that looks wrong.

    Raises:
        ConfigError: the model has several inputs, or takes no floats.
        DataError: the data cannot be read, does not fit the model, or is no data at all.
    """
    if len(graph.inputs) != 1:
        raise ConfigError(f"--calibration needs a model with one input; this one has {len(graph.inputs)}.")
    name, kind = graph.inputs[0].name, graph.inputs[0].type.tensor_type.elem_type
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    if dtype.kind not in "fV":  # V: bfloat16
        raise ConfigError(f"--calibration gives floats, but input {name!r} of this model takes {dtype}.")
    channels, size = image_input(model, config.layout)
    samples = open_samples(
        data=config.calibration, data_dir=config.data_dir, download=config.download, split="train",
        limit=config.calibration_size, seed=config.seed, size=config.size or size, channels=channels,
        progress=progress,
    )  # fmt: skip
    recipe = recipe_for(model, samples, config.mean, config.std, config.layout)
    fixed = batch_of(graph)
    each = max(alive(graph, probe), default=1)
    batch = fixed or max(1, min(BATCH, CHUNK // each))
    batches = [(np.ascontiguousarray(x, dtype), y) for x, y in samples.batches(recipe, batch)]
    progress.note(
        f"calibration: {len(samples)} samples of {samples.name}, at most "
        f"{bytes_text(min(STREAMS * each * len(samples), MEMORY))} of activations in memory"
    )
    if fixed:
        left = len(samples) % fixed
        if len(samples) < fixed:
            raise DataError(
                f"--calibration {config.calibration}: {len(samples)} samples, but the model takes batches of {fixed}. "
                "Give at least that many."
            )
        if left:
            progress.warn(f"{left} calibration samples are left out: the model takes batches of {fixed}.")
            batches = batches[:-1]
    _check_values([x for x, _ in batches], samples, preprocessing.read(model), progress)
    labels = None if samples.labels is None else [y for _, y in batches]
    chunks = [{name: x} for x, _ in batches]
    return Calibration(chunks, labels, None if samples.images is None else recipe)


def within(chunks: list[Feeds], graph: Graph, probe: Probe, progress: Progress) -> list[Feeds]:
    """Return the first chunks whose activations fit into memory in all layers at once, and say when they are fewer."""
    each = STREAMS * max(alive(graph, probe), default=1)
    fits, seen = 1, size_of(chunks[0])
    while fits < len(chunks) and (seen + size_of(chunks[fits])) * each <= MEMORY:
        seen += size_of(chunks[fits])
        fits += 1
    if fits < len(chunks):
        samples = sum(map(size_of, chunks))
        progress.warn(
            f"{samples} calibration samples would take {bytes_text(each * samples)} of activations; the first {seen} "
            "are used."
        )
    return chunks[:fits]


def _check_values(
    batches: list[np.ndarray], samples: Samples, carried: Preprocessing | None, progress: Progress
) -> None:
    """Refuse input that is not finite or all the same; warn of floats on another scale than the recipe's."""
    low, high = float(min(x.min() for x in batches)), float(max(x.max() for x in batches))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{samples.name}: NaN or infinity after preprocessing; check --mean and --std, and the data.")
    if low == high:
        raise DataError(f"{samples.name}: every value of the calibration data is {low:g}, so nothing can be learnt.")
    if samples.images is not None:
        return
    ends = carried.ends() if carried is not None else (low, high)
    middle, half = sum(ends) / 2, (ends[1] - ends[0]) / 2
    if carried is not None and (high > middle + BEYOND * half or low < middle - BEYOND * half):
        progress.warn(
            f"{samples.name} holds values from {low:g} to {high:g}; images preprocessed by the model's recipe lie "
            f"between {ends[0]:.3g} and {ends[1]:.3g}. Give uint8 images, or floats that are network input."
        )
    elif carried is None and high > 64 and low >= 0:
        progress.warn(
            f"{samples.name} holds floats from {low:g} to {high:g}, which look like raw pixels; they are taken as "
            "network input as they are. Give uint8 images with --mean and --std if the model expects those."
        )
