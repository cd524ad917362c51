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

``variant="exact"`` evaluates every candidate every time. What lies before a candidate is not computed again, and
candidates of a layer are evaluated together (:mod:`..suffixes`). ``"lazy"`` evaluates only candidates that may be the
best. What a candidate costs (the loss without it, less the loss) changes little while others go, so what it cost when
last looked at is an estimate of what it costs now, corrected by how the first-order estimate, -sum z * dL/dz over its
map, has changed since; that takes one backward pass for all candidates. They are looked at in the order of these
estimates, :data:`LAZY` at least, until the next one's lies above the best by :data:`MARGIN` times as much as estimates
have been wrong of late.
"""

from __future__ import annotations

import math
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

LAZY = 4

RECENT, MARGIN = 64, 4.0
"""Estimates whose errors say how wrong the next ones may be, and by which multiple of the largest of them. (With 1, the
choice differed in 12 of 60 rounds on a network of 1,056 filters, by gaps of a millionth; with 4 in none.)"""


@dataclass
class Seen:
    """What a candidate cost when last looked at.

    Attributes:
        cost: loss without it, less the loss.
        slope: first-order estimate of that, then.
    """

    cost: float
    slope: float


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
        return {int(g) for layer in self._members for g in self._groups.units[layer.module][self.alive(layer)]}

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
        self._seen: dict[int, Seen] = {}
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
        loss, found = self._suffixes.slopes(lambda logits: F.cross_entropy(logits, self._labels))
        slopes = {module: values.tolist() for module, values in found.items()}
        slope = {
            one: sum(slopes[module][channel] for module, channels in self._units[one] for channel in channels)
            for one in allowed
        }
        known = {one: self._seen.get(one, Seen(-math.inf, 0.0)) for one in allowed}
        estimates = {one: seen.cost + slope[one] - seen.slope for one, seen in known.items()}
        order = sorted(allowed, key=lambda one: (estimates[one], one))
        costs: dict[int, float] = {}
        while order and (not costs or estimates[order[0]] < min(costs.values()) + MARGIN * max(self._errors)):
            part = [one for one in order if estimates[one] == -math.inf] or order[:LAZY]
            order = order[len(part) :]
            exact = {one: without - loss for one, without in self._losses(part).items()}
            self._errors.extend(estimates[one] - cost for one, cost in exact.items() if one in self._seen)
            self._seen |= {one: Seen(cost, slope[one]) for one, cost in exact.items()}
            costs |= exact
        return costs

    def _losses(self, candidates: list[int]) -> dict[int, float]:
        """Return the losses without each of the candidates; those of the same modules are evaluated together."""
        order = sorted(candidates, key=lambda one: (self._kinds[one], one))
        found = self._suffixes.without([self._units[one] for one in order])
        return {one: F.cross_entropy(logits, self._labels).item() for one, logits in zip(order, found, strict=True)}
