"""Layers get constants of their own and compute what they did."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from prune_onnx.graph_ops.unshare import own_operands

from .builder import Net, analysed, distance, outputs_of


def check_own(model: onnx.ModelProto) -> onnx.ModelProto:
    before = model.SerializeToString()
    analysis, (feeds, *_) = analysed(model)[:2]
    result = own_operands(model, analysis.probe.shapes)
    assert model.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    for a, b in zip(outputs_of(model, feeds), outputs_of(result, feeds), strict=True):
        assert distance(a, b) < 1e-5
    layers = [n for n in result.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm")]
    reads = [name for n in result.graph.node for name in n.input]
    for node in layers:
        assert len(node.input) == 3
        assert all(reads.count(name) == 1 for name in node.input[1:])
    return result


@pytest.mark.parametrize(("ir", "opset"), [(8, 17), (3, 9)])
def test_shared_weights_and_missing_biases(ir: int, opset: int) -> None:
    net = Net(ir=ir, opset=opset)
    x = net.conv(net.input(2, 4, 6, 6), 4, pads=[1, 1, 1, 1], bias=False)
    weight, bias = net.const(net.random(4, 4, 3, 3)), net.const(net.random(4))
    x = net.op("Conv", net.op("Conv", x, weight, bias), weight, bias)
    x = net.op("ConvTranspose", x, net.random(4, 3, 2, 2), group=2)
    check_own(net.model(net.gemm(net.op("Flatten", x), 5)))


@pytest.mark.parametrize("swapped", [False, True])
def test_matmul_with_a_bias_behind_it_is_a_gemm(swapped: bool) -> None:
    net = Net()
    x = net.matmul(net.input(3, 7), 6)
    bias = net.const(net.random(6))
    x = net.op("Add", *((bias, x) if swapped else (x, bias)))
    result = check_own(net.model(net.op("Add", net.matmul(net.relu(x), 4), net.random(3, 4))))
    assert [n.op_type for n in result.graph.node] == ["Gemm", "Relu", "Gemm", "Add"]


def test_products_of_three_axes_and_of_activations_stay() -> None:
    net = Net()
    x = net.matmul(net.input(2, 5, 7), 6)
    y = net.op("MatMul", x, net.op("Transpose", x, perm=[0, 2, 1]), dims=[2, 5, 5])
    model = net.model(y)
    assert [n.op_type for n in check_own(model).graph.node] == ["MatMul", "Transpose", "MatMul"]


def test_a_matmul_that_is_an_output_keeps_it() -> None:
    net = Net()
    x = net.matmul(net.input(3, 7), 6)
    check_own(net.model(x, net.op("Add", x, net.random(6))))


def test_a_weight_that_is_an_output_is_copied() -> None:
    net = Net()
    model = net.model(net.conv(net.input(1, 3, 5, 5), 4))
    name = net.nodes[0].input[1]
    model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 3, 3, 3]))
    result = own_operands(model, analysed(model)[0].probe.shapes)
    assert result.graph.node[0].input[1] != name
    feeds = {"x": np.ones((1, 3, 5, 5), np.float32)}
    np.testing.assert_array_equal(outputs_of(model, feeds)[1], outputs_of(result, feeds)[1])
