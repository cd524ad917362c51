"""The read-only view of a model: order, readers, what depends on data."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser

from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.graph_ops.graph import Graph, captured_names, constant_node_value, tensor_value

from .builder import Net

CHAIN = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) {
    shape = Shape(x)
    zeros = ConstantOfShape(shape)
    noise = RandomNormalLike(x)
    two = Constant<value_float = 2.0>()
    four = Mul(two, two)
    a = Mul(x, four)
    b = Add(a, zeros)
    y = Add(b, noise)
}"""


def test_what_depends_on_data() -> None:
    """Sizes and constants do not; random numbers do, although nothing flows into them."""
    graph = Graph(parser.parse_model(CHAIN))
    assert {n for n in ("shape", "zeros", "two", "four") if graph.is_static(n)} == {"shape", "zeros", "two", "four"}
    assert graph.dynamic == {"x", "noise", "a", "b", "y"}
    assert not graph.is_static("")


def test_producers_and_readers() -> None:
    graph = Graph(parser.parse_model(CHAIN))
    assert graph.producer["a"].op_type == "Mul"
    assert [(n.op_type, i) for n, i in graph.readers["two"]] == [("Mul", 0), ("Mul", 1)]
    assert graph.outputs == ["y"]
    assert graph.opset == 17


def test_constants() -> None:
    net = Net()
    weight = net.random(2, 3)
    net.op("Add", net.input(2, 3), weight)
    graph = Graph(net.model(net.op("Identity", "add0_out")))
    np.testing.assert_array_equal(graph.constant("w0"), weight)
    assert graph.constant("add0_out") is None
    assert graph.constant("x") is None
    assert float(Graph(parser.parse_model(CHAIN)).constant("two")) == 2.0


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ({"value": numpy_helper.from_array(np.eye(2))}, np.eye(2)),
        ({"value_int": 3}, np.int64(3)),
        ({"value_ints": [1, 2]}, np.asarray([1, 2])),
        ({"value_float": 0.5}, np.float32(0.5)),
        ({"value_floats": [0.5, 1.5]}, np.asarray([0.5, 1.5], np.float32)),
        ({"value_string": "a"}, None),
    ],
)
def test_values_of_constant_nodes(attribute: dict, expected: object) -> None:
    value = constant_node_value(helper.make_node("Constant", [], ["c"], **attribute))
    if expected is None:
        assert value is None
    else:
        assert value.dtype == np.asarray(expected).dtype
        np.testing.assert_array_equal(value, expected)


def test_data_that_does_not_fit() -> None:
    tensor = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    tensor.dims[0] = 5
    with pytest.raises(ModelError, match="initializer 'w' cannot be read"):
        tensor_value(tensor)


def body(*nodes: onnx.NodeProto, inputs: tuple[str, ...] = (), out: str = "z") -> onnx.GraphProto:
    return helper.make_graph(
        list(nodes),
        "body",
        [helper.make_tensor_value_info(i, TensorProto.FLOAT, None) for i in inputs],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
    )


def test_names_captured_by_nested_bodies() -> None:
    """What inner bodies make or take in is their own; what they read beyond that is captured."""
    inner = body(helper.make_node("Add", ["own", "far"], ["deep"]), out="deep")
    middle = body(
        helper.make_node("Neg", ["near"], ["own"]),
        helper.make_node("If", ["flag"], ["z"], then_branch=inner, else_branch=inner),
        inputs=("given",),
    )
    node = helper.make_node(
        "If", ["condition"], ["y"], then_branch=middle, else_branch=body(helper.make_node("Identity", ["other"], ["z"]))
    )
    assert captured_names(node) == {"near", "far", "flag", "other"}
    assert captured_names(helper.make_node("Add", ["a", "b"], ["c"])) == frozenset()


def test_an_output_of_a_body_may_be_captured_itself() -> None:
    node = helper.make_node("If", ["c"], ["y"], then_branch=body(out="outer"), else_branch=body(out="outer"))
    assert captured_names(node) == {"outer"}


@settings(deadline=None, derandomize=True, database=None)
@given(st.permutations(range(8)))
def test_any_order_of_nodes_becomes_a_topological_one(order: list[int]) -> None:
    model = parser.parse_model(CHAIN)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[i] for i in order)
    graph = Graph(model)
    assert sorted(n.op_type for n in graph.nodes) == sorted(n.op_type for n in nodes)
    made = {"x"}
    for index, node in enumerate(graph.nodes):
        assert node.index == index
        assert set(node.inputs) <= made
        made |= set(node.outputs)


def test_a_file_in_order_keeps_it() -> None:
    model = parser.parse_model(CHAIN)
    assert [n.proto for n in Graph(model).nodes] == list(model.graph.node)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a = Add(x, b) b = Neg(a) y = Neg(b)", "cycle through node 'Add'"),
        ("y = Add(x, nowhere)", "'Add' reads 'nowhere', which nothing makes"),
        ("a = Neg(x) a = Abs(x) y = Neg(a)", "'a' is made twice"),
        ("x = Neg(x) y = Neg(x)", "'x' is made twice"),
        ("a = Neg(x)", "output 'y' is made by no node"),
    ],
)
def test_what_is_no_graph(text: str, match: str) -> None:
    model = parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) {' + text + "}")
    with pytest.raises(ModelError, match=match):
        Graph(model)


def test_attributes() -> None:
    net = Net()
    net.conv(net.input(1, 3, 6, 6), 4, name="c", auto_pad="VALID", strides=[2, 1])
    node = Graph(net.model(net.relu("c_out"))).nodes[0]
    assert node.attribute("auto_pad") == "VALID"
    assert node.attribute("strides") == [2, 1]
    assert node.attribute("group", 1) == 1
    assert str(node) == "Conv node 'c'"
