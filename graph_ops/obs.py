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
from dataclasses import dataclass

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

    @classmethod
    def of(cls, x: np.ndarray, t: np.ndarray, *, rows: int = 16384) -> Gram:
        """Average over sampled positions, in float64 over float32 products.

        Args:
            x: (M, D) inputs with a trailing column of ones.
            t: (M, O) targets.
            rows: how many positions are multiplied at once.
        """
        a = np.zeros((x.shape[1], x.shape[1]))
        b = np.zeros((t.shape[1], x.shape[1]))
        for i in range(0, len(x), rows):
            part = x[i : i + rows]
            a += part.T @ part
            b += t[i : i + rows].T @ part
        energy = float(np.square(t, dtype=np.float64).sum()) / len(t)
        return cls(a / len(x), b / len(x), energy, len(x))

    def error(self, w: np.ndarray) -> float:
        """Mean squared error of ``W x`` against the targets, summed over the outputs."""
        return float(self.t - 2 * np.sum(w * self.b) + np.sum((w @ self.a) * w))


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
    use = np.flatnonzero(columns)
    diagonal = ridge_matrix(gram, ridge)[use]
    h = gram.a[np.ix_(use, use)] + np.diag(diagonal)
    right = gram.b[:, use] + w0[:, use] * diagonal
    w = np.zeros_like(w0, dtype=np.float64)
    w[:, use] = np.linalg.solve(h, right.T).T
    return w


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
        columns: (units, k) the columns that each unit feeds; equally many for every unit.
        weight: of this layer's relative error in the sum.
    """

    gram: Gram
    w0: np.ndarray
    columns: np.ndarray
    weight: float = 1.0


def removal_path(readers: Sequence[Reader], ridge: float, allowed: np.ndarray, stop: int = 0) -> Path:
    """Remove units one by one, always the one that costs all its readers together the least.

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
        best = int(np.argmin(costs))
        for state in states:
            state.remove(left[best])
        order.append(int(left[best]))
        error.append(error[-1] + max(float(costs[best]), 0.0))
        left = np.delete(left, best)
    return Path(np.asarray(order, np.int64), np.asarray(error))


class _State:
    """A reader's inverse and weights while units go."""

    def __init__(self, reader: Reader, ridge: float) -> None:
        gram = reader.gram
        diagonal = ridge_matrix(gram, ridge)
        inverse = np.linalg.inv(gram.a + np.diag(diagonal))
        self.inverse = (inverse + inverse.T) / 2
        self.w = (gram.b + reader.w0 * diagonal) @ self.inverse
        self.columns = reader.columns
        self.scale = reader.weight / max(gram.t, 1e-30)
        self.start = max(gram.error(self.w), 0.0) * self.scale

    def costs(self, units: np.ndarray) -> np.ndarray:
        """What removing each of ``units`` would cost, (len(units),)."""
        g = self.columns[units]
        blocks = self.inverse[g[:, :, None], g[:, None, :]]
        w = self.w[:, g].transpose(1, 2, 0)
        return np.sum(np.linalg.solve(blocks, w) * w, (1, 2)) * self.scale

    def remove(self, unit: int) -> None:
        """Take a unit out; the others make up for it."""
        g = self.columns[unit]
        factor = np.linalg.solve(self.inverse[np.ix_(g, g)], self.inverse[g, :])
        self.w -= self.w[:, g] @ factor
        self.inverse -= self.inverse[:, g] @ factor
        self.inverse = (self.inverse + self.inverse.T) / 2
        self.w[:, g] = 0
        self.inverse[g, :] = self.inverse[:, g] = 0
        self.inverse[g, g] = 1.0
