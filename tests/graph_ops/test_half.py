"""Float16 inside, float32 outside."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from prune_onnx.graph_ops.half import LARGEST, SMALLEST, to_float16

from .builder import Net, distance, run_ort


def check_half(model: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance: float = 5e-3) -> onnx.ModelProto:
    """Convert; the interface stays, the outputs nearly do."""
    before = model.SerializeToString()
    half = to_float16(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(half, full_check=True)
    names = [o.name for o in model.graph.output]
    assert [(o.name, o.type.tensor_type.elem_type) for o in half.graph.output] == [
        (o.name, o.type.tensor_type.elem_type) for o in model.graph.output
    ]
    for a, b in zip(run_ort(model, feeds, names), run_ort(half, feeds, names), strict=True):
        assert distance(a, b) <= tolerance
    return half


def inputs(*shape: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def kinds(model: onnx.ModelProto) -> set[int]:
    return {t.data_type for t in model.graph.initializer}


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def test_weights_and_activations_are_half_as_wide() -> None:
    net = Net()
    y = net.relu(net.bn(net.conv(net.input("n", 3, 8, 8), 6)))
    model = net.model(net.head(net.relu(net.conv(y, 8))))
    half = check_half(model, inputs(2, 3, 8, 8))
    assert kinds(half) == {TensorProto.FLOAT16}
    assert ops(half).count("Cast") == 2, "one behind the input, one in front of the output"
    assert [i.name for i in half.graph.input] == ["x"]
    assert half.graph.input[0].type == model.graph.input[0].type


def test_an_output_that_is_read_inside_and_an_input_that_is_an_output() -> None:
    net = Net()
    y = net.conv(net.input(1, 3, 6, 6), 4, name="both")
    z = net.relu(y)
    w = net.op("Identity", "x")
    check_half(net.model(y, z, w), inputs(1, 3, 6, 6))


def test_scales_of_resize_keep_their_value() -> None:
    """1.3 in float16 is 1.2998: the map would have another size."""
    net = Net()
    y = net.conv(net.input(1, 2, 10, 10), 3)
    scales = np.asarray([1, 1, 1.25, 1.3], np.float32)
    y = net.op("Resize", y, "", scales, mode="nearest", dims=[1, 3, 10, 10])
    half = check_half(net.model(net.head(y)), inputs(1, 2, 10, 10))
    stored = [numpy_helper.to_array(t) for t in half.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert len(stored) == 1
    np.testing.assert_array_equal(stored[0], scales)


def test_sums_of_squares_keep_float32() -> None:
    net = Net()
    y = net.op("Mul", net.conv(net.input(1, 2, 8, 8), 3), np.asarray(300, np.float32))
    y = net.op("ReduceL2", y, axes=[2, 3], keepdims=1)
    half = check_half(net.model(y), inputs(1, 2, 8, 8))
    reader = next(n for n in half.graph.node if n.op_type == "ReduceL2")
    assert reader.input[0].endswith("_fp32")


def test_constants_beyond_float16_stay_finite_and_tiny_ones_stay_above_zero() -> None:
    net = Net()
    y = net.conv(net.input(1, 2, 4, 4), 3)
    y = net.op("Add", net.op("Min", net.op("Max", y, np.asarray(-1e9, np.float32)), np.asarray(1e9, np.float32)),
               np.asarray(1e-12, np.float32))  # fmt: skip
    half = check_half(net.model(y), inputs(1, 2, 4, 4))
    stored = [float(numpy_helper.to_array(t)) for t in half.graph.initializer if not t.dims]
    assert sorted(stored) == pytest.approx([-LARGEST, SMALLEST, LARGEST], rel=0.01)


@pytest.mark.parametrize("attribute", ["value = float {2.0}", "value_float = 2.0"])
def test_constant_nodes_and_casts(attribute: str) -> None:
    model = parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3] x) => (float[N, 3] y, int64[N, 3] rounded) {{
            two = Constant <{attribute}> ()
            doubled = Mul(x, two)
            whole = Cast <to = 7> (doubled)
            rounded = Identity(whole)
            back = Cast <to = 1> (whole)
            like = CastLike(whole, x)
            sum = Add(back, like)
            y = Add(sum, doubled)
        }}""")
    half = check_half(model, inputs(4, 3, seed=2), tolerance=1e-2)
    assert "Constant" not in ops(half)


def test_bodies_are_converted_with_what_they_capture() -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 3] x, bool flag) => (float[2, 3] y) {
            captured = Relu(x)
            out = If (flag) <
                then_branch = a () => (float[2, 3] t) { c = Constant <value = float {3.0}> () t = Mul(captured, c) },
                else_branch = b () => (float[2, 3] e) { n = Neg(captured) e = Add(n, x) }
            >
            y = Sigmoid(out)
        }""")
    for flag in (True, False):
        half = check_half(model, inputs(2, 3) | {"flag": np.asarray(flag)})
    body = next(a.g for n in half.graph.node if n.op_type == "If" for a in n.attribute if a.name == "then_branch")
    assert body.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16


def test_loop_state_is_half() -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y) {
            count = Constant <value = int64 {3}> ()
            go = Constant <value = bool {1}> ()
            y = Loop (count, go, x) <
                body = b (int64 i, bool c, float[2] s) => (bool more, float[2] next) {
                    more = Identity(c)
                    half = Constant <value = float {0.5}> ()
                    next = Mul(s, half)
                }
            >
        }""")
    check_half(model, {"x": np.asarray([4.0, -8.0], np.float32)})


def test_weights_that_are_listed_as_inputs() -> None:
    net = Net(ir=3, opset=9)
    model = net.model(net.head(net.relu(net.conv(net.input(1, 3, 7, 7), 8))))
    half = check_half(model, inputs(1, 3, 7, 7))
    assert [i.name for i in half.graph.input] == ["x"]


def test_a_weight_that_is_an_output() -> None:
    net = Net()
    y = net.conv(net.input(1, 3, 6, 6), 4)
    model = net.model(y)
    weight = net.nodes[0].input[1]
    model.graph.output.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, [4, 3, 3, 3]))
    check_half(model, inputs(1, 3, 6, 6))
