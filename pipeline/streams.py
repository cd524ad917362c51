"""Runs a network over the calibration inputs a stretch at a time, with weights that change on the way.

Layer-by-layer reconstruction needs every layer's input from the network as it is so far. A stream keeps, for each chunk
of the inputs, the tensors that later nodes still read, and moves on from there: one forward pass in all, however many
layers are changed. Maps are large in the first layers and small in the last ones, so that not all inputs need be there
from the beginning: more of them join when there is room, by way of the layers as they are by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from prune_onnx.graph_ops.graph import Graph, Node, raw_bytes
from prune_onnx.graph_ops.model_io import copy_fields
from prune_onnx.graph_ops.probe import Probe

from .probing import Feeds, batch_of
from .sessions import create_session

Chunk = dict[str, np.ndarray]


class Stream:
    """A position in a network and what has been computed up to there.

    Attributes:
        chunks: per chunk of inputs, the tensors that are still needed.
        weights: new values of initializers.
        position: index of the first node that has not run.
    """

    def __init__(
        self,
        graph: Graph,
        probe: Probe,
        chunks: Sequence[Feeds],
        weights: dict[str, np.ndarray] | None = None,
        position: int = 0,
    ) -> None:
        self.graph, self.probe = graph, probe
        self.chunks: list[Chunk] = [dict(chunk) for chunk in chunks]
        self.weights = weights if weights is not None else {}
        self.position = position
        self._last_use = {name: max(node.index for node, _ in readers) for name, readers in graph.readers.items()}

    def fork(self, weights: dict[str, np.ndarray], chunks: int | None = None) -> Stream:
        """A second stream from here on, with other weights, over the first ``chunks`` chunks."""
        return Stream(self.graph, self.probe, self.chunks[:chunks], weights, self.position)

    def advance(self, until: int, want: Sequence[str] = ()) -> None:
        """Run the nodes before ``until``; keep what later nodes read, the tensors ``want``, and the graph's outputs."""
        nodes = self._moving(self.position, until)
        needed = set(want) | set(self.graph.outputs)
        made = {out for n in nodes for out in n.outputs if out}
        fetch = [name for name in made if name in needed or self._last_use.get(name, -1) >= until]
        if nodes and fetch:
            session = create_session(self._segment(nodes, fetch), "cpu")
            inputs = [i.name for i in session.get_inputs()]
            for chunk in self.chunks:
                found = session.run(fetch, {name: chunk[name] for name in inputs})
                chunk.update(zip(fetch, found, strict=True))
        self.position = max(self.position, until)
        for chunk in self.chunks:
            for name in [n for n in chunk if self._last_use.get(n, -1) < until and n not in needed]:
                del chunk[name]

    def join(self, chunks: Sequence[Feeds]) -> None:
        """Take further inputs in: they pass the nodes before :attr:`position` with the weights of now."""
        if chunks:
            more = Stream(self.graph, self.probe, chunks, self.weights)
            more.advance(self.position, list(self.chunks[0]))
            self.chunks += more.chunks

    def rest(self) -> Callable[[Mapping[str, np.ndarray]], Iterator[list[np.ndarray]]]:
        """Open one session for all nodes that are left.

        Returns:
            A function that takes tensors to be used in place of the cached ones, and yields the graph's outputs for
            every chunk.
        """
        nodes = self._moving(self.position, len(self.graph.nodes))
        fetch = [name for name in self.graph.outputs if any(name in node.outputs for node in nodes)]
        session = create_session(self._segment(nodes, fetch), "cpu") if fetch else None
        inputs = [i.name for i in session.get_inputs()] if session else []

        def run(other: Mapping[str, np.ndarray]) -> Iterator[list[np.ndarray]]:
            for chunk in self.chunks:
                found = session.run(fetch, {n: other[n] if n in other else chunk[n] for n in inputs}) if session else []
                new = dict(zip(fetch, found, strict=True))
                yield [new[name] if name in new else chunk[name] for name in self.graph.outputs]

        return run

    def _moving(self, start: int, until: int) -> list[Node]:
        """Nodes of a stretch whose outputs depend on the inputs or on their sizes, and are not known."""
        return [
            n
            for n in self.graph.nodes[start:until]
            if any(out in self.graph.following and not self._known(out) for out in n.outputs)
        ]

    def _known(self, name: str) -> bool:
        return name in self.probe.values and name not in self.probe.varying

    def _segment(self, nodes: list, fetch: list[str]) -> onnx.ModelProto:
        """A model of a few nodes: cached tensors are inputs, static ones initializers."""
        nodes = self._with_constants(nodes)
        made = {out for n in nodes for out in n.outputs}
        reads = dict.fromkeys(
            name for n in nodes for name in [*n.inputs, *sorted(n.captured)] if name and name not in made
        )
        model = onnx.ModelProto()
        copy_fields(self.graph.model, model, leave_out=("graph", "metadata_props"))
        model.ir_version = max(model.ir_version, 4)
        model.graph.name = "segment"
        model.graph.node.extend(n.proto for n in nodes)
        for name in reads:
            if name in self.weights:
                model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(self.weights[name]), name))
            elif name in self.graph.initializers:
                model.graph.initializer.append(inline(self.graph.initializers[name]))
            elif self._known(name):
                model.graph.initializer.append(numpy_helper.from_array(self.probe.values[name], name))
            else:
                array = self.chunks[0][name]
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                model.graph.input.append(helper.make_tensor_value_info(name, kind, [None] * array.ndim))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in fetch)
        return model

    def _with_constants(self, nodes: list[Node]) -> list[Node]:
        """The nodes, behind those that make the constants which they read and nobody has looked at."""
        found = {n.index: n for n in nodes}
        open_nodes = list(nodes)
        while open_nodes:
            node = open_nodes.pop()
            for name in (*node.inputs, *node.captured):
                maker = self.graph.producer.get(name)
                if maker is None or maker.index in found or name in self.graph.following or self._known(name):
                    continue
                found[maker.index] = maker
                open_nodes.append(maker)
        return [found[index] for index in sorted(found)]


def alive(graph: Graph, probe: Probe) -> list[int]:
    """Return for every node the bytes of one input's activations that are held at once while it runs."""
    last = {name: max(node.index for node, _ in readers) for name, readers in graph.readers.items()}
    batch = max(1, batch_of(graph))

    def size(name: str) -> int:
        lines = probe.lines.get(name)
        return math.prod(probe.shapes.get(name, (0,))) * (lines[0].dtype.itemsize if lines else 4) // batch

    held = {value.name: size(value.name) for value in graph.inputs}
    result = []
    for node in graph.nodes:
        held |= {name: size(name) for name in node.outputs if name in graph.dynamic}
        result.append(sum(held.values()))
        held = {name: b for name, b in held.items() if last.get(name, -1) > node.index or name in graph.outputs}
    return result


def inline(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A tensor with its data inside, wherever it is stored."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    copy = onnx.TensorProto()
    copy_fields(tensor, copy, leave_out=("external_data", "data_location"))
    copy.raw_data = bytes(raw_bytes(tensor))
    return copy
