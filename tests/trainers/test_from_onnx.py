"""ONNX files as torch modules: the same numbers as ONNX Runtime, weights that train, and the way back into the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from onnx import numpy_helper
from torch import nn

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.rules.base import RULES
from prune_onnx.pipeline.probing import Feeds, probe
from prune_onnx.trainers.from_onnx import OnnxModule, draw_weights, trained_model
from prune_onnx.trainers.from_onnx.base import OPERATORS
from prune_onnx.trainers.masks import prunable
from prune_onnx.trainers.methods.scales import batch_norms
from prune_onnx.trainers.trace import INPUT, trace

from ..graph_ops.builder import Net, outputs_of
from ..graph_ops.cases import CASES, Case
from ..graph_ops.random_graphs import describe, networks

CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
TRAINABLE = [case for case in CASES if not {node.op_type for node in case.model().graph.node} & CONTROL_FLOW]
TOLERANCE = 1e-4
HALF = 5e-3
"""Models of half floats: torch computes in float32."""


def feeds_of(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]] | None = None, seed: int = 0) -> Feeds:
    graph = Graph(model_io.load(model))
    _, feeds, _ = probe(graph, shapes or {}, seed)
    return feeds


def run(module: OnnxModule, feeds: Feeds) -> Sequence[torch.Tensor]:
    given = [feeds[name] for name in module.input_names]
    values = module(*(torch.from_numpy(x.astype(np.float32) if x.dtype == np.float16 else x.copy()) for x in given))
    return values if isinstance(values, tuple) else (values,)


def assert_close(wanted: Sequence[np.ndarray], found: Sequence[torch.Tensor]) -> None:
    """Compare relative to the largest value of each output; integers must be equal, NaN and infinity in place."""
    for a, b in zip(wanted, found, strict=True):
        x, y = a.astype(np.float64), b.detach().numpy().astype(np.float64)
        assert x.shape == y.shape
        finite = np.isfinite(x)
        np.testing.assert_array_equal(x[~finite], y[~finite])
        if a.dtype.kind == "f":
            size = np.abs(x[finite]).max(initial=0.0) or 1.0
            assert np.abs(x - y)[finite].max(initial=0.0) <= (HALF if a.dtype == np.float16 else TOLERANCE) * size
        else:
            np.testing.assert_array_equal(x, y)


def same_outputs(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]] | None = None) -> OnnxModule:
    feeds = feeds_of(model, shapes)
    module = OnnxModule(model).eval()
    with torch.no_grad():
        assert_close(outputs_of(model, feeds), run(module, feeds))
    return module


# Parity


@pytest.mark.parametrize("case", TRAINABLE, ids=lambda case: case.name)
def test_case_gives_what_onnx_runtime_gives(case: Case) -> None:
    same_outputs(case.model(), case.check.get("shapes"))


@settings(
    max_examples=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(model=networks())
def test_random_network_gives_what_onnx_runtime_gives(model: onnx.ModelProto) -> None:
    note(describe(model))
    same_outputs(model)


@pytest.mark.parametrize("op", [op for op in RULES if op not in CONTROL_FLOW])
def test_every_operator_of_the_engine_has_a_translation(op: str) -> None:
    assert op in OPERATORS


def one_node(op: str, *inputs: object, opset: int = 17, outputs: int = 1, **attributes: object) -> onnx.ModelProto:
    """A network of one node on a map; strings are further names, arrays constants."""
    net = Net(opset=opset)
    made = net.op(op, net.input(2, 3, 7, 6), *inputs, outputs=outputs, **attributes)
    return net.model(*([made] if isinstance(made, str) else made))


SIZES = [(mode, way) for mode in ("linear", "cubic") for way in ("half_pixel", "align_corners", "asymmetric",
         "pytorch_half_pixel", "half_pixel_symmetric")]  # fmt: skip


@pytest.mark.parametrize(("mode", "way"), SIZES)
@pytest.mark.parametrize("scales", [(1, 1, 2, 1.5), (1, 1, 0.6, 0.5)], ids=["up", "down"])
def test_interpolations(mode: str, way: str, scales: tuple[float, ...]) -> None:
    same_outputs(
        one_node("Resize", "", np.array(scales, np.float32), mode=mode, coordinate_transformation_mode=way, opset=19)
    )


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("way", ["half_pixel", "align_corners", "asymmetric"])
def test_nearest_neighbours(rounding: str, way: str) -> None:
    for scales in ((1, 1, 2, 3), (1, 1, 0.5, 1.5)):
        same_outputs(
            one_node(
                "Resize", "", np.array(scales, np.float32), nearest_mode=rounding, coordinate_transformation_mode=way
            )
        )


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool", "Conv", "ConvTranspose"])
def test_automatic_padding(op: str, auto: str) -> None:
    if "Conv" in op:
        model = one_node(
            op, np.random.default_rng(0).normal(size=(3, 3, 3, 2)).astype(np.float32), auto_pad=auto, strides=[2, 1]
        )
    else:
        model = one_node(op, kernel_shape=[3, 2], strides=[2, 1], auto_pad=auto)
    same_outputs(model)


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 2, 1]], ids=str)
@pytest.mark.parametrize("ceil", [0, 1])
def test_average_pools(ceil: int, pads: list[int], include: int) -> None:
    same_outputs(
        one_node(
            "AveragePool",
            kernel_shape=[3, 3],
            strides=[2, 2],
            pads=pads,
            ceil_mode=ceil,
            count_include_pad=include,
            opset=19,
        )
    )


def test_positions_of_a_max_pool_count_through_the_whole_tensor() -> None:
    for columns_first in (0, 1):
        same_outputs(
            one_node(
                "MaxPool",
                outputs=2,
                kernel_shape=[3, 2],
                strides=[2, 2],
                pads=[1, 0, 1, 1],
                storage_order=columns_first,
            )
        )


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(op: str, gates: int, direction: str) -> None:
    net, ways, hidden = Net(opset=17), 2 if direction == "bidirectional" else 1, 5
    x = net.input(6, 2, 4)
    kernels = [net.random(ways, gates * hidden, n) for n in (4, hidden)]
    y = net.op(op, x, *kernels, net.random(ways, 2 * gates * hidden), outputs=2, hidden_size=hidden,
               direction=direction)  # fmt: skip
    assert set(same_outputs(net.model(*y)).weights) == {"w0", "w1", "w2"}


def test_another_batch_runs_through_a_file_that_fixes_one() -> None:
    """Shapes of Reshape nodes, and a class token, have the batch size written into them."""
    net = Net(opset=17)
    y = net.conv(net.input(1, 3, 6, 6), 8, 3, strides=[3, 3])
    y = net.op("Transpose", net.op("Reshape", y, [1, 8, 4]), perm=[0, 2, 1])
    y = net.op("Concat", net.random(1, 1, 8), y, axis=1)
    y = net.op("Reshape", net.op("Reshape", net.matmul(y, 6), [0, 3, -1]), [1, -1])
    model = net.model(net.matmul(y, 4))
    module = OnnxModule(model).eval()
    images = torch.randn(3, 3, 6, 6)
    alone = [outputs_of(model, {"x": image[None].numpy()})[0] for image in images]
    with torch.no_grad():
        assert_close([np.concatenate(alone)], [module(images)])


# What is trained


def classifier(**options: object) -> onnx.ModelProto:
    """Convolutions with BatchNorm, a shared kernel, Gemm and MatMul with a bias behind it; any batch size."""
    net = Net(**options)
    y = net.relu(net.bn(net.conv(net.input("N", 3, 8, 8), 6, pads=[1, 1, 1, 1], name="stem")))
    shared = net.const(net.random(6, 6, 3, 3, scale=0.2), "shared.weight")
    for _ in range(2):
        y = net.relu(net.bn(net.op("Conv", y, shared, pads=[1, 1, 1, 1])))
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    y = net.relu(net.gemm(y, 5, transB=1))
    return net.model(net.op("Add", net.matmul(y, 4), net.random(4)))


def float_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def a_step(module: OnnxModule, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.train()
    outputs = module(torch.randn(8, 3, 8, 8))
    (outputs * torch.randn_like(outputs)).sum().backward()
    optimizer.step()


def test_a_step_moves_every_weight_and_statistic_and_the_file_gets_them() -> None:
    model = classifier()
    module = OnnxModule(model)
    a_step(module)
    before, trained = float_weights(model), trained_model(module)
    after = float_weights(trained)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (after[name] != value).any(), name
    feeds = feeds_of(trained)
    with torch.no_grad():
        assert_close(outputs_of(trained, feeds), run(module.eval(), feeds))


def test_layers_are_torchs_own_for_the_methods_that_look_for_them() -> None:
    module = OnnxModule(classifier())
    layers = trace(module, torch.randn(2, 3, 8, 8))
    assert len(layers) == 4  # the shared kernel is one layer
    assert sum(isinstance(layer.module, nn.Linear) for layer in layers) == 2
    assert len(prunable(module)) == 4
    assert len(batch_norms(module)) == 3
    assert layers[0].sources == {INPUT}
    assert layers[0].norm in batch_norms(module)
    assert {"shared.weight"} <= dict(module.named_parameters()).keys()


def test_what_is_shared_in_the_file_is_one_parameter() -> None:
    module = OnnxModule(classifier())
    assert len(list(module.parameters())) == len(module.parameters_by_name) == len(module.weights)


def test_statistics_that_the_file_writes_once_become_each_layers_own() -> None:
    """Exporters merge equal tensors: fresh BatchNorms have the same mean, and zero biases, in one initializer."""
    net = Net(opset=17)
    zeros, ones = (net.const(np.full(6, v, np.float32), n) for v, n in ((0, "zeros"), (1, "ones")))
    y = net.input("N", 3, 8, 8)
    for _ in range(2):
        y = net.conv(y, 6, bias=False)
        y = net.op("BatchNormalization", y, net.const(net.positive(6)), zeros, zeros, ones)
    model = net.model(net.head(y))
    module = OnnxModule(model)
    a_step(module)
    trained = trained_model(module)
    model_io.check(trained)
    feeds = feeds_of(trained)
    with torch.no_grad():
        assert_close(outputs_of(trained, feeds), run(module.eval(), feeds))
    assert [i.name for i in trained.graph.input] == ["x"]


def test_numbers_of_formulas_masks_and_tables_stay_as_they_are() -> None:
    net = Net(opset=17)
    x = net.input("N", 3, 8, 8)
    y = net.op("Sub", x, net.const(net.random(3, 1, 1), "mean"))
    y = net.conv(y, 6, name="stem")
    y = net.op("Mul", y, net.const(net.random(6, 1, 1), "scale"))
    y = net.op("Mul", y, net.const(np.float32(0.125), "formula"))
    y = net.op("Add", y, net.const(net.random(1, 1, 6, 6), "positions"))
    module = OnnxModule(net.model(net.head(y)))
    assert "scale" in module.weights
    assert not {"mean", "formula", "positions"} & set(module.weights)
    a_step(module)
    before, after = float_weights(module.model), float_weights(trained_model(module))
    assert {name for name in before if (before[name] != after[name]).any()} == set(module.weights)


def test_a_standardised_weight_trains_through_the_nodes_that_compute_it() -> None:
    net = Net(opset=17)
    raw = net.const(net.random(6, 3, 3, 3), "raw")
    weight = net.op("Sub", raw, net.op("ReduceMean", raw, axes=[1, 2, 3], keepdims=1))
    model = net.model(net.head(net.op("Conv", net.input("N", 3, 8, 8), weight)))
    module = same_outputs(model)
    a_step(module)
    assert (float_weights(trained_model(module))["raw"] != float_weights(model)["raw"]).any()


def test_a_final_softmax_is_left_out_for_the_loss() -> None:
    net = Net(opset=17)
    model = net.model(net.op("Softmax", net.gemm(net.op("Flatten", net.input("N", 3, 2, 2)), 4)))
    x = torch.randn(5, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(OnnxModule(model, logits=True)(x).softmax(1), OnnxModule(model)(x))


# The way back


@pytest.mark.parametrize("case", TRAINABLE[::7], ids=lambda case: case.name)
def test_what_was_not_trained_is_written_back_bit_for_bit(case: Case) -> None:
    model = case.model()
    assert model_io.to_bytes(trained_model(OnnxModule(model))) == model_io.to_bytes(model_io.load(model))


def test_everything_but_the_values_is_the_files(tmp_path: Path) -> None:
    model = classifier(opset=13, ir=7)
    model.metadata_props.add(key="author", value="somebody")
    model.graph.initializer[0].doc_string = "a note"
    onnx.save(model, tmp_path / "in.onnx")
    module = OnnxModule(tmp_path / "in.onnx")
    a_step(module)
    model_io.save(trained_model(module), tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    for tensor in (*written.graph.initializer, *model.graph.initializer):
        tensor.ClearField("raw_data")
    assert str(written) == str(model)


def test_older_files_whose_initializers_are_inputs_train_as_well() -> None:
    model = classifier(opset=9, ir=3)
    assert len(model.graph.input) > len(model.graph.initializer)
    module = same_outputs(model)
    assert module.input_names == ["x"]
    a_step(module)
    onnx.checker.check_model(trained_model(module))


def test_weights_in_constant_nodes_are_written_back_there() -> None:
    model = classifier()
    tensor = model.graph.initializer[0]
    node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
    before = numpy_helper.to_array(tensor)
    model.graph.node.insert(0, node)
    del model.graph.initializer[0]
    module = same_outputs(model)
    a_step(module)
    trained = trained_model(module)
    assert (numpy_helper.to_array(trained.graph.node[0].attribute[0].t) != before).any()


def test_half_floats_are_trained_in_single_precision_and_stored_as_halves() -> None:
    model = classifier(dtype=np.float16)
    module = OnnxModule(model)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert model_io.to_bytes(trained_model(module)) == model_io.to_bytes(model_io.load(model))
    a_step(module)
    assert {tensor.data_type for tensor in trained_model(module).graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_fresh_weights_have_the_variance_of_their_layer_and_batch_norm_begins_anew() -> None:
    net = Net(opset=17)
    y = net.bn(net.conv(net.input("N", 64, 8, 8), 128, name="stem"))
    y = net.op("Flatten", net.op("GlobalAveragePool", net.relu(y)))
    module = OnnxModule(net.model(net.op("Add", net.matmul(y, 200), net.random(200))))
    torch.manual_seed(0)
    draw_weights(module)
    kernels = {name: p for name, p in module.parameters_by_name.items() if module.weights[name].role == "kernel"}
    (conv, matrix) = kernels.values()
    assert conv.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert matrix.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.02)
    (norm,) = batch_norms(module)
    for value, wanted in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
        assert (value == wanted).all()


# Mistakes


def test_operators_that_cannot_be_trained_are_named_with_their_nodes() -> None:
    case = next(case for case in CASES if case.name == "body_reads_an_outer_tensor")
    with pytest.raises(ModelError, match="no translation to torch for If node 'if0'"):
        OnnxModule(case.model())


def test_opsets_of_another_broadcasting_are_refused() -> None:
    model = classifier(opset=9)
    model.opset_import[0].version = 6
    for node in model.graph.node:  # inference looked different then
        if node.op_type == "BatchNormalization":
            node.attribute.append(onnx.helper.make_attribute("is_test", 1))
    with pytest.raises(ModelError, match=r"opset 6; 7 and later .*version_converter"):
        OnnxModule(model)


def test_statistics_that_nobody_reads_are_no_outputs() -> None:
    model = classifier(opset=9)
    node = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    node.output.extend(["mean_out", "var_out", "saved_mean", "saved_var"])
    assert len(batch_norms(OnnxModule(model))) == 3
    a_step(OnnxModule(model))


def test_a_node_that_does_not_take_its_input_is_named() -> None:
    module = OnnxModule(classifier())
    with pytest.raises(ModelError, match="Conv node 'stem' fails: "):
        module(torch.randn(1, 4, 8, 8))
