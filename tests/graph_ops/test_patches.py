"""A layer as a matrix: the sampled columns times the weights are what the layer computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.obs import Gram, solve
from prune_onnx.graph_ops.patches import ChannelLayer, Layer, unit_columns

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


TRANSPOSED = {
    "stride 2": {"shape": (4, 5, 6), "weight": (4, 3, 2, 2), "strides": [2, 2]},
    "overlapping, padded": {"shape": (4, 5, 6), "weight": (4, 3, 4, 3), "strides": [2, 1], "pads": [1, 1, 1, 0]},
    "output padding": {"shape": (4, 5, 5), "weight": (4, 3, 3, 3), "strides": [2, 3], "output_padding": [1, 2]},
    "dilated": {"shape": (3, 6, 6), "weight": (3, 5, 2, 3), "dilations": [2, 3], "strides": [2, 2]},
    "grouped": {"shape": (6, 4, 4), "weight": (6, 2, 3, 3), "group": 3, "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "same upper": {"shape": (3, 5, 5), "weight": (3, 4, 3, 3), "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "same lower": {"shape": (3, 5, 5), "weight": (3, 4, 3, 3), "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    "1-D": {"shape": (4, 9), "weight": (4, 5, 4), "strides": [3], "pads": [2, 1]},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_convolution_equals_columns_times_matrix(case, bias):
    net = Net(opset=17)
    options = dict(case)
    weight = net.random(*options.pop("weight"))
    constants = [net.const(weight)]
    if bias:
        constants.append(net.const(net.random(weight.shape[1] * options.get("group", 1))))
    model = net.model(net.op("ConvTranspose", net.input(2, *options.pop("shape")), *constants, **options))
    layer, x, out = read(net, model)
    positions = layer.sample_positions(out.shape, 23, np.random.default_rng(0))
    columns, targets = layer.columns(x, out.shape, positions), layer.targets(out, positions)
    assert columns.shape[2] == layer.width
    np.testing.assert_allclose(np.einsum("gmd,god->gmo", columns, layer.matrix()), targets, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.tensors(layer.matrix())[0], weight)


def read(net: Net, model: onnx.ModelProto) -> tuple[Layer, np.ndarray, np.ndarray]:
    """The only layer of a model, a random input and the output."""
    graph = Graph(model)
    node = graph.nodes[-1]
    x = net.random(*(d.dim_value for d in graph.inputs[0].type.tensor_type.shape.dim))
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return Layer(node, graph.constant(node.inputs[1]), bias), x, outputs_of(model, {"x": x})[0]


@pytest.mark.parametrize("kind", ["conv", "gemm", "matmul"])
def test_channels_of_a_wide_layer_hand_their_weights_on(kind):
    """The third input channel is a sum of others and a constant: without it the layer computes what it did."""
    net = Net()
    if kind == "conv":
        shape = (3, 4, 5, 5)
        model = net.model(net.conv(net.input(*shape), 6, 3))
    else:
        shape = (3, 4 * 9)
        model = net.model(net.gemm(net.input(*shape), 6) if kind == "gemm" else net.matmul(net.input(*shape), 6))
    plain, x, _ = read(net, model)
    channels = x.reshape(3, 4, -1)
    channels[:, 2] = 0.5 * channels[:, 0] - 2 * channels[:, 3] + 0.25
    layer = ChannelLayer(plain.node, plain.weight, plain.bias, 1 if kind == "conv" else 9)
    where = layer.sample_positions(x.shape, 1000, np.random.default_rng(0))
    columns, targets = layer.columns(x, x.shape, where)[0], layer.targets(x, where)[0]
    np.testing.assert_allclose(columns.astype(np.float64) @ layer.matrix()[0].T, targets, rtol=1e-5)
    use = np.asarray([True, True, False, True, True])
    fitted = solve(Gram.of(columns, targets), layer.matrix()[0], use, 1e-9)
    weight, bias = layer.tensors(fitted[None])
    new = Layer(plain.node, weight, bias).matrix()[0]
    out = np.prod(x.shape[2:], dtype=int)
    assert not new[:, :-1].reshape(6, 4, -1)[:, 2].any()
    every = np.arange(9 if kind == "conv" else out)
    y = (3, 6, 3, 3) if kind == "conv" else (3, 6)
    rows = plain.columns(x, y, every)[0]
    np.testing.assert_allclose(rows @ new.T, rows @ plain.matrix()[0].T, rtol=1e-4, atol=1e-4)


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


def test_columns_of_units_that_feed_different_numbers_of_channels():
    labels = np.asarray([4, 7, 4, 9])
    np.testing.assert_array_equal(
        unit_columns(labels, 2, np.asarray([4, 9, 5])), [[0, 1, 4, 5], [6, 7, -1, -1], [-1, -1, -1, -1]]
    )
