"""Network Slimming: an L1 term on the BatchNorm scales, by its sub-gradient.

    min over W, gamma of  loss(W, gamma) + lambda * |gamma|_1
    every step:           grad_gamma += lambda * sign(gamma)      (sign(0) = 0), before the optimiser's step

Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017; equations (2) and
(3) of Bui et al., "A Proximal Algorithm for Network Slimming". The term goes through the optimiser, so momentum ``m``
multiplies it by ``1 / (1 - m)``. A sub-gradient step brings scales near zero, never to it: which channels go is
decided afterwards, by a threshold (``slim --criterion bn-gamma``).

Published lambda: 1e-4 for VGG-19, 1e-5 for ResNet-164 and DenseNet-40. The default is that value, raised on schedules
that are too short for it to take an idle scale near zero (:func:`.scales.sufficient_lambda`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from prune_onnx.graph_ops.progress import SILENT, Progress

from .base import Method
from .scales import INIT_GAMMA, batch_norms, require_batch_norms, start_scales, sufficient_lambda

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

STRONGEST = 0.02
"""Gradient that a default lambda may outweigh at most."""


@dataclass
class NetworkSlimming(Method):
    """Network Slimming: an L1 term on the BatchNorm scales, by its sub-gradient.

    Attributes:
        lambda_: strength of the L1 term.
        init_gamma: initial BatchNorm scale; ``None`` goes on with trained ones.
    """

    name: ClassVar[str] = "network-slimming"

    lambda_: float
    init_gamma: float | None = INIT_GAMMA

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        published = 1e-5 if config.model.startswith(("resnet", "preresnet", "densenet")) else 1e-4
        start = config.init_gamma or INIT_GAMMA
        # One step moves a scale by lr * lambda / (1 - m) once the momentum has built up.
        reach = sum(schedule.at(step) for step in range(schedule.steps)) / (1 - config.momentum)
        init_gamma = None if config.starts_trained else INIT_GAMMA
        return {"init_gamma": init_gamma, "lambda_": sufficient_lambda(published, start, reach, STRONGEST)}

    @classmethod
    def check(cls, model: nn.Module) -> None:
        require_batch_norms(model, cls.name)

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        self._norms = batch_norms(model)
        if self.init_gamma is not None:
            start_scales(self._norms, self.init_gamma)

    @torch.no_grad()
    def before_step(self) -> None:
        scales = [norm.weight for norm in self._norms if norm.weight.grad is not None]
        if not scales:  # all frozen
            return
        torch._foreach_add_([scale.grad for scale in scales], torch._foreach_sign(scales), alpha=self.lambda_)
