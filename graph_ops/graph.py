"""A read-only view of an ONNX model: nodes in order, who makes and who reads a tensor, which values are static."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .errors import ModelError
from .memory import give_back

# Their outputs differ from run to run although nothing flows in.
RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
# They look at the size of their input only, never at its values.
SHAPE_OPS = frozenset({"Shape", "Size"})


@dataclass(eq=False)
class Node:
    """One node of the main graph.

    Attributes:
        proto: the node itself; not changed by the analysis.
        index: position in topological order.
        name: its name, or ``OpType(first output)`` where the exporter gave none.
        captured: names of outer tensors that its If/Loop/Scan bodies read.
    """

    proto: onnx.NodeProto
    index: int
    name: str
    captured: frozenset[str] = frozenset()
    _attributes: dict[str, Any] | None = field(default=None, repr=False)

    # Read over and over by every pass; a protobuf message makes new strings each time.
    @functools.cached_property
    def op_type(self) -> str:
        return self.proto.op_type

    @functools.cached_property
    def domain(self) -> str:
        return "" if self.proto.domain == "ai.onnx" else self.proto.domain

    @functools.cached_property
    def inputs(self) -> list[str]:
        return list(self.proto.input)

    @functools.cached_property
    def outputs(self) -> list[str]:
        return list(self.proto.output)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value (str for strings), or ``default``."""
        if self._attributes is None:
            try:
                self._attributes = {a.name: helper.get_attribute_value(a) for a in self.proto.attribute}
            except ValueError as error:  # a function's parameter, outside of any function
                raise ModelError(f"{self} has an attribute without a value.") from error
        value = self._attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def __str__(self) -> str:
        return f"{self.op_type} node {self.name!r}"


class Graph:
    """The main graph of ``model``; the model itself is not changed.

    Attributes:
        model: the ModelProto, functions already inlined (see :mod:`.model_io`).
        nodes: all nodes in topological order.
        initializers: name to TensorProto.
        inputs: graph inputs that are not initializers.
        outputs: names of the graph outputs.
        producer: tensor name to the node that makes it.
        readers: tensor name to (node, input index) pairs, main graph only.
        opset: version of the default domain.
        dynamic: names of tensors that are computed from data.
        spread: those of them that only follow a dynamic size (see :meth:`add_spread`).

    Raises:
        ModelError: a cycle, a tensor that nobody makes, or a name made twice.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        graph = model.graph
        self.initializers = {t.name: t for t in graph.initializer}
        self.sparse = {s.values.name for s in graph.sparse_initializer}
        self.inputs = [i for i in graph.input if i.name not in self.initializers]
        self.outputs = [o.name for o in graph.output]
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
        self.nodes = [
            Node(p, i, p.name or f"{p.op_type}({p.output[0] if p.output else i})", captured_names(p))
            for i, p in enumerate(_in_order(graph))
        ]
        self.producer: dict[str, Node] = {}
        self.readers: dict[str, list[tuple[Node, int]]] = {}
        self.captured: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.outputs:
                if name:
                    self.producer[name] = node
            for i, name in enumerate(node.inputs):
                if name:
                    self.readers.setdefault(name, []).append((node, i))
            for name in node.captured:
                self.captured.setdefault(name, []).append(node)
        self.dynamic = self._dependent(sizes=False)
        self.spread: set[str] = set()

    def add_spread(self, names: set[str]) -> None:
        """From now on treat constants that are spread over a dynamic size as computed: they have no fixed value."""
        self.spread |= names
        self.dynamic |= names

    @functools.cached_property
    def following(self) -> set[str]:
        """Names of tensors that follow from the graph's inputs or from their sizes alone."""
        return self._dependent(sizes=True)

    def _dependent(self, *, sizes: bool) -> set[str]:
        """Names of tensors whose values depend on the graph's inputs; on their ``sizes`` too, if these count."""
        found = {i.name for i in self.inputs}
        for node in self.nodes:
            if node.op_type in SHAPE_OPS and not node.domain and not sizes:
                continue
            reads = [*node.inputs, *node.captured]
            if node.op_type in RANDOM_OPS or any(name in found for name in reads):
                found.update(name for name in node.outputs if name)
        return found

    def is_static(self, name: str) -> bool:
        """Whether the tensor's value is the same for all input data (it may still follow a dynamic size)."""
        return bool(name) and name not in self.dynamic

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value of an initializer or Constant node, or ``None`` for anything else."""
        if name in self.initializers:
            return tensor_value(self.initializers[name])
        node = self.producer.get(name)
        if node is None or node.op_type != "Constant" or node.domain:
            return None
        return constant_node_value(node.proto)


def external_position(tensor: onnx.TensorProto) -> tuple[str, int, int] | None:
    """(file, offset, length) of a tensor that is stored outside the model, ``None`` for one inside it."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entry = {e.key: e.value for e in tensor.external_data}
    return entry.get("location", ""), int(entry.get("offset", 0)), int(entry.get("length", -1))


def raw_bytes(tensor: onnx.TensorProto) -> bytes | np.ndarray:
    """A tensor's bytes as the file format stores them; external ones are mapped, not read."""
    position = external_position(tensor)
    if position is not None:
        file, offset, length = position
        status = os.stat(file)
        return _mapped(file, status.st_mtime_ns, status.st_size)[offset : offset + length]
    return tensor.raw_data


@functools.lru_cache(maxsize=4)
def _mapped(file: str, changed_ns: int, size: int) -> np.ndarray:
    """A file's bytes, mapped read-only; the other arguments tell versions of the file apart."""
    return np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)


def unmap() -> None:
    """Let go of the mapped files: what nobody holds any more leaves the memory, what is wanted again comes back.

    Sessions that were closed leave holes that the C library would keep for later; they are given back as well.
    """
    _mapped.cache_clear()
    give_back()


def tensor_value(tensor: onnx.TensorProto) -> np.ndarray:
    """Return a tensor's value; that of an external one is mapped into memory, read-only.

    Raises:
        ModelError: its data does not fit its shape.
    """
    position = external_position(tensor)
    try:
        if position is not None:
            stored = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=b"")
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if dtype.itemsize * math.prod(tensor.dims) == position[2]:
                return np.asarray(raw_bytes(tensor)).view(dtype).reshape(tuple(tensor.dims))
            stored.raw_data = bytes(raw_bytes(tensor))
            return numpy_helper.to_array(stored)
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(f"initializer {tensor.name!r} cannot be read: {error}.") from error


def constant_node_value(proto: onnx.NodeProto) -> np.ndarray | None:
    """Return the value of a Constant node, or ``None`` for strings and sparse values."""
    attribute = proto.attribute[0]
    if attribute.name == "value":
        return tensor_value(attribute.t)
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name in kinds:
        return np.asarray(helper.get_attribute_value(attribute), kinds[attribute.name])
    return None


def subgraphs(proto: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the bodies of a control-flow node."""
    for attribute in proto.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def captured_names(proto: onnx.NodeProto) -> frozenset[str]:
    """Names that the node's bodies read from outside themselves."""
    names: set[str] = set()
    for body in subgraphs(proto):
        own = {i.name for i in body.input} | {t.name for t in body.initializer}
        reads: set[str] = {o.name for o in body.output}
        for node in body.node:
            reads.update(name for name in node.input if name)
            reads.update(captured_names(node))
            own.update(node.output)
        names |= reads - own
    return frozenset(names)


def _in_order(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes in topological order, stable where the file is in order already."""
    known = {""} | {i.name for i in graph.input} | {t.name for t in graph.initializer}
    known |= {s.values.name for s in graph.sparse_initializer}
    made: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for name in node.output:
            if name and (name in made or name in known):
                raise ModelError(f"tensor {name!r} is made twice (node {node.name or node.op_type!r}).")
            made[name] = i
    reads = [set(node.input) | captured_names(node) for node in graph.node]
    waiting: dict[int, int] = {}
    followers: dict[int, list[int]] = {}
    for i, names in enumerate(reads):
        makers = set()
        for name in names - known:
            if name not in made:
                raise ModelError(
                    f"node {graph.node[i].name or graph.node[i].op_type!r} reads {name!r}, which nothing makes."
                )
            makers.add(made[name])
        waiting[i] = len(makers)
        for maker in makers:
            followers.setdefault(maker, []).append(i)
    for output in graph.output:
        if output.name not in made and output.name not in known:
            raise ModelError(f"graph output {output.name!r} is made by no node.")
    if all(max((made[n] for n in names - known), default=-1) < i for i, names in enumerate(reads)):
        return list(graph.node)
    ready = [i for i, n in waiting.items() if n == 0]
    order: list[int] = []
    while ready:
        i = ready.pop(0)
        order.append(i)
        for follower in followers.get(i, ()):
            waiting[follower] -= 1
            if waiting[follower] == 0:
                ready.append(follower)
    if len(order) < len(graph.node):
        stuck = next(i for i, n in waiting.items() if n > 0)
        raise ModelError(f"the graph has a cycle through node {graph.node[stuck].name or graph.node[stuck].op_type!r}.")
    return [graph.node[i] for i in order]
