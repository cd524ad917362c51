"""Which of a file's constants are weights: trained, and written back under their names.

A float initializer (or Constant node) is a weight when a layer uses it as one: :data:`ROLES` says where each operator
has its weights. It may come there through other nodes that only see constants (a Transpose, weight standardisation).
Behind a layer, a constant that is added or multiplied and varies along one axis only is one too: the bias of a MatMul,
a layer scale. What is left is kept as it is: numbers of formulas, masks, positions and anchors, normalisation of the
input, tables that several axes index, and constants of integer type, quantised weights among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from prune_onnx.graph_ops.graph import Graph, Node
from prune_onnx.graph_ops.rules.base import MICROSOFT, key

FLOATS = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
)
KERNEL, SCALE, SHIFT = "kernel", "scale", "shift"
ROLES: dict[str, dict[int, str]] = {
    "Conv": {1: KERNEL, 2: SHIFT},
    key(MICROSOFT, "FusedConv"): {1: KERNEL, 2: SHIFT},
    "ConvTranspose": {1: KERNEL, 2: SHIFT},
    "Gemm": {0: KERNEL, 1: KERNEL, 2: SHIFT},
    "MatMul": {0: KERNEL, 1: KERNEL},
    "Einsum": {0: KERNEL, 1: KERNEL, 2: KERNEL},
    "Gather": {0: KERNEL},
    "LSTM": {1: KERNEL, 2: KERNEL, 3: SHIFT},
    "GRU": {1: KERNEL, 2: KERNEL, 3: SHIFT},
    "RNN": {1: KERNEL, 2: KERNEL, 3: SHIFT},
    "BatchNormalization": {1: SCALE, 2: SHIFT},
    "InstanceNormalization": {1: SCALE, 2: SHIFT},
    "GroupNormalization": {1: SCALE, 2: SHIFT},
    "LayerNormalization": {1: SCALE, 2: SHIFT},
    "RMSNormalization": {1: SCALE},
    "PRelu": {1: SCALE},
    key(MICROSOFT, "BiasGelu"): {1: SHIFT},
    key(MICROSOFT, "FastGelu"): {1: SHIFT},
}
"""Operator to input to what a weight does there."""

ELEMENTWISE = {"Add": SHIFT, "Sub": SHIFT, "Mul": SCALE, "Div": SCALE}
QUANTISED = frozenset({"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"})
"""Scales behind which there are integers: no weights."""


@dataclass(frozen=True)
class Weight:
    """A constant that is trained.

    Attributes:
        name: in the file: of the initializer, or of a Constant node's output.
        stored: where its value stands in the model; training is written back there.
        role: what it does: ``kernel``, ``scale`` or ``shift``.
        fan_in: of a kernel: how many inputs an output is summed over.
    """

    name: str
    stored: onnx.TensorProto
    role: str
    fan_in: int = 1


def find_weights(graph: Graph, nodes: list[Node]) -> dict[str, Weight]:
    """Return the weights that some nodes of a graph use, by name, in the order in which they do."""
    stored = dict(float_constants(graph))
    behind = _behind_layers(graph)
    found: dict[str, Weight] = {}

    def add(name: str, role: str, user: Node) -> None:
        if name in stored:
            found.setdefault(name, Weight(name, stored[name], role, _fan_in(stored[name], user)))
            return
        maker = graph.producer.get(name)
        if maker is None or maker.op_type in QUANTISED:
            return
        for source in maker.inputs:  # computed from constants: what it is computed from is trained
            if source and graph.is_static(source) and (source not in stored or _size(stored[source]) > 1):
                add(source, role, user)

    for node in nodes:
        if all(graph.is_static(name) for name in node.outputs if name):
            continue  # constants only; it counts where its result is used
        for index, role in ROLES.get(key(node.domain, node.op_type), {}).items():
            if index < len(node.inputs) and graph.is_static(node.inputs[index]):
                add(node.inputs[index], role, node)
        if node.op_type in ELEMENTWISE and not node.domain and any(name in behind for name in node.inputs):
            for name in node.inputs:
                if name in stored and _is_vector(stored[name]):
                    add(name, ELEMENTWISE[node.op_type], node)
    return found


def float_constants(graph: Graph) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield name and place of all float tensors in initializers and Constant nodes."""
    for name, tensor in graph.initializers.items():
        if tensor.data_type in FLOATS:
            yield name, tensor
    for node in graph.nodes:
        if node.op_type == "Constant" and not node.domain and node.proto.attribute[0].name == "value":
            tensor = node.proto.attribute[0].t
            if tensor.data_type in FLOATS:
                yield node.outputs[0], tensor


def _behind_layers(graph: Graph) -> set[str]:
    """Return the tensors that depend on data through at least one layer."""
    found: set[str] = set()
    for node in graph.nodes:
        dynamic = [name for name in node.inputs if name and not graph.is_static(name)]
        if dynamic and (_is_layer(node) or any(name in found for name in dynamic)):
            found.update(name for name in node.outputs if name)
    return found


def _is_layer(node: Node) -> bool:
    return KERNEL in ROLES.get(key(node.domain, node.op_type), {}).values()


def _fan_in(tensor: onnx.TensorProto, user: Node) -> int:
    """Return how many of a kernel's entries go into one output."""
    dims = list(tensor.dims) or [1]
    if user.op_type == "MatMul" or (user.op_type == "Gemm" and not user.attribute("transB", 0)):
        return dims[-2] if len(dims) > 1 else dims[0]
    outputs = dims[1] * user.attribute("group", 1) if user.op_type == "ConvTranspose" and len(dims) > 1 else dims[0]
    return max(1, _size(tensor) // outputs)


def _size(tensor: onnx.TensorProto) -> int:
    size = 1
    for dim in tensor.dims:
        size *= dim
    return size


def _is_vector(tensor: onnx.TensorProto) -> bool:
    """Whether more than one value stands along one axis."""
    return sum(dim > 1 for dim in tensor.dims) == 1
