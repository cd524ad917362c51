"""Simple pruning: the weights of smallest magnitude become zero, and the rest trains on.

    train; then, in each of ``rounds``: zero the round(p * n) smallest |w| of n, retrain with the zeros kept

Source: Algorithm 2 of Shili et al., "Projection-Free CNN Pruning via Frank-Wolfe with Momentum", which has one round;
with more, p rises linearly to ``prune_ratio``. (Its experiments section calls the baseline a greedy backward selection;
the algorithm is this one.) Weights are the kernels of convolutions and linear layers; biases stay. Exactly so many go,
ties or not. The paper gives no p; its figures have about half of the weights left, so that is the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..masks import lowest
from .pruning import Pruning, pruned_count

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

RATIO = 0.5


@dataclass
class Magnitude(Pruning):
    """Simple pruning: the weights of smallest magnitude become zero, and the rest trains on.

    Attributes:
        prune_ratio: fraction of weights that are zero in the end.
        scope: rank over all layers (``global``), or take the same fraction of each ``layer``.
    """

    name: ClassVar[str] = "magnitude"

    prune_ratio: float = RATIO
    scope: str = "global"

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {**super().defaults(config, schedule), "prune_ratio": RATIO, "scope": "global"}

    @torch.no_grad()
    def prune(self, number: int) -> None:
        ratio = self.prune_ratio * number / self.rounds
        places = list(self._masks)
        # What is masked goes first, whatever else is zero.
        scores = [torch.where(self._masks.get(*place), getattr(*place).abs(), -1) for place in places]
        for place, dead in zip(places, prune_lowest(scores, ratio, self.scope), strict=True):
            self._masks.set(*place, ~dead)


def prune_lowest(scores: list[torch.Tensor], ratio: float, scope: str) -> list[torch.Tensor]:
    """Return which weights go: exactly ``ratio`` of them, to the nearest whole number.

    Args:
        scores: of each tensor's entries.
        ratio: fraction that goes.
        scope: of all tensors together (``global``), or of each one (``layer``).
    """
    together = [scores] if scope == "global" else [[score] for score in scores]
    return [dead for group in together for dead in lowest(group, pruned_count(ratio, sum(s.numel() for s in group)))]
