"""What a network would give without one channel: the part behind the channel is run again, for many channels at once.

A pass over a batch is kept, node by node of the network's graph (torch.fx). To leave out a channel only the nodes that
depend on it are computed again, on the kept values of all others; channels of one layer are stacked along the batch.
Networks in evaluation mode treat the images of a batch one by one, so this gives what a full pass would.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from prune_onnx.graph_ops.errors import ConfigError

from .from_onnx.base import Operation
from .masks import is_layer
from .trace import Layer, evaluating

STACKED = 2**23
"""Entries of one layer's stacked maps that are held at a time."""


class _Tracer(fx.Tracer):
    """Follows a network from operation to operation; what stands for a node of an ONNX file is one."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, Operation | nn.modules.batchnorm._BatchNorm) or is_layer(m)
        return whole or super().is_leaf_module(m, module_qualified_name)


class _Keeping(fx.Interpreter):
    """Runs a graph and keeps every value as it was first: a later node may work in place."""

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        self.kept[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


class Suffixes:
    """A network's pass over one batch, kept, and what it gives without single channels.

    Args:
        model: run in evaluation mode; what changes in its weights counts from the next :meth:`refresh` on.
        inputs: the batch, (S, C, H, W).

    Raises:
        ConfigError: torch.fx cannot follow the network: its forward pass depends on data.
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor) -> None:
        self._model, self._inputs = model, inputs
        try:
            with evaluating(model):  # a functional dropout reads the mode when the graph is made
                self._runner = _Keeping(fx.GraphModule(model, _Tracer().trace(model)))
        except Exception as error:  # the network's own code runs on stand-ins for tensors: anything may come
            raise ConfigError(
                f"backward-selection cannot follow this network's forward pass ({error}). Try --method taylor."
            ) from error
        self._nodes = list(self._runner.module.graph.nodes)
        self._modules = {module: name for name, module in model.named_modules()}

    @torch.no_grad()
    def refresh(self) -> torch.Tensor:
        """Run the whole network; return its output, (S, classes)."""
        self._runner.kept = self._kept = {}
        with evaluating(self._model):
            return self._runner.run(self._inputs)

    @torch.no_grad()
    def without(self, layer: Layer, channels: list[int]) -> Iterator[torch.Tensor]:
        """Yield, in order, the network's output without each of the channels of a layer, (S, classes) each.

        Args:
            layer: its output, behind its BatchNorm if it has one, is zero in the channel.
            channels: to leave out, one at a time.
        """
        name = self._modules[layer.norm or layer.module]
        start = next(node for node in self._nodes if node.op == "call_module" and node.target == name)
        behind = self._behind(start)
        value = self._kept[start]
        at_a_time = max(1, STACKED // value.numel())
        for first in range(0, len(channels), at_a_time):
            part = channels[first : first + at_a_time]
            stacked = value.repeat(len(part), *[1] * (value.dim() - 1)).view(len(part), *value.shape)
            for index, channel in enumerate(part):
                stacked[index, :, channel] = 0
            output = self._run(start, stacked.flatten(0, 1), behind, len(part))
            yield from output.view(len(part), len(value), -1)

    def _behind(self, start: fx.Node) -> list[fx.Node]:
        """Return the nodes that depend on ``start``, in order."""
        found = {start}
        for node in self._nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return [node for node in self._nodes if node in found and node is not start]

    def _run(self, start: fx.Node, value: torch.Tensor, behind: list[fx.Node], copies: int) -> torch.Tensor:
        """Return the output with ``value`` at ``start``, for a batch that is ``copies`` times as large."""
        env = self._runner.env = {start: value}
        self._runner.kept = {}
        inside = {start, *behind}
        with evaluating(self._model):
            for node in behind:
                for source in node.all_input_nodes:
                    if source not in inside and source not in env:
                        env[source] = self._enlarged(source, copies)
                env[node] = self._runner.run_node(node)
        return env[behind[-1]]

    def _enlarged(self, node: fx.Node, copies: int) -> object:
        """Return a kept value for the larger batch; constants and parameters are as they are."""
        value = self._kept[node]
        if node.op == "get_attr" or not isinstance(value, torch.Tensor) or len(value) != len(self._inputs):
            return value
        return value.repeat(copies, *[1] * (value.dim() - 1))
