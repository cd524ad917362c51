"""Builds small ONNX graphs with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper, shape_inference

MICROSOFT = "com.microsoft"
Operand = str | np.ndarray | Sequence[int]


class Net:
    """Builds a graph node by node; shapes follow from ONNX's own inference, weights are random and seeded.

    >>> net = Net(opset=17)
    >>> y = net.conv(net.input(1, 3, 8, 8), 6, pads=[1, 1, 1, 1])
    >>> net.dims(y)
    [1, 6, 8, 8]
    """

    def __init__(self, *, seed: int = 0, opset: int = 17, dtype: type = np.float32, ir: int = 8) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset, self.dtype, self.ir = opset, np.dtype(dtype), ir
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.types: dict[str, onnx.TypeProto] = {}
        self.counts: dict[str, int] = {}

    # -- tensors -----------------------------------------------------------------------------------------------------
    def input(self, *dims: int | str, name: str = "x", dtype: type | None = None) -> str:
        """Add a graph input; a string is a dynamic size."""
        info = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype)), dims)
        self.inputs.append(info)
        self.types[name] = info.type
        return name

    def const(self, value: Any, name: str = "") -> str:
        """Add an initializer; Python numbers become the net's float type, lists of int become int64."""
        if not isinstance(value, np.ndarray):
            value = np.asarray(value)
            value = value.astype(self.dtype if value.dtype.kind == "f" else value.dtype)
        name = name or self.unique("w")
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        self.types[name] = helper.make_tensor_type_proto(self.initializers[name].data_type, value.shape)
        return name

    def random(self, *dims: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
        """Normal values in the net's type."""
        return (self.rng.standard_normal(dims) * scale + shift).astype(self.dtype)

    def positive(self, *dims: int) -> np.ndarray:
        """Values between 0.5 and 1.5 in the net's type."""
        return self.rng.uniform(0.5, 1.5, dims).astype(self.dtype)

    def dims(self, name: str) -> list[int]:
        """Sizes of a tensor; 0 where they are dynamic or unknown."""
        return [d.dim_value for d in self.types[name].tensor_type.shape.dim]

    def unique(self, wish: str) -> str:
        """A name that is not taken."""
        self.counts[wish] = self.counts.get(wish, -1) + 1
        return f"{wish}{self.counts[wish]}"

    # -- nodes -------------------------------------------------------------------------------------------------------
    def op(
        self,
        op_type: str,
        *inputs: Operand,
        name: str = "",
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        dims: Sequence[int] | None = None,
        **attributes: Any,
    ) -> Any:
        """Add a node.

        Args:
            op_type: operator.
            inputs: tensor names, or arrays and lists that become initializers.
            name: of the node; its first output is called the same.
            outputs: how many, or their names.
            domain: of the operator.
            dims: shape of the first output, where ONNX has no inference for it (default: the first input's).
            attributes: of the node; ``None`` leaves one out.

        Returns:
            The output's name, or all names of several.
        """
        name = name or self.unique(op_type.lower())
        names = [i if isinstance(i, str) else self.const(i if isinstance(i, np.ndarray) else list(i)) for i in inputs]
        if isinstance(outputs, int):
            outs = [f"{name}_out" if i == 0 else f"{name}_out{i}" for i in range(outputs)]
        else:
            outs = list(outputs)
        attributes = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(op_type, names, outs, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        self._infer(node, dims)
        return outs[0] if len(outs) == 1 else tuple(outs)

    def _infer(self, node: onnx.NodeProto, dims: Sequence[int] | None) -> None:
        if node.domain or dims is not None:
            kind = self.types[next(i for i in node.input if i)]
            if dims is not None:
                kind = helper.make_tensor_type_proto(kind.tensor_type.elem_type, dims)
            self.types.update(dict.fromkeys(node.output, kind))
            return
        known = {i: self.types[i] for i in node.input if i}
        values = {i: self.initializers[i] for i in node.input if i in self.initializers}
        found = shape_inference.infer_node_outputs(
            defs.get_schema(node.op_type, self.opset, ""),
            node,
            known,
            values,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self.ir,
        )
        self.types.update(found)

    def conv(
        self,
        x: str,
        channels: int,
        kernel: int | Sequence[int] = 3,
        *,
        group: int = 1,
        bias: bool = True,
        name: str = "",
        weight: Operand | None = None,
        **attributes: Any,
    ) -> str:
        """Add a convolution with random weights."""
        shape = self.dims(x)
        kernel = [kernel] * (len(shape) - 2) if isinstance(kernel, int) else list(kernel)
        if weight is None:
            fan = shape[1] // group * int(np.prod(kernel))
            weight = self.random(channels, shape[1] // group, *kernel, scale=fan**-0.5)
        more = [self.random(channels, scale=0.3)] if bias else []
        return self.op(
            "Conv", x, weight, *more, name=name or self.unique("conv"), group=group if group > 1 else None, **attributes
        )

    def conv_transpose(
        self,
        x: str,
        channels: int,
        kernel: int = 2,
        *,
        group: int = 1,
        bias: bool = True,
        name: str = "",
        **attributes: Any,
    ) -> str:
        """Add a transposed convolution with random weights."""
        shape = self.dims(x)
        weight = self.random(
            shape[1], channels // group, *[kernel] * (len(shape) - 2), scale=(shape[1] // group) ** -0.5
        )
        more = [self.random(channels, scale=0.3)] if bias else []
        return self.op(
            "ConvTranspose",
            x,
            weight,
            *more,
            name=name or self.unique("deconv"),
            group=group if group > 1 else None,
            **attributes,
        )

    def bn(self, x: str, *, gamma: np.ndarray | None = None, beta: np.ndarray | None = None) -> str:
        """Add a BatchNormalization with random statistics."""
        n = self.dims(x)[1]
        gamma = self.positive(n) if gamma is None else gamma.astype(self.dtype)
        beta = self.random(n, scale=0.3) if beta is None else beta.astype(self.dtype)
        return self.op(
            "BatchNormalization", x, gamma, beta, self.random(n, scale=0.3), self.positive(n), name=self.unique("bn")
        )

    def gemm(self, x: str, n: int, *, name: str = "", bias: Any = True, **attributes: Any) -> str:
        """Add a fully connected layer with random weights."""
        k = self.dims(x)[0 if attributes.get("transA") else 1]
        shape = (n, k) if attributes.get("transB") else (k, n)
        more = [self.random(n, scale=0.3)] if bias is True else [] if bias is False else [bias]
        return self.op(
            "Gemm", x, self.random(*shape, scale=k**-0.5), *more, name=name or self.unique("gemm"), **attributes
        )

    def matmul(self, x: str, n: int, *, name: str = "") -> str:
        """Multiply by a random matrix from the right."""
        k = self.dims(x)[-1]
        return self.op("MatMul", x, self.random(k, n, scale=k**-0.5), name=name or self.unique("matmul"))

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def head(self, x: str, n: int = 5, name: str = "head") -> str:
        """Add global pooling and a fully connected layer: the end of most cases."""
        return self.gemm(self.op("Flatten", self.op("GlobalAveragePool", x)), n, name=name)

    # -- model -------------------------------------------------------------------------------------------------------
    def model(self, *outputs: str) -> onnx.ModelProto:
        """Close the graph."""
        results = []
        for name in outputs:
            info = onnx.ValueInfoProto(name=name)
            info.type.CopyFrom(self.types[name])
            results.append(info)
        inputs = list(self.inputs)
        if self.ir < 4:
            inputs += [
                helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.initializers.values()
            ]
        graph = helper.make_graph(self.nodes, "net", inputs, results, list(self.initializers.values()))
        domains = {"": self.opset} | {n.domain: 1 for n in self.nodes if n.domain}
        return helper.make_model(
            graph, ir_version=self.ir, opset_imports=[helper.make_opsetid(d, v) for d, v in domains.items()]
        )
