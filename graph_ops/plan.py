"""From scores and a budget to the units that stay."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .alignment import parts
from .analysis import Analysis
from .cost import CostModel
from .errors import PlanError
from .latency_model import LatencyModel

SCHEMA_VERSION = 1

# Aligned widths are worth this much of a budget: an unaligned layer leaves the runtime's fast path, which costs more.
ODD_WIDTHS = 0.9
# A budget is used up to this much, with widths of this step where the usual ones are too coarse.
CLOSE = 0.99
FINE = 4


@dataclass(frozen=True)
class Budget:
    """What the plan has to meet.

    Attributes:
        name: ``keep_macs``, ``keep_params``, ``keep_channels`` or ``keep_latency``.
        fraction: of the original's cost that may stay.
        scope: ``global`` or ``layer``.
        align: see :func:`.alignment.alignment_step`.
        min_keep: fraction of its units that every group keeps at least.
    """

    name: str
    fraction: float
    scope: str = "global"
    align: int | str = "auto"
    min_keep: float = 0.1


class Planner:
    """Finds the keep-set of a budget; the cost falls monotonically as more is removed."""

    def __init__(
        self,
        analysis: Analysis,
        scores: np.ndarray,
        base: np.ndarray,
        budget: Budget,
        latency: LatencyModel | None = None,
    ) -> None:
        """Prepare the groups.

        Args:
            analysis: the graph's analysis.
            scores: one per unit; NaN means keep.
            base: units that exact removal leaves; the others are gone already.
            budget: what to meet.
            latency: measured times, for a budget in latency and for its steps.
        """
        self.analysis, self.base, self.budget = analysis, base, budget
        self.measured = latency is not None
        model, name = latency.cost if latency else CostModel(analysis), budget.name.removeprefix("keep_")
        self.fixed, self.tally = model.tally(name)
        self.full = model.full(name)
        self.vectors = [v for v in analysis.vectors() if not analysis.pinned[v].any()]
        self._positions = np.concatenate([np.zeros(0, np.int64), *self.vectors])
        self._starts = np.cumsum([0, *(len(v) for v in self.vectors)])[:-1]
        self._sources: dict[int, set[int]] = {}
        for fork in analysis.forks:
            for source, label in zip(fork.source.tolist(), fork.labels.tolist(), strict=True):
                self._sources.setdefault(label, set()).add(source)
        self.scores = scores.copy()
        for fork in analysis.forks:  # a shared stream's channel goes when all of its readers dropped it, not before
            self.scores[fork.source] = np.nan
        if latency and budget.align == "auto":
            self.groups = [self._group(g.units, at) for g, at in zip(analysis.groups, latency.steps, strict=True)]
        elif budget.align == 1:
            self.groups = [self._group(g.units, range(1, len(g.units) + 1)) for g in analysis.groups]
        else:
            self.groups = [
                self._group(part.units, range(step, len(part.units) + 1, step))
                for group in parts(analysis)
                for part in group
                for step in [part.step(budget.align)]
            ]

    def _group(self, units: np.ndarray, steps: Sequence[int]) -> _Group:
        fixed = self.analysis.pinned[units] | (np.isnan(self.scores[units]) & self.base[units])
        alive, dead = units[~fixed & self.base[units]], units[~fixed & ~self.base[units]]
        order = np.concatenate([alive[np.argsort(-self.scores[alive], kind="stable")], dead])
        held = int(fixed.sum())
        floor = min(max(0, max(1, int(np.ceil(self.budget.min_keep * len(units)))) - held), len(alive))
        totals = [total for total in steps if total >= held + floor]
        options = [total - held for total in totals] or [len(alive)]
        fine = {total - held for total in range(FINE, len(units) + 1, FINE) if total >= held + floor}
        return _Group(order, len(alive), options, sorted({*options, *fine}))

    def cost(self, keep: np.ndarray) -> float:
        """What the budget limits, when only the units ``keep`` are left."""
        return self.fixed + self.tally.total(self.tally.counts(keep))

    def counts(self, share: float) -> list[int]:
        """Kept units per group when the fraction ``share`` of the ranking stays, rounded to the steps."""
        if self.budget.scope == "layer":
            raw = [int(np.ceil(share * group.alive)) for group in self.groups]
        else:
            ranked = np.sort(np.concatenate([self.scores[g.order[: g.alive]] for g in self.groups]))[::-1]
            stays = int(np.ceil(share * len(ranked)))
            threshold = ranked[stays - 1] if stays else np.inf
            raw = [int((self.scores[g.order[: g.alive]] >= threshold).sum()) for g in self.groups]
        return [group.rounded(count) for group, count in zip(self.groups, raw, strict=True)]

    def keep(self, counts: list[int]) -> np.ndarray:
        """Turn counts into units; every axis keeps at least one position."""
        keep = self.base.copy()
        for group, count in zip(self.groups, counts, strict=True):
            keep[group.order[:count]] = True
            keep[group.order[count:]] = False
        keep = self.analysis.drop_unread(keep)
        if not self.vectors:
            return keep
        for v in np.flatnonzero(~np.logical_or.reduceat(keep[self._positions], self._starts)):
            vector = self.vectors[v]
            if not keep[vector].any():
                alive = vector[self.base[vector]]
                keep[alive[np.argmax(np.nan_to_num(self.scores[alive], nan=np.inf))]] = True
        return keep

    def smallest(self) -> np.ndarray:
        """Return the units that the smallest allowed model has, bool (units,)."""
        return self.keep(self.counts(0.0))

    def solve(self) -> np.ndarray:
        """Return the units that stay, bool (units,): cost at most the budget, and as close to it as the steps allow.

        Raises:
            PlanError: even the smallest allowed model costs more; the message names the best reachable fraction.
        """
        target = self.budget.fraction * self.full
        if self.cost(self.base) <= target:  # exact removal is enough; fill up to the steps where that fits
            counts = self._filled_up(target)
            if self.budget.align in ("auto", 1) or all(n == g.whole for n, g in zip(counts, self.groups, strict=True)):
                return self.keep(counts)
        total = sum(group.alive for group in self.groups)
        low, high = 0, total  # low: known to fit (checked below), high: known not to
        if (reached := self.cost(self.smallest())) > target:
            raise PlanError(
                f"--{self.budget.name.replace('_', '-')} {self.budget.fraction:g} cannot be reached: the smallest "
                f"model that --min-keep {self.budget.min_keep:g} and the pinned channels allow has "
                f"{np.ceil(1e4 * reached / self.full) / 1e4:g}."
            )
        while high - low > 1:
            middle = (low + high) // 2
            if self.cost(self.keep(self.counts(middle / total))) <= target:
                low = middle
            else:
                high = middle
        counts = self._fill(self.counts(low / total), target)
        if self.cost(self.keep(counts)) < ODD_WIDTHS * target:
            # The steps are too coarse for this budget: let whole groups of an odd width stay as they were.
            counts = self._fill(counts, target, "whole")
        if self.budget.align == "auto" and not self.measured and self.cost(self.keep(counts)) < CLOSE * target:
            # What is left is smaller than any step: widths that are still fast, if not as good a bargain.
            counts = self._fill(counts, target, "fine")
        return self.keep(counts)

    def _filled_up(self, target: float) -> list[int]:
        """Nothing that is alive goes; dead units stay where they make a group's width a multiple of its step."""
        counts = [group.alive for group in self.groups]
        for g, group in enumerate(self.groups):
            tried = [*counts[:g], group.whole, *counts[g + 1 :]]
            if tried != counts and self.cost(self.keep(tried)) <= target:
                counts = tried
        return counts

    def _fill(self, counts: list[int], target: float, pace: str = "steps") -> list[int]:
        """Give back what still fits, the most important units first, in steps, ``fine`` ones or ``whole`` groups."""
        counts = counts.copy()
        keep = self.keep(counts)
        kept = self.tally.counts(keep)
        cost = self.fixed + self.tally.total(kept)
        queue = [(self._urgency(g, counts[g]), g) for g in range(len(counts)) if self._more(g, counts[g], pace)]
        heapq.heapify(queue)
        while queue:
            _, g = heapq.heappop(queue)
            count = counts[g] + self._more(g, counts[g], pace)
            back = self.groups[g].order[counts[g] : count]
            back = np.union1d(back, [s for unit in back.tolist() for s in self._sources.get(unit, ()) if self.base[s]])
            back = back[~keep[back.astype(np.int64)]].astype(np.int64)
            growth, vectors, each = self.tally.more(kept, back) if len(back) else (0, [], 0)
            if cost + growth > target:
                continue
            cost += growth
            kept[vectors] += each
            keep[back] = True
            counts[g] = count
            if self._more(g, count, pace):
                heapq.heappush(queue, (self._urgency(g, count), g))
        return counts

    def _more(self, g: int, count: int, pace: str) -> int:
        """How many units a group would take back next."""
        group = self.groups[g]
        if pace == "whole":
            return max(group.whole - count, 0)
        return group.next(count, group.fine if pace == "fine" else group.options) - count

    def _urgency(self, g: int, count: int) -> float:
        """Rank of a group's next unit: the most important first, or the group that lost the largest share."""
        group = self.groups[g]
        if self.budget.scope == "layer":
            return count / group.alive
        return -float(self.scores[group.order[count]])


@dataclass(frozen=True)
class _Group:
    """The removable units of a group, or of a part of it that is aligned by itself.

    Attributes:
        order: units by importance, those that exact removal would take last: they may stay to fill up a step.
        alive: how many of them carry anything.
        options: counts that make the group's width a multiple of its step, ascending.
        fine: these and multiples of :data:`FINE`, for what is left of a budget.
    """

    order: np.ndarray
    alive: int
    options: list[int]
    fine: list[int]

    @property
    def whole(self) -> int:
        """Everything that is alive, and what is dead as far as that fills up a step."""
        return max(self.rounded(self.alive), self.alive)

    def rounded(self, count: int) -> int:
        """The smallest aligned count that is large enough, else the largest."""
        return next((option for option in self.options if option >= count), self.options[-1])

    def next(self, count: int, options: Sequence[int]) -> int:
        """The next of ``options`` that keeps more that is alive, or ``count`` when there is none."""
        if count >= self.alive:
            return count
        return next((option for option in options if option > count), count)


def to_json(analysis: Analysis, keep: np.ndarray, facts: dict[str, Any]) -> str:
    """Write a plan: for every group the indices of the units that stay, in the group's channel order."""
    groups = [
        {"name": g.name, "channels": len(g.units), "kept": np.flatnonzero(keep[g.units]).tolist()}
        for g in analysis.groups
    ]
    head = {"schema_version": SCHEMA_VERSION, "kind": "prune-onnx plan"}
    return json.dumps({**head, **facts, "groups": groups}, indent=1)


def from_json(analysis: Analysis, text: str, source: str = "the plan") -> np.ndarray:
    """Read a plan back.

    Raises:
        PlanError: not a plan, or one of another model.
    """
    try:
        raw = json.loads(text)
        stored = {g["name"]: (int(g["channels"]), [int(i) for i in g["kept"]]) for g in raw["groups"]}
        version = raw["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{source} is not a plan written by slim --dry-run --plan.") from error
    if version != SCHEMA_VERSION:
        raise PlanError(f"{source} has schema version {version}; this version reads {SCHEMA_VERSION}.")
    own = {g.name: len(g.units) for g in analysis.groups}
    if own != {name: channels for name, (channels, _) in stored.items()}:
        name = next(iter(set(own.items()) ^ {(n, c) for n, (c, _) in stored.items()}))[0]
        raise PlanError(f"{source} was made for another model: the groups differ at {name!r}.")
    keep = np.ones(analysis.units, bool)
    for group in analysis.groups:
        kept = stored[group.name][1]
        if any(not 0 <= i < len(group.units) for i in kept):
            raise PlanError(f"{source}: group {group.name!r} has indices out of range.")
        mask = np.zeros(len(group.units), bool)
        mask[kept] = True
        keep[group.units] = mask
    if not keep[analysis.pinned].all():
        raise PlanError(f"{source} removes channels that are pinned here; replay it with the options it was made with.")
    return keep
