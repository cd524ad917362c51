"""The probe run: shapes, static values, one sample a channel, at one and at another size."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from prune_onnx.graph_ops.errors import ConfigError, ModelError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.pipeline.probing import OTHER_BATCH, SIDES, input_shapes, probe, random_feeds

from ..graph_ops.builder import Net, run_ort


def convolution(*dims: int | str) -> Net:
    net = Net()
    net.conv(net.input(*dims), 6, name="conv", pads=[1, 1, 1, 1])
    return net


def test_every_tensor_has_a_shape_and_a_line_per_axis() -> None:
    net = convolution(1, 3, 8, 6)
    graph = Graph(net.model(net.head("conv_out")))
    found, feeds, other = probe(graph)
    names = [name for node in graph.nodes for name in node.outputs]
    arrays = dict(zip(names, run_ort(graph.model, feeds, names), strict=True)) | feeds
    assert other is None
    assert not found.varying
    assert not found.other_shapes
    for name, array in arrays.items():
        assert found.shapes[name] == array.shape
        for axis, line in enumerate(found.lines[name]):
            index = [0] * array.ndim
            index[axis] = slice(None)
            np.testing.assert_array_equal(line, array[tuple(index)])
    for name, tensor in graph.initializers.items():
        assert found.shapes[name] == tuple(tensor.dims)


def test_static_values_are_known() -> None:
    net = Net()
    x = net.input(1, 3, 8, 6)
    stored = net.random(3, 6, 1, 1)
    weight = net.op("Transpose", stored, perm=[1, 0, 2, 3])
    y = net.conv(x, 6, 1, weight=weight)
    size = net.op("Shape", y)
    graph = Graph(net.model(net.head(y), size))
    found, _, _ = probe(graph)
    assert set(found.values) == {weight, size}
    np.testing.assert_array_equal(found.values[size], [1, 6, 8, 6])
    np.testing.assert_array_equal(found.values[weight], stored.transpose(1, 0, 2, 3))


def test_two_sizes_of_a_dynamic_model() -> None:
    net = convolution("N", 3, "H", "W")
    size = net.op("Shape", "conv_out")
    graph = Graph(net.model(net.head("conv_out"), size))
    found, feeds, other = probe(graph)
    assert feeds["x"].shape == (1, 3, SIDES[0], SIDES[0])
    assert other is not None
    assert other["x"].shape == (OTHER_BATCH, 3, SIDES[0] + 32, SIDES[0] + 32)
    assert found.varying == {size}
    assert found.moving_axes("conv_out") == [True, False, True, True]
    assert found.moving_axes("head_out") == [True, False]


def test_a_model_that_takes_one_size_only() -> None:
    """Open in the file, fixed inside: the first size that runs is taken."""
    net = convolution("N", 3, "H", "W")
    flat = net.op("Reshape", "conv_out", [0, 6 * 32 * 32])
    _, feeds, other = probe(Graph(net.model(net.gemm(flat, 5))))
    assert feeds["x"].shape == (1, 3, 32, 32)
    assert other is not None
    assert other["x"].shape == (OTHER_BATCH, 3, 32, 32)


def test_a_batch_that_is_fixed_inside() -> None:
    net = convolution("N", 3, 8, 8)
    flat = net.op("Reshape", "conv_out", [1, 6 * 64])
    found, feeds, other = probe(Graph(net.model(net.gemm(flat, 5))))
    assert feeds["x"].shape == (1, 3, 8, 8)
    assert other is None or other["x"].shape == (1, 3, 8, 8)
    assert not found.varying


def test_shapes_can_be_given() -> None:
    net = convolution("N", 3, "H", "W")
    graph = Graph(net.model(net.head("conv_out")))
    _, feeds, other = probe(graph, {"x": (1, 3, 20, 12)})
    assert feeds["x"].shape == (1, 3, 20, 12)
    assert other is not None
    assert other["x"].shape == (OTHER_BATCH, 3, 20, 12)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"y": (1, 3, 8, 8)}, "no input 'y'; its inputs are x"),
        ({"x": (1, 3, 8)}, "1x3x8 does not fit the model's"),
        ({"x": (1, 4, 8, 8)}, r"1x4x8x8 does not fit the model's \?x3x\?x\?"),
    ],
)
def test_shapes_that_do_not_fit(given: dict, match: str) -> None:
    net = convolution("N", 3, "H", "W")
    with pytest.raises(ConfigError, match=match):
        probe(Graph(net.model(net.head("conv_out"))), given)


def test_the_same_seed_gives_the_same_inputs() -> None:
    graph = Graph(convolution(1, 3, 8, 8).model("conv_out"))
    shapes = input_shapes(graph, {}, batch=1, side=8)
    one, two, other = (random_feeds(graph, shapes, seed)["x"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_integers_and_booleans_are_small() -> None:
    net = Net()
    net.input(2, 3, name="tokens", dtype=np.int64)
    net.input(2, 3, name="mask", dtype=np.bool_)
    feeds = random_feeds(
        Graph(net.model(net.op("Where", "mask", "tokens", np.zeros((2, 3), np.int64)))),
        {"tokens": (2, 3), "mask": (2, 3)},
    )
    assert feeds["tokens"].dtype == np.int64
    assert set(np.unique(feeds["tokens"])) <= {0, 1}
    assert feeds["mask"].dtype == np.bool_


def test_a_model_that_does_not_run() -> None:
    net = convolution(1, 3, 8, 8)
    flat = net.op("Reshape", "conv_out", [1, 385], dims=[1, 385])
    model = net.model(net.gemm(flat, 5))
    with pytest.raises(ModelError, match="does not run in ONNX Runtime") as caught:
        probe(Graph(model))
    assert "\n" not in str(caught.value)
    assert "--input-shape" not in str(caught.value)


def test_a_dynamic_model_that_does_not_run_asks_for_a_shape() -> None:
    net = convolution("N", 3, "H", "W")
    flat = net.op("Reshape", "conv_out", [1, 6 * 37 * 41])
    model = net.model(net.gemm(flat, 5))
    with pytest.raises(ModelError, match="--input-shape"):
        probe(Graph(model))
    assert probe(Graph(model), {"x": (1, 3, 37, 41)})[1]["x"].shape == (1, 3, 37, 41)


def test_sequences_have_no_shape() -> None:
    net = convolution(1, 3, 8, 8)
    sequence = net.op("SequenceConstruct", "conv_out", "conv_out")
    y = net.op("ConcatFromSequence", sequence, axis=1, dims=[1])
    net.types[y].CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, [1, 12, 8, 8]))
    found, _, _ = probe(Graph(net.model(net.head(y))))
    assert sequence not in found.shapes
    assert found.shapes[y] == (1, 12, 8, 8)


def test_inputs_that_are_no_tensors_are_refused() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [1]))
    value = onnx.ValueInfoProto(name="s", type=kind)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(
        helper.make_graph([helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0)], "g", [value], [out]),
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17)],
    )
    with pytest.raises(ModelError, match="input 's' is not a tensor"):
        probe(Graph(model))
