"""Operators that pin: what reaches them stays, the report names node, operator and reason, and the rest is cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from prune_onnx.graph_ops.errors import ConfigError

from .builder import MICROSOFT, Net, analysed, check_cut

PINNED_OPS = {"LSTM", "GRU", "RNN", "If", "Loop", "Scan", "SequenceMap"}
Pinning = Callable[[Net, str], str]
PINNING: dict[str, tuple[Pinning, str, str]] = {}


def pins(op: str, reason: str) -> Callable[[Pinning], Pinning]:
    """List a function that adds a node called "pinning" behind a tensor of shape (1, 6, 4, 4)."""

    def register(build: Pinning) -> Pinning:
        PINNING[build.__name__] = (build, f"{op} node 'pinning': {reason}", op)
        return build

    return register


def rank_four(net: Net, x: str) -> str:
    """(1, tokens, features) as a map again."""
    return net.op("Unsqueeze", net.op("Transpose", x, perm=[0, 2, 1]), [3])


def body(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[str],
    initializers: list[onnx.TensorProto] | None = None,
) -> onnx.GraphProto:
    """A graph for a control-flow node; all outputs but those named ``go_on`` are floats."""
    types = {name: TensorProto.BOOL if name == "go_on" else TensorProto.FLOAT for name in outputs}
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
    return helper.make_graph(nodes, "body", inputs, results, initializers or [])


@pins("LRN", "its sum runs across axis 1 (--norms release lets it be cut)")
def lrn(net: Net, x: str) -> str:
    return net.op("LRN", x, name="pinning", size=3)


def recurrent(op: str, gates: int) -> Pinning:
    def build(net: Net, x: str) -> str:
        sequence = net.op("Transpose", net.op("Reshape", x, [1, 6, 16]), perm=[2, 0, 1])
        y, _ = net.op(
            op,
            sequence,
            net.random(1, gates * 7, 6, scale=0.3),
            net.random(1, gates * 7, 7, scale=0.3),
            outputs=2,
            name="pinning",
            hidden_size=7,
        )
        return rank_four(net, net.op("Transpose", net.op("Squeeze", y, [1]), perm=[1, 0, 2]))

    return build


for recurrent_op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
    built = recurrent(recurrent_op, gates)
    built.__name__ = recurrent_op.lower()
    pins(recurrent_op, "recurrent layers are left alone")(built)


@pins("If", "its body reads the tensor")
def branch(net: Net, x: str) -> str:
    condition = net.op("Greater", net.op("ReduceMax", "x", keepdims=0), net.const(0.0))
    then = body([helper.make_node("Neg", [x], ["out"], name="neg")], [], ["out"])
    other = body([helper.make_node("Identity", [x], ["out"], name="same")], [], ["out"])
    return as_map(net, net.op("If", condition, name="pinning", dims=[1, 6, 4, 4], then_branch=then, else_branch=other))


def as_map(net: Net, name: str) -> str:
    net.types[name].CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, [1, 6, 4, 4]))
    return name


@pins("Loop", "control flow is left alone")
def loop(net: Net, x: str) -> str:
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        helper.make_tensor_value_info("carried", TensorProto.FLOAT, [1, 6, 4, 4]),
    ]
    nodes = [
        helper.make_node("Identity", ["going"], ["go_on"], name="keep_on"),
        helper.make_node("Tanh", ["carried"], ["next"], name="step"),
    ]
    graph = body(nodes, inputs, ["go_on", "next"])
    return as_map(
        net,
        net.op("Loop", net.const(np.asarray(3)), net.const(np.asarray(True)), x, name="pinning", dims=[1], body=graph),
    )


@pins("Loop", "its body reads the tensor")
def loop_that_captures(net: Net, x: str) -> str:
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        helper.make_tensor_value_info("carried", TensorProto.FLOAT, [1, 6, 4, 4]),
    ]
    nodes = [
        helper.make_node("Identity", ["going"], ["go_on"], name="keep_on"),
        helper.make_node("Add", ["carried", x], ["next"], name="step"),
    ]
    start = net.const(np.zeros((1, 6, 4, 4), np.float32))
    return as_map(
        net,
        net.op(
            "Loop",
            net.const(np.asarray(3)),
            net.const(np.asarray(True)),
            start,
            name="pinning",
            dims=[1],
            body=body(nodes, inputs, ["go_on", "next"]),
        ),
    )


@pins("Scan", "control flow is left alone")
def scan(net: Net, x: str) -> str:
    inputs = [helper.make_tensor_value_info("row", TensorProto.FLOAT, [6, 4, 4])]
    graph = body([helper.make_node("Tanh", ["row"], ["made"], name="step")], inputs, ["made"])
    return as_map(net, net.op("Scan", x, name="pinning", num_scan_inputs=1, body=graph, dims=[1, 6, 4, 4]))


@pins("SequenceMap", "control flow is left alone")
def sequence_map(net: Net, x: str) -> str:
    sequence = net.op("SequenceConstruct", "x", "x")
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("element", "beside")]
    nodes = [
        helper.make_node("ReduceMax", ["element"], ["most"], keepdims=1, name="most_of"),
        helper.make_node("Add", ["most", "beside"], ["made"], name="step"),
    ]
    made = net.op("SequenceMap", sequence, x, name="pinning", body=body(nodes, inputs, ["made"]))
    return as_map(net, net.op("SequenceAt", made, net.const(np.asarray(0)), dims=[1]))


@pins("Einsum", "it takes a diagonal")
def diagonal(net: Net, x: str) -> str:
    y = net.op("Einsum", net.op("Reshape", x, [6, 4, 4]), name="pinning", equation="cii->ci")
    return net.op("Reshape", y, [1, 6, 2, 2])


@pins("Trilu", "no rule for operator Trilu")
def unknown(net: Net, x: str) -> str:
    return net.op("Trilu", x, name="pinning")


@pins("Trilu", "no rule for operator Trilu of domain com.microsoft")
def unknown_of_a_known_domain(net: Net, x: str) -> str:
    return net.op("Trilu", x, name="pinning", domain=MICROSOFT)


@pins("Conv", "its weight depends on data")
def dynamic_convolution(net: Net, x: str) -> str:
    scale = net.op("Sigmoid", net.op("GlobalAveragePool", net.conv("x", 1, name="scale")))
    return net.op("Conv", x, net.op("Mul", net.random(6, 6, 1, 1), scale), name="pinning")


@pins("MatMul", "a product with a vector")
def product_with_a_vector(net: Net, x: str) -> str:
    y = net.op("MatMul", net.op("Transpose", x, perm=[0, 2, 3, 1]), net.random(6), name="pinning")
    return net.op("Unsqueeze", y, [1])


@pins("MatMul", "only one of two activations can be cut on the summed axis")
def product_with_the_input(net: Net, x: str) -> str:
    other = net.op("Slice", "x", [0, 0], [6, 4], [2, 3])
    other = net.op("Slice", other, [0], [1], [1])
    return net.op("MatMul", net.op("Transpose", x, perm=[0, 2, 3, 1]), other, name="pinning")


@pins("MatMul", "only one input can be cut on a batch axis")
def channels_as_batch_beside_the_input(net: Net, x: str) -> str:
    other = net.op("Slice", net.op("Concat", "x", "x", axis=1), [0, 0], [4, 4], [2, 3])
    return net.op("MatMul", x, other, name="pinning")


@pins("Gather", "it picks single positions or by data")
def gather_by_data(net: Net, x: str) -> str:
    index = net.op(
        "Cast",
        net.op("Clip", net.op("Slice", net.op("Reshape", "x", [-1]), [0], [3], [0]), net.const(0.0), net.const(5.0)),
        to=TensorProto.INT64,
    )
    return net.op("Gather", x, index, name="pinning", axis=1)


@pins("Slice", "its bounds depend on data")
def slice_by_data(net: Net, x: str) -> str:
    start = net.op(
        "Cast",
        net.op("Clip", net.op("Slice", net.op("Reshape", "x", [-1]), [0], [1], [0]), net.const(0.0), net.const(1.0)),
        to=TensorProto.INT64,
    )
    size = net.op("Add", start, [3])
    y = net.op("Slice", x, start, size, [1], name="pinning")
    net.types[y].CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, [1, 3, 4, 4]))
    return y


@pins("ReduceMean", "it runs across axis 1 (--norms release lets it be cut)")
def mean_over_channels(net: Net, x: str) -> str:
    return net.op("ReduceMean", x, axes=[1], name="pinning")


@pins("Concat", "not every part can be cut on axis 1")
def stacked_with_the_input(net: Net, x: str) -> str:
    part = net.op("Concat", "x", "x", "x", axis=1)
    return net.op("Concat", x, net.op("Slice", part, [0, 0, 0], [6, 1, 4], [1, 2, 3]), name="pinning", axis=2)


@pins("MaxPool", "its indices count positions across channels")
def pool_indices(net: Net, x: str) -> str:
    y, _ = net.op("MaxPool", x, outputs=2, name="pinning", kernel_shape=[2, 2])
    return y


@pins("FusedConv", "it adds a fused residual")
def fused_residual(net: Net, x: str) -> str:
    weight = net.random(6, 6, 1, 1, scale=0.3)
    return net.op(
        "FusedConv", x, weight, net.random(6), x, name="pinning", domain=MICROSOFT, dims=[1, 6, 4, 4], activation="Relu"
    )


@pins("Gemm", "its bias depends on data")
def gemm_with_moving_bias(net: Net, x: str) -> str:
    moving = net.op("Slice", net.op("Reshape", "x", [1, -1]), [0], [6], [1])
    y = net.op("Gemm", net.op("Flatten", net.op("GlobalAveragePool", x)), net.random(6, 6), moving, name="pinning")
    return net.op("Unsqueeze", y, [2, 3])


@pytest.mark.parametrize("name", list(PINNING))
def test_what_pins_says_so_and_leaves_the_rest_free(name: str) -> None:
    build, reason, op = PINNING[name]
    net = Net()
    y = net.relu(net.conv(net.input(1, 3, 8, 8), 8, name="before"))
    y = build(net, net.conv(y, 6, name="pinned"))
    assert any(n.name == "pinning" and n.op_type == op for n in net.nodes)
    model = net.model(net.head(net.conv(net.relu(net.conv(y, 8, 1, name="after")), 5, 1, name="last")))
    result = check_cut(model, fraction=0.6, predict=("macs",))
    assert set(result.pinned) - {"pinning", "scale"} == {"pinned", "head"}
    assert reason in result.pinned["pinned"]
    kept = {g.name: int(result.keep[g.units].sum()) for g in result.analysis.groups}
    assert kept["pinned"] == 6
    assert kept["before"] == 3
    assert kept["after"] == 3


def test_every_pinning_operator_is_tested() -> None:
    assert {op for _, _, op in PINNING.values()} >= PINNED_OPS


def test_graph_outputs_pin() -> None:
    net = Net()
    y = net.conv(net.relu(net.conv(net.input(1, 3, 8, 8), 8, name="inside")), 6, name="outside")
    result = check_cut(net.model(y, net.head(y)))
    assert set(result.pinned) == {"outside", "head"}
    assert "graph output 'outside_out': its shape is the model's interface" in result.pinned["outside"]


class TestIgnore:
    def model(self) -> onnx.ModelProto:
        net = Net()
        y = net.relu(net.conv(net.input(1, 3, 10, 10), 8, name="stage1.conv"))
        y = net.relu(net.conv(y, 8, name="stage2.conv"))
        return net.model(net.head(net.conv(y, 8, name="stage2.last")))

    def test_globs_pin_the_nodes_that_they_match(self) -> None:
        result = check_cut(self.model(), ignore=["stage2.*"])
        assert set(result.pinned) == {"stage2.conv", "stage2.last", "head"}
        assert any("--ignore stage2.*" in reason for reason in result.pinned["stage2.last"])

    def test_coupled_layers_stay_together(self) -> None:
        net = Net()
        x = net.input(1, 3, 8, 8)
        y = net.op("Add", net.conv(x, 8, name="left"), net.conv(x, 8, name="right"))
        analysis, _ = analysed(net.model(net.head(net.conv(y, 5))), ignore=["right"])
        assert analysis.groups[0].nodes == ("left", "right")
        assert analysis.pinned[analysis.groups[0].units].all()

    def test_a_glob_that_matches_nothing_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match=r"'stage2\.cnv' matches no node.*stage2\.conv"):
            analysed(self.model(), ignore=["stage2.cnv"])
