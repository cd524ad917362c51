"""What models run on in ``eval``: samples from files, or random numbers of a shape that the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from prune_onnx.graph_ops import preprocessing
from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.progress import Progress

from .accuracy import Kept, Tally, compare_outputs, tally
from .data import Samples, image_input, open_samples, recipe_for
from .eval_schema import EvalConfig
from .probing import probe, random_feeds
from .sessions import TensorSpec, input_specs

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Samples a run when accuracy is counted; bounded by the activations of large images.
ACCURACY_BATCH = 64
# Random inputs on which models are compared when there is no data.
RANDOM_INPUTS = 16


@dataclass(frozen=True)
class DataInputs:
    """Samples from files, turned into the models' one input by a recipe."""

    spec: TensorSpec
    samples: Samples
    recipe: Preprocessing
    name: str

    def feed(self, batch_size: int) -> dict[str, np.ndarray]:
        """Return the first samples as one run's input, repeated where there are too few."""
        size = fixed_batch(self.spec) or batch_size
        array, _ = next(self.samples.batches(self.recipe, size))
        return {self.spec.name: np.resize(array, (size, *array.shape[1:])).astype(self.spec.dtype)}

    def judge(
        self,
        models: Sequence[InferenceSession],
        baseline: InferenceSession | None,
        keep: Kept | None,
        progress: Progress,
    ) -> list[Tally]:
        """Count right answers and differences over all samples."""
        size = fixed_batch(self.spec) or 1
        batches = self.samples.batches(self.recipe, max(1, ACCURACY_BATCH // size) * size)
        with progress.task(f"accuracy on {self.name}", len(self.samples)) as advance:
            return tally(models, baseline, batches, advance, keep)


@dataclass(frozen=True)
class RandomInputs:
    """Random inputs of a shape that the model is known to run at."""

    specs: list[TensorSpec]
    graph: Graph
    shapes: Mapping[str, tuple[int, ...]]
    seed: int
    name: str = "random inputs"

    def feed(self, batch_size: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Return random inputs of ``batch_size`` samples where the model leaves their number open."""
        shapes = {
            spec.name: (fixed_batch(spec) or batch_size, *self.shapes[spec.name][1:]) if spec.shape else ()
            for spec in self.specs
        }
        return random_feeds(self.graph, shapes, self.seed + seed)

    def judge(
        self,
        models: Sequence[InferenceSession],
        baseline: InferenceSession | None,
        keep: Kept | None,
        progress: Progress,
    ) -> list[Tally] | None:
        """Compare the outputs of models and baseline; without a baseline there is nothing to compare with."""
        if baseline is None:
            return None
        with progress.task("outputs on random inputs", len(models)) as advance:
            found = []
            for model in models:
                feeds = (self.feed(1, seed) for seed in range(RANDOM_INPUTS))
                found.append(compare_outputs(model, baseline, feeds))
                advance(1)
            return found


def fixed_batch(spec: TensorSpec) -> int | None:
    """Samples that a run takes, where the model fixes them."""
    return spec.shape[0] if spec.shape else 1


def open_inputs(
    config: EvalConfig, protos: Sequence[onnx.ModelProto], session: InferenceSession, progress: Progress
) -> tuple[DataInputs | RandomInputs, tuple[int, ...]]:
    """Return what the models run on, and the batch sizes that are timed.

    Args:
        config: the data, and the batch sizes that were asked for.
        protos: all models; the first that carries its preprocessing has the say.
        session: of the first one.
        progress: warned where models carry different preprocessing.

    Raises:
        ConfigError: options that do not fit the model or the data.
        DataError: the data is missing, corrupt, or does not fit the model.
    """
    specs = input_specs(session)
    fixed = fixed_batch(specs[0])
    if fixed is not None and config.batch_size not in ((1,), (fixed,)):
        asked = ", ".join(map(str, config.batch_size))
        raise ConfigError(f"--batch-size {asked}: the model takes batches of {fixed} only ({specs[0]}).")
    sizes = config.batch_size if fixed is None else (fixed,)
    if not config.has_data:
        graph = Graph(protos[0])
        _, feeds, _ = probe(graph, dict(config.input_shape), config.seed)
        shapes = {name: array.shape for name, array in feeds.items()}
        return RandomInputs(specs, graph, shapes, config.seed), sizes
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise ConfigError(f"data can be fed to models with one input only; this one has {len(specs)}: {names}.")
    channels, size = image_input(protos[0], config.layout)
    samples = open_samples(
        dataset=config.dataset,
        data=config.data,
        data_dir=config.data_dir,
        download=config.download,
        split="test",
        limit=config.limit,
        seed=config.seed,
        size=config.size or size,
        channels=channels,
        progress=progress,
    )
    # Some tools drop a model's metadata; its baseline still says how both want their input.
    carrier = next((proto for proto in protos if preprocessing.read(proto) is not None), protos[0])
    recipe = recipe_for(carrier, samples, config.mean, config.std, config.layout)
    if config.mean is None and any(preprocessing.read(other) not in (None, recipe) for other in protos):
        progress.warn(
            "model and baseline carry different preprocessing in their metadata; the model's is used for both. "
            "Give --mean and --std to choose."
        )
    return DataInputs(specs[0], samples, recipe, f"{samples.name}, {len(samples):,} samples"), sizes
