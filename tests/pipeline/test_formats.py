"""Numbers as people read them."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_onnx.pipeline import formats


def test_formats_do_as_their_examples_say() -> None:
    assert doctest.testmod(formats).failed == 0


@given(st.floats(1e-6, 1e12))
def test_three_digits_are_kept(value: float) -> None:
    factors = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    text, unit = formats.size(value).split(" ")
    assert float(text.replace(",", "")) * factors[unit] == pytest.approx(value, rel=0.0051, abs=0.5)
    text, unit = formats.milliseconds(value).split(" ")
    factors = {"µs": 1e-3, "ms": 1, "s": 1e3}
    assert float(text.replace(",", "")) * factors[unit] == pytest.approx(value, rel=0.0051)
    assert "e" not in text
