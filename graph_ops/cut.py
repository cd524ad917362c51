"""The cut: slice every operand, recompute every size, and let nothing else change.

Works on a copy of the original ModelProto, so that metadata, names, opsets and untouched weights stay bit for bit.
Static operands are sliced per use: an initializer that several nodes share keeps its name when all of them want the
same slice and is copied where they differ. Weights that nodes compute (Identity, Transpose, Cast, DequantizeLinear,
ConstantOfShape) keep those nodes; anything else is written out with its value.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .analysis import Analysis
from .assembly import assemble
from .errors import ModelError, PlanError
from .exact import Edits
from .graph import SHAPE_OPS, Node
from .probe import Shape
from .records import Operand
from .rules import rule_for

TAKE_AT_ONCE = 2**20  # bytes
Index = tuple[tuple[int, bytes], ...]
"""What is kept of a tensor: (axis, kept positions as int64 bytes) pairs."""


def cut(
    analysis: Analysis, keep: np.ndarray, edits: Edits | None = None, *, computed: Iterable[str] = ()
) -> onnx.ModelProto:
    """Return a new model in which only the kept units are left.

    Args:
        analysis: of the model.
        keep: bool (units,); pinned units must be kept.
        edits: new operand values to slice instead of the original ones.
        computed: names of weights that nodes compute and that are written out even where nothing of them is cut.

    Raises:
        PlanError: a pinned unit is to go, or an axis would lose all its positions.
    """
    keep = np.asarray(keep, bool)
    if keep.shape != analysis.pinned.shape or not keep[analysis.pinned].all():
        raise PlanError("the plan removes channels that are pinned, or was made for another model.")
    if any((keep[fork.labels] & ~keep[fork.source]).any() for fork in analysis.forks):
        raise PlanError("the plan removes channels of a shared stream that one of its readers keeps.")
    if any(not keep[vector].any() for vector in analysis.vectors()):
        raise PlanError("the plan removes every channel of a tensor; keep at least one.")
    work = Cut(analysis, keep, edits or Edits())
    work.write_out(frozenset(computed))
    return work.model()


class Cut:
    """One cut in progress; the rules' ``rewrite`` sides work on it."""

    def __init__(self, analysis: Analysis, keep: np.ndarray, edits: Edits) -> None:
        self.analysis, self.keep, self.edits = analysis, keep, edits
        self.graph, self.probe = analysis.graph, analysis.probe
        self._positions: dict[int, np.ndarray] = {}
        self._protos: dict[int, onnx.NodeProto] = {}
        self._before: dict[int, list[onnx.NodeProto]] = {}
        self._after: dict[int, list[onnx.NodeProto]] = {}
        self._front: list[onnx.NodeProto] = []
        self._new: dict[str, onnx.TensorProto] = {}
        self._made: dict[tuple[str, Index], str] = {}
        self._bypassed: dict[str, str] = {}
        self._operands: dict[tuple[int, int], Operand] = {(o.node.index, o.input): o for o in analysis.operands}
        self._names = set(self.graph.producer) | set(self.graph.initializers) | {i.name for i in self.graph.inputs}

    # -- what the rules ask ------------------------------------------------------------------------------------------
    def shape(self, name: str) -> Shape:
        """Shape before the cut, at the probed sizes."""
        return self.probe.shapes.get(name, ())

    def value(self, name: str) -> np.ndarray | None:
        """Value of a static tensor before the cut."""
        return self.analysis.value(name)

    def kept(self, name: str, axis: int) -> np.ndarray | None:
        """Positions that stay on an axis, or ``None`` when all do."""
        vector = self.analysis.axes.get(name, {}).get(axis)
        if vector is None:
            return None
        positions = self._kept(vector)
        return None if len(positions) == len(vector) else positions

    def size(self, name: str, axis: int) -> int:
        """Length of an axis after the cut, at the probed sizes."""
        kept = self.kept(name, axis)
        return self.shape(name)[axis] if kept is None else len(kept)

    def operand_size(self, node: Node, index: int, axis: int) -> int:
        """Length of a static operand's axis after the cut."""
        operand = self._operands.get((node.index, index))
        if operand is None or axis not in operand.axes:
            return self.shape(node.inputs[index])[axis]
        return len(self._kept(operand.axes[axis]))

    def _kept(self, vector: np.ndarray) -> np.ndarray:
        if id(vector) not in self._positions:
            self._positions[id(vector)] = np.flatnonzero(self.keep[vector])
        return self._positions[id(vector)]

    # -- what the rules do -------------------------------------------------------------------------------------------
    def proto(self, node: Node) -> onnx.NodeProto:
        """The node's copy that may be edited."""
        if node.index not in self._protos:
            copy = onnx.NodeProto()
            copy.CopyFrom(node.proto)
            self._protos[node.index] = copy
        return self._protos[node.index]

    def feed(self, node: Node, index: int, value: np.ndarray) -> None:
        """Let a node read a new constant."""
        proto = self.proto(node)
        while len(proto.input) <= index:
            proto.input.append("")
        name = self._name(proto.input[index] or f"{node.outputs[0]}_input{index}")
        self._add(name, value)
        proto.input[index] = name

    def drop_input(self, node: Node, index: int) -> None:
        """Remove a trailing optional input."""
        proto = self.proto(node)
        proto.input[index] = ""
        while proto.input and not proto.input[-1]:
            del proto.input[-1]

    def set_attribute(self, node: Node, name: str, value: object) -> None:
        """Set an attribute of a node."""
        self.drop_attribute(node, name)
        self.proto(node).attribute.append(helper.make_attribute(name, value))

    def drop_attribute(self, node: Node, name: str) -> None:
        """Remove an attribute of a node."""
        proto = self.proto(node)
        rest = [a for a in proto.attribute if a.name != name]
        del proto.attribute[:]
        proto.attribute.extend(rest)

    def gather_first(self, node: Node, axis: int, positions: np.ndarray) -> None:
        """Put a Gather in front of a node's first input."""
        proto = self.proto(node)
        index, out = self._name(f"{proto.input[0]}_kept"), self._name(f"{proto.input[0]}_gathered")
        self._add(index, positions.astype(np.int64))
        self._before.setdefault(node.index, []).append(
            helper.make_node(
                "Gather", [proto.input[0], index], [out], name=self._name(f"{node.name}_gather"), axis=axis
            )
        )
        proto.input[0] = out

    def resize_operand(self, node: Node, index: int) -> None:
        """Rewrite an operand that holds the output's sizes (Reshape, Expand, Resize).

        Args:
            node: the node.
            index: which input holds the sizes.
        """
        # In a Reshape -1 is inferred, and 0 copies the input's size unless the node says otherwise.
        infers = node.op_type == "Reshape"
        copies = infers and not node.attribute("allowzero", 0)
        x, y, name = node.inputs[0], node.outputs[0], node.inputs[index]
        written = self.value(name) if name not in self.probe.varying else None
        kept = [self.kept(y, a) for a in range(len(self.shape(y)))]
        if all(k is None for k in kept) and not (infers and self._changed(x)):
            return
        offset = len(self.shape(y)) - (len(written) if written is not None else len(self.shape(y)))
        moving = self.probe.moving_axes(y)
        target: list[int | None] = []
        for a in range(offset, len(self.shape(y))):
            old = None if written is None else int(written[a - offset])
            if infers and old == -1:
                target.append(-1)
            elif copies and old == 0 and a < len(self.shape(x)) and self._same(x, y, a):
                target.append(0)
            elif not infers and old == 1:
                target.append(1)
            elif kept[a] is not None and not moving[a]:
                target.append(len(kept[a]))
            elif not moving[a]:
                target.append(self.shape(y)[a])
            elif copies and a < len(self.shape(x)) and self._same(x, y, a):
                target.append(0)
            else:
                target.append(None)
        if infers and target.count(None) == 1 and -1 not in target:
            target[target.index(None)] = -1
        if None in target:
            self._patch(node, index, target)
        else:
            self.feed(node, index, np.asarray(target, np.int64))

    def _same(self, x: str, y: str, axis: int) -> bool:
        """Whether an axis has the same length in both tensors, before and after, at both probed sizes."""
        others = self.probe.other_shapes
        before = self.shape(x)[axis] == self.shape(y)[axis]
        if x in others and y in others:
            before = before and axis < len(others[x]) and others[x][axis] == others[y][axis]
        return before and self.size(x, axis) == self.size(y, axis)

    def _changed(self, name: str) -> bool:
        return any(self.kept(name, a) is not None for a in self.analysis.axes.get(name, {}))

    def bypass(self, node: Node, index: int = 0) -> None:
        """Let the readers of a node that does nothing any more read one of its inputs instead."""
        out = node.outputs[0]
        source = self._protos.get(node.index, node.proto).input[index]
        if out not in self.graph.outputs and out not in self.graph.captured:
            self._bypassed[out] = source
        else:
            proto = self.proto(node)
            proto.op_type = "Identity"
            del proto.input[:], proto.attribute[:]
            proto.input.append(source)

    def _patch(self, node: Node, index: int, target: list[int | None]) -> None:
        """Overwrite single entries of a size operand that stays live because other entries follow dynamic sizes."""
        proto = self.proto(node)
        live = proto.input[index]
        mask, new, out = (self._name(f"{live}_{part}") for part in ("mask", "sizes", "patched"))
        self._add(mask, np.asarray([t is not None for t in target]))
        self._add(new, np.asarray([0 if t is None else t for t in target], np.int64))
        self._before.setdefault(node.index, []).append(
            helper.make_node("Where", [mask, new, live], [out], name=self._name(f"{node.name}_sizes"))
        )
        proto.input[index] = out

    # -- operands ----------------------------------------------------------------------------------------------------
    def _slice_operands(self) -> None:
        wishes: dict[str, list[tuple[Node, int, Index]]] = {}
        for (n, i), operand in self._operands.items():
            if (n, i) in self.edits.operands:
                continue
            index = tuple(
                (a, self._kept(v).astype(np.int64).tobytes())
                for a, v in sorted(operand.axes.items())
                if len(self._kept(v)) < len(v)
            )
            if index:
                wishes.setdefault(operand.node.inputs[i], []).append((operand.node, i, index))
        for name, uses in wishes.items():
            every = len(self.graph.readers.get(name, ())) == len(uses) and name not in self.graph.captured
            if (
                every
                and len({index for _, _, index in uses}) == 1
                and name in self.graph.initializers
                and name not in self.graph.outputs
            ):
                self._add(name, _take(self.value(name), uses[0][2]), like=self.graph.initializers[name])
                continue
            for node, i, index in uses:
                self.proto(node).input[i] = self._sliced(name, index)
        for (n, i), value in self.edits.operands.items():
            self._edit(self.graph.nodes[n], i, value)

    def write_out(self, computed: frozenset[str]) -> None:
        """Store the value of weights that nodes compute, so that what they are computed from can go."""
        for operand in self.analysis.operands:
            name = operand.node.inputs[operand.input]
            if name in computed and all(len(self._kept(v)) == len(v) for v in operand.axes.values()):
                if (name, ()) not in self._made:
                    self._made[name, ()] = self._name(name)
                    self._add(self._made[name, ()], np.asarray(self.value(name)))
                self.proto(operand.node).input[operand.input] = self._made[name, ()]

    def _edit(self, node: Node, i: int, value: np.ndarray) -> None:
        operand = self._operands.get((node.index, i))
        if operand is not None:
            axes = operand.axes
        else:  # a bias that the node did not have
            vector = self.analysis.axes.get(node.outputs[0], {}).get(1)
            axes = {} if vector is None else {0: vector}
        for axis, vector in axes.items():
            if value.shape[axis] == len(vector):
                value = value.take(self._kept(vector), axis)
        proto = self.proto(node)
        name = proto.input[i] if i < len(proto.input) else ""
        if name in self.graph.initializers and len(self.graph.readers[name]) == 1 and name not in self.graph.captured:
            self._add(name, value, like=self.graph.initializers[name])
        else:
            self.feed(node, i, value)

    def _sliced(self, name: str, index: Index) -> str:
        """Return the name of a slice of a static tensor, made once."""
        key = (name, index)
        if key not in self._made:
            self._made[key] = self._materialise(name, index) if index else name
        return self._made[key]

    def _materialise(self, name: str, index: Index) -> str:
        node = self.graph.producer.get(name)
        if node is not None and name not in self.probe.varying:
            axes = dict(index)
            rank = len(self.shape(name))
            if node.op_type in ("Identity", "Cast"):
                return self._clone(node, {0: index})
            if node.op_type == "Transpose":
                perm = node.attribute("perm", list(range(rank))[::-1])
                return self._clone(node, {0: tuple(sorted((perm[a], p) for a, p in axes.items()))})
            if node.op_type == "DequantizeLinear" and not node.attribute("block_size", 0):
                axis = node.attribute("axis", 1) % rank
                inner = {0: index}
                if len(self.shape(node.inputs[1])) == 1 and self.shape(node.inputs[1])[0] > 1 and axis in axes:
                    inner |= {i: ((0, axes[axis]),) for i in range(1, len(node.inputs)) if node.inputs[i]}
                return self._clone(node, inner)
            if node.op_type == "ConstantOfShape":
                shape = [
                    len(np.frombuffer(axes[a], np.int64)) if a in axes else n for a, n in enumerate(self.shape(name))
                ]
                fed = self._name(f"{name}_shape")
                self._add(fed, np.asarray(shape, np.int64))
                return self._clone(node, {}, {0: fed})
        value = self.value(name)
        if value is None or name in self.probe.varying:
            raise ModelError(f"tensor {name!r} follows a dynamic size and cannot be cut; fix the size or use --ignore.")
        new = self._name(name)
        self._add(new, _take(value, index), like=self.graph.initializers.get(name))
        return new

    def _clone(self, node: Node, indices: dict[int, Index], fed: dict[int, str] | None = None) -> str:
        copy = onnx.NodeProto()
        copy.CopyFrom(node.proto)
        for i, index in indices.items():
            copy.input[i] = self._sliced(copy.input[i], index)
        for i, name in (fed or {}).items():
            copy.input[i] = name
        copy.name = self._name(node.name)
        copy.output[0] = self._name(node.outputs[0])
        self._front.append(copy)
        return copy.output[0]

    def _bake_sizes(self) -> None:
        """Freeze scales computed from the size of a cut axis: they keep the value that the network was trained with."""
        affected: set[str] = set()
        for node in self.graph.nodes:
            if any(self.graph.is_static(out) for out in node.outputs):
                reads_cut = node.op_type in SHAPE_OPS and self._changed(node.inputs[0])
                if reads_cut or any(name in affected for name in node.inputs):
                    affected.update(node.outputs)
        if not affected:
            return
        for node in self.graph.nodes:
            if all(self.graph.is_static(out) for out in node.outputs):
                continue
            current = self._protos.get(node.index, node.proto).input
            for i, name in enumerate(current):
                if name in affected and name not in self.probe.varying and name in self.probe.values:
                    self.feed(node, i, self.probe.values[name])

    # -- assembly ----------------------------------------------------------------------------------------------------
    def _name(self, wish: str) -> str:
        """A tensor or node name that is not taken."""
        name, n = wish, 0
        while name in self._names or not name:
            n += 1
            name = f"{wish}_cut{n}"
        self._names.add(name)
        return name

    def _add(self, name: str, value: np.ndarray, like: onnx.TensorProto | None = None) -> None:
        tensor = numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        if like is not None:
            tensor.data_type = like.data_type
            tensor.doc_string = like.doc_string
        self._new[name] = tensor

    def model(self) -> onnx.ModelProto:
        """Assemble the cut model."""
        for node in self.graph.nodes:
            touched = any(self._changed(name) for name in [*node.inputs, *node.outputs])
            if touched and not all(self.graph.is_static(out) for out in node.outputs):
                rule_for(node).rewrite(node, self)
        for fork in self.analysis.forks:
            source, kept = self._kept(fork.source), self._kept(fork.labels)
            if fork.node.op_type != "Gather" and not np.array_equal(source, kept):
                self.gather_first(fork.node, fork.axis, np.searchsorted(source, kept))
        self._slice_operands()
        for n, shift in self.edits.shifts.items():
            self._add_shift(self.graph.nodes[n], shift)
        self._bake_sizes()
        nodes = list(self._front)
        for node in self.graph.nodes:
            nodes += self._before.get(node.index, [])
            nodes.append(self._protos.get(node.index, node.proto))
            nodes += self._after.get(node.index, [])
        return assemble(self.analysis, self._rewired(nodes), self._new, self.kept)

    def _rewired(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Let readers of bypassed nodes read what those read."""
        if not self._bypassed:
            return nodes
        result = []
        for node in nodes:
            if any(name in self._bypassed for name in node.input):
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                for i, name in enumerate(copy.input):
                    while name in self._bypassed:
                        name = self._bypassed[name]
                    copy.input[i] = name
                node = copy
            result.append(node)
        return result

    def _add_shift(self, node: Node, shift: np.ndarray) -> None:
        """Add a vector to the last axis of a node's output, which has no bias input."""
        proto = self.proto(node)
        y = node.outputs[0]
        axis = len(self.shape(y)) - 1
        kept = self.kept(y, axis)
        dtype = np.asarray(self.value(node.inputs[1])).dtype
        name, inner = self._name(f"{y}_shift"), self._name(f"{y}_unshifted")
        self._add(name, (shift if kept is None else shift[kept]).astype(dtype))
        proto.output[0] = inner
        self._after.setdefault(node.index, []).append(
            helper.make_node("Add", [inner, name], [y], name=self._name(f"{node.name}_shift"))
        )


def _take(value: np.ndarray, index: Index) -> np.ndarray:
    """Return the kept positions, copied a few rows at a time: nothing between the two arrays exists in full."""
    kept = {axis: np.frombuffer(positions, np.int64) for axis, positions in index}
    if not kept:
        return value
    result = np.empty([len(kept[a]) if a in kept else n for a, n in enumerate(value.shape)], value.dtype)
    rows = kept.pop(0, np.arange(value.shape[0]))
    step = max(1, TAKE_AT_ONCE * len(value) // max(1, value.nbytes))
    for i in range(0, len(rows), step):
        part = value[rows[i : i + step]]
        for axis, positions in kept.items():
            part = part.take(positions, axis)
        result[i : i + step] = part
    return result
