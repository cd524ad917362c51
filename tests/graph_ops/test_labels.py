"""Union-find on arrays against sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_onnx.graph_ops.labels import Labels

COUNT = 24
PAIRS = st.lists(st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT - 1)), max_size=30)


def brute_force(batches: list[list[tuple[int, int]]]) -> list[frozenset[int]]:
    """Classes by repeated union of sets."""
    classes = [{i} for i in range(COUNT)]
    for pairs in batches:
        for a, b in pairs:
            one = next(c for c in classes if a in c)
            two = next(c for c in classes if b in c)
            if one is not two:
                one |= two
                classes.remove(two)
    return sorted((frozenset(c) for c in classes), key=min)


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(PAIRS, max_size=5))
def test_classes_are_those_of_a_brute_force_union(batches: list[list[tuple[int, int]]]) -> None:
    labels = Labels()
    every = labels.fresh(COUNT)
    for pairs in batches:
        if pairs:
            a, b = np.asarray(pairs).T
            labels.join(a, b)
    roots = labels.find(every)
    classes = brute_force(batches)
    for members in classes:
        assert len({int(roots[i]) for i in members}) == 1
    assert len(np.unique(roots)) == len(classes)


def test_fresh_labels_are_all_different_also_when_the_forest_grows() -> None:
    labels = Labels()
    first = labels.fresh(1000)
    labels.join(first[1:], first[:1])
    more = labels.fresh(5000)
    assert len(np.unique(labels.find(more))) == 5000
    assert len(np.unique(labels.find(first))) == 1
    assert labels.count == 6000


def test_join_broadcasts() -> None:
    labels = Labels()
    grid = labels.fresh(12).reshape(3, 4)
    labels.join(grid, grid[:1])
    roots = labels.find(grid)
    assert (roots == roots[0]).all()
    assert len(np.unique(roots)) == 4


def test_join_across_leaves_one_label_for_each_position_of_the_axis() -> None:
    labels = Labels()
    grid = labels.fresh(24).reshape(2, 3, 4)
    rows = labels.join_across(grid, 1)
    roots = labels.find(grid)
    assert rows.shape == (3,)
    assert len(np.unique(labels.find(rows))) == 3
    for position in range(3):
        assert len(np.unique(roots[:, position])) == 1


def test_a_root_that_meets_several_others_takes_them_all() -> None:
    labels = Labels()
    x = labels.fresh(6)
    labels.join(np.asarray([5, 5, 5]), np.asarray([4, 1, 3]))
    assert len(np.unique(labels.find(x[[1, 3, 4, 5]]))) == 1
    assert len(np.unique(labels.find(x))) == 3
