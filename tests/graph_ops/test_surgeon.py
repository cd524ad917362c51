"""Edits through graphsurgeon lose nothing of the model."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from prune_onnx.graph_ops.surgeon import edit

from .builder import Net, distance, outputs_of
from .test_fold import assert_carried, decorate


def model() -> onnx.ModelProto:
    net = Net()
    y = net.relu(net.bn(net.conv(net.input("N", 3, 6, 6), 8)))
    result = net.model(net.head(net.op("Identity", y, name="useless")))
    decorate(result)
    return result


def initializers(m: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in m.graph.initializer}


def test_an_edit_of_nothing_changes_nothing() -> None:
    before = model()
    after = edit(before, lambda graph: None)
    assert_carried(after, before)
    assert list(after.graph.node) == list(before.graph.node)
    assert initializers(after) == initializers(before)


def test_a_node_that_goes_takes_what_only_it_needed() -> None:
    before = onnx.shape_inference.infer_shapes(model())
    before.graph.quantization_annotation.add(tensor_name="relu0_out")
    before.graph.quantization_annotation.add(tensor_name="useless_out")

    def bypass(graph: gs.Graph) -> None:
        node = next(n for n in graph.nodes if n.name == "useless")
        reader = node.outputs[0].outputs[0]
        reader.inputs[0] = node.inputs[0]
        node.outputs.clear()

    after = edit(before, bypass)
    assert_carried(after, before)
    assert "useless" not in {n.name for n in after.graph.node}
    assert "useless_out" not in {i.name for i in after.graph.value_info}
    assert [q.tensor_name for q in after.graph.quantization_annotation] == ["relu0_out"]
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    assert distance(outputs_of(before, feeds)[0], outputs_of(after, feeds)[0]) == 0
    onnx.checker.check_model(after, full_check=True)


def test_a_new_weight_arrives() -> None:
    def double(graph: gs.Graph) -> None:
        conv = next(n for n in graph.nodes if n.op == "Conv")
        conv.inputs[1] = gs.Constant("doubled", 2 * conv.inputs[1].values)

    before = model()
    after = edit(before, double)
    np.testing.assert_array_equal(
        numpy_helper.to_array(initializers(after)["doubled"]), 2 * numpy_helper.to_array(initializers(before)["w0"])
    )
    assert "w0" not in initializers(after)
    assert next(n for n in after.graph.node if n.op_type == "Conv").doc_string == "doc of conv0"
