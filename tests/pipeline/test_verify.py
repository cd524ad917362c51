"""A result that differs from its reference is never called right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from prune_onnx.graph_ops.errors import ModelError, VerificationError
from prune_onnx.pipeline import verify as module
from prune_onnx.pipeline.verify import TOLERANCE, verify

from ..graph_ops.builder import Net

FEEDS = [{"x": np.random.default_rng(seed).standard_normal((2, 3, 6, 6)).astype(np.float32)} for seed in range(3)]


def model(change: Callable[[Net], None] = lambda net: None, seed: int = 0) -> onnx.ModelProto:
    net = Net(seed=seed)
    net.head(net.relu(net.conv(net.input("N", 3, 6, 6), 8)))
    change(net)
    return net.model("head_out")


def scaled(factor: float) -> onnx.ModelProto:
    """The model with one weight of its last layer changed."""
    result = model()
    name = next(n for n in result.graph.node if n.name == "head").input[1]
    tensor = next(t for t in result.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    return result


def test_a_model_equals_itself() -> None:
    found = verify(model(), model(), FEEDS, "original")
    assert found.passed
    assert found.reference == "original"
    assert found.max_abs_diff == found.max_rel_diff == 0.0
    assert found.tolerance == TOLERANCE["float32"]


def test_rounding_is_reported_and_allowed() -> None:
    found = verify(model(), scaled(1 + 2e-6), FEEDS, "masked")
    assert 0 < found.max_rel_diff <= found.tolerance
    assert found.max_abs_diff > 0


@pytest.mark.parametrize("factor", [1 + 5e-5, 0.0, -1.0])
def test_a_wrong_weight_is_found(factor: float) -> None:
    with pytest.raises(
        VerificationError, match=r"output 'head_out' differs from the masked model's by .* Nothing was written"
    ):
        verify(model(), scaled(factor), FEEDS, "masked")


def test_every_input_is_tried() -> None:
    """A difference that shows on the last input only."""
    feeds = [{"x": np.zeros((1, 3, 6, 6), np.float32)}, {"x": np.full((1, 3, 6, 6), 5, np.float32)}]

    def clipped(net: Net) -> None:
        net.nodes.append(onnx.helper.make_node("Clip", ["x", "", net.const(np.float32(4), name="four")], ["clipped"]))
        net.nodes[0].input[0] = "clipped"
        net.nodes.insert(0, net.nodes.pop())

    assert verify(model(), model(clipped), feeds[:1], "original").passed
    with pytest.raises(VerificationError):
        verify(model(), model(clipped), feeds, "original")


def test_another_shape_is_found() -> None:
    short = model()
    short.graph.node[-1].output[0] = "long"
    for name, value in (("starts", 0), ("ends", 4), ("axes", 1)):
        short.graph.initializer.append(numpy_helper.from_array(np.asarray([value]), name))
    short.graph.node.append(onnx.helper.make_node("Slice", ["long", "starts", "ends", "axes"], ["head_out"]))
    short.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    with pytest.raises(VerificationError, match=r"output 'head_out' has shape \(2, 4\) instead of \(2, 5\)"):
        verify(model(), short, FEEDS, "original")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(value: float) -> None:
    broken = model()
    name = next(n for n in broken.graph.node if n.name == "head").input[2]
    tensor = next(t for t in broken.graph.initializer if t.name == name)
    bias = numpy_helper.to_array(tensor).copy()
    bias[1] = value
    tensor.CopyFrom(numpy_helper.from_array(bias, name))
    with pytest.raises(VerificationError, match="is not finite where"):
        verify(model(), broken, FEEDS, "original")
    with pytest.raises(VerificationError, match="is not finite where"):
        verify(broken, model(), FEEDS, "original")
    assert verify(broken, broken, FEEDS, "original").passed


def test_integers_must_be_equal() -> None:
    def as_integers(factor: float) -> onnx.ModelProto:
        net = Net()
        y = net.op("Mul", net.head(net.relu(net.conv(net.input("N", 3, 6, 6), 8))), net.const(factor))
        return net.model(net.op("Cast", y, to=onnx.TensorProto.INT64))

    assert verify(as_integers(1000.0), as_integers(1000.0), FEEDS, "original").passed
    with pytest.raises(VerificationError):
        verify(as_integers(1000.0), as_integers(1001.0), FEEDS, "original")


def test_a_result_that_does_not_run() -> None:
    broken = model()
    broken.graph.node[0].input[1] = "x"
    with pytest.raises((VerificationError, ModelError)):
        verify(model(), broken, FEEDS, "original")


@pytest.mark.parametrize(("own", "passes"), [(1.0, True), (0.0, False)])
def test_optimisations_may_change_the_result_as_much_as_the_reference(
    monkeypatch: pytest.MonkeyPatch, own: float, passes: bool
) -> None:
    """A net that amplifies rounding moves under the optimisations; a result that alone moves is wrong."""
    result, real = scaled(1 + 1e-6), module._optimised

    def moved(candidate: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        factor = 1.0 if candidate is result else own
        return [out * np.float32(1 + 1e-3 * factor) for out in real(candidate, feeds)]

    monkeypatch.setattr(module, "_optimised", moved)
    if passes:
        assert verify(model(), result, FEEDS, "masked").passed
    else:
        with pytest.raises(VerificationError, match="differs from the masked model's"):
            verify(model(), result, FEEDS, "masked")
