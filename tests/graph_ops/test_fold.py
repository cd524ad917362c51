"""BatchNormalization folded into the sum in front of it, and nothing else changed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune_onnx.graph_ops import gammas, model_io
from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.graph_ops.fold import fold_batch_norm
from prune_onnx.graph_ops.graph import Graph

from .builder import Net, Runner, distance, outputs_of, run_ort, run_reference


def check_fold(model: onnx.ModelProto, count: int = 1, runner: Runner = run_ort) -> onnx.ModelProto:
    """Fold; the outputs stay, ``count`` nodes go."""
    before = model.SerializeToString()
    folded, done = fold_batch_norm(model)
    assert model.SerializeToString() == before
    assert done == count
    assert ops(folded).count("BatchNormalization") == ops(model).count("BatchNormalization") - count
    assert [o.name for o in folded.graph.output] == [o.name for o in model.graph.output]
    model_io.check(folded, model)
    onnx.checker.check_model(folded, full_check=True)
    rng = np.random.default_rng(5)
    feeds = {}
    for value in model.graph.input:
        if value.name in {t.name for t in model.graph.initializer}:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value or 2 for d in kind.shape.dim]
        feeds[value.name] = rng.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    for a, b in zip(outputs_of(model, feeds, runner), outputs_of(folded, feeds, runner), strict=True):
        assert distance(a, b) <= (1e-12 if a.dtype == np.float64 else 1e-5)
    return folded


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conv(bias: bool, dtype: type) -> None:
    """Any padding: the normalisation comes after the sum."""
    net = Net(dtype=dtype)
    y = net.relu(net.bn(net.conv(net.input(1, 3, 7, 7), 8, bias=bias, pads=[1, 1, 1, 1])))
    y = net.relu(net.bn(net.conv(y, 8, bias=bias, group=2, strides=[2, 2])))
    model = net.model(net.head(net.bn(net.conv(y, 8, 1, group=8, bias=bias))))
    folded = check_fold(model, 3, run_reference if dtype == np.float64 else run_ort)
    assert ops(folded) == ["Conv", "Relu", "Conv", "Relu", "Conv", "GlobalAveragePool", "Flatten", "Gemm"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_conv_transpose(bias: bool, group: int) -> None:
    net = Net()
    y = net.conv(net.input(1, 3, 6, 6), 8)
    y = net.bn(net.conv_transpose(y, 12, 3, group=group, bias=bias, strides=[2, 2]))
    check_fold(net.model(net.conv(net.relu(y), 2)))


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(
    "bias",
    [
        False,
        True,
        np.full((1, 10), 0.3, np.float32),
        np.float32(0.2),
        np.linspace(0, 1, 30, dtype=np.float32).reshape(3, 10),
    ],
    ids=["none", "vector", "row", "scalar", "matrix"],
)
def test_gemm(bias: object, trans_b: int) -> None:
    net = Net()
    bias = net.const(bias) if isinstance(bias, np.ndarray | np.generic) else bias
    y = net.bn(net.gemm(net.input(3, 6), 10, bias=bias, transB=trans_b))
    check_fold(net.model(net.gemm(net.relu(y), 4)))


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}])
def test_scaled_gemm_is_left_alone(attributes: dict) -> None:
    net = Net()
    check_fold(net.model(net.gemm(net.bn(net.gemm(net.input(3, 6), 10, **attributes)), 4)), 0)


def test_another_reader_of_the_sum_prevents_it() -> None:
    net = Net()
    y = net.conv(net.input(1, 3, 7, 7), 8)
    check_fold(net.model(net.head(net.op("Add", net.bn(y), y))), 0)


def test_two_norms_of_one_sum_prevent_it() -> None:
    net = Net()
    y = net.conv(net.input(1, 3, 7, 7), 8)
    check_fold(net.model(net.head(net.op("Add", net.bn(y), net.bn(y)))), 0)


def test_a_sum_that_is_an_output_prevents_it() -> None:
    net = Net()
    y = net.conv(net.input(1, 3, 7, 7), 8)
    check_fold(net.model(net.head(net.bn(y)), y), 0)


def test_a_body_that_reads_the_sum_prevents_it() -> None:
    net = Net()
    y = net.conv(net.input(1, 3, 6, 6), 8)
    bodies = [
        helper.make_graph(
            [helper.make_node(op, [y], ["out"], name=op)],
            op,
            [],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        )
        for op in ("Neg", "Abs")
    ]
    condition = net.op("Greater", net.op("ReduceMax", "x", keepdims=0), net.const(0.0))
    beside = net.op("If", condition, dims=[1, 8, 4, 4], then_branch=bodies[0], else_branch=bodies[1])
    net.types[beside].tensor_type.elem_type = TensorProto.FLOAT
    check_fold(net.model(net.head(net.op("Add", net.bn(y), beside))), 0)


def test_a_norm_without_a_sum_in_front_stays() -> None:
    net = Net()
    y = net.bn(net.relu(net.conv(net.input(1, 3, 7, 7), 8)))
    check_fold(net.model(net.head(net.bn(net.op("Concat", y, y, axis=1)))), 0)


def test_the_norms_name_lives_on() -> None:
    """The tensor behind the norm may be an output, or be asked for by name."""
    net = Net()
    y = net.bn(net.conv(net.input("N", 3, 7, 7), 8))
    folded = check_fold(net.model(y))
    assert folded.graph.node[0].output[0] == y
    assert folded.graph.node[0].name == "conv0"


def test_a_weight_shared_by_two_convs_is_folded_for_each() -> None:
    net = Net()
    weight = net.const(net.random(8, 8, 1, 1))
    y = net.conv(net.input(1, 3, 6, 6), 8)
    one, two = (net.bn(net.conv(y, 8, weight=weight, bias=False)) for _ in range(2))
    check_fold(net.model(net.head(net.op("Add", one, two))), 2)


def test_what_the_model_carries_is_kept() -> None:
    net = Net()
    y = net.relu(net.bn(net.conv(net.input(1, 3, 7, 7), 8)))
    model = net.model(net.head(net.bn(net.conv(y, 6))))
    decorate(model)
    folded = check_fold(model, 2)
    assert set(gammas.read(folded)) == {n.output[0] for n in model.graph.node if n.op_type == "BatchNormalization"}
    gammas.write(folded, {})
    assert_carried(folded, model)
    for node in folded.graph.node:
        old = next(n for n in model.graph.node if n.name == node.name)
        assert node.doc_string == old.doc_string
        assert node.metadata_props == old.metadata_props
    for tensor in folded.graph.initializer:
        old = next((t for t in model.graph.initializer if t.name == tensor.name), None)
        assert old is None or tensor == old


def decorate(model: onnx.ModelProto) -> None:
    """Fill in everything that a model can carry beside its graph."""
    model.doc_string, model.domain, model.model_version = "a doc", "net.example", 7
    model.producer_name, model.producer_version = "maker", "1.2"
    model.metadata_props.add(key="labels", value="cat,dog")
    model.graph.name, model.graph.doc_string = "graph name", "graph doc"
    model.graph.metadata_props.add(key="scope", value="root")
    model.graph.input[0].doc_string = "an image"
    model.graph.input[0].type.denotation = "IMAGE"
    for node in model.graph.node:
        node.doc_string = f"doc of {node.name}"
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"scope of {node.name}")
    for tensor in model.graph.initializer:
        tensor.doc_string = f"doc of {tensor.name}"


def assert_carried(result: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """What belongs to the model and not to a node or tensor."""
    for field in (
        "ir_version",
        "opset_import",
        "doc_string",
        "domain",
        "model_version",
        "producer_name",
        "producer_version",
        "metadata_props",
    ):
        assert getattr(result, field) == getattr(model, field), field
    for field in ("name", "doc_string", "metadata_props", "input", "output"):
        assert getattr(result.graph, field) == getattr(model.graph, field), field


def test_initializers_that_are_inputs() -> None:
    net = Net(ir=3, opset=9)
    folded = check_fold(net.model(net.head(net.bn(net.conv(net.input(1, 3, 7, 7), 8)))))
    assert {t.name for t in folded.graph.initializer} <= {i.name for i in folded.graph.input}


def test_stored_shapes_stay_true() -> None:
    net = Net()
    model = net.model(net.head(net.bn(net.conv(net.input(1, 3, 7, 7), 8))))
    model = onnx.shape_inference.infer_shapes(model)
    folded = check_fold(model)
    made = {name for n in folded.graph.node for name in n.output}
    assert {i.name for i in folded.graph.value_info} <= made


def test_types_that_the_editor_would_corrupt_are_refused() -> None:
    net = Net(opset=21, ir=10)
    model = net.model(net.head(net.bn(net.conv(net.input(1, 3, 7, 7), 8))))
    model.graph.initializer.append(helper.make_tensor("packed", TensorProto.INT4, [2], [1, 2]))
    with pytest.raises(ModelError, match="cannot be made on a model with INT4 weights"):
        fold_batch_norm(model)


def test_constant_nodes_as_parameters() -> None:
    net = Net()
    y = net.conv(
        net.input(1, 3, 7, 7), 8, weight=net.op("Constant", value=numpy_helper.from_array(net.random(8, 3, 3, 3)))
    )
    check_fold(net.model(net.head(net.bn(y))))


def test_a_layer_without_a_name_is_called_the_same_afterwards() -> None:
    """Reports and ``--ignore`` know it by its output, which the BatchNormalization's takes the place of."""
    net = Net()
    model = net.model(net.relu(net.bn(net.conv(net.input(1, 3, 7, 7), 8))))
    for node in model.graph.node:
        node.name = ""
    folded = check_fold(model)
    assert [n.name for n in Graph(folded).nodes if n.op_type == "Conv"] == [
        n.name for n in Graph(model).nodes if n.op_type == "Conv"
    ]
