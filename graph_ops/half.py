"""Float32 to float16: weights and activations inside, inputs and outputs as they were.

Every float32 tensor becomes float16, bodies of If, Loop and Scan included. Three kinds of places keep float32, with a
Cast on the way in and out: inputs and outputs of the graph; operators whose definition does not take float16 there, as
their ONNX schema says (the scales of Resize, NonMaxSuppression); and :data:`WIDE` operators, which sum or raise to
powers what would not fit into float16. Operators of other domains have no schema here and keep float32 too.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper, shape_inference

from .errors import ModelError
from .graph import captured_names, subgraphs, tensor_value
from .model_io import copy_fields, split_weights

WIDE = frozenset(
    {
        *("ReduceSumSquare", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "Pow", "Exp", "CumSum"),
        *("LRN", "LpNormalization", "MeanVarianceNormalization", "Range", "SoftmaxCrossEntropyLoss"),
    }
)
"""Operators that keep float32: their results overflow, or cancel, long before their inputs do."""

BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})
LARGEST, SMALLEST = 65504.0, 5.96e-8
"""Largest float16 and smallest one above zero: weights beyond them (masks of -1e9, tiny epsilons) become these."""


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that computes in float16 and has the inputs and outputs of ``model``.

    Args:
        model: float32, its weights inside or outside.

    Raises:
        ModelError: the type of a tensor cannot be inferred.
    """
    result = onnx.ModelProto()
    copy_fields(model, result, leave_out=("graph",))
    result.ir_version = max(result.ir_version, 4)  # from there on weights need not be listed as inputs
    kinds = _kinds(model)
    opset = {o.domain or "ai.onnx": o.version for o in model.opset_import}.get("ai.onnx", 1)
    _Half(model.graph, result.graph, kinds, opset, _names(model.graph), outer={}).convert()
    return result


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor, those of bodies included."""
    try:
        inferred = shape_inference.infer_shapes(split_weights(model)[0])
    except (shape_inference.InferenceError, ValueError) as error:
        raise ModelError(f"shape inference fails on the result, so it cannot become float16: {error}.") from error
    kinds: dict[str, int] = {}

    def visit(graph: onnx.GraphProto) -> None:
        for value in [*graph.input, *graph.output, *graph.value_info]:
            if value.type.tensor_type.elem_type:
                kinds[value.name] = value.type.tensor_type.elem_type
        kinds.update({tensor.name: tensor.data_type for tensor in graph.initializer})
        for node in graph.node:
            for body in subgraphs(node):
                visit(body)
        for node in graph.node:  # operators without inference: like the first input
            known = [kinds[name] for name in node.input if name in kinds]
            for name in node.output:
                if known and name and name not in kinds:
                    kinds[name] = known[0]

    visit(inferred.graph)
    return kinds


def _names(graph: onnx.GraphProto) -> set[str]:
    """All tensor names of a graph and of its bodies."""
    found = {v.name for v in [*graph.input, *graph.output]} | {t.name for t in graph.initializer}
    for node in graph.node:
        found.update(node.output)
        for body in subgraphs(node):
            found |= _names(body)
    return found


class _Half:
    """The conversion of one graph or body."""

    def __init__(
        self,
        source: onnx.GraphProto,
        target: onnx.GraphProto,
        kinds: dict[str, int],
        opset: int,
        names: set[str],
        outer: dict[str, str],
    ) -> None:
        """Prepare.

        Args:
            source: float32.
            target: empty, is filled.
            kinds: element types by name.
            opset: version of the ONNX operators.
            names: taken in the whole model.
            outer: what the graph outside calls the float16 form of its tensors.
        """
        self.source, self.target, self.kinds, self.opset, self.names = source, target, kinds, opset, names
        self.half = dict(outer)  # name of a float32 tensor -> name of its float16 form, where that is another
        self.single: dict[str, str] = {}  # name of a converted tensor -> name of a float32 copy
        self.weights = {t.name: t for t in source.initializer}
        self.constants: dict[str, np.ndarray] = {}
        self.wanted: dict[str, set[bool]] = {}  # weight -> the forms that are read, True is float16

    def convert(self, *, body: bool = False) -> None:
        """Fill the target."""
        copy_fields(self.source, self.target, leave_out=("node", "initializer", "value_info", "input", "output"))
        self._inputs(body)
        nodes = [n for n in self.source.node if not self._take_constant(n)]
        results = {o.name for o in self.source.output if self._is_single(o.name)} if not body else set()
        for name in results:
            if name not in self.weights and name not in self.constants and name not in self.half:
                self.half[name] = self._free(f"{name}_fp16")
        for node in nodes:
            self._node(node)
        for name in results:
            self._cast(self._read_half(name), name, TensorProto.FLOAT)
        for value in self.source.output:
            copy = self.target.output.add()
            copy.CopyFrom(value)
            if body and self._is_single(value.name):
                copy.type.tensor_type.elem_type = TensorProto.FLOAT16
                copy.name = self._read_half(value.name)
        self.target.value_info.extend(v for v in self.source.value_info if not self._is_single(v.name))
        self._initializers()

    def _is_single(self, name: str) -> bool:
        return self.kinds.get(name) == TensorProto.FLOAT

    def _inputs(self, body: bool) -> None:
        for value in self.source.input:
            if value.name in self.weights:
                continue
            copy = self.target.input.add()
            copy.CopyFrom(value)
            if not self._is_single(value.name):
                continue
            if body:
                copy.type.tensor_type.elem_type = TensorProto.FLOAT16
            else:
                self.half[value.name] = self._free(f"{value.name}_fp16")
                self.single[value.name] = value.name
                self._cast(value.name, self.half[value.name], TensorProto.FLOAT16)

    def _take_constant(self, node: onnx.NodeProto) -> bool:
        """Turn float Constant nodes into weights: operators that keep float32 then read them unrounded."""
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            return False
        attribute = node.attribute[0]
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            self.constants[node.output[0]] = tensor_value(attribute.t)
        elif attribute.name in ("value_float", "value_floats"):
            self.constants[node.output[0]] = np.asarray(helper.get_attribute_value(attribute), np.float32)
        return node.output[0] in self.constants

    # -- nodes -------------------------------------------------------------------------------------------------------
    def _node(self, node: onnx.NodeProto) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        keeps_in, keeps_out = self._keeps(node)
        for i, name in enumerate(node.input):
            if name and self._is_single(name):
                copy.input[i] = self._read_single(name) if i in keeps_in else self._read_half(name)
        after = []
        for i, name in enumerate(node.output):
            if not name or not self._is_single(name):
                continue
            half = self.half.get(name, name)
            if i in keeps_out:
                copy.output[i] = self._free(f"{name}_fp32")
                self.single[name] = copy.output[i]
                after.append((copy.output[i], half))
            else:
                copy.output[i] = half
        self._attributes(node, copy, keeps_out)
        self.target.node.append(copy)
        for single, half in after:
            self._cast(single, half, TensorProto.FLOAT16)

    def _keeps(self, node: onnx.NodeProto) -> tuple[set[int], set[int]]:
        """Which inputs and outputs of a node keep float32."""
        everything = set(range(len(node.input))), set(range(len(node.output)))
        if node.domain not in ("", "ai.onnx") or node.op_type in WIDE:
            return everything
        if node.op_type in BODIES:
            return set(), set()
        try:
            schema = defs.get_schema(node.op_type, self.opset, "")
        except defs.SchemaError:
            return everything
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

        def keeps(formal: list, i: int) -> bool:
            kind = formal[min(i, len(formal) - 1)].type_str
            return "tensor(float16)" not in allowed.get(kind, [kind])

        return (
            {i for i in everything[0] if schema.inputs and keeps(schema.inputs, i)},
            {i for i in everything[1] if schema.outputs and keeps(schema.outputs, i)},
        )

    def _attributes(self, node: onnx.NodeProto, copy: onnx.NodeProto, keeps_out: set[int]) -> None:
        """Follow the types that attributes name, and convert bodies."""
        for attribute in copy.attribute:
            if 0 not in keeps_out and attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT and 0 not in keeps_out:
                attribute.t.CopyFrom(numpy_helper.from_array(_rounded(tensor_value(attribute.t)), attribute.t.name))
        if node.op_type not in BODIES:
            return
        captured = {name: self._read_half(name) for name in captured_names(node) if self._is_single(name)}
        old = [body for a in node.attribute for body in ([a.g] if a.HasField("g") else a.graphs)]
        new = [body for a in copy.attribute for body in ([a.g] if a.HasField("g") else a.graphs)]
        for source, target in zip(old, new, strict=True):
            target.Clear()
            _Half(source, target, self.kinds, self.opset, self.names, captured).convert(body=True)

    # -- tensors -----------------------------------------------------------------------------------------------------
    def _read_half(self, name: str) -> str:
        """Name of a tensor's float16 form."""
        if name in self.weights or name in self.constants:
            self.wanted.setdefault(name, set()).add(True)
            if name not in self.half:
                self.half[name] = self._free(f"{name}_fp16") if name in {o.name for o in self.source.output} else name
        return self.half.get(name, name)

    def _read_single(self, name: str) -> str:
        """Name of a tensor's float32 form."""
        if name not in self.single:
            self.single[name] = self._free(f"{name}_fp32")
            if name in self.weights or name in self.constants:
                self.wanted.setdefault(name, set()).add(False)
            else:
                self._cast(self.half.get(name, name), self.single[name], TensorProto.FLOAT)
        return self.single[name]

    def _initializers(self) -> None:
        for name, tensor in self.weights.items():
            if tensor.data_type != TensorProto.FLOAT:
                self.target.initializer.add().CopyFrom(tensor)
            else:
                self._store(name, tensor_value(tensor))
        for name, value in self.constants.items():
            self._store(name, value)

    def _store(self, name: str, value: np.ndarray) -> None:
        for half in self.wanted.get(name, ()):
            stored = _rounded(value) if half else np.ascontiguousarray(value)
            own = self.half[name] if half else self.single[name]
            self.target.initializer.append(numpy_helper.from_array(stored.reshape(value.shape), own))

    def _cast(self, source: str, target: str, kind: int) -> None:
        name = self._free(f"{target}_cast")
        self.target.node.append(helper.make_node("Cast", [source], [target], name=name, to=kind))

    def _free(self, wish: str) -> str:
        name, n = wish, 0
        while name in self.names:
            n += 1
            name = f"{wish}{n}"
        self.names.add(name)
        return name


def _rounded(value: np.ndarray) -> np.ndarray:
    """Round to float16: finite values stay finite, and what is not zero does not become zero."""
    value = np.asarray(value, np.float32)
    finite = np.where(np.isfinite(value), np.clip(value, -LARGEST, LARGEST), value)
    small = (finite != 0) & (np.abs(finite) < SMALLEST)
    return np.where(small, np.copysign(SMALLEST, finite), finite).astype(np.float16)
