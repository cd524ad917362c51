"""Backward filter selection: one after the other, the filter goes without which the loss is lowest.

    M = 1;  repeat floor(C * P) times:  for every filter left, e = L(f(s, M without it));  remove the one of the least e

L is the mean loss of ``samples`` training images, the same ones throughout; C counts all filters that may go, P is
``prune_ratio``. A filter is removed behind its BatchNorm: its bias, scale and shift go too, so that what it feeds the
next layer is zero. Then the network trains with the filters masked, from its initial weights (``rewind``): the paper
trains the smaller network from scratch.

Source: Algorithm 1 of Mitsuno and Kurita, "Filter Pruning using Hierarchical Group Sparse Regularization for Deep
Convolutional Neural Networks". Its equation 5 has |L(W) - L(W * M)|, by which a filter would stay because the loss
falls without it; the algorithm, and this, take the least loss. Candidates are the convolutions but the last, here
without those whose channels meet others in a sum or concatenation; with ``coupled`` what meets in a sum is one
candidate. Every layer keeps one filter (the paper stops there).

``variant="exact"`` evaluates every candidate every time. What lies before a candidate is not computed again, behind it
only what differs, and candidates of a layer are evaluated together (:mod:`..suffixes`). ``"lazy"`` evaluates only
candidates that may be the best. What a candidate costs (the loss without it, less the loss) changes little while others
go, so what it cost when last looked at is an estimate of what it costs now, corrected by how the first-order estimate,
-sum z * dL/dz over its map, has changed since; that takes one backward pass for all candidates. How far an estimate may
be wrong is judged by how far the first-order estimates of all candidates have moved since the candidate was looked at
(the root of the sum of their mean squares, removal by removal). The :data:`LAZY` of least estimate are looked at, then
all whose estimate lies above the best by less than :data:`MARGIN` times as much as estimates have been wrong of late,
each by its own measure. The choice is the exact one as long as no estimate is off by more than that.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.progress import SILENT, Progress

from .. import initial
from ..coupling import Coupling
from ..suffixes import Suffixes, Unit
from ..trace import Layer
from .filters import FilterPruning, is_convolution, share_of

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

IMAGES = 128

LAZY = 12

RECENT, MARGIN = 256, 2.0
"""Estimates whose errors say how wrong the next ones may be, and by which multiple of the largest of them."""


@dataclass
class Seen:
    """What a candidate cost when last looked at.

    Attributes:
        cost: loss without it, less the loss.
        slope: first-order estimate of that, then.
        drift: by how much first-order estimates had moved till then: mean squares, summed.
    """

    cost: float
    slope: float
    drift: float


@dataclass
class BackwardSelection(FilterPruning):
    """Backward selection: one after the other, the filter goes without which the loss on samples is lowest.

    Attributes:
        prune_ratio: fraction of the filters of all candidate layers that goes.
        coupled: filters that meet others in a sum go too, together with those.
        samples: training images that the loss is taken over.
        rewind: train from the initial weights afterwards.
        variant: ``exact`` or ``lazy``.
    """

    name: ClassVar[str] = "backward-selection"
    VARIANTS: ClassVar[tuple[str, ...]] = ("exact", "lazy")

    samples: int = IMAGES
    rewind: bool = True
    variant: str = "exact"

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        own = {"samples": IMAGES, "rewind": True, "variant": "exact"}
        return {**super().defaults(config, schedule), **own}

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        if self.variant not in self.VARIANTS:
            raise ConfigError(f"{self.name} has no variant {self.variant!r}; it has {', '.join(self.VARIANTS)}.")
        super().prepare(model, schedule, seed=seed, progress=progress)

    def add_masks(self, model: nn.Module) -> None:
        if self.rewind:
            initial.keep(model)
        super().add_masks(model)
        if not self.coupled:
            self._groups, self._members, self._readers = Coupling.separate(self._taken), self._taken, []
        last = [layer for layer in self._layers if is_convolution(layer)][-1]
        written = [self._groups.units[layer.module].tolist() for layer in self._members if layer is not last]
        self._candidates = set(self._groups.free.tolist()).intersection({group for own in written for group in own})
        self._units = self._units_of_candidates()

    def prune(self, number: int) -> None:
        batches = list(self.scoring_batches(self.samples))
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        wanted = share_of(len(self._candidates), self.prune_ratio * number / self.rounds)
        gone = len(self._candidates - self._live())
        search = Search(Suffixes(self._model, inputs), labels, self._units, exact=self.variant == "exact")
        with self._progress.task("selecting filters", wanted - gone) as advance:
            for _ in range(wanted - gone):
                allowed = self._allowed()
                if not allowed:
                    break
                self.drop_groups(torch.tensor([search.best(allowed)]))
                self._masks.apply()
                advance(1)
        if self.rewind:
            initial.restore(self._model)

    def alive(self, layer: Layer) -> list[int]:
        """Return the channels of a layer that are left."""
        return self._masks.get(layer.module).flatten().nonzero().flatten().tolist()

    def _live(self) -> set[int]:
        """Return the groups that are left."""
        lists = (self._groups.units[layer.module][self.alive(layer)].tolist() for layer in self._members)
        return {group for groups in lists for group in groups}

    def _allowed(self) -> list[int]:
        """Return the candidates that are left, but those that are the last of a layer."""
        held: set[int] = set()
        for layer in self._members:
            left = set(self._groups.units[layer.module][self.alive(layer)].tolist())
            held |= left if len(left) == 1 else set()
        return sorted((self._candidates & self._live()) - held)

    def _units_of_candidates(self) -> dict[int, Unit]:
        """Return where each candidate is written, behind BatchNorm, and what else is zero without it."""
        places = [(layer.norm or layer.module, self._groups.units[layer.module]) for layer in self._members]
        places += [(norm, self._groups.norms[norm]) for norm in self._readers if norm.affine]
        found: dict[int, dict[nn.Module, tuple[int, ...]]] = {group: {} for group in self._candidates}
        for module, groups in places:
            for channel, group in enumerate(groups.tolist()):
                if group in found:
                    found[group][module] = (*found[group].get(module, ()), channel)
        return {group: tuple(modules.items()) for group, modules in found.items()}


class Search:
    """Finds the candidate to go, again and again; the network changes in between.

    Args:
        suffixes: of the network.
        labels: of its batch.
        units: of each candidate.
        exact: evaluate all candidates every time.
    """

    def __init__(self, suffixes: Suffixes, labels: torch.Tensor, units: dict[int, Unit], *, exact: bool) -> None:
        self._suffixes, self._labels, self._units, self._exact = suffixes, labels, units, exact
        kinds: dict[tuple[nn.Module, ...], int] = {}
        self._kinds = {
            one: kinds.setdefault(tuple(module for module, _ in unit), len(kinds)) for one, unit in units.items()
        }
        self._modules = list(dict.fromkeys(module for unit in units.values() for module, _ in unit))
        self._seen: dict[int, Seen] = {}
        self._slope: dict[int, float] = {}
        self._drift = 0.0
        self._errors: deque[float] = deque([0.0], maxlen=RECENT)

    def best(self, allowed: list[int]) -> int:
        """Return the candidate without which the loss is lowest, the first of equals."""
        if self._exact:
            self._suffixes.refresh()
            costs = self._losses(allowed)
        else:
            costs = self._likely(allowed)
        return min(costs, key=lambda one: (costs[one], one))

    def _likely(self, allowed: list[int]) -> dict[int, float]:
        """Return what those of the candidates cost that may be the best."""
        loss, found = self._suffixes.slopes(lambda logits: F.cross_entropy(logits, self._labels), self._modules)
        slopes = {module: values.tolist() for module, values in found.items()}
        slope = {
            one: sum(slopes[module][channel] for module, channels in self._units[one] for channel in channels)
            for one in allowed
        }
        self._drift += statistics.fmean((slope[one] - self._slope.get(one, 0.0)) ** 2 for one in allowed)
        self._slope = slope
        unseen = [one for one in allowed if one not in self._seen]
        costs = self._look(unseen, loss) if unseen else {}
        known = {one: self._seen[one] for one in allowed if one not in costs}
        estimates = {one: seen.cost + slope[one] - seen.slope for one, seen in known.items()}
        spread = {one: math.sqrt(self._drift - seen.drift) for one, seen in known.items()}
        order = sorted(known, key=lambda one: (estimates[one], one))
        part, order = order[:LAZY], order[LAZY:]
        while part:
            exact = self._look(part, loss)
            costs |= exact
            self._errors.extend((estimates[one] - cost) / spread[one] for one, cost in exact.items() if spread[one])
            least, width = min(costs.values()), MARGIN * max(self._errors)
            part = [one for one in order if estimates[one] < least + width * spread[one]]
            taken = set(part)
            order = [one for one in order if one not in taken]
        return costs

    def _look(self, candidates: list[int], loss: float) -> dict[int, float]:
        """Return what candidates cost, and remember it."""
        costs = {one: without - loss for one, without in self._losses(candidates).items()}
        self._seen |= {one: Seen(cost, self._slope[one], self._drift) for one, cost in costs.items()}
        return costs

    def _losses(self, candidates: list[int]) -> dict[int, float]:
        """Return the losses without each of the candidates; those of the same modules are evaluated together."""
        order = sorted(candidates, key=lambda one: (self._kinds[one], one))
        losses: list[float] = []
        for logits in self._suffixes.without([self._units[one] for one in order]):
            labels = self._labels.expand(len(logits), -1).flatten()
            each = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
            losses += each.view(len(logits), -1).mean(1).tolist()
        return dict(zip(order, losses, strict=True))
