"""The recipe that turns pixels into network input, and its place in the model's metadata."""

from __future__ import annotations

import numpy as np
import pytest

from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.graph_ops.preprocessing import KEY, Preprocessing, read, write

from .builder import Net

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5)).astype(np.uint8)
RECIPE = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0), size=(4, 5))


def model():
    net = Net()
    return net.model(net.head(net.conv(net.input("N", 3, 4, 5), 4)))


def test_by_hand() -> None:
    x = RECIPE.apply(IMAGES)
    assert x.dtype == np.float32
    assert x.shape == (2, 3, 4, 5)
    assert x[1, 2, 3, 4] == pytest.approx(IMAGES[1, 2, 3, 4] / 255 - 0.3, rel=1e-6)
    assert x[0, 1, 0, 2] == pytest.approx((IMAGES[0, 1, 0, 2] / 255 - 0.2) * 4, rel=1e-5)


def test_other_layouts_and_scales() -> None:
    last = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0), layout="NHWC").apply(IMAGES)
    np.testing.assert_array_equal(last.transpose(0, 3, 1, 2), RECIPE.apply(IMAGES))
    raw = Preprocessing(mean=(0.0,), std=(1.0,), scale=1.0).apply(IMAGES)
    np.testing.assert_array_equal(raw, IMAGES.astype(np.float32))


def test_round_trip_through_a_model() -> None:
    m = model()
    assert read(m) is None
    write(m, Preprocessing(mean=(0.5,), std=(0.5,)))
    write(m, RECIPE)
    assert read(m) == RECIPE
    assert [p.key for p in m.metadata_props] == [KEY]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"mean": 1, "std": [1]}', '{"mean": ["a"], "std": [1]}'])
def test_a_damaged_entry_is_an_error(text: str) -> None:
    m = model()
    m.metadata_props.add(key=KEY, value=text)
    with pytest.raises(ModelError, match="cannot be read"):
        read(m)
