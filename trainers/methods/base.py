"""What a method is: hooks around the optimiser's step, and the facts that it reports about sparsity.

A step of the loop is ``backward, clip, before_step, optimizer.step, after_step``. State that a run must not lose
(auxiliary variables, masks) lives in registered buffers of the network's own modules: it then moves with the network,
goes into its ``state_dict``, and is resumed with it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from prune_onnx.graph_ops.progress import SILENT, Progress

from .scales import batch_norms

if TYPE_CHECKING:
    from ..batches import Batches
    from ..config import Schedule, TrainConfig


@dataclass
class Method:
    """Base of all methods; it trains plainly. The fields of a subclass are the options of the run that it takes."""

    name: ClassVar[str]

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the names of the :class:`~..config.TrainConfig` fields that the method takes."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        """Return values for the method's options on this network and schedule, for those that were not given."""
        return {}

    @classmethod
    def of(cls, config: TrainConfig) -> Method:
        """Return the method with the options of a resolved configuration."""
        return cls(**{option: getattr(config, option) for option in cls.options()})

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Refuse a network that lacks what the method works on.

        Raises:
            ConfigError: says what is missing, and what to take instead.
        """

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        """Set the network up before its first step; a resumed run then loads its state over it."""

    def attach(self, optimizer: torch.optim.Optimizer, images: Batches) -> None:
        """Take what pruning needs besides the network, after :meth:`prepare`: momentum to clear, images to score on."""

    def begin(self) -> None:
        """Change the network before the first step of a run; one that is resumed has that in its checkpoint."""

    def before_step(self) -> None:
        """Change gradients, after the backward pass and clipping, before the optimiser's step."""

    def after_step(self, lr: float) -> None:
        """Change parameters after an optimiser's step of learning rate ``lr``."""

    def after_epoch(self, lr: float, epoch: int = 0) -> None:
        """Change parameters after an epoch whose last learning rate was ``lr``; ``epoch`` are finished by now."""

    def finish(self, model: nn.Module) -> dict[str, int]:
        """Make the sparsity of the trained network explicit in its parameters; return :meth:`sparsity` after that."""
        return self.sparsity(model)

    def support(self, norm: nn.Module) -> torch.Tensor:
        """Return, per channel of a BatchNorm layer, what is zero where the channel is dead: its scale, shape (C,)."""
        return norm.weight

    def sparsity(self, model: nn.Module) -> dict[str, int]:
        """Return ``channels`` (of all BatchNorm layers) and ``dead_channels`` (those without support)."""
        supports = [self.support(norm) for norm in batch_norms(model)]
        return {
            "channels": sum(support.numel() for support in supports),
            "dead_channels": sum(int((support == 0).sum()) for support in supports),
        }
