"""Branches that are a constant: replaced by that constant, or by nothing.

A residual branch whose every channel died adds the same vector to every position; the convolutions that compute it are
dead code behind an element-wise operator. The operand becomes an initializer of shape (1, C, 1, ...), an addition of
zero disappears, and the nodes that fed it go with it.
"""

from __future__ import annotations

import numpy as np
import onnx

from .analysis import Analysis
from .constants import Constants
from .cut import Cut
from .exact import Edits
from .graph import Node

JOINS = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "Sum"})


def fold_constant_branches(analysis: Analysis, known: Constants) -> onnx.ModelProto | None:
    """Return a model without the branches that are constant, or ``None`` when there is none.

    Args:
        analysis: of the model.
        known: its constant channels.
    """
    edit = Cut(analysis, np.ones(analysis.units, bool), Edits())
    changed = False
    for node in analysis.graph.nodes:
        if node.op_type in JOINS and not node.domain and len(node.inputs) == 2:
            changed |= _fold_join(node, known, edit)
    return edit.model() if changed else None


def _fold_join(node: Node, known: Constants, edit: Cut) -> bool:
    """Replace one constant operand of an element-wise node; the other must have the full shape."""
    out_shape = known.shape(node.outputs[0])
    for i, name in enumerate(node.inputs):
        other = node.inputs[1 - i]
        if name not in known.graph.dynamic or other not in known.graph.dynamic or name == other:
            continue
        if name in known.graph.spread:
            continue  # a constant already
        axis = next((a for a in known.axes(name) if known.flags(name, a).all()), None)
        if axis is None or known.shape(other) != out_shape:
            continue
        sample = edit.probe.lines[name][axis]
        if not sample.any() and (node.op_type == "Add" or (node.op_type == "Sub" and i == 1)):
            edit.bypass(node, 1 - i)
        else:
            shape = [len(sample) if a == axis else 1 for a in range(len(known.shape(name)))]
            edit.feed(node, i, sample.reshape(shape))
        return True
    return False
