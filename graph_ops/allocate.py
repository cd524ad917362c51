"""Shares a budget out over the groups: the smallest total damage at the output for a given cost.

Each group has a curve: the damage at the output for every number of kept units. The removal path gives its shape, a few
measured levels its height: log damage is interpolated linearly in log error, never extrapolated. With a price on cost,
every group takes the count that minimises damage + price * cost; bisection on the price meets the budget. The cost of a
group depends on its neighbours' counts (MACs are products), so the groups are visited in turn until nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .analysis import Analysis
from .cost import CostModel, Curves
from .errors import PlanError

Steps = int | Sequence[int]

# Steps in opposite directions are tried in nets of so many groups at most.
SWAPPED = 100


@dataclass
class Curve:
    """A group's damage.

    Attributes:
        units: of the group.
        error: ``error[i]``, relative error of the readers after i removals, non-decreasing.
        kept: measured counts, descending.
        damage: measured damage at those counts.
    """

    units: int
    error: np.ndarray
    kept: np.ndarray
    damage: np.ndarray

    def times(self, factor: float) -> Curve:
        """The same with ``factor`` times the damage."""
        return replace(self, damage=self.damage * factor)

    def at(self, counts: np.ndarray) -> np.ndarray:
        """Damage at kept counts."""
        log_error = np.log(np.maximum(self.error, 1e-12))
        known_x = log_error[self.units - self.kept]
        known_y = np.log(np.maximum(np.maximum.accumulate(self.damage), 1e-12))
        x = log_error[self.units - counts]
        y = np.interp(x, known_x, known_y)
        # Between nothing removed and the first measured level the damage grows in proportion to the error.
        above = counts > self.kept[0]
        y = np.where(above, known_y[0] + (x - known_x[0]), y)
        return np.where(counts >= self.units, 0.0, np.exp(y))


class FractionalCost:
    """A cost as products of kept fractions of sets of units, for what-if questions about counts instead of units."""

    def __init__(
        self,
        analysis: Analysis,
        name: str,
        model: CostModel | None = None,
        parts: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Prepare the terms.

        Args:
            analysis: of the graph.
            name: ``macs``, ``params``, ``channels`` or ``latency``.
            model: of the costs; needed for ``latency``.
            parts: disjoint sets of units; ``None`` takes the channel groups. All other units stay.
        """
        parts = [group.units for group in analysis.groups] if parts is None else parts
        self.groups = len(parts)
        part_of = np.full(analysis.units, -1)
        for number, units in enumerate(parts):
            part_of[units] = number
        self.fixed, terms = (model or CostModel(analysis)).terms(name)
        self._scale = np.asarray([t.scale for t in terms], np.float64)
        width = max((len(t.factors) for t in terms), default=1)
        # factors[f, t] @ shares is the number of kept positions; the last share, of ungrouped positions, is 1.
        self._factors = np.zeros((width, len(terms), self.groups + 1))
        self._factors[:, :, -1] = 1.0
        for t, term in enumerate(terms):
            for f, vector in enumerate(term.factors):
                ids, positions = np.unique(part_of[vector], return_counts=True)
                self._factors[f, t, -1] = 0.0
                self._factors[f, t, ids] = positions  # id -1 is the last column
        blank = (None,) * width
        self._curves = [Curves([(*t.curves, *blank)[f] for t in terms]) for f in range(width)]

    def total(self, kept: np.ndarray) -> float:
        """Cost when set g keeps the fraction ``kept[g]``."""
        return float(self._sum((self._factors @ np.append(kept, 1.0))[:, :, None])[0])

    def along(self, kept: np.ndarray, g: int, shares: np.ndarray) -> np.ndarray:
        """Cost when set g keeps each of the fractions ``shares`` and the others what ``kept`` says."""
        others = np.append(kept, 1.0)
        others[g] = 0.0
        return self._sum((self._factors @ others)[:, :, None] + self._factors[:, :, g, None] * shares)

    def _sum(self, sizes: np.ndarray) -> np.ndarray:
        """Cost at the factors' kept positions, shape (factor, term, question)."""
        values = np.asarray([curves.at(size) for curves, size in zip(self._curves, sizes, strict=True)])
        return self.fixed + self._scale @ values.prod(0)


def allocate(
    curves: dict[int, Curve],
    cost: FractionalCost,
    target: float,
    steps: dict[int, Steps],
    floors: dict[int, int],
    use: float = 0.0,
) -> dict[int, int]:
    """Return kept counts per group that meet ``target``.

    Args:
        curves: of the groups that may be pruned.
        cost: of all groups.
        target: the cost may be at most this.
        steps: counts are multiples of this, or among these.
        floors: least count of a group.
        use: part of the target that is to be used even where that does more damage than using less.

    Raises:
        PlanError: the floors alone cost more.
    """
    allowed = {g: options(c.units, steps[g], floors[g]) for g, c in curves.items()}
    damage = {g: c.at(allowed[g]) for g, c in curves.items()}

    def choose(price: float) -> dict[int, int]:
        kept = np.ones(cost.groups)
        index = dict.fromkeys(curves, 0)
        for _ in range(6):
            before = dict(index)
            for g, c in curves.items():
                index[g] = int(np.argmin(damage[g] + price * cost.along(kept, g, allowed[g] / c.units)))
                kept[g] = allowed[g][index[g]] / c.units
            if index == before:
                break
        return index

    def price_of(index: dict[int, int]) -> float:
        kept = np.ones(cost.groups)
        for g, i in index.items():
            kept[g] = allowed[g][i] / curves[g].units
        return cost.total(kept)

    low = 0.0
    high = 1.0 / cost.total(np.ones(cost.groups))
    for _ in range(80):
        if price_of(choose(high)) <= target:
            break
        high *= 4
    else:
        raise PlanError("the budget cannot be reached by the groups that may be pruned.")
    for _ in range(60):
        middle = np.sqrt(low * high) if low > 0 else high / 16
        if price_of(choose(middle)) <= target:
            high = middle
        else:
            low = middle
        if low > 0 and high / low < 1.0005:
            break
    index = _fill(choose(high), allowed, damage, price_of, target)
    if len(index) <= SWAPPED:
        index = _swap(index, allowed, damage, price_of, target, use)
    return {g: int(allowed[g][i]) for g, i in index.items()}


def uniform(
    sizes: dict[int, int],
    cost: FractionalCost,
    target: float,
    steps: dict[int, Steps],
    floors: dict[int, int],
) -> dict[int, int]:
    """Return counts that keep the same fraction of every group, rounded up to the steps, and meet ``target``.

    Raises:
        PlanError: the floors alone cost more.
    """

    allowed = {g: options(n, steps[g], floors[g]) for g, n in sizes.items()}

    def counts(share: float) -> dict[int, int]:
        return {g: int(allowed[g][allowed[g] >= share * n].min()) for g, n in sizes.items()}

    def price(share: float) -> float:
        kept = np.ones(cost.groups)
        for g, count in counts(share).items():
            kept[g] = count / sizes[g]
        return cost.total(kept)

    if price(0.0) > target:
        raise PlanError("the budget cannot be reached by the groups that may be pruned.")
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if price(middle) <= target else (low, middle)
    return counts(low)


def options(units: int, steps: Steps, floor: int) -> np.ndarray:
    """Return the allowed counts of a group, descending: everything, and the steps above the floor."""
    among = range(steps, units, steps) if isinstance(steps, int) else steps
    counts = {units} | {n for n in among if floor <= n < units}
    return np.asarray(sorted(counts, reverse=True))


def _fill(
    index: dict[int, int],
    allowed: dict[int, np.ndarray],
    damage: dict[int, np.ndarray],
    price_of: Callable[[dict[int, int]], float],
    target: float,
) -> dict[int, int]:
    """Give back what still fits, the largest gain per cost first."""
    now = price_of(index)
    while True:
        best, best_gain = None, 0.0
        for g, i in index.items():
            if i == 0:
                continue
            tried = {**index, g: i - 1}
            cost = price_of(tried)
            if cost <= target:
                gain = (damage[g][i] - damage[g][i - 1]) / max(cost - now, 1e-9)
                if gain > best_gain:
                    best, best_gain = (g, cost), gain
        if best is None:
            return index
        index = {**index, best[0]: index[best[0]] - 1}
        now = best[1]


def _swap(
    index: dict[int, int],
    allowed: dict[int, np.ndarray],
    damage: dict[int, np.ndarray],
    price_of: Callable[[dict[int, int]], float],
    target: float,
    use: float,
) -> dict[int, int]:
    """Where no step fits any more: one group a step up, another one a step down, as long as that is better.

    Less damage is better; while less than the part ``use`` of the target is used, more use is.
    """
    now, least = price_of(index), use * target
    while True:
        best: tuple[float, float, dict[int, int]] | None = None
        for up in (g for g, i in index.items() if i > 0):
            for down in (g for g, i in index.items() if g != up and i + 1 < len(allowed[g])):
                harm = damage[up][index[up] - 1] - damage[up][index[up]]
                harm += damage[down][index[down] + 1] - damage[down][index[down]]
                if harm < 0 or now < least:
                    tried = {**index, up: index[up] - 1, down: index[down] + 1}
                    cost = price_of(tried)
                    better = cost > now if now < least else cost >= least
                    if cost <= target and better and (best is None or harm < best[0]):
                        best = harm, cost, tried
        if best is None:
            return index
        _, now, index = best
