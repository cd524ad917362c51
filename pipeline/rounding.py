"""Takes the rounding of activations out of a quantised model, so that two of them can be compared.

Rounding is not continuous: a sum that differs in its last place may come out one step of the scale higher, and the
steps add up from layer to layer. So a cut model and its reference, equal but for the order of their sums, may differ
by percents. Without the rounding, but with the same clipping to the range of the integers, both compute a continuous
function again, and a wrong channel shows as clearly as in a float model.
"""

from __future__ import annotations

import re

import numpy as np
import onnx
from onnx import helper, numpy_helper

from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.wire import copy_fields

QUANTISED = re.compile("Quant|QLinear|Integer")
QUANTISERS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
SUMS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# They pass numbers on without computing with them, so they take floats where they took integers.
MOVING = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


def is_quantised(model: onnx.ModelProto) -> bool:
    """Whether a model computes with quantised numbers."""
    return any(QUANTISED.search(node.op_type) for node in model.graph.node)


def rounds_sums(model: onnx.ModelProto) -> bool:
    """Whether what a float sum gives is quantised further on; sums of integers are exact in any order."""
    graph = Graph(model)
    summed: set[str] = set()
    for node in graph.nodes:
        after = any(name in summed for name in node.inputs)
        if after and node.op_type in QUANTISERS:
            return True
        if after or (node.op_type in SUMS and not all(map(graph.is_static, filter(None, node.outputs)))):
            summed.update(node.outputs)
    return False


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return a model that clips where ``model`` quantises and dequantises activations.

    Args:
        model: not changed; its weights stay where they are.

    Returns:
        ``None`` when the integers are computed with (QLinear operators, whose sums are exact anyway), leave the
        model, or are scaled channel by channel.
    """
    graph = Graph(model)
    floats: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    bounds: list[onnx.TensorProto] = []
    for node in graph.nodes:
        x = node.inputs[0] if node.inputs else ""
        proto = node.proto
        if node.op_type == "QuantizeLinear" and not graph.is_static(x):
            made = _clip(graph, node.proto, f"{node.outputs[0]}_range_{len(bounds)}")
            if made is None:
                return None
            bounds += made[0]
            nodes += made[1]
            floats.add(node.outputs[0])
            continue
        if any(name in floats for name in node.inputs) or node.captured & floats:
            if node.op_type == "DequantizeLinear" and not node.captured:
                proto = helper.make_node("Identity", [x], node.outputs[:1], name=node.name)
            elif node.op_type in MOVING and all(n in floats or graph.is_static(n) for n in node.inputs if n):
                floats.update(node.outputs)
            else:
                return None
        nodes.append(proto)
    if floats & set(graph.outputs):
        return None
    result = onnx.ModelProto()
    copy_fields(model, result, leave_out=("graph",))
    copy_fields(model.graph, result.graph, leave_out=("node", "value_info", "quantization_annotation"))
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(bounds)
    return result


def _clip(graph: Graph, proto: onnx.NodeProto, name: str) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]] | None:
    """Nodes that clip to what a QuantizeLinear node can represent, and the bounds that they read."""
    scale = graph.constant(proto.input[1])
    zero = graph.constant(proto.input[2]) if len(proto.input) > 2 and proto.input[2] else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype.kind not in "iu":
        return None
    ends, middle, step = np.iinfo(zero.dtype), int(zero.item()), float(scale.item())
    tensors = [
        numpy_helper.from_array(np.asarray((end - middle) * step, scale.dtype), f"{name}_{end}")
        for end in (ends.min, ends.max)
    ]
    return tensors, [
        helper.make_node("Max", [proto.input[0], tensors[0].name], [f"{name}_above"]),
        helper.make_node("Min", [f"{name}_above", tensors[1].name], [proto.output[0]]),
    ]
