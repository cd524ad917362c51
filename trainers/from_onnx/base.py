"""What a translation is: one function an operator, from tensors to tensors, listed under the operator's name.

A translation is called as ``function(op, *inputs)``: ``op`` is the :class:`Operation` that it belongs to, and gives
attributes and opset; inputs that the node leaves out are ``None``. It returns a tensor, or a tuple of them for
several outputs. Sizes, axes and other arithmetic on shapes are int64 tensors on the CPU, whatever the device is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import nn

from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.graph_ops.graph import Node
from prune_onnx.graph_ops.registry import Registry
from prune_onnx.graph_ops.rules.base import MICROSOFT, key

__all__ = [
    "MICROSOFT",
    "OPERATORS",
    "Batch",
    "Operation",
    "Outputs",
    "Tensor",
    "Translation",
    "ints",
    "key",
    "operator",
    "torch_dtype",
]

Tensor = torch.Tensor
Outputs = Tensor | tuple[Tensor | None, ...]
Translation = Callable[..., Outputs]

OPERATORS: Registry[Translation] = Registry("operator translation")

_T = onnx.TensorProto
DTYPES = {
    _T.FLOAT: torch.float32,
    _T.DOUBLE: torch.float64,
    _T.FLOAT16: torch.float32,
    _T.BFLOAT16: torch.float32,
    _T.INT8: torch.int8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.UINT8: torch.uint8,
    _T.UINT16: torch.uint16,
    _T.UINT32: torch.uint32,
    _T.UINT64: torch.uint64,
    _T.BOOL: torch.bool,
}
"""Half floats are trained as float32. With the wider unsigned integers torch computes hardly anything."""


def operator(*op_types: str, domain: str = "") -> Callable[[Translation], Translation]:
    """Function decorator: list a translation under operator names of a domain."""
    return OPERATORS.register(*(key(domain, op) for op in op_types))


def torch_dtype(elem_type: int) -> torch.dtype:
    """Return the torch type in which values of an ONNX element type are held.

    Raises:
        ModelError: torch has none.
    """
    try:
        return DTYPES[elem_type]
    except KeyError:
        name = _T.DataType.Name(elem_type) if elem_type in _T.DataType.values() else elem_type
        raise ModelError(f"values of type {name} cannot be trained on.") from None


def ints(value: Tensor) -> list[int]:
    """Return sizes, axes or the like as Python ints."""
    return [int(v) for v in value.reshape(-1).tolist()]


@dataclass
class Batch:
    """The size of the batch in progress, and the one that the file was written for.

    Attributes:
        fixed: what the file says, and has in the shapes of Reshape nodes; 0 where it leaves the size open.
        actual: of the inputs of this pass.
    """

    fixed: int = 0
    actual: int = 0

    @property
    def factor(self) -> int:
        """By how much sizes of the file grow that have the batch in them; 1 where the file is right."""
        return self.actual // self.fixed if self.fixed and not self.actual % self.fixed else 1


class Operation(nn.Module):
    """A node that is a plain function of its inputs.

    Attributes:
        node: the node.
        opset: version of the default domain.
        batch: what to do where a batch size is written into the graph.
        constants: indices of the inputs that are constants of the file.
    """

    def __init__(self, node: Node, opset: int, batch: Batch, constants: Collection[int] = ()) -> None:
        super().__init__()
        self.node, self.opset, self.batch, self.constants = node, opset, batch, frozenset(constants)
        self._function = OPERATORS.get(key(node.domain, node.op_type))

    @property
    def op_type(self) -> str:
        return self.node.op_type

    @property
    def outputs(self) -> list[str]:
        return self.node.outputs

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value (str for strings), or ``default``."""
        return self.node.attribute(name, default)

    def forward(self, *inputs: Tensor | None) -> Outputs:
        places = {x.device for x in inputs if x is not None and x.dim()}
        if len(places) > 1:  # constants of integer type meet data on a GPU
            device = next(place for place in places if place.type != "cpu")
            inputs = tuple(x if x is None else x.to(device) for x in inputs)
        return self._function(self, *inputs)

    def extra_repr(self) -> str:
        return str(self.node)
