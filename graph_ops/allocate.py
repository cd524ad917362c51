"""Shares a budget out over the groups: the smallest total damage at the output for a given cost.

Each group has a curve: the damage at the output for every number of kept units. The removal path gives its shape, a few
measured levels its height: log damage is interpolated linearly in log error, never extrapolated. With a price on cost,
every group takes the count that minimises damage + price * cost; bisection on the price meets the budget. The cost of a
group depends on its neighbours' counts (MACs are products), so the groups are visited in turn until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .analysis import Analysis
from .cost import CostModel
from .errors import PlanError


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
    """A cost as products of kept fractions of groups, for what-if questions about counts instead of units."""

    def __init__(self, analysis: Analysis, name: str) -> None:
        """Prepare the terms.

        Args:
            analysis: of the graph.
            name: ``macs``, ``params`` or ``channels``.
        """
        self.groups = len(analysis.groups)
        self.fixed, terms = CostModel(analysis).terms(name)
        self._scale = np.asarray([t.scale for t in terms], np.float64)
        width = max((len(t.factors) for t in terms), default=1)
        # factors[f, t] @ shares is the number of kept positions; the last share, of ungrouped positions, is 1.
        self._factors = np.zeros((width, len(terms), self.groups + 1))
        self._factors[:, :, -1] = 1.0
        for t, term in enumerate(terms):
            for f, vector in enumerate(term.factors):
                ids, positions = np.unique(analysis.group_of[vector], return_counts=True)
                self._factors[f, t, -1] = 0.0
                self._factors[f, t, ids] = positions  # id -1 is the last column

    def total(self, kept: np.ndarray) -> float:
        """Cost when group g keeps the fraction ``kept[g]``."""
        sizes = self._factors @ np.append(kept, 1.0)
        return self.fixed + float(self._scale @ sizes.prod(0))

    def slope(self, kept: np.ndarray, g: int) -> float:
        """What the cost grows by when group g goes from nothing to everything (linear but for squares)."""
        high, low = kept.copy(), kept.copy()
        high[g], low[g] = 1.0, 0.0
        return self.total(high) - self.total(low)


def allocate(
    curves: dict[int, Curve], cost: FractionalCost, target: float, steps: dict[int, int], floors: dict[int, int]
) -> dict[int, int]:
    """Return kept counts per group that meet ``target``.

    Args:
        curves: of the groups that may be pruned.
        cost: of all groups.
        target: the cost may be at most this.
        steps: counts are multiples of this.
        floors: least count of a group.

    Raises:
        PlanError: the floors alone cost more.
    """
    options = {g: _options(c.units, steps[g], floors[g]) for g, c in curves.items()}
    damage = {g: c.at(options[g]) for g, c in curves.items()}

    def choose(price: float) -> dict[int, int]:
        kept = np.ones(cost.groups)
        index = dict.fromkeys(curves, 0)
        for _ in range(6):
            before = dict(index)
            for g, c in curves.items():
                slope = cost.slope(kept, g)
                index[g] = int(np.argmin(damage[g] + price * slope * options[g] / c.units))
                kept[g] = options[g][index[g]] / c.units
            if index == before:
                break
        return index

    def price_of(index: dict[int, int]) -> float:
        kept = np.ones(cost.groups)
        for g, i in index.items():
            kept[g] = options[g][i] / curves[g].units
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
    index = choose(high)
    return {g: int(options[g][i]) for g, i in _fill(index, options, damage, price_of, target).items()}


def uniform(
    sizes: dict[int, int], cost: FractionalCost, target: float, steps: dict[int, int], floors: dict[int, int]
) -> dict[int, int]:
    """Return counts that keep the same fraction of every group, rounded up to the steps, and meet ``target``.

    Raises:
        PlanError: the floors alone cost more.
    """

    def counts(share: float) -> dict[int, int]:
        result = {}
        for g, units in sizes.items():
            count = max(floors[g], int(np.ceil(share * units)))
            result[g] = min(units, -(-count // steps[g]) * steps[g])
        return result

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


def _options(units: int, step: int, floor: int) -> np.ndarray:
    """Allowed counts, descending: everything, and the multiples of the step above the floor."""
    counts = {units} | {n for n in range(step, units, step) if n >= floor}
    return np.asarray(sorted(counts, reverse=True))


def _fill(
    index: dict[int, int],
    options: dict[int, np.ndarray],
    damage: dict[int, np.ndarray],
    price_of: object,
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
