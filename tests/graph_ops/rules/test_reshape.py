"""The blocks that reshapes are taken apart into."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_onnx.graph_ops.rules.base import product
from prune_onnx.graph_ops.rules.reshape import blocks


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1, 6, 4, 4), (1, 2, 3, 16), [([1], [1, 2]), ([2, 3], [3])]),
        ((2, 3), (2, 3), [([0], [0]), ([1], [1])]),
        ((8,), (1, 8, 1), [([0], [1])]),
        ((2, 6), (3, 4), [([0, 1], [0, 1])]),
        ((1, 1), (1,), []),
        ((12, 5), (3, 4, 5), [([0], [0, 1]), ([1], [2])]),
    ],
)
def test_examples(before: tuple[int, ...], after: tuple[int, ...], expected: list) -> None:
    assert blocks(before, after) == expected


@st.composite
def two_views(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of the same size: random factors, grouped in two ways, with ones in between."""
    factors = draw(st.lists(st.integers(1, 5), max_size=6))

    def view() -> list[int]:
        shape, size = [], 1
        for factor in factors:
            size *= factor
            if draw(st.booleans()):
                shape.append(size)
                size = 1
            if draw(st.integers(0, 4)) == 0:
                shape.append(1)
        return [*shape, size] if size > 1 else shape

    return view(), view()


@settings(deadline=None, derandomize=True, database=None)
@given(two_views())
def test_blocks_partition_both_shapes_into_minimal_equal_products(views: tuple[list[int], list[int]]) -> None:
    before, after = views
    found = blocks(before, after)
    assert [a for left, _ in found for a in left] == [i for i, n in enumerate(before) if n != 1]
    assert [b for _, right in found for b in right] == [i for i, n in enumerate(after) if n != 1]
    for left, right in found:
        assert product(before[a] for a in left) == product(after[b] for b in right)
        lefts = {math.prod(before[a] for a in left[:i]) for i in range(1, len(left))}
        rights = {math.prod(after[b] for b in right[:i]) for i in range(1, len(right))}
        assert not lefts & rights, "a block that could be split"
