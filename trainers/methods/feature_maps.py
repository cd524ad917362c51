"""Whole filters by what they compute on training images: Taylor's criterion and HRank.

    taylor   Theta = | mean over the map of dC/dz * z |, mean over the examples; divided by its layer's l2 norm
    hrank    the mean rank of the map, as a matrix

z is a filter's map after its ReLU, dC/dz the gradient of one example's loss. taylor ranks the filters of all layers
together, hrank those of each layer; the lowest go, with bias and BatchNorm, and the rest trains on.

Sources: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (2017); Lin et al.,
"HRank: Filter Pruning using High-Rank Feature Map" (2020). Published programs of the first differ from it, so
``variant`` has:

* ``paper``: the absolute value is taken for each example, after the mean over the map.
* ``signed``: at the end, so that examples cancel each other.
* ``inside``: before the mean over the map: an upper bound.

Scores are taken in evaluation mode. Convolutions whose channels meet others in a sum or concatenation are left out, but
with ``coupled`` what meets in a sum goes together, by the mean of its filters' scores (of ranks, each over its layer's
mean); the map of a filter whose sum comes before the ReLU is BatchNorm's output. Every layer keeps one filter.
HRank's ranks use torch's default tolerance in float32; its 500 images are the default of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.progress import SILENT, Progress

from ..masks import lowest
from ..trace import Layer, evaluating, watched
from .filters import FilterPruning, relative, share_of
from .pruning import pruned_count

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

IMAGES = 500


def taylor(maps: torch.Tensor, slopes: torch.Tensor, variant: str = "paper") -> torch.Tensor:
    """Return Taylor's criterion of one batch, summed over its examples, shape (C,).

    Args:
        maps: z, (N, C, ...).
        slopes: gradients of each example's own loss, of the same shape.
        variant: ``signed`` sums may be added over batches; their absolute value is the score.
    """
    products = (maps * slopes).flatten(2)
    if variant == "inside":
        return products.abs().mean(2).sum(0)
    means = products.mean(2)
    return (means if variant == "signed" else means.abs()).sum(0)


def normalised(scores: torch.Tensor) -> torch.Tensor:
    """Return a layer's scores over their l2 norm; a layer of zeros keeps them."""
    norm = torch.linalg.vector_norm(scores)
    return scores / norm if norm > 0 else scores


def ranks(maps: torch.Tensor) -> torch.Tensor:
    """Return the ranks of maps (N, C, H, W), summed over the examples, shape (C,)."""
    return torch.linalg.matrix_rank(maps.float()).sum(0).float()


@dataclass
class FeatureMaps(FilterPruning):
    """Base of the methods that score filters by their maps.

    Attributes:
        samples: training images that scores are computed on.
    """

    samples: int = IMAGES

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {**super().defaults(config, schedule), "samples": IMAGES}

    def scores(self) -> list[torch.Tensor]:
        """Return the scores of each layer that takes part, shape (C,) each."""
        raise NotImplementedError

    def dropped(self, layer: Layer) -> torch.Tensor:
        """Return which filters of a layer are masked."""
        return ~self._masks.get(layer.module).flatten()

    def maps_of(self, use: Callable[[list[torch.Tensor], torch.Tensor], None], *, slopes: bool) -> None:
        """Call ``use`` for each batch with the maps of every layer that takes part (:class:`Watch`), and the loss."""
        with evaluating(self._model), torch.set_grad_enabled(slopes):
            for inputs, labels in self.scoring_batches(self.samples):
                with watched(self._model, {}) as watch:
                    loss = F.cross_entropy(self._model(inputs), labels, reduction="sum")
                use([watch.maps[layer.name] for layer in self._taken], loss)


@dataclass
class Taylor(FeatureMaps):
    """Taylor pruning: the filters go whose removal changes the loss least, to first order.

    Attributes:
        variant: ``paper``, ``signed`` or ``inside``.
    """

    name: ClassVar[str] = "taylor"
    VARIANTS: ClassVar[tuple[str, ...]] = ("paper", "signed", "inside")

    variant: str = "paper"

    @classmethod
    def usual_rounds(cls, config: TrainConfig) -> int:
        return 5

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {**super().defaults(config, schedule), "variant": "paper"}

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        if self.variant not in self.VARIANTS:
            raise ConfigError(f"{self.name} has no variant {self.variant!r}; it has {', '.join(self.VARIANTS)}.")
        super().prepare(model, schedule, seed=seed, progress=progress)

    def scores(self) -> list[torch.Tensor]:
        sums = [torch.zeros(len(layer.module.weight), device=layer.module.weight.device) for layer in self._taken]

        def add(maps: list[torch.Tensor], loss: torch.Tensor) -> None:
            slopes = torch.autograd.grad(loss, maps)
            for total, z, slope in zip(sums, maps, slopes, strict=True):
                total += taylor(z.detach(), slope, self.variant)

        self.maps_of(add, slopes=True)
        return [normalised(total.abs()) for total in sums]

    @torch.no_grad()
    def prune(self, number: int) -> None:
        scores = self.scores()
        if self.coupled:
            self.prune_groups(scores, self.prune_ratio * number / self.rounds, together=True)
            return
        for score, layer in zip(scores, self._taken, strict=True):
            score[self.dropped(layer)] = -1  # stays dropped
            score[score.argmax()] = torch.inf  # every layer keeps one
        count = pruned_count(self.prune_ratio * number / self.rounds, sum(map(len, scores)))
        count = min(count, sum(map(len, scores)) - len(scores))
        for layer, dead in zip(self._taken, lowest(scores, count), strict=True):
            self.drop_units(layer, dead)


@dataclass
class HRank(FeatureMaps):
    """HRank: in each layer the filters go whose maps have the lowest rank on average."""

    name: ClassVar[str] = "hrank"

    def scores(self) -> list[torch.Tensor]:
        sums = [torch.zeros(len(layer.module.weight), device=layer.module.weight.device) for layer in self._taken]

        def add(maps: list[torch.Tensor], loss: torch.Tensor) -> None:
            for total, z in zip(sums, maps, strict=True):
                total += ranks(z)

        self.maps_of(add, slopes=False)
        return sums

    @torch.no_grad()
    def prune(self, number: int) -> None:
        if self.coupled:
            scores = [relative(score) for score in self.scores()]
            self.prune_groups(scores, self.prune_ratio * number / self.rounds, together=False)
            return
        for score, layer in zip(self.scores(), self._taken, strict=True):
            score[self.dropped(layer)] = -1
            count = share_of(len(score), self.prune_ratio * number / self.rounds)
            self.drop_units(layer, lowest([score], min(count, len(score) - 1))[0])
