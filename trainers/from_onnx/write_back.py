"""From a trained module back into the file: values change, the graph does not."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from prune_onnx.graph_ops.graph import tensor_value

from .module import OnnxModule


def trained_model(module: OnnxModule) -> onnx.ModelProto:
    """Return the model that ``module`` was made from, with what the module holds now in its weights and statistics.

    A tensor that training left as it was stays as it was, bit for bit. BatchNorm statistics that layers shared in the
    file (exporters write equal tensors once) become tensors of their own when they have drifted apart.
    """
    model = onnx.ModelProto()
    model.CopyFrom(module.model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    for name, parameter in module.parameters_by_name.items():
        tensor = stored[name] if name in stored else makers[name].attribute[0].t
        _store(tensor, _array(parameter.t() if name in module.transposed else parameter, tensor))
    for norm, outputs in module.norms.items():
        for index, value in ((3, norm.running_mean), (4, norm.running_var)):
            _store_statistic(model, stored, [makers[output] for output in outputs], index, value)
    return model


def _store_statistic(
    model: onnx.ModelProto,
    stored: dict[str, onnx.TensorProto],
    nodes: list[onnx.NodeProto],
    index: int,
    value: torch.Tensor,
) -> None:
    """Store a statistic of the BatchNorm layer that ``nodes`` are; where others read the tensor, in one of its own."""
    name = nodes[0].input[index]
    array = _array(value, stored[name])
    if array.tobytes() == tensor_value(stored[name]).tobytes():
        return
    readers = sum(name in node.input for node in model.graph.node)
    if readers > len(nodes):
        fresh = onnx.TensorProto(name=_free(f"{name}_{index}", stored), data_type=stored[name].data_type)
        name = fresh.name
        model.graph.initializer.append(fresh)
        stored[name] = model.graph.initializer[-1]
        if model.ir_version < 4:  # initializers were inputs then
            model.graph.input.append(helper.make_tensor_value_info(name, fresh.data_type, array.shape))
        for node in nodes:
            node.input[index] = name
    _store(stored[name], array)


def _array(value: torch.Tensor, tensor: onnx.TensorProto) -> np.ndarray:
    """Return a trained value in the type of the file."""
    return value.detach().cpu().contiguous().numpy().astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))


def _store(tensor: onnx.TensorProto, value: np.ndarray) -> None:
    """Replace a tensor's value, unless it has it."""
    if list(tensor.dims) == list(value.shape) and tensor_value(tensor).tobytes() == value.tobytes():
        return
    fresh = numpy_helper.from_array(value, tensor.name)
    if tensor.HasField("doc_string"):
        fresh.doc_string = tensor.doc_string
    fresh.metadata_props.extend(tensor.metadata_props)
    tensor.CopyFrom(fresh)


def _free(name: str, taken: dict[str, onnx.TensorProto]) -> str:
    while name in taken:
        name += "_"
    return name
