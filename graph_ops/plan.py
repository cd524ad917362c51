"""From scores and a budget to the units that stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .analysis import Analysis
from .cost import CostModel
from .errors import PlanError

SCHEMA_VERSION = 1


def alignment_step(channels: int, align: int | str) -> int:
    """Return the step that a group's kept count is rounded up to.

    ONNX Runtime's CPU convolutions cost ceil(C / 16) blocks and leave the fast path when C % 4 != 0, so wide groups
    step by 16 and narrow ones by 8 or 4; very narrow ones step by 1, because 4 would be too coarse.
    """
    if align != "auto":
        return int(align)
    for step, least in ((16, 128), (8, 32), (4, 8)):
        if channels >= least:
            return step
    return 1


@dataclass(frozen=True)
class Budget:
    """What the plan has to meet.

    Attributes:
        name: ``keep_macs``, ``keep_params`` or ``keep_channels``.
        fraction: of the original's cost that may stay.
        scope: ``global`` or ``layer``.
        align: see :func:`alignment_step`.
        min_keep: fraction of its units that every group keeps at least.
    """

    name: str
    fraction: float
    scope: str = "global"
    align: int | str = "auto"
    min_keep: float = 0.1


class Planner:
    """Finds the keep-set of a budget; the cost falls monotonically as more is removed."""

    def __init__(self, analysis: Analysis, scores: np.ndarray, base: np.ndarray, budget: Budget) -> None:
        """Prepare the groups.

        Args:
            analysis: the graph's analysis.
            scores: one per unit; NaN means keep.
            base: units that exact removal leaves; the others are gone already.
            budget: what to meet.
        """
        self.analysis, self.base, self.budget = analysis, base, budget
        model = CostModel(analysis)
        self.cost: Callable[[np.ndarray], int] = {
            "keep_macs": model.macs, "keep_params": model.params, "keep_channels": model.channels}[budget.name]
        self.full = self.cost(np.ones(analysis.units, bool))
        self.vectors = [v for v in analysis.vectors() if not analysis.pinned[v].any()]
        self.scores = scores.copy()
        for fork in analysis.forks:  # a shared stream's channel goes when all of its readers dropped it, not before
            self.scores[fork.source] = np.nan
        scores = self.scores
        self.orders: list[np.ndarray] = []  # per group: removable units, most important first
        self.floors: list[int] = []  # per group: how many of them stay at least
        self.steps: list[int] = []
        self.held: list[int] = []  # per group: units that stay anyway
        for group in analysis.groups:
            free = group.units[base[group.units] & ~analysis.pinned[group.units] & ~np.isnan(scores[group.units])]
            held = int(base[group.units].sum()) - len(free)
            self.orders.append(free[np.argsort(-scores[free], kind="stable")])
            self.held.append(held)
            self.steps.append(alignment_step(len(group.units), budget.align))
            least = max(1, int(np.ceil(budget.min_keep * len(group.units))))
            self.floors.append(min(len(free), max(0, least - held)))

    def counts(self, share: float) -> list[int]:
        """Kept free units per group when the fraction ``share`` of the ranking stays, rounded up to the steps."""
        if self.budget.scope == "layer":
            raw = [int(np.ceil(share * len(order))) for order in self.orders]
        else:
            ranked = np.sort(np.concatenate([self.scores[order] for order in self.orders]))[::-1]
            stays = int(np.ceil(share * len(ranked)))
            threshold = ranked[stays - 1] if stays else np.inf
            raw = [int((self.scores[order] >= threshold).sum()) for order in self.orders]
        return [self.rounded(g, count) for g, count in enumerate(raw)]

    def rounded(self, g: int, count: int) -> int:
        """Round a group's count up to its step, not under its floor and not over what it has."""
        count = max(count, self.floors[g])
        total = count + self.held[g]
        total = -(-total // self.steps[g]) * self.steps[g]
        return min(len(self.orders[g]), total - self.held[g])

    def keep(self, counts: list[int]) -> np.ndarray:
        """Turn counts into units; every axis keeps at least one position."""
        keep = self.base.copy()
        for order, count in zip(self.orders, counts, strict=True):
            keep[order[count:]] = False
        keep = self.analysis.drop_unread(keep)
        for vector in self.vectors:
            if not keep[vector].any():
                alive = vector[self.base[vector]]
                keep[alive[np.argmax(np.nan_to_num(self.scores[alive], nan=np.inf))]] = True
        return keep

    def solve(self) -> np.ndarray:
        """Return the units that stay, bool (units,): cost at most the budget, and as close to it as the steps allow.

        Raises:
            PlanError: even the smallest allowed model costs more; the message names the best reachable fraction.
        """
        target = self.budget.fraction * self.full
        if self.cost(self.base) <= target:
            return self.base.copy()
        total = sum(len(order) for order in self.orders)
        low, high = 0, total  # low: known to fit (checked below), high: known not to
        least = self.counts(0.0)
        if (reached := self.cost(self.keep(least))) > target:
            raise PlanError(
                f"--{self.budget.name.replace('_', '-')} {self.budget.fraction:g} cannot be reached: the smallest model that "
                f"--min-keep {self.budget.min_keep:g} and the pinned channels allow has "
                f"{np.ceil(1e4 * reached / self.full) / 1e4:g}.")
        while high - low > 1:
            middle = (low + high) // 2
            if self.cost(self.keep(self.counts(middle / total))) <= target:
                low = middle
            else:
                high = middle
        return self.keep(self._fill(self.counts(low / total), target))

    def _fill(self, counts: list[int], target: float) -> list[int]:
        """Give back, step by step, the most important units that still fit."""
        open_groups = set(range(len(counts)))
        while open_groups:
            best, best_score = -1, -np.inf
            for g in open_groups:
                if counts[g] < len(self.orders[g]):
                    score = self.scores[self.orders[g][counts[g]]]
                    if self.budget.scope == "layer":  # the group that lost the largest share comes first
                        score = 1 - counts[g] / len(self.orders[g])
                    if score > best_score:
                        best, best_score = g, score
            if best < 0:
                return counts
            tried = counts.copy()
            tried[best] = self.rounded(best, counts[best] + 1)
            if self.cost(self.keep(tried)) <= target:
                counts = tried
            else:
                open_groups.discard(best)
        return counts


def to_json(analysis: Analysis, keep: np.ndarray, facts: dict[str, Any]) -> str:
    """Write a plan: for every group the indices of the units that stay, in the group's channel order."""
    groups = [{"name": g.name, "channels": len(g.units), "kept": np.flatnonzero(keep[g.units]).tolist()}
              for g in analysis.groups]
    return json.dumps({"schema_version": SCHEMA_VERSION, "kind": "prune-onnx plan", **facts, "groups": groups}, indent=1)


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
