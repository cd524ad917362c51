"""Local functions: what a model defines for itself is written out where it is called."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import inliner

from .errors import ModelError
from .graph import subgraphs

MOST_NODES = 1_000_000
"""Functions that call functions grow exponentially when they are written out; a graph of more nodes is refused."""


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without local functions.

    Args:
        model: checked, so that no function calls itself.

    Raises:
        ModelError: a call does not fit its function, or the result would be too large.
    """
    if not model.functions:
        return model
    if nodes_when_inlined(model) > MOST_NODES:
        raise ModelError(f"its functions would grow to more than {MOST_NODES} nodes.")
    try:
        return inliner.inline_local_functions(model)
    except RuntimeError as error:
        raise ModelError(f"its functions cannot be inlined: {str(error).splitlines()[0]}.") from error


def nodes_when_inlined(model: onnx.ModelProto) -> int:
    """Number of nodes of the main graph after all calls are written out, bodies included."""
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key not in functions:
                total += 1 + sum(size(body.node) for body in subgraphs(node))
                continue
            if key not in sizes:
                sizes[key] = 1  # a call of itself, which the checker refuses, must not recurse here
                sizes[key] = size(functions[key].node)
            total += sizes[key]
        return total

    return size(model.graph.node)
