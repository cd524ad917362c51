"""Output channels of every convolution and linear layer, before and after, from the graphs alone."""

from __future__ import annotations

from .count import Counted
from .eval_results import Layer

# Operators with channels of their own, and where their weight stands.
WEIGHTED = {
    "Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1,
    "MatMulInteger": 1, "QLinearMatMul": 3,
}  # fmt: skip
LAST = frozenset({"MatMul", "MatMulInteger", "QLinearMatMul", "Gemm"})


def layers(baseline: Counted, model: Counted) -> list[Layer]:
    """Return the layers of the baseline, each with the channels that it has left in the model.

    A layer is found again by its node's name; where nodes have no names, by the tensor that it gives.
    """
    left = {name: channels for name, _, channels in _channels(model)}
    return [
        Layer(name=name, op_type=op_type, before=channels, after=left.get(name, 0))
        for name, op_type, channels in _channels(baseline)
    ]


def _channels(counted: Counted) -> list[tuple[str, str, int]]:
    found, graph = [], counted.graph
    for node in graph.nodes:
        at = WEIGHTED.get(node.op_type)
        if at is None or len(node.inputs) <= at or not graph.is_static(node.inputs[at]):
            continue  # the product of two activations has no channels of its own
        shape = counted.shapes.get(node.outputs[0])
        axis = -1 if node.op_type in LAST else 1
        if shape and len(shape) > 1:
            found.append((node.name, node.op_type, shape[axis]))
    return found
