"""Pruning by Frank-Wolfe: which weights stay is an optimisation over relaxed masks, solved by gradients of the loss.

    train; then, in each of ``rounds``:
        min over m of  L(m * W),   m in [0, 1]^n, sum m <= k = (1 - p) n        (:mod:`.mask_polytope`)
        keep the k weights with the largest m (of equal ones the largest |W|), retrain with the others at zero

The gradient in m is g * W with g = dL / d(m * W), so the first step takes the first-order Taylor saliency and later
ones correct it for what the mask changed. L is the mean loss over ``samples`` training images. BatchNorm normalises by
their batches meanwhile: the statistics of the dense network do not fit a thinned one, and retraining will bring them
along. (bn-cnn on scikit-learn's digits, 90 % of the weights: by the batch the rounded mask has a loss of .46 where
magnitude's has 1.07; by the old statistics 4.2 and 4.5.)

Source: Shili et al., "Projection-Free CNN Pruning via Frank-Wolfe with Momentum". What it prints (Algorithms 3 and 4)
has no feasible set, no linear minimisation and no convex combination: G is a sum of gradients, and "apply pruning to M
based on G and s" names no criterion. The default here is the sound form of what its prose describes. ``variant`` gives
the printed ones:

* ``printed``: the weights with the smallest |G * W| go. ``printed-gradient``: those with the smallest |G|. G is the sum
  of the gradients of ``samples`` images.
* frank-wolfe (Algorithm 3), N rounds: pruned when i mod N/2 = 0, twice for an even N and once for an odd one.
* frank-wolfe-momentum (Algorithm 4), with two corrections: its momentum ``G <- m * G`` is a rescaling, which changes no
  ranking; here it is the moving average that the prose speaks of. And it raises s after pruning, so that the last value
  is never used (.10 .24 .38 .52 .66 for .1 to .8 in 5 rounds); here s_i = start + (end - start) * i / N (.24 ... .80).

The paper prunes after each of its rounds, and its comparison gives the pruned networks more epochs than the dense one;
here all retraining is inside ``epochs``, so that ``plain`` with the same ``epochs`` is a fair control. It gives no N,
E, s or momentum. Defaults: half of the weights go, as in its figures; 20 steps; 5 rounds and rho .9 with momentum.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.progress import SILENT, Progress

from ..masks import prunable
from ..trace import batch_statistics, evaluating
from .magnitude import RATIO, prune_lowest
from .mask_polytope import MaskPolytope, frank_wolfe
from .pruning import SAMPLES, Pruning, pruned_count

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

AVERAGE = "weight_average"
"""Buffer of the printed Algorithm 4: the moving average of gradients, over rounds."""


@dataclass
class FrankWolfe(Pruning):
    """Frank-Wolfe pruning: the mask is optimised over its relaxation, then rounded; the rest trains on.

    Attributes:
        prune_ratio: fraction of weights that are zero in the end.
        scope: one sum constraint for all layers (``global``), or one for each ``layer``.
        samples: training images that the loss is taken over.
        fw_steps: Frank-Wolfe steps in each round.
        variant: ``sound``, ``printed`` or ``printed-gradient``.
    """

    name: ClassVar[str] = "frank-wolfe"
    VARIANTS: ClassVar[tuple[str, ...]] = ("sound", "printed", "printed-gradient")

    prune_ratio: float = RATIO
    scope: str = "global"
    samples: int = SAMPLES
    fw_steps: int = 20
    variant: str = "sound"

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {
            **super().defaults(config, schedule),
            "prune_ratio": RATIO, "scope": "global", "samples": SAMPLES, "fw_steps": 20, "variant": "sound",
        }  # fmt: skip

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        if self.variant not in self.VARIANTS:
            raise ConfigError(f"{self.name} has no variant {self.variant!r}; it has {', '.join(self.VARIANTS)}.")
        super().prepare(model, schedule, seed=seed, progress=progress)

    def ratio(self, number: int) -> float:
        """Return the fraction of zeros after round ``number``."""
        return self.prune_ratio * number / self.rounds

    def prune(self, number: int) -> None:
        if self.variant == "sound":
            self._prune_soundly(number)
        elif 2 * number % self.rounds == 0:
            self._prune_as_printed(self._gradients(), self.prune_ratio)

    @torch.no_grad()
    def _prune_soundly(self, number: int) -> None:
        layers = [layer for layer, _ in self._masks]
        weights = torch.cat([layer.weight.flatten() for layer in layers])
        alive = torch.cat([self._masks.get(layer).flatten() for layer in layers])
        sizes = [layer.weight.numel() for layer in layers]
        blocks = [sum(sizes)] if self.scope == "global" else sizes
        polytope = MaskPolytope(tuple((size, size - pruned_count(self.ratio(number), size)) for size in blocks))

        def gradient(mask: torch.Tensor) -> torch.Tensor:
            self._load(layers, mask * weights)
            count = min(self.samples, len(self._images))
            return torch.cat([slope.flatten() for slope in self._gradients(by_batch=True)]) * weights / count

        try:
            point, gaps = frank_wolfe(gradient, polytope, polytope.middle(alive), self.fw_steps, rho=self._rho())
        finally:
            self._load(layers, weights)
        kept = polytope.rounded(torch.where(alive, point, -1), weights.abs())
        for layer, part in zip(layers, kept.split(sizes), strict=True):
            self._masks.set(layer, "weight", part)
        self._progress.note(f"{self.name}, round {number}: gap {gaps[0]:.3g} at first, {gaps[-1]:.3g} at last")

    @torch.no_grad()
    def _prune_as_printed(self, gradients: list[torch.Tensor], ratio: float) -> None:
        layers = [layer for layer, _ in self._masks]
        scores = []
        for layer, gradient in zip(layers, gradients, strict=True):
            score = gradient.abs() if self.variant == "printed-gradient" else (gradient * layer.weight).abs()
            scores.append(torch.where(self._masks.get(layer), score, -1))  # what is masked goes first
        for layer, dead in zip(layers, prune_lowest(scores, ratio, self.scope), strict=True):
            self._masks.set(layer, "weight", ~dead)

    def _rho(self) -> float:
        return 0.0

    def _gradients(self, *, by_batch: bool = False) -> list[torch.Tensor]:
        """Return the sum over the samples of the loss's gradients in the kernels, as they are now.

        Args:
            by_batch: BatchNorm normalises by the batch.
        """
        kernels = [layer.weight for layer, _ in self._masks]
        sums = [torch.zeros_like(kernel) for kernel in kernels]
        mode = batch_statistics(self._model) if by_batch else nullcontext()
        with evaluating(self._model), mode, torch.enable_grad():
            for inputs, labels in self.scoring_batches(self.samples):
                loss = F.cross_entropy(self._model(inputs), labels, reduction="sum")
                torch._foreach_add_(sums, torch.autograd.grad(loss, kernels))
        return sums

    @staticmethod
    def _load(layers: list[nn.Module], flat: torch.Tensor) -> None:
        """Write a vector of all weights into the layers."""
        parts = flat.split([layer.weight.numel() for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.data.copy_(part.view_as(layer.weight))


@dataclass
class FrankWolfeMomentum(FrankWolfe):
    """Frank-Wolfe pruning with momentum: an average of gradients chooses, and the ratio rises over the rounds.

    Attributes:
        prune_ratio_start: where the schedule of ratios starts: s_i = start + (end - start) * i / N.
        rho: weight of the past in the average; 0 makes it frank-wolfe.
    """

    name: ClassVar[str] = "frank-wolfe-momentum"

    prune_ratio_start: float = 0.0
    rho: float = 0.9

    @classmethod
    def usual_rounds(cls, config: TrainConfig) -> int:
        return 5

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        end = RATIO if config.prune_ratio is None else config.prune_ratio
        if config.prune_ratio_start is not None and config.prune_ratio_start > end:
            raise ConfigError(f"prune_ratio_start {config.prune_ratio_start} lies above prune_ratio {end}.")
        return {**super().defaults(config, schedule), "prune_ratio_start": 0.0, "rho": 0.9}

    def add_masks(self, model: nn.Module) -> None:
        super().add_masks(model)
        if self.variant != "sound":
            for layer in prunable(model):
                layer.register_buffer(AVERAGE, torch.zeros_like(layer.weight))

    def ratio(self, number: int) -> float:
        return self.prune_ratio_start + (self.prune_ratio - self.prune_ratio_start) * number / self.rounds

    def prune(self, number: int) -> None:
        if self.variant == "sound":
            self._prune_soundly(number)
            return
        averages = [getattr(layer, AVERAGE) for layer, _ in self._masks]
        share = 1.0 if number == 1 else 1 - self.rho  # the average begins with the first gradients
        torch._foreach_lerp_(averages, self._gradients(), share)
        self._prune_as_printed(averages, self.ratio(number))

    def finish(self, model: nn.Module) -> dict[str, int]:
        if self.variant != "sound":
            for layer in prunable(model):
                delattr(layer, AVERAGE)
        return super().finish(model)

    def _rho(self) -> float:
        return self.rho
