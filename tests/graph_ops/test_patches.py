"""A layer as a matrix: the sampled columns times the weights are what the layer computes."""

from __future__ import annotations

import numpy as np
import pytest

from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.patches import Layer

from .builder import Net, outputs_of

CASES = {
    "3x3 padded": {"shape": (4, 7, 6), "channels": 5, "kernel": 3, "pads": [1, 1, 1, 1]},
    "stride and uneven pads": {"shape": (4, 9, 8), "channels": 5, "kernel": 3, "pads": [0, 1, 2, 1], "strides": [2, 3]},
    "dilated": {"shape": (3, 9, 9), "channels": 4, "kernel": [3, 2], "dilations": [2, 3]},
    "same upper": {"shape": (3, 7, 8), "channels": 4, "kernel": 2, "auto_pad": "SAME_UPPER"},
    "same lower, stride": {"shape": (3, 7, 8), "channels": 4, "kernel": 3, "auto_pad": "SAME_LOWER", "strides": [2, 2]},
    "grouped": {"shape": (6, 5, 5), "channels": 9, "kernel": 3, "group": 3, "pads": [1, 1, 1, 1]},
    "depthwise": {"shape": (6, 5, 5), "channels": 12, "kernel": 3, "group": 6},
    "1-D": {"shape": (4, 11), "channels": 5, "kernel": 3, "pads": [2, 0]},
    "3-D without bias": {"shape": (2, 4, 5, 4), "channels": 3, "kernel": 2, "bias": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_convolution_equals_columns_times_matrix(case):
    net = Net(opset=17)
    options = dict(case)
    y = net.conv(net.input(2, *options.pop("shape")), options.pop("channels"), options.pop("kernel"), **options)
    model = net.model(y)
    graph = Graph(model)
    node = graph.nodes[0]
    x = net.random(*(d.dim_value for d in graph.inputs[0].type.tensor_type.shape.dim))
    out = outputs_of(model, {"x": x})[0]
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    layer = Layer(node, graph.constant(node.inputs[1]), bias)
    rng = np.random.default_rng(0)
    positions = layer.sample_positions(out.shape, 7, rng)
    assert len(set(positions.tolist())) == len(positions) == min(7, int(np.prod(out.shape[2:])))
    columns, targets = layer.columns(x, out.shape, positions), layer.targets(out, positions)
    assert columns.shape[2] == layer.width
    np.testing.assert_allclose(np.einsum("gmd,god->gmo", columns, layer.matrix()), targets, rtol=1e-5, atol=1e-5)
    weight, new_bias = layer.tensors(layer.matrix())
    np.testing.assert_array_equal(weight, layer.weight)
    np.testing.assert_array_equal(new_bias, 0 if bias is None else bias)


@pytest.mark.parametrize("kind", ["gemm", "gemm transB", "matmul"])
def test_product_equals_rows_times_matrix(kind):
    net = Net()
    if kind == "matmul":
        y = net.matmul(net.input(2, 3, 6), 4)
    else:
        y = net.gemm(net.input(5, 6), 4, transB=1 if "transB" in kind else None)
    model = net.model(y)
    graph = Graph(model)
    node = graph.nodes[0]
    x = net.random(*(d.dim_value for d in graph.inputs[0].type.tensor_type.shape.dim))
    out = outputs_of(model, {"x": x})[0]
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    layer = Layer(node, graph.constant(node.inputs[1]), bias)
    positions = layer.sample_positions(out.shape, 100, np.random.default_rng(0))
    columns, targets = layer.columns(x, out.shape, positions), layer.targets(out, positions)
    np.testing.assert_allclose(np.einsum("gmd,god->gmo", columns, layer.matrix()), targets, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.tensors(layer.matrix())[0], layer.weight)
