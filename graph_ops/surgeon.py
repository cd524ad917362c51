"""Edits of the topology through onnx-graphsurgeon, without what its round trip would lose.

graphsurgeon drops metadata_props, doc strings and quantisation annotations, mistakes some 8-bit float types for others
and fails on 4-bit ones. Here models with such types are refused, and what is dropped is put back by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx
import onnx_graphsurgeon as gs

from . import model_io
from .errors import ModelError

_T = onnx.TensorProto
LOSSY_TYPES = frozenset(
    getattr(_T, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ")
    if hasattr(_T, name)
)


def edit(model: onnx.ModelProto, change: Callable[[gs.Graph], None]) -> onnx.ModelProto:
    """Return a copy of ``model`` after ``change`` has edited it as a graphsurgeon graph.

    Dead nodes and unused tensors are cleaned up and the nodes are sorted.

    Raises:
        ModelError: the model holds tensor types that graphsurgeon corrupts, or something else that it cannot take.
    """
    bad = sorted({_T.DataType.Name(t.data_type) for t in model.graph.initializer if t.data_type in LOSSY_TYPES})
    if bad:
        raise ModelError(f"this edit cannot be made on a model with {', '.join(bad)} weights.")
    model = model_io.with_weights(model)
    with _refusing():
        graph = gs.import_onnx(model)
    change(graph)
    with _refusing():
        graph.cleanup().toposort()
        edited = gs.export_onnx(graph, do_type_check=False)
    return restore(edited, model)


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what graphsurgeon stumbles over (names that are no text, unknown attributes) into a message."""
    try:
        yield
    except Exception as error:  # its exceptions share no base class
        reason = model_io.first_line(error)
        raise ModelError(f"onnx-graphsurgeon cannot make this edit on the model: {reason}.") from error


def to_model(graph: object) -> onnx.ModelProto:
    """Turn a graphsurgeon graph into a ModelProto.

    Raises:
        ModelError: it is not a graphsurgeon graph.
    """
    if not isinstance(graph, gs.Graph):
        raise ModelError(f"cannot read a model from {type(graph).__name__}; give a path, a ModelProto or a gs.Graph.")
    return gs.export_onnx(graph)


def restore(edited: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Put back on ``edited`` what the round trip through graphsurgeon dropped, matched by name."""
    result = onnx.ModelProto()
    result.CopyFrom(original)
    del result.graph.node[:]
    del result.graph.initializer[:]
    by_output = {(n.op_type, *n.output): n for n in original.graph.node}
    by_name = {(n.op_type, n.name): n for n in original.graph.node if n.name}  # an edit may have moved the outputs
    for node in edited.graph.node:
        old = by_output.get((node.op_type, *node.output), by_name.get((node.op_type, node.name)))
        if old is not None:
            node.doc_string = old.doc_string
            if not node.metadata_props:
                node.metadata_props.extend(old.metadata_props)
    result.graph.node.extend(edited.graph.node)
    before = {t.name: t for t in original.graph.initializer}
    for tensor in edited.graph.initializer:
        old = before.get(tensor.name)
        if old is not None:
            tensor.doc_string = old.doc_string
    result.graph.initializer.extend(edited.graph.initializer)
    alive = {name for n in result.graph.node for name in n.output} | {t.name for t in result.graph.initializer}
    gone = set(before) - alive
    for field in (result.graph.value_info, result.graph.input):
        stays = [i for i in field if (i.name in alive or field is result.graph.input) and i.name not in gone]
        del field[:]
        field.extend(stays)
    if result.ir_version < 4:  # every initializer is a graph input as well
        listed = {i.name for i in result.graph.input}
        result.graph.input.extend(
            onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
            for t in result.graph.initializer
            if t.name not in listed
        )
    marks = [q for q in result.graph.quantization_annotation if q.tensor_name in alive]
    del result.graph.quantization_annotation[:]
    result.graph.quantization_annotation.extend(marks)
    return result
