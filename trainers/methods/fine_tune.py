"""Fine-tuning: trained weights train on, and what is zero stays zero.

Masks are taken from the weights themselves: every kernel weight and every BatchNorm scale that is exactly zero; and
the bias and shift of a unit that has neither, so that it stays silent. That is what follows pruning in every paper; the
reference programs of network slimming keep a dead channel's scale and shift in the same way.

What comes out of ``slim`` has no zeros left to keep. It is tuned by ``--method plain --model FILE.onnx``; with
``--reinit`` it is trained from scratch instead (Liu et al., "Rethinking the Value of Network Pruning", 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError

from ..masks import prunable
from .pruning import Masked, unit_constants
from .scales import batch_norms

if TYPE_CHECKING:
    from ..batches import Batches
    from ..config import Schedule, TrainConfig


@dataclass
class FineTune(Masked):
    """Fine-tuning: trained weights train on, and those that are zero stay zero."""

    name: ClassVar[str] = "fine-tune"

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        if not config.starts_trained:
            raise ConfigError("method 'fine-tune' wants trained weights. Give them with --init, or as an ONNX file.")
        return {}

    def add_masks(self, model: nn.Module) -> None:
        super().add_masks(model)
        for norm in batch_norms(model):
            self._masks.add(norm)
        for layer in self._layers:
            for module, name in unit_constants(layer):
                if (module, name) not in list(self._masks):
                    self._masks.add(module, name)

    @torch.no_grad()
    def attach(self, optimizer: torch.optim.Optimizer, images: Batches) -> None:
        super().attach(optimizer, images)
        for module in (*prunable(self._model), *batch_norms(self._model)):
            self._masks.set(module, "weight", module.weight != 0)
        for layer in self._layers:
            silent = (layer.module.weight.flatten(1) == 0).all(1)
            if layer.norm is not None and isinstance(layer.norm.weight, nn.Parameter):
                silent |= layer.norm.weight == 0
            for module, name in unit_constants(layer):
                if name == "bias":
                    self._masks.set(module, name, ~(silent & (module.bias == 0)))
