"""Layers with weights of their own, as torch's modules: what training methods look for in a network.

Conv, Gemm, MatMul and BatchNormalization nodes whose weights are the file's become ``nn.Conv1d`` to ``nn.Conv3d``,
``nn.Linear`` and ``nn.BatchNorm2d``; they hold the parameters themselves, so two layers can share one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from prune_onnx.graph_ops.graph import Graph, Node

from .values import as_tensor
from .weights import Weight
from .windows import Window, pad

Built = tuple[nn.Module, int]
"""A module, and which input of the node it takes."""


@dataclass
class Shelf:
    """Hands out parameters, one for each weight.

    Attributes:
        graph: where they are used.
        weights: which there are.
        parameters: those handed out, by name.
        transposed: names of those that are held the other way round than in the file.
    """

    graph: Graph
    weights: dict[str, Weight]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)

    def has(self, *names: str) -> bool:
        """Return whether all of these are weights (or absent)."""
        return all(not name or name in self.weights for name in names)

    def rank(self, name: str) -> int:
        return len(self.weights[name].stored.dims)

    def alone(self, name: str) -> bool:
        """Return whether a single node reads it."""
        return len(self.graph.readers[name]) == 1 and name not in self.graph.captured

    def take(self, name: str, *, transposed: bool = False) -> nn.Parameter | None:
        """Return the parameter of a weight; ``None`` for an absent one."""
        if not name:
            return None
        if name not in self.parameters:
            value = as_tensor(self.weights[name].stored)
            self.parameters[name] = nn.Parameter(value.t().contiguous() if transposed else value)
            if transposed:
                self.transposed.add(name)
        return self.parameters[name]

    def constant(self, name: str) -> torch.Tensor | None:
        """Return the value of an initializer that is no weight, such as a statistic."""
        tensor = self.graph.initializers.get(name)
        return None if tensor is None else as_tensor(tensor)


class _Padded:
    """Pads its input first, where torch's own padding will not do."""

    window: Window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.window.symmetric:
            x = pad(x, self.window.padding(x.shape[2:]))
        return super().forward(x)


class Conv1d(_Padded, nn.Conv1d):
    """A Conv node of one spatial axis."""


class Conv2d(_Padded, nn.Conv2d):
    """A Conv node of two spatial axes."""


class Conv3d(_Padded, nn.Conv3d):
    """A Conv node of three spatial axes."""


class BatchNorm(nn.BatchNorm2d):
    """A BatchNormalization node, of any rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Take everything."""


def _input(node: Node, index: int) -> str:
    return node.inputs[index] if index < len(node.inputs) else ""


def convolution(node: Node, shelf: Shelf) -> Built | None:
    weight, bias = _input(node, 1), _input(node, 2)
    if not shelf.has(weight, bias) or not 3 <= shelf.rank(weight) <= 5:
        return None
    out_channels, per_group, *kernel = shelf.weights[weight].stored.dims
    window, group = Window.of(node, kernel), node.attribute("group", 1)
    rank = len(kernel)
    module = (Conv1d, Conv2d, Conv3d)[rank - 1](
        per_group * group,
        out_channels,
        tuple(kernel),
        window.strides,
        window.pads[:rank] if window.symmetric else 0,
        window.dilations,
        group,
        bias=False,
        device="meta",
    )
    module.window = window
    module.weight, module.bias = shelf.take(weight), shelf.take(bias)
    return module, 0


def linear(node: Node, shelf: Shelf) -> Built | None:
    """Gemm or MatMul by a matrix of the file, applied to the last axis."""
    weight, bias = _input(node, 1), _input(node, 2)
    upright = node.op_type == "Gemm" and bool(node.attribute("transB", 0))
    if not weight or not shelf.has(weight, bias) or shelf.rank(weight) != 2 or shelf.graph.is_static(node.inputs[0]):
        return None
    if node.op_type == "Gemm":
        plain = node.attribute("alpha", 1.0) == 1 and not node.attribute("transA", 0)
        if not plain or (bias and (node.attribute("beta", 1.0) != 1 or shelf.rank(bias) != 1)):
            return None
    if not upright and not shelf.alone(weight):  # others want it as it is in the file
        return None
    rows, columns = shelf.weights[weight].stored.dims
    inside, outside = (columns, rows) if upright else (rows, columns)
    if bias and shelf.weights[bias].stored.dims[0] != outside:
        return None
    module = nn.Linear(inside, outside, bias=False, device="meta")
    module.weight, module.bias = shelf.take(weight, transposed=not upright), shelf.take(bias)
    return module, 0


def batch_norm(node: Node, shelf: Shelf) -> Built | None:
    scale, bias, mean, var = (_input(node, index) for index in range(1, 5))
    outputs = [name for name in node.outputs[1:] if name in shelf.graph.readers or name in shelf.graph.outputs]
    if outputs or not shelf.has(scale, bias) or not {mean, var} <= shelf.graph.initializers.keys():
        return None
    if shelf.graph.is_static(node.inputs[0]):  # it standardises a weight
        return None
    module = BatchNorm(
        shelf.weights[scale].stored.dims[0],
        node.attribute("epsilon", 1e-5),
        1 - node.attribute("momentum", 0.9),
        device="meta",
    )
    module.weight, module.bias = shelf.take(scale), shelf.take(bias)
    module.running_mean, module.running_var = shelf.constant(mean), shelf.constant(var)
    module.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    return module, 0


LAYERS: dict[str, Callable[[Node, Shelf], Built | None]] = {
    "Conv": convolution,
    "Gemm": linear,
    "MatMul": linear,
    "BatchNormalization": batch_norm,
}
"""Operator to what makes a module of its node, or returns ``None`` where it is a plain function after all."""


def signature(node: Node) -> Sequence[object]:
    """Return what two nodes must have in common to be one layer that is used twice."""
    attributes = sorted((a.name, a.SerializeToString()) for a in node.proto.attribute)
    return (node.op_type, tuple(node.inputs[1:]), tuple(attributes))
