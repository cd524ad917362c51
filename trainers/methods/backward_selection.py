"""Backward filter selection: one after the other, the filter goes without which the loss is lowest.

    M = 1;  repeat floor(C * P) times:  for every filter left, e = L(f(s, M without it));  remove the one of the least e

L is the mean loss of ``samples`` training images, the same ones throughout; C counts all filters that may go, P is
``prune_ratio``. A filter is removed behind its BatchNorm: its bias, scale and shift go too, so that what it feeds the
next layer is zero. Then the network trains with the filters masked, from its initial weights (``rewind``): the paper
trains the smaller network from scratch.

Source: Algorithm 1 of Mitsuno and Kurita, "Filter Pruning using Hierarchical Group Sparse Regularization for Deep
Convolutional Neural Networks". Its equation 5 has |L(W) - L(W * M)|, by which a filter would stay because the loss
falls without it; the algorithm, and this, take the least loss. Candidates are the convolutions but the last, here
without those whose channels meet others in a sum or concatenation. Every layer keeps one filter (the paper stops
there).

``variant="exact"`` evaluates every candidate every time. What lies before a candidate is not computed again, and
candidates of a layer are evaluated together (:mod:`..suffixes`). ``"lazy"`` evaluates only the :data:`LAZY` candidates
that were best when last looked at: many times faster, and usually but not always the same choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.progress import SILENT, Progress

from .. import initial
from ..suffixes import Suffixes
from ..trace import Layer
from .filters import alone, is_convolution, require_convolutions, share_of
from .pruning import Pruning

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

IMAGES = 128

LAZY = 16

Candidate = tuple[int, int]
"""Index of the layer, channel."""


@dataclass
class BackwardSelection(Pruning):
    """Backward selection: one after the other, the filter goes without which the loss on samples is lowest.

    Attributes:
        prune_ratio: fraction of the filters of all candidate layers that goes.
        samples: training images that the loss is taken over.
        rewind: train from the initial weights afterwards.
        variant: ``exact`` or ``lazy``.
    """

    name: ClassVar[str] = "backward-selection"
    VARIANTS: ClassVar[tuple[str, ...]] = ("exact", "lazy")

    prune_ratio: float = 0.5
    samples: int = IMAGES
    rewind: bool = True
    variant: str = "exact"

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        own = {"prune_ratio": 0.5, "samples": IMAGES, "rewind": True, "variant": "exact"}
        return {**super().defaults(config, schedule), **own}

    @classmethod
    def check(cls, model: nn.Module) -> None:
        require_convolutions(model, cls.name)

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        if self.variant not in self.VARIANTS:
            raise ConfigError(f"{self.name} has no variant {self.variant!r}; it has {', '.join(self.VARIANTS)}.")
        super().prepare(model, schedule, seed=seed, progress=progress)

    def add_masks(self, model: nn.Module) -> None:
        if self.rewind:
            initial.keep(model)
        last = [layer for layer in self._layers if is_convolution(layer)][-1]
        self._taken = [layer for layer in alone(self._layers) if layer is not last]
        for layer in self._taken:
            self.add_unit_masks(layer, units=True)

    def prune(self, number: int) -> None:
        batches = list(self.scoring_batches(self.samples))
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        total = sum(len(layer.module.weight) for layer in self._taken)
        wanted = share_of(total, self.prune_ratio * number / self.rounds)
        gone = total - sum(len(self.alive(layer)) for layer in self._taken)
        suffixes = Suffixes(self._model, inputs)
        known: dict[Candidate, float] = {}
        with self._progress.task("selecting filters", wanted - gone) as advance:
            for _ in range(wanted - gone):
                best = self._best(suffixes, labels, known)
                if best is None:
                    break
                layer = self._taken[best[0]]
                dead = torch.zeros(len(layer.module.weight), dtype=torch.bool, device=inputs.device)
                dead[best[1]] = True
                self.drop_units(layer, dead)
                self._masks.apply()
                known.pop(best)
                advance(1)
        if self.rewind:
            initial.restore(self._model)

    def alive(self, layer: Layer) -> list[int]:
        """Return the channels of a layer that are left."""
        return self._masks.get(layer.module).flatten().nonzero().flatten().tolist()

    def _best(self, suffixes: Suffixes, labels: torch.Tensor, known: dict[Candidate, float]) -> Candidate | None:
        """Return the candidate without which the loss is lowest, the first of equals; ``None`` when none may go.

        Args:
            suffixes: of the network.
            labels: of its batch.
            known: the candidates' losses when last looked at; brought up to date.
        """
        suffixes.refresh()
        left = [self.alive(layer) for layer in self._taken]
        candidates = [(index, channel) for index, some in enumerate(left) if len(some) > 1 for channel in some]
        if self.variant == "lazy" and known:
            candidates = sorted(candidates, key=lambda one: known.get(one, -math.inf))[:LAZY]
        for index, layer in enumerate(self._taken):
            channels = sorted(channel for owner, channel in candidates if owner == index)
            for channel, logits in zip(channels, suffixes.without(layer, channels), strict=True):
                known[index, channel] = F.cross_entropy(logits, labels).item()
        return min(candidates, key=lambda one: (known[one], one), default=None)
