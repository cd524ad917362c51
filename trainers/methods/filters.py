"""Whole filters by their own weights: L1 norm, L2 norm, distance to the others.

    l1-filters   score sum |F_i|;                      once, layer by layer, then retraining with the filters masked
    sfp          score |F_i|_2;                        after every epoch; what is zeroed trains on and may come back
    fpgm         score sum over j of |F_i - F_j|_2;    after every epoch; what is zeroed gets no gradient till the next
    fpgm-mix     by |F_i|_2 first, then among those that are left by the distance

In each layer the lowest floor(C * prune_ratio) of C filters go.

Sources: Li et al., "Pruning Filters for Efficient ConvNets" (2017); He et al., "Soft Filter Pruning" (2018); He et al.,
"Filter Pruning via Geometric Median" (2019), whose filters of least total distance are the nearest to the median and so
the most replaceable. Its 40 % are 30 % by distance and 10 % by norm, hence the defaults here.

l1-filters takes the convolutions whose channels meet no others in a sum or concatenation (in a ResNet the first one of
a block, as in the paper), and with a filter its bias and BatchNorm. ``coupled`` takes the others too: what meets in a
sum goes together, by the mean of its filters' scores, each over its layer's mean.

The other three take every convolution and, as their authors do, weights only: a zeroed filter still gives the constant
that BatchNorm makes of zero. It is exactly constant, so ``slim`` can remove it; the authors' program leaves that out.
What meets in a sum can only be removed where all of it is constant: that is what ``coupled`` is for here.

sfp needs long runs at a falling rate. With few steps an epoch BatchNorm lifts what has just come back to full size, and
the last zeroing then costs what was built on it (scikit-learn's digits, 8 epochs of 20 steps: 25 %, fpgm-mix 95 %).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError

from ..coupling import couple
from ..masks import lowest
from ..trace import Layer
from .pruning import Masked, Pruning, pruned_count

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

Score = Callable[[torch.Tensor], torch.Tensor]

Rule = tuple[Score, float]
"""A score, and which part of the filters goes by it."""


def by_l1(filters: torch.Tensor) -> torch.Tensor:
    """Return the L1 norms of filters (C, weights), shape (C,)."""
    return filters.abs().sum(1)


def by_l2(filters: torch.Tensor) -> torch.Tensor:
    """Return the L2 norms of filters (C, weights), shape (C,)."""
    return torch.linalg.vector_norm(filters, dim=1)


def by_distance(filters: torch.Tensor) -> torch.Tensor:
    """Return each filter's distances to the others of (C, weights), summed, shape (C,)."""
    # Not by way of the Gram matrix: that cancels where filters are near each other, which is what is asked.
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def share_of(count: int, ratio: float) -> int:
    """Return floor(count * ratio), where 5 * .2 is 1 whatever its rounding error."""
    return int(count * ratio + 1e-9)


def lowest_filters(weight: torch.Tensor, score: Score, count: int) -> torch.Tensor:
    """Return which ``count`` filters of (C, ...) score lowest, boolean (C,)."""
    return lowest([score(weight.flatten(1))], count)[0]


def in_turn(weight: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    """Return which filters go: by the first rule, by the next one among those that are left, and so on, boolean (C,).

    Args:
        weight: (C, ...).
        rules: scores, and the fraction of all C that goes by each.
    """
    dead = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    for score, ratio in rules:
        left = (~dead).nonzero().flatten()
        dead[left[lowest_filters(weight[left], score, share_of(len(weight), ratio))]] = True
    return dead


def is_convolution(layer: Layer) -> bool:
    """Return whether a layer is a convolution."""
    return not isinstance(layer.module, nn.Linear)


def alone(layers: list[Layer]) -> list[Layer]:
    """Return the convolutions whose channels meet no other layer's: nothing else has to go with them."""
    shared = {name for layer in layers if len(layer.sources) > 1 for name in layer.sources}
    taken = [layer for layer in layers if is_convolution(layer) and not layer.output and layer.name not in shared]
    return [layer for layer in taken if getattr(layer.module, "groups", 1) == 1]


def require_convolutions(model: nn.Module, method: str) -> None:
    """Refuse a network without filters.

    Raises:
        ConfigError: it has no convolution.
    """
    if not any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in model.modules()):
        raise ConfigError(f"method {method!r} works on the filters of convolutions, and this network has none.")


def relative(scores: torch.Tensor) -> torch.Tensor:
    """Return a layer's scores over their mean; a layer of zeros keeps them."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


@dataclass
class FilterPruning(Pruning):
    """Base of the methods that prune whole filters in rounds, with all that belongs to them.

    Attributes:
        prune_ratio: fraction of filters that goes.
        coupled: filters that meet others in a sum go too, together with those.
    """

    prune_ratio: float = 0.5
    coupled: bool = False

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {**super().defaults(config, schedule), "prune_ratio": 0.5, "coupled": False}

    @classmethod
    def check(cls, model: nn.Module) -> None:
        require_convolutions(model, cls.name)

    def add_masks(self, model: nn.Module) -> None:
        if not self.coupled:
            self._taken = alone(self._layers)
            for layer in self._taken:
                self.add_unit_masks(layer, units=True)
            return
        self._groups = couple(model, self._layers, next(self._images.in_order(2))[0])
        self._members, free = self._groups.writers(self._layers), self._groups.free
        self._taken = [layer for layer in self._members if is_convolution(layer)]
        for layer in self._members:
            self.add_unit_masks(layer, units=True)
        own = {layer.norm for layer in self._members}  # others read what several layers have written
        self._readers = [n for n, g in self._groups.norms.items() if n not in own and torch.isin(g, free).any()]
        for norm in filter(lambda norm: norm.affine, self._readers):
            self._masks.add(norm, "weight")
            self._masks.add(norm, "bias")

    @torch.no_grad()
    def prune_groups(self, scores: list[torch.Tensor], ratio: float, *, together: bool) -> None:
        """Drop the groups of lowest mean score; every layer keeps one.

        Args:
            scores: of each layer that takes part.
            ratio: fraction of the groups that goes, those that are gone included.
            together: rank the groups of all layers, not those of each set of layers that share some.
        """
        groups = self._groups
        means = groups.mean({layer.module: score for layer, score in zip(self._taken, scores, strict=True)})
        for layer in self._taken:  # what is gone stays gone
            means[groups.units[layer.module].to(means.device)[~self._masks.get(layer.module).flatten()]] = -1
        for layer in self._members:
            own = groups.units[layer.module].to(means.device)
            means[own[means[own].argmax()]] = torch.inf
        dead = []
        for part in [torch.cat(groups.components)] if together else groups.components:
            values = means[part.to(means.device)]
            count = pruned_count(ratio, len(part)) if together else share_of(len(part), ratio)
            dead.append(part[lowest([values], min(count, int(values.isfinite().sum())))[0].cpu()])
        self.drop_groups(torch.cat(dead))

    def drop_groups(self, dead: torch.Tensor) -> None:
        """Mask groups, wherever they are written, and where a BatchNorm of its own reads them."""
        for layer in self._members:
            gone = torch.isin(self._groups.units[layer.module], dead)
            self.drop_units(layer, gone.to(layer.module.weight.device))
        for norm in filter(lambda norm: norm.affine, self._readers):
            live = ~torch.isin(self._groups.norms[norm], dead).to(norm.weight.device)
            self._masks.narrow(norm, "weight", live)
            self._masks.narrow(norm, "bias", live)


@dataclass
class L1Filters(FilterPruning):
    """L1 filter pruning: in each layer the filters of smallest L1 norm go, and the rest trains on."""

    name: ClassVar[str] = "l1-filters"

    @torch.no_grad()
    def prune(self, number: int) -> None:
        if self.coupled:
            scores = [relative(by_l1(layer.module.weight.flatten(1))) for layer in self._taken]
            self.prune_groups(scores, self.prune_ratio * number / self.rounds, together=False)
            return
        for layer in self._taken:
            weight = layer.module.weight
            keep = share_of(len(weight), 1 - self.prune_ratio * number / self.rounds)
            self.drop_units(layer, lowest_filters(weight, by_l1, len(weight) - max(1, keep)))


@dataclass
class SoftFilters(Masked):
    """Soft filter pruning: after every epoch the filters of smallest L2 norm become zero, and may come back.

    Attributes:
        prune_ratio: fraction of each layer's filters.
        coupled: filters that meet in a sum become zero together.
    """

    name: ClassVar[str] = "sfp"

    prune_ratio: float = 0.4
    coupled: bool = False

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {"prune_ratio": 0.4, "coupled": False}

    @classmethod
    def check(cls, model: nn.Module) -> None:
        require_convolutions(model, cls.name)

    def rules(self) -> list[Rule]:
        """Return the scores by which filters go, one after the other, and which part of them by each."""
        return [(by_l2, self.prune_ratio)]

    def add_masks(self, model: nn.Module) -> None:
        """Take no masks: zeroed filters train on."""
        self.find_layers(model)

    def find_layers(self, model: nn.Module) -> None:
        """Find the layers whose filters may go."""
        self._taken = list(filter(is_convolution, self._layers))
        if self.coupled:
            self._groups = couple(model, self._layers, next(self._images.in_order(2))[0])
            self._taken = self._groups.writers(self._layers)

    def chosen(self) -> list[torch.Tensor]:
        """Return which filters of each layer become zero, boolean (C,)."""
        weights = [layer.module.weight for layer in self._taken]
        if not self.coupled:
            return [in_turn(weight, self.rules()) for weight in weights]
        parts = [self._chosen_groups(part) for part in self._groups.components]
        dead = torch.cat([torch.tensor([], dtype=torch.long), *parts])
        of_layers = [torch.isin(self._groups.units[layer.module], dead) for layer in self._taken]
        return [gone.to(weight.device) for gone, weight in zip(of_layers, weights, strict=True)]

    def _chosen_groups(self, part: torch.Tensor) -> torch.Tensor:
        """Return the groups of a set that become zero; every layer keeps one."""
        groups = {layer.module: self._groups.units[layer.module] for layer in self._taken}
        groups = {module: own for module, own in groups.items() if torch.isin(own, part).any()}
        dead = part[:0]
        for score, ratio in self.rules():
            scores = {}
            for module, own in groups.items():
                left = ~torch.isin(own, dead)
                values = relative(score(module.weight.cpu().flatten(1)[left]))
                scores[module] = values.new_zeros(len(left)).masked_scatter(left, values)
            means = self._groups.mean(scores)
            for own in groups.values():
                left = own[~torch.isin(own, dead)]
                means[left[means[left].argmax()]] = torch.inf
            left = part[~torch.isin(part, dead)]
            count = min(share_of(len(part), ratio), int(means[left].isfinite().sum()))
            dead = torch.cat([dead, left[lowest([means[left]], count)[0]]])
        return dead

    @torch.no_grad()
    def after_epoch(self, lr: float, epoch: int = 0) -> None:
        for layer, dead in zip(self._taken, self.chosen(), strict=True):
            layer.module.weight[dead] = 0


@dataclass
class GeometricMedian(SoftFilters):
    """FPGM: after every epoch the filters nearest to the geometric median become zero, till the next choice.

    Attributes:
        prune_ratio: fraction of each layer's filters.
        coupled: filters that meet in a sum become zero together.
    """

    name: ClassVar[str] = "fpgm"

    def rules(self) -> list[Rule]:
        return [(by_distance, self.prune_ratio)]

    def add_masks(self, model: nn.Module) -> None:
        self.find_layers(model)
        for layer in self._taken:
            self._masks.add(layer.module, units=True)

    @torch.no_grad()
    def after_epoch(self, lr: float, epoch: int = 0) -> None:
        for layer, dead in zip(self._taken, self.chosen(), strict=True):
            self._masks.set(layer.module, "weight", ~dead)
        self._masks.apply()
        self._masks.clear(self._optimizer)


@dataclass
class MixedMedian(GeometricMedian):
    """FPGM-mix: part of the filters goes by the L2 norm, the rest by the distance to the geometric median.

    Attributes:
        norm_share: part of ``prune_ratio`` that goes by the norm.
    """

    name: ClassVar[str] = "fpgm-mix"

    norm_share: float = 0.25

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {**super().defaults(config, schedule), "norm_share": 0.25}

    def rules(self) -> list[Rule]:
        return [(by_l2, self.prune_ratio * self.norm_share), (by_distance, self.prune_ratio * (1 - self.norm_share))]
