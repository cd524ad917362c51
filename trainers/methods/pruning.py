"""What the pruning methods have in common: masks kept to the end, and rounds of pruning and retraining.

A run of ``epochs`` has ``rounds`` prunings, each followed by ``retrain_epochs`` under the learning-rate schedule from
its beginning and an optimiser without a past; what is left comes first. A dense control of equal length is ``plain``
with the same ``epochs``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.progress import SILENT, Progress

from .. import initial
from ..batches import generator
from ..masks import Masks, prunable, weight_facts
from ..trace import Layer, trace
from .base import Method

if TYPE_CHECKING:
    from ..batches import Batch, Batches
    from ..config import Schedule, TrainConfig

SAMPLES = 1000
"""Training images that scores are computed on, when not given: NNrelief's number."""

SCORING_BATCH = 100


@dataclass
class Masked(Method):
    """Base of the methods that keep masks. A subclass says which, and when they change."""

    @classmethod
    def check(cls, model: nn.Module) -> None:
        if not prunable(model):
            raise ConfigError(f"method {cls.name!r} works on convolutions and linear layers; this network has none.")

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        self._model, self._restarts, self._seed, self._progress = model, schedule.restarts, seed, progress
        self._masks = Masks()

    def attach(self, optimizer: torch.optim.Optimizer, images: Batches) -> None:
        self._optimizer, self._images = optimizer, images
        self._layers = trace(self._model, next(images.in_order(2))[0])
        self.add_masks(self._model)

    def add_masks(self, model: nn.Module) -> None:
        """Give masks to all kernels; other methods mask something else."""
        for layer in prunable(model):
            self._masks.add(layer)

    def before_step(self) -> None:
        self._masks.mask_gradients()

    def after_step(self, lr: float) -> None:
        self._masks.apply()

    def finish(self, model: nn.Module) -> dict[str, int]:
        """Take the masks off, and the initial weights of methods that rewind; the zeros stay."""
        self._masks.reload()
        self._masks.apply()
        self._masks.remove()
        initial.forget(model)
        return self.sparsity(model)

    def sparsity(self, model: nn.Module) -> dict[str, int]:
        return {**super().sparsity(model), **weight_facts(model)}

    def add_unit_masks(self, layer: Layer, *, units: bool) -> None:
        """Give masks to a layer's kernels and to all else that its units have: bias, and BatchNorm behind it.

        Args:
            layer: the layer.
            units: one entry for a whole unit in the mask of its kernels, in place of one for each weight.
        """
        self._masks.add(layer.module, units=units)
        for module, name in unit_constants(layer):
            self._masks.add(module, name)

    def drop_units(self, layer: Layer, dead: torch.Tensor) -> None:
        """Mask whole units of a layer with :meth:`add_unit_masks`: what they feed the next layer is exactly zero.

        Args:
            layer: the layer.
            dead: boolean, one entry a unit.
        """
        self._masks.narrow(layer.module, "weight", units_of(~dead, self._masks.get(layer.module)))
        for module, name in unit_constants(layer):
            self._masks.narrow(module, name, ~dead)

    def scoring_batches(self, count: int) -> Iterator[Batch]:
        """Yield training images without augmentation, the same ones in every round.

        Args:
            count: how many images, drawn by the seed; all of them if there are fewer.
        """
        chosen = torch.randperm(len(self._images), generator=generator(self._seed, "scoring"))[:count].sort().values
        parts = math.ceil(len(chosen) / SCORING_BATCH)
        yield from self._images.at(chosen, math.ceil(len(chosen) / parts))  # no small batch at the end


@dataclass
class Pruning(Masked):
    """Base of the methods that prune in rounds. A subclass says what :meth:`prune` does.

    Attributes:
        rounds: how often the network is pruned.
        retrain_epochs: length of each retraining.
    """

    rounds: int = 1
    retrain_epochs: int = 1

    @classmethod
    def usual_rounds(cls, config: TrainConfig) -> int:
        """Return how many rounds this network takes when not told."""
        return 1

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        """Divide the run into parts of equal length, the first one with what is left over.

        Of a network that starts with trained weights, the first part is not needed: it is pruned at once.

        Raises:
            ConfigError: it is too short for that.
        """
        rounds, before = config.rounds, 0 if config.starts_trained else 1
        if rounds is None:  # two epochs for each part at least, or what there is
            rounds = max(1, min(cls.usual_rounds(config), config.length // 2 - before))
        length = config.retrain_epochs or config.length // (rounds + before)
        if not 0 < rounds * length <= config.length - before:
            raise ConfigError(
                f"{rounds} rounds of {max(length, 1)} epochs leave nothing of {config.length} epochs for the training "
                "before them. Give more --epochs, or fewer --rounds or --retrain-epochs."
            )
        return {"rounds": rounds, "retrain_epochs": length}

    def prune(self, number: int) -> None:
        """Set the masks of round ``number``, counted from 1, by the network as it is now."""
        raise NotImplementedError

    def begin(self) -> None:
        self.after_epoch(0.0, 0)

    def after_epoch(self, lr: float, epoch: int = 0) -> None:
        if epoch in self._restarts:
            self.prune(self._restarts.index(epoch) + 1)
            self._masks.apply()
            self._optimizer.state.clear()  # retraining begins with a new optimiser


def pruned_count(sparsity: float, total: int) -> int:
    """Return how many of ``total`` go at a sparsity: the nearest whole number."""
    return round(sparsity * total)


def unit_constants(layer: Layer) -> list[tuple[nn.Module, str]]:
    """Return where a layer's units have parameters besides their kernels: the bias, BatchNorm's scale and shift."""
    places = [(layer.module, "bias"), (layer.norm, "weight"), (layer.norm, "bias")]
    return [place for place in places if isinstance(getattr(*place, None), nn.Parameter)]


def units_of(live: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Spread one entry a unit over a mask of kernels."""
    return live.view(-1, *[1] * (mask.dim() - 1)).expand_as(mask)
