"""Gives every layer a weight and a bias of its own, so that each can be refitted by itself.

Exporters merge equal initializers of unrelated layers, and leave out biases that are zero. Refitting one layer must not
change another one, and nearly always needs a bias.

    Conv(x, W)             ->  Conv(x, W, 0)              likewise ConvTranspose and Gemm
    MatMul(x, W) [+ b]     ->  Gemm(x, W, b)              where x has two axes
    shared W or b          ->  a copy for each layer

The model computes the same as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .graph import captured_names
from .probe import Shape

LAYERS = ("Conv", "ConvTranspose", "Gemm")
BIAS = 2
GEMM_WITHOUT_BIAS = 11
"""Operator set from which on Gemm takes any form of bias that is used here."""


def own_operands(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> onnx.ModelProto:
    """Return a model whose Conv, ConvTranspose and Gemm nodes share no constant with any other node.

    Args:
        model: any; is left as it is.
        shapes: of its tensors.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return _Unshared(result, shapes).model


class _Unshared:
    """The edit of one model, in place."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> None:
        self.model, self.shapes = model, shapes
        self.weights = {t.name: t for t in model.graph.initializer}
        self.uses = Counter(name for node in model.graph.node for name in [*node.input, *captured_names(node)])
        self.uses.update(o.name for o in model.graph.output)
        self.names = {*self.weights, *(i.name for i in model.graph.input), *self.uses}
        self.names.update(name for node in model.graph.node for name in node.output)
        self._to_gemm()
        for node in model.graph.node:
            if node.op_type in LAYERS and node.domain in ("", "ai.onnx"):
                self._own(node)

    def _own(self, node: onnx.NodeProto) -> None:
        for i in range(1, len(node.input)):
            name = node.input[i]
            if name in self.weights and self.uses[name] > 1:
                copy = onnx.TensorProto()
                copy.CopyFrom(self.weights[name])
                node.input[i] = self._add(copy, name)
                self.uses[name] -= 1
        weight = self.weights.get(node.input[1])
        has_bias = len(node.input) > BIAS and node.input[BIAS]
        if weight is None or has_bias or node.output[0] not in self.shapes:
            return
        bias = np.zeros(self.shapes[node.output[0]][1], helper.tensor_dtype_to_np_dtype(weight.data_type))
        name = self._add(numpy_helper.from_array(bias), f"{node.input[1]}_bias")
        del node.input[BIAS:]
        node.input.append(name)

    def _to_gemm(self) -> None:
        """Turn products with a constant matrix, and the constant that is added to them, into Gemm nodes."""
        opset = max((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), default=1)
        if opset < GEMM_WITHOUT_BIAS:
            return
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        gone = []
        for node in self.model.graph.node:
            if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
                continue
            weight = self.weights.get(node.input[1])
            if weight is None or len(weight.dims) != 2 or len(self.shapes.get(node.input[0], ())) != 2:
                continue
            node.op_type = "Gemm"
            y = node.output[0]
            add = readers.get(y, [None])[0]
            if add is not None and add.op_type == "Add" and self.uses[y] == 1:
                bias = add.input[1] if add.input[0] == y else add.input[0]
                if bias in self.weights and tuple(self.weights[bias].dims) == (weight.dims[1],):
                    node.input.append(bias)
                    node.output[0] = add.output[0]
                    gone.append(add)
        for node in gone:
            self.model.graph.node.remove(node)

    def _add(self, tensor: onnx.TensorProto, wish: str) -> str:
        name, n = wish, 0
        while name in self.names:
            n += 1
            name = f"{wish}{n}"
        self.names.add(name)
        tensor.name = name
        self.model.graph.initializer.append(tensor)
        self.weights[name] = tensor
        if self.model.ir_version < 4:  # where weights are listed as inputs
            self.model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
        return name
