"""Names that users type: listed in order, given once, guessed when mistyped."""

from __future__ import annotations

import pytest

from prune_onnx.graph_ops.errors import ConfigError, PruneOnnxError
from prune_onnx.graph_ops.registry import Registry, close_matches


def shapes() -> Registry[type]:
    registry = Registry[type]("shape")
    registry.register("square", "box")(int)
    registry.register("circle")(float)
    return registry


def test_names_come_in_order_and_several_may_mean_the_same() -> None:
    registry = shapes()
    assert registry.names() == list(registry) == ["square", "box", "circle"]
    assert registry.get("box") is registry.get("square") is int
    assert "circle" in registry
    assert "line" not in registry


def test_the_decorator_gives_the_object_back() -> None:
    @Registry[type]("thing").register("a")
    class Thing:
        """Registered."""

    assert Thing.__name__ == "Thing"


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="shape 'circle' is registered twice"):
        shapes().register("circle")(str)


def test_a_mistyped_name_is_guessed() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown shape 'sqare'\. Did you mean 'square'\? Known: square, box, circle\."
    ):
        shapes().get("sqare")
    assert close_matches("xyz", ["square"]) == ""


def test_every_error_has_an_exit_code() -> None:
    assert PruneOnnxError("x").exit_code == 1
    assert ConfigError("x").exit_code == 2
