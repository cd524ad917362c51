"""A cut changes what it must and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from prune_onnx.graph_ops.assembly import live_nodes
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.errors import PlanError
from prune_onnx.graph_ops.graph import Graph

from .builder import Net, analysed, check_cut, random_keep, value_info
from .test_fold import assert_carried, decorate


def model() -> onnx.ModelProto:
    net = Net()
    y = net.relu(net.bn(net.conv(net.input("N", 3, 8, 8), 8, name="cut")))
    y = net.conv(y, 6, name="reader")
    y = net.op("Reshape", y, [0, 6, -1])
    y = net.gemm(net.op("ReduceMean", y, axes=[2], keepdims=0), 7, name="untouched")
    return net.model(net.gemm(net.relu(y), 5, name="head"))


def initializers(m: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in m.graph.initializer}


class TestNothingIsLost:
    def test_what_the_model_carries(self) -> None:
        original = model()
        decorate(original)
        result = check_cut(original, ignore=["untouched"]).model
        assert_carried(result, original)
        assert [n.name for n in result.graph.node] == [n.name for n in original.graph.node]
        for new, old in zip(result.graph.node, original.graph.node, strict=True):
            assert new.doc_string == old.doc_string
            assert new.metadata_props == old.metadata_props
            assert new.output == old.output
            assert new.attribute == old.attribute
        for name, tensor in initializers(result).items():
            if name in initializers(original):
                assert tensor.doc_string == initializers(original)[name].doc_string

    def test_weights_that_nothing_cuts_stay_bit_for_bit(self) -> None:
        original = model()
        result = check_cut(original, ignore=["untouched", "reader"]).model
        old, new = initializers(original), initializers(result)
        for node in ("untouched", "head"):
            for name in next(n for n in original.graph.node if n.name == node).input[1:]:
                assert new[name].SerializeToString() == old[name].SerializeToString()

    def test_a_cut_of_nothing_is_the_model(self) -> None:
        original = model()
        decorate(original)
        original = value_info(original)
        analysis, _ = analysed(original)
        result = cut(analysis, np.ones(analysis.units, bool))
        assert result.SerializeToString(deterministic=True) == original.SerializeToString(deterministic=True)

    def test_the_source_is_not_changed(self) -> None:
        original = model()
        before = original.SerializeToString(deterministic=True)
        analysis, _ = analysed(original)
        held = analysis.graph.model.SerializeToString(deterministic=True)
        cut(analysis, random_keep(analysis, 0, 0.5))
        assert analysis.graph.model.SerializeToString(deterministic=True) == held
        assert original.SerializeToString(deterministic=True) == before

    def test_unused_initializers_stay(self) -> None:
        original = model()
        original.graph.initializer.append(numpy_helper.from_array(np.arange(4, dtype=np.float32), "anchors"))
        result = check_cut(original, predict=("macs",)).model
        assert "anchors" in initializers(result)

    def test_values_keep_their_numbers(self) -> None:
        """A sliced weight holds the original's numbers, not recomputed ones."""
        original = model()
        result = check_cut(original)
        group = next(g for g in result.analysis.groups if g.name == "cut")
        kept = result.keep[group.units]
        name = next(n for n in original.graph.node if n.name == "cut").input[1]
        old = numpy_helper.to_array(initializers(original)[name])
        np.testing.assert_array_equal(numpy_helper.to_array(initializers(result.model)[name]), old[kept])

    def test_quantisation_annotations(self) -> None:
        original = model()
        for name in ("cut_out", "relu0_out"):
            note = original.graph.quantization_annotation.add(tensor_name=name)
            note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=original.graph.initializer[0].name)
        result = check_cut(original).model
        assert list(result.graph.quantization_annotation) == list(original.graph.quantization_annotation)


class TestStoredShapes:
    @pytest.mark.parametrize("seed", range(3))
    def test_they_are_right_afterwards(self, seed: int) -> None:
        original = value_info(model())
        assert len(original.graph.value_info) >= 6
        result = check_cut(original, seed=seed).model
        assert {i.name for i in result.graph.value_info} == {i.name for i in original.graph.value_info}
        del original.graph.value_info[:]
        bare = onnx.ModelProto()
        bare.CopyFrom(result)
        del bare.graph.value_info[:]
        inferred = {i.name: i for i in shape_inference.infer_shapes(bare, strict_mode=True).graph.value_info}
        for info in result.graph.value_info:
            dims = [d.dim_value or d.dim_param for d in info.type.tensor_type.shape.dim]
            assert dims == [d.dim_value or d.dim_param for d in inferred[info.name].type.tensor_type.shape.dim]

    def test_shapes_of_tensors_that_are_gone_go(self) -> None:
        net = Net()
        y = net.conv(net.input(1, 3, 8, 8), 8)
        net.relu(net.conv(y, 4, name="dead_end"))
        original = value_info(net.model(net.head(y)))
        result = check_cut(original, predict=()).model
        assert "dead_end" not in {n.name for n in result.graph.node}
        assert "dead_end_out" not in {i.name for i in result.graph.value_info}

    def test_stored_shapes_of_weights(self) -> None:
        """Some exporters list the initializers among them."""
        original = model()
        for t in original.graph.initializer:
            original.graph.value_info.append(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
        result = check_cut(original).model
        stored = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in result.graph.value_info}
        for name, tensor in initializers(result).items():
            assert stored.get(name, list(tensor.dims)) == list(tensor.dims)


class TestNames:
    def test_two_slices_of_one_weight_get_two_names(self) -> None:
        net = Net()
        weight = net.const(net.random(8, 8, 3, 3, scale=0.1), name="shared")
        net.const(np.zeros(1, np.float32), name="shared_cut1")  # the obvious new name is taken
        y = net.conv(net.relu(net.conv(net.input(1, 3, 10, 10), 8)), 8, weight=weight, name="first")
        result = check_cut(net.model(net.head(net.conv(y, 8, weight=weight, name="second"))), predict=("macs",))
        names = [t.name for t in result.model.graph.initializer]
        assert len(names) == len(set(names))
        first, second = (
            next(n for n in result.model.graph.node if n.name == name).input[1] for name in ("first", "second")
        )
        assert first != second

    def test_one_slice_of_one_weight_keeps_the_name(self) -> None:
        net = Net()
        weight = net.const(net.random(8, 3, 3, 3), name="shared")
        x = net.input(1, 3, 8, 8)
        y = net.op("Add", net.conv(x, 8, weight=weight), net.conv(net.relu(x), 8, weight=weight))
        result = check_cut(net.model(net.head(y)))
        assert list(initializers(result.model)["shared"].dims) == [4, 3, 3, 3]

    def test_nodes_without_names(self) -> None:
        original = model()
        for node in original.graph.node:
            node.name = ""
        assert check_cut(original).pinned.keys() == {"Gemm(head_out)"}


class TestOldFiles:
    def test_initializers_stay_inputs(self) -> None:
        net = Net(ir=3, opset=9)
        y = net.conv(net.input(1, 3, 8, 8), 8, weight=net.op("Identity", net.random(8, 3, 3, 3)))
        result = check_cut(net.model(net.head(net.conv(y, 6)))).model
        listed = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in result.graph.input}
        for tensor in result.graph.initializer:
            assert listed[tensor.name] == list(tensor.dims)
        assert set(listed) == {"x"} | {t.name for t in result.graph.initializer}

    def test_nodes_out_of_order(self) -> None:
        original = model()
        nodes = list(original.graph.node)[::-1]
        del original.graph.node[:]
        original.graph.node.extend(nodes)
        graph = Graph(original)
        assert [n.name for n in graph.nodes] == [n.name for n in model().graph.node]


class TestRefusals:
    def test_pinned_units_cannot_go(self) -> None:
        analysis, _ = analysed(model())
        with pytest.raises(PlanError, match="pinned"):
            cut(analysis, np.zeros(analysis.units, bool))

    def test_a_keep_set_of_another_model(self) -> None:
        analysis, _ = analysed(model())
        with pytest.raises(PlanError, match="another model"):
            cut(analysis, np.ones(analysis.units + 1, bool))

    def test_every_axis_keeps_a_position(self) -> None:
        analysis, _ = analysed(model())
        keep = np.ones(analysis.units, bool)
        keep[analysis.groups[0].units] = False
        with pytest.raises(PlanError, match="every channel"):
            cut(analysis, keep)


def test_position_codes_spread_over_the_image_are_cut() -> None:
    """Constants spread over a dynamic size have no one value to slice; they are cut where they come from."""
    net = Net()
    y = net.conv(net.input("N", 3, "H", "W"), 8, name="stem", pads=[1, 1, 1, 1])
    codes = net.op("Expand", net.random(1, 8, 1, 1), net.op("Shape", y))
    y = net.conv(net.relu(net.op("Add", y, codes)), 6, name="free")
    result = check_cut(net.model(net.head(y)))
    assert set(result.pinned) == {"head"}
    assert "Expand" in result.touched


def test_a_view_by_strides_over_a_dynamic_batch_is_cut() -> None:
    """The dynamo exporter writes such a view as a flat copy and an index that counts through it."""
    net = Net()
    y = net.op("GlobalAveragePool", net.conv(net.input("N", 3, 6, 6), 8, name="stem"))
    batch = net.op("Squeeze", net.op("Slice", net.op("Shape", y), [0], [1]), [0])
    rows = net.op("Mul", net.op("Range", net.const(np.int64(0)), batch, net.const(np.int64(1))), net.const(np.int64(8)))
    index = net.op("Add", net.op("Unsqueeze", rows, [1]), np.arange(8).reshape(1, 8))
    y = net.op("Gather", net.op("Reshape", y, [-1]), index, axis=0)
    result = check_cut(net.model(net.gemm(y, 5, name="head")))
    assert set(result.pinned) == {"head"}
    assert "Gather" in result.touched


def test_live_nodes() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Abs", ["x"], ["b"]),
        helper.make_node("Neg", ["a"], ["c"]),
        helper.make_node("Sin", ["b"], ["d"]),
    ]
    assert [n.op_type for n in live_nodes(nodes, ["c"])] == ["Relu", "Neg"]
    body = helper.make_graph(
        [helper.make_node("Neg", ["b"], ["z"])],
        "body",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    nodes.append(helper.make_node("If", ["flag"], ["e"], then_branch=body, else_branch=body))
    assert [n.op_type for n in live_nodes(nodes, ["e"])] == ["Abs", "If"]
