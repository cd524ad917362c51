"""Small files that ask for much: memory, time, recursion."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .net import Net

BILLION = 10**9
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
_value = helper.make_tensor_value_info


def _net(*dims: int | str) -> tuple[Net, str]:
    net = Net()
    return net, net.relu(net.conv(net.input(*(dims or (1, 3, 8, 8))), 4, name="stem"))


def _model(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto] | None = None) -> onnx.ModelProto:
    """A model from ``x`` (1, 3, 8, 8) to ``y``."""
    graph = helper.make_graph(
        nodes, "bomb", [_value("x", FLOAT, [1, 3, 8, 8])], [_value("y", FLOAT, list("abcd"))], initializers or []
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def _ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.int64), name)


def wide_input() -> onnx.ModelProto:
    model = _model([helper.make_node("Relu", ["x"], ["y"])])
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = BILLION
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = BILLION
    return model


def endless_input() -> onnx.ModelProto:
    model = _model([helper.make_node("Relu", ["x"], ["y"])])
    for dim in model.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_value = 2**62
    return model


def constant_of_shape() -> onnx.ModelProto:
    return _model(
        [
            helper.make_node("ConstantOfShape", ["n"], ["c"]),
            helper.make_node("ReduceSum", ["c"], ["s"]),
            helper.make_node("Add", ["x", "s"], ["y"]),
        ],
        [_ints("n", BILLION)],
    )


def computed_size() -> onnx.ModelProto:
    return _model(
        [
            helper.make_node("Mul", ["n", "n"], ["m"]),
            helper.make_node("ConstantOfShape", ["m"], ["c"]),
            helper.make_node("ReduceSum", ["c"], ["s"]),
            helper.make_node("Add", ["x", "s"], ["y"]),
        ],
        [_ints("n", BILLION)],
    )


def expand() -> onnx.ModelProto:
    return _model([helper.make_node("Expand", ["x", "n"], ["y"])], [_ints("n", BILLION, 3, 8, 8)])


def tile() -> onnx.ModelProto:
    return _model([helper.make_node("Tile", ["x", "n"], ["y"])], [_ints("n", 1, 1, BILLION, BILLION)])


def pad() -> onnx.ModelProto:
    return _model([helper.make_node("Pad", ["x", "n"], ["y"])], [_ints("n", 0, 0, BILLION, BILLION, 0, 0, 0, 0)])


def resize() -> onnx.ModelProto:
    scales = numpy_helper.from_array(np.asarray([1, 1, 1e6, 1e6], np.float32), "n")
    return _model([helper.make_node("Resize", ["x", "", "n"], ["y"])], [scales])


def count_to_infinity() -> onnx.ModelProto:
    step = [numpy_helper.from_array(np.asarray(v, np.int64), n) for n, v in (("a", 0), ("b", 2**62), ("c", 1))]
    return _model(
        [
            helper.make_node("Range", ["a", "b", "c"], ["r"]),
            helper.make_node("Cast", ["r"], ["f"], to=FLOAT),
            helper.make_node("ReduceSum", ["f"], ["s"]),
            helper.make_node("Add", ["x", "s"], ["y"]),
        ],
        step,
    )


def endless_loop() -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "s"], ["t"]), helper.make_node("Identity", ["go"], ["again"])],
        "body",
        [_value("i", INT64, []), _value("go", BOOL, []), _value("s", FLOAT, None)],
        [_value("again", BOOL, []), _value("t", FLOAT, None)],
    )
    trips = numpy_helper.from_array(np.asarray(2**62, np.int64), "n")
    return _model([helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)], [trips])


def nested_branches(depth: int = 5000) -> bytes:
    """If inside If inside If: protobuf's own depth limit keeps Python from building it."""

    def field(number: int, content: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(content)) + content

    graph = field(2, b"leaf")
    for _ in range(depth):
        attribute = field(1, b"then_branch") + field(6, graph) + _varint(20 << 3) + _varint(5)
        graph = field(1, field(1, b"c") + field(2, b"z") + field(4, b"If") + field(5, attribute)) + field(2, b"g")
    return _model([helper.make_node("Relu", ["x"], ["y"])]).SerializeToString() + field(7, graph)


def many_axes() -> onnx.ModelProto:
    net, y = _net()
    model = net.model(net.head(y))
    model.graph.initializer[0].dims[:] = [1] * 200_000
    return model


def absurd_weight() -> onnx.ModelProto:
    net, y = _net()
    model = net.model(net.head(y))
    model.graph.initializer[0].dims[:] = [BILLION, BILLION, BILLION, BILLION]
    return model


def weight_without_data() -> onnx.ModelProto:
    net, y = _net()
    model = net.model(net.head(y))
    model.graph.initializer[0].dims[:] = [BILLION]
    model.graph.initializer[0].ClearField("raw_data")
    return model


def sparse_weight() -> onnx.ModelProto:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "w"), _ints("i", 5), [BILLION, BILLION]
    )
    model = _model([helper.make_node("ReduceSum", ["w"], ["s"]), helper.make_node("Add", ["x", "s"], ["y"])])
    model.graph.sparse_initializer.append(sparse)
    return model


def wide_kernel() -> onnx.ModelProto:
    net, y = _net()
    y = net.op("MaxPool", y, kernel_shape=[2, 2], dims=[1, 4, 5, 5])
    model = net.model(y)
    model.graph.node[-1].attribute[0].ints[:] = [BILLION, BILLION]
    return model


def many_groups() -> onnx.ModelProto:
    net, y = _net()
    model = net.model(net.conv(y, 4, 1, group=4))
    next(a for a in model.graph.node[-1].attribute if a.name == "group").i = BILLION
    return model


def many_outputs() -> onnx.ModelProto:
    net, y = _net()
    model = net.model(net.op("Split", y, outputs=2, axis=1)[0])
    model.opset_import[0].version = 18
    model.graph.node[-1].attribute.append(helper.make_attribute("num_outputs", BILLION))
    return model


def recursive_function() -> onnx.ModelProto:
    model = _model([helper.make_node("f", ["x"], ["y"], domain="own")])
    model.opset_import.append(helper.make_opsetid("own", 1))
    call = helper.make_node("f", ["a"], ["b"], domain="own")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", "f", ["a"], ["b"], [call], opsets))
    return model


def doubling_functions() -> onnx.ModelProto:
    """Twenty-six functions, each of which calls the one before it twice: 67 million nodes when inlined."""
    model = _model([helper.make_node("f25", ["x"], ["y"], domain="own")])
    model.opset_import.append(helper.make_opsetid("own", 1))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for i in range(26):
        op, domain = ("Relu", "") if i == 0 else (f"f{i - 1}", "own")
        nodes = [helper.make_node(op, ["a"], ["m"], domain=domain), helper.make_node(op, ["m"], ["b"], domain=domain)]
        model.functions.append(helper.make_function("own", f"f{i}", ["a"], ["b"], nodes, opsets))
    return model


def doubling_sizes() -> onnx.ModelProto:
    """Concat of a tensor with itself, forty times."""
    nodes = [helper.make_node("Concat", [f"t{i}" if i else "x"] * 2, [f"t{i + 1}"], axis=3) for i in range(40)]
    return _model([*nodes, helper.make_node("Relu", ["t40"], ["y"])])


def doubling_lengths() -> onnx.ModelProto:
    """The same with a list of sizes, which shape inference follows entry by entry."""
    nodes = [helper.make_node("Shape", ["x"], ["t0"])]
    nodes += [helper.make_node("Concat", [f"t{i}"] * 2, [f"t{i + 1}"], axis=0) for i in range(28)]
    return _model(
        [
            *nodes,
            helper.make_node("Size", ["t28"], ["s"]),
            helper.make_node("Cast", ["s"], ["f"], to=FLOAT),
            helper.make_node("Add", ["x", "f"], ["y"]),
        ]
    )


def self_loop() -> onnx.ModelProto:
    return _model(
        [
            helper.make_node("Add", ["x", "b"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Relu", ["b"], ["y"]),
        ]
    )


def long_history() -> onnx.ModelProto:
    net, y = _net()
    model = net.model(net.head(y))
    model.metadata_props.add(key="prune_onnx.slim", value="[" * 100_000)
    return model


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes_of_length(length: int) -> bytes:
    """A model whose graph claims to be longer than the file."""
    return b"\x08\x08\x3a" + _varint(length) + b"\x0a\x00"


BOMBS: dict[str, Callable[[], onnx.ModelProto | bytes]] = {
    f.__name__: f
    for f in (
        wide_input,
        endless_input,
        constant_of_shape,
        computed_size,
        expand,
        tile,
        pad,
        resize,
        count_to_infinity,
        endless_loop,
        nested_branches,
        many_axes,
        absurd_weight,
        weight_without_data,
        sparse_weight,
        wide_kernel,
        many_groups,
        many_outputs,
        recursive_function,
        doubling_functions,
        doubling_sizes,
        doubling_lengths,
        self_loop,
        long_history,
    )
}
BOMBS["long_field"] = lambda: _bytes_of_length(2**40)
BOMBS["endless_field"] = lambda: _bytes_of_length(2**63)
BOMBS["nothing_but_tags"] = lambda: b"\x3b" * 100_000
