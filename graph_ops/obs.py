"""Structured optimal brain surgeon on a layer's Gram matrix, and the least-squares fit that goes with it.

A sum is seen at sampled positions as ``y = W x``: x (D,) holds the inputs under the window, channel by channel, and a
trailing 1 for the bias; W is (O, D). With A = E[x x^T], B = E[t x^T] for targets t, the ridge solution that is pulled
to the trained weights W0 is

    W = (B + W0 L) (A + L)^-1,   L = ridge * mean(diag A) on the weights, 0 on the bias.

Removing the columns g of one channel from the full solution costs, with H = A + L,

    e_g = tr(W_g (H^-1_gg)^-1 W_g^T)
    W   <- W - W_g (H^-1_gg)^-1 H^-1_g:          (the other columns make up for it)
    H^-1 <- H^-1 - H^-1_:g (H^-1_gg)^-1 H^-1_g:

Source: Hassibi & Stork 1993 (optimal brain surgeon), in the structured form of Frantar & Alistarh 2022 and the
reconstruction of ThiNet / He et al. 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Gram:
    """Second moments of a layer's inputs and targets, float64.

    Attributes:
        a: E[x x^T], (D, D); the last row and column belong to the bias.
        b: E[t x^T], (O, D).
        t: E[|t|^2] summed over the outputs.
        count: positions that were averaged.
    """

    a: np.ndarray
    b: np.ndarray
    t: float
    count: int
    _full: tuple[float, np.ndarray, np.ndarray] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, x: np.ndarray, t: np.ndarray, *, rows: int = 16384) -> Gram:
        """Average over sampled positions, in float64 over float32 products.

        Args:
            x: (M, D) inputs with a trailing column of ones.
            t: (M, O) targets.
            rows: how many positions are multiplied at once.
        """
        energy = float(np.einsum("ij,ij->", t, t, dtype=np.float64)) / len(t)
        return cls(moments(x, x, rows=rows), moments(t, x, rows=rows), energy, len(x))

    def error(self, w: np.ndarray) -> float:
        """Mean squared error of ``W x`` against the targets, summed over the outputs."""
        return float(self.t - 2 * np.sum(w * self.b) + np.sum((w @ self.a) * w))

    def __add__(self, other: Gram) -> Gram:
        """The moments over both sets of positions."""
        count = self.count + other.count
        mine, its = self.count / count, other.count / count
        return Gram(mine * self.a + its * other.a, mine * self.b + its * other.b, mine * self.t + its * other.t, count)

    def on(self, columns: np.ndarray) -> Gram:
        """The moments of some columns, given as indexes in ascending order."""
        if len(columns) == len(self.a):
            return self
        return Gram(self.a[np.ix_(columns, columns)], self.b[:, columns], self.t, self.count)

    def full(self, w0: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """H^-1 and the ridge solution on all columns; several questions about one layer share them."""
        if self._full is None or self._full[0] != ridge:
            diagonal = ridge_matrix(self, ridge)
            inverse = np.linalg.inv(_with_diagonal(self.a.copy(), diagonal))
            self._full = ridge, inverse, (self.b + w0 * diagonal) @ inverse
        return self._full[1:]


def moments(t: np.ndarray, x: np.ndarray, *, rows: int = 16384) -> np.ndarray:
    """Return E[t x^T] over positions, float64 over float32 products of ``rows`` positions each."""
    total = np.zeros((t.shape[1], x.shape[1]))
    for i in range(0, len(x), rows):
        total += t[i : i + rows].T @ x[i : i + rows]
    total /= len(x)
    return total


def ridge_matrix(gram: Gram, ridge: float) -> np.ndarray:
    """The diagonal of L, (D,)."""
    diagonal = np.full(len(gram.a), ridge * max(float(np.mean(np.diag(gram.a)[:-1])), 1e-12))
    diagonal[-1] = 1e-9 * max(diagonal[0], 1e-12)
    return diagonal


def solve(gram: Gram, w0: np.ndarray, columns: np.ndarray, ridge: float) -> np.ndarray:
    """Least squares on some of the columns.

    Args:
        gram: moments.
        w0: (O, D) weights that the ridge pulls to.
        columns: bool (D,), which may be used; the bias column always is.
        ridge: relative to the mean of the Gram matrix's diagonal.

    Returns:
        (O, D), zero outside ``columns``.
    """
    use, diagonal, h = _normal(gram, columns, ridge)
    right = gram.b[:, use] + w0[:, use] * diagonal
    w = np.zeros_like(w0, dtype=np.float64)
    w[:, use] = np.linalg.solve(h, right.T).T
    return w


class Fit:
    """The same for several targets on the same inputs."""

    def __init__(self, gram: Gram, w0: np.ndarray, columns: np.ndarray, ridge: float) -> None:
        """Prepare; the arguments are those of :func:`solve`."""
        self._use, diagonal, h = _normal(gram, columns, ridge)
        self._pull = w0[:, self._use] * diagonal
        self._inverse = np.linalg.inv(h)
        self._width = len(columns)

    def weights(self, b: np.ndarray) -> np.ndarray:
        """Return the solution for the targets whose moments with the inputs are ``b``, E[t x^T]."""
        w = np.zeros((len(b), self._width))
        w[:, self._use] = (b[:, self._use] + self._pull) @ self._inverse
        return w


def _normal(gram: Gram, columns: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns in use, the diagonal of L on them, and A + L on them."""
    use = np.flatnonzero(columns)
    diagonal = ridge_matrix(gram, ridge)[use]
    return use, diagonal, _with_diagonal(gram.a[np.ix_(use, use)], diagonal)


def _with_diagonal(a: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    a.flat[:: len(a) + 1] += diagonal
    return a


@dataclass
class Path:
    """The greedy removal of a group's units, cheapest first.

    Attributes:
        order: units in the order of their removal.
        error: ``error[i]`` is the error before removal i: over all readers, the sum of their mean squared errors, each
            relative to its targets' energy; one longer than ``order``.
    """

    order: np.ndarray
    error: np.ndarray


@dataclass
class Reader:
    """One layer that reads a group's units.

    Attributes:
        gram: its moments.
        w0: (O, D) trained weights.
        columns: (units, k) the columns that each unit feeds; -1 fills up the rows of units that feed fewer.
        weight: of this layer's relative error in the sum.
    """

    gram: Gram
    w0: np.ndarray
    columns: np.ndarray
    weight: float = 1.0


# Paths of more units than this remove several at a time: 1/64 of those that are left.
SINGLY = 64
# Rows of removed columns are taken out of the inverse when they are this part of it.
COMPACT = 0.2


def removal_path(readers: Sequence[Reader], ridge: float, allowed: np.ndarray, stop: int = 0) -> Path:
    """Remove units one by one, always the one that costs all its readers together the least.

    Of many units (more than 64), the cheapest few go at a time, in the order of what each alone would cost.

    Args:
        readers: the layers that read the units.
        ridge: relative ridge.
        allowed: bool (units,), which may go.
        stop: how many of the allowed units stay at the end.
    """
    states = [_State(reader, ridge) for reader in readers]
    left = np.flatnonzero(allowed)
    order: list[int] = []
    error = [sum(state.start for state in states)]
    while len(left) > stop:
        costs = sum(state.costs(left) for state in states)
        several = min(max(1, len(left) // SINGLY), len(left) - stop)
        chosen = np.argsort(costs, kind="stable")[:several]
        each = np.maximum(costs[chosen], 0.0)
        grown = max(sum(state.remove(left[chosen]) for state in states), 0.0)
        # What they cost together is shared out in proportion to what each costs alone.
        growth = np.cumsum(each) * (grown / each.sum() if each.any() else 0.0)
        error += (error[-1] + growth).tolist()
        order += left[chosen].tolist()
        left = np.delete(left, chosen)
    return Path(np.asarray(order, np.int64), np.asarray(error))


class _State:
    """A reader's inverse and weights while units go, on the columns that the units feed."""

    def __init__(self, reader: Reader, ridge: float) -> None:
        gram = reader.gram
        inverse, w = gram.full(reader.w0, ridge)
        self.scale = reader.weight / max(gram.t, 1e-30)
        self.start = max(gram.error(w), 0.0) * self.scale
        fed = reader.columns >= 0
        used, places = np.unique(reader.columns[fed], return_inverse=True)
        # Missing columns get rows of their own that nothing depends on, one for each place in a unit's block.
        spare = reader.columns.shape[1] if not fed.all() else 0
        self.inverse, self.w = inverse[np.ix_(used, used)], w[:, used]
        if spare:
            self.inverse = np.pad(self.inverse, (0, spare))
            self.inverse.flat[len(used) * (len(self.inverse) + 1) :: len(self.inverse) + 1] = 1.0
            self.w = np.pad(self.w, ((0, 0), (0, spare)))
        self.columns = np.broadcast_to(len(used) + np.arange(reader.columns.shape[1]), fed.shape).copy()
        self.columns[fed] = places
        self.spare = len(used)  # what comes from here on is nobody's
        self.gone = np.zeros(len(self.inverse), bool)

    def costs(self, units: np.ndarray) -> np.ndarray:
        """What removing each of ``units`` would cost, (len(units),)."""
        g = self.columns[units]
        blocks = self.inverse[g[:, :, None], g[:, None, :]]
        w = self.w[:, g].transpose(1, 2, 0)
        return np.sum(np.linalg.solve(blocks, w) * w, (1, 2)) * self.scale

    def remove(self, units: np.ndarray) -> float:
        """Take units out, the others make up for them; return what that costs."""
        g = np.unique(self.columns[units])
        g = g[g < self.spare]
        if not len(g):
            return 0.0
        block, rows, w = self.inverse[np.ix_(g, g)], self.inverse[g, :], self.w[:, g]
        solved = np.linalg.solve(block, np.concatenate([w.T, rows], 1))
        cost = float(np.sum(solved[:, : len(w)] * w.T)) * self.scale
        factor = solved[:, len(w) :]
        self.w -= w @ factor
        self.inverse -= rows.T @ factor
        self.w[:, g] = 0
        self.inverse[g, :] = self.inverse[:, g] = 0
        self.inverse[g, g] = 1.0
        self.gone[g] = True
        if self.gone.sum() > COMPACT * len(self.gone):
            self._compact()
        return cost

    def _compact(self) -> None:
        """Forget the columns that are gone; units that had them are not asked about again."""
        stay = np.flatnonzero(~self.gone)
        place = np.full(len(self.gone), -1)
        place[stay] = np.arange(len(stay))
        self.inverse = self.inverse[np.ix_(stay, stay)]
        self.inverse = (self.inverse + self.inverse.T) / 2
        self.w = self.w[:, stay]
        self.spare = int(place[self.spare]) if self.spare < len(place) else len(stay)
        self.columns = place[self.columns]
        self.gone = np.zeros(len(stay), bool)
