"""From the nodes of a cut graph to a model: nothing of the original is lost, nothing says what is no longer true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
from onnx import helper

from . import gammas
from .analysis import Analysis
from .graph import captured_names
from .model_io import copy_fields


def assemble(
    analysis: Analysis,
    nodes: list[onnx.NodeProto],
    new: Mapping[str, onnx.TensorProto],
    kept: Callable[[str, int], np.ndarray | None],
) -> onnx.ModelProto:
    """Make a model of a cut graph's nodes: what reaches no output goes, everything else is carried over.

    Args:
        analysis: of the original.
        nodes: of the cut graph.
        new: initializers that are new or changed, by name.
        kept: positions of an axis of a tensor that stay; ``None`` for all of them.
    """
    source = analysis.graph.model
    was_used = _used_names(source.graph.node)
    nodes = live_nodes(nodes, analysis.graph.outputs)
    used = _used_names(nodes) | set(analysis.graph.outputs)
    result = onnx.ModelProto()
    # Everything but the tensors is copied here; the weights once, below.
    copy_fields(source, result, leave_out=("graph",))
    copy_fields(source.graph, result.graph, leave_out=("node", "initializer", "value_info"))
    result.graph.node.extend(nodes)
    have = set()
    for tensor in source.graph.initializer:
        if tensor.name in used or tensor.name not in was_used:
            result.graph.initializer.append(new.get(tensor.name, tensor))
            have.add(tensor.name)
    fresh = [t for name, t in new.items() if name not in have and name in used]
    result.graph.initializer.extend(fresh)
    _fix_inputs(analysis, result, have, new, fresh)
    _fix_value_info(analysis, result, nodes, new, kept)
    gammas.sliced(result, {name: kept(name, 1) for node in nodes for name in node.output})
    return result


def _fix_inputs(
    analysis: Analysis,
    result: onnx.ModelProto,
    have: set[str],
    new: Mapping[str, onnx.TensorProto],
    fresh: list[onnx.TensorProto],
) -> None:
    """Before IR version 4 every initializer is also a graph input: keep those entries true."""
    gone = set(analysis.graph.initializers) - have
    entries = [i for i in result.graph.input if i.name not in gone]
    for entry in entries:
        if entry.name in new:
            entry.CopyFrom(_value_info(new[entry.name]))
    if result.ir_version < 4:
        entries += [_value_info(t) for t in fresh]
    copies = [onnx.ValueInfoProto() for _ in entries]
    for copy, entry in zip(copies, entries, strict=True):
        copy.CopyFrom(entry)
    del result.graph.input[:]
    result.graph.input.extend(copies)


def _fix_value_info(
    analysis: Analysis,
    result: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    new: Mapping[str, onnx.TensorProto],
    kept: Callable[[str, int], np.ndarray | None],
) -> None:
    """Rebuild the stored shapes of cut tensors, drop those of tensors that are gone."""
    made = {name for node in nodes for name in node.output} | {t.name for t in result.graph.initializer}
    for info in analysis.graph.model.graph.value_info:
        if info.name not in made:
            continue
        copy = result.graph.value_info.add()
        copy.CopyFrom(info)
        if info.name in new:
            copy.CopyFrom(_value_info(new[info.name]))
        for axis in analysis.axes.get(info.name, {}):
            stay = kept(info.name, axis)
            dims = copy.type.tensor_type.shape.dim
            if stay is not None and axis < len(dims) and dims[axis].HasField("dim_value"):
                dims[axis].dim_value = len(stay)
    stays = [q for q in result.graph.quantization_annotation if q.tensor_name in made]
    del result.graph.quantization_annotation[:]
    result.graph.quantization_annotation.extend(stays)


def live_nodes(nodes: list[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that reach an output, in order."""
    wanted = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if any(name in wanted for name in node.output):
            kept.append(node)
            wanted.update(node.input)
            wanted.update(captured_names(node))
    return kept[::-1]


def _used_names(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in [*node.input, *captured_names(node)] if name}


def _value_info(tensor: onnx.TensorProto) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
