"""BatchNorm scales in a model's metadata: what folding would lose, kept for the criterion ``bn-gamma``.

The entry ``prune_onnx.bn_gamma`` is a JSON object: name of the tensor that the BatchNormalization makes (the folded
layer makes it afterwards, in this program as in ONNX Runtime) to its scales, float32, little-endian, base64.
``train`` writes it at export, folding adds what it folds, and a cut slices it along with the tensor.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping

import numpy as np
import onnx

from .graph import Graph

KEY = "prune_onnx.bn_gamma"


def read(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the noted scales by tensor; none where there is no entry, or one that others wrote."""
    text = next((prop.value for prop in model.metadata_props if prop.key == KEY), "{}")
    try:
        return {
            str(tensor): np.frombuffer(base64.b64decode(packed, validate=True), "<f4").copy()
            for tensor, packed in json.loads(text).items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error):
        return {}


def write(model: onnx.ModelProto, scales: Mapping[str, np.ndarray]) -> None:
    """Replace the entry; without scales there is none."""
    others = [prop for prop in model.metadata_props if prop.key != KEY]
    if len(others) < len(model.metadata_props):
        kept = [onnx.StringStringEntryProto(key=prop.key, value=prop.value) for prop in others]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
    if scales:
        packed = {name: base64.b64encode(np.asarray(s, "<f4").tobytes()).decode() for name, s in scales.items()}
        model.metadata_props.add(key=KEY, value=json.dumps(packed, separators=(",", ":")))


def present(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the scales of the BatchNormalization nodes that the graph has."""
    graph = Graph(model)
    values = {
        node.outputs[0]: graph.constant(node.inputs[1])
        for node in graph.nodes
        if node.op_type == "BatchNormalization" and not node.domain
    }
    return {tensor: np.asarray(value, np.float32) for tensor, value in values.items() if value is not None}


def keep_present(model: onnx.ModelProto) -> None:
    """Note the scales of all BatchNormalization nodes, beside those that are noted already."""
    write(model, {**read(model), **present(model)})


def sliced(model: onnx.ModelProto, kept: Mapping[str, np.ndarray | None]) -> None:
    """Follow a cut.

    Args:
        model: the cut model, its metadata still that of the original.
        kept: tensor to the positions that stay on its channel axis, ``None`` for all; other tensors are gone.
    """
    scales = read(model)
    if not scales:
        return
    left = {}
    for tensor, scale in scales.items():
        if tensor in kept:
            positions = kept[tensor]
            if positions is None:
                left[tensor] = scale
            elif len(positions) and positions.max() < len(scale):
                left[tensor] = scale[positions]
    write(model, left)
