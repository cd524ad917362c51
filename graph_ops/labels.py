"""Labels: which positions of which axes can only be removed together.

Every position of a prunable axis carries an integer label. Joining two labels says that the positions go or stay
together; the classes that remain in the end are the *removable units*. A disjoint-set forest on numpy arrays, so that
joining two axes of thousands of channels costs a few array operations.
"""

from __future__ import annotations

import numpy as np

Vector = np.ndarray
"""int64 labels of the positions of one axis, shape (dim,)."""


class Labels:
    """A growing set of labels with union-find.

    >>> labels = Labels()
    >>> a, b = labels.fresh(3), labels.fresh(3)
    >>> labels.join(a, b[::-1])
    >>> bool(labels.find(a[0]) == labels.find(b[2]))
    True
    """

    def __init__(self) -> None:
        self._parent = np.arange(1024, dtype=np.int64)
        self.count = 0

    def fresh(self, n: int) -> Vector:
        """Return ``n`` new labels, each a class of its own."""
        first, self.count = self.count, self.count + n
        if self.count > len(self._parent):
            grown = np.arange(max(2 * len(self._parent), self.count), dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return np.arange(first, self.count, dtype=np.int64)

    def find(self, labels: Vector) -> Vector:
        """Return the representative of each label's class, same shape."""
        root = self._parent[labels]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                break
            root = above
        self._parent[labels] = root
        return root

    def roots(self) -> Vector:
        """Return the representative of every label, (count,); valid until the next join."""
        return self.find(np.arange(self.count))

    def join(self, a: Vector, b: Vector) -> None:
        """Join ``a[i]`` with ``b[i]`` for every i (shapes broadcast)."""
        a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        while True:
            root_a, root_b = self.find(a), self.find(b)
            differ = root_a != root_b
            if not differ.any():
                return
            a, b = root_a[differ], root_b[differ]
            # Hook the larger root under the smaller one. Where one root meets several, the smallest wins and the
            # rest is joined in the next round, because their roots still differ then.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def join_across(self, grid: np.ndarray, axis: int) -> Vector:
        """Join all labels that share a position on ``axis`` of ``grid``; return one label per position."""
        rows = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)
        self.join(rows[:, 1:], rows[:, :1])
        return rows[:, 0].copy()
