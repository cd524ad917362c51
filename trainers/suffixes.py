"""What a network would give without one channel: the part behind the channel is run again, for many channels at once.

A pass over a batch is kept, node by node of the network's graph (torch.fx). To leave out a channel only the nodes that
depend on it are computed again, on the kept values of all others; channels of one layer are stacked along the batch.
Networks in evaluation mode treat the images of a batch one by one, so this gives what a full pass would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import fx, nn

from prune_onnx.graph_ops.errors import ConfigError

from .from_onnx.base import Operation
from .masks import is_layer
from .trace import evaluating

STACKED = 2**23
"""Entries of one module's stacked maps that are held at a time."""

Unit = tuple[tuple[nn.Module, tuple[int, ...]], ...]
"""What goes together: modules, and the channels of their outputs that are then zero."""


class _Tracer(fx.Tracer):
    """Follows a network from operation to operation; what stands for a node of an ONNX file is one."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, Operation | nn.modules.batchnorm._BatchNorm) or is_layer(m)
        return whole or super().is_leaf_module(m, module_qualified_name)


class _Runner(fx.Interpreter):
    """Runs a graph, and keeps every value, if asked to.

    Attributes:
        kept: values as they were first: a later node may work in place.
        own: the values themselves.
    """

    kept: dict[fx.Node, object] | None = None
    own: dict[fx.Node, object] | None = None

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if self.kept is not None:
            self.kept[n] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        if self.own is not None:
            self.own[n] = value
        return value


class Suffixes:
    """A network's pass over one batch, kept, and what it gives without single units.

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
                self._runner = _Runner(fx.GraphModule(model, _Tracer().trace(model)))
        except Exception as error:  # the network's own code runs on stand-ins for tensors: anything may come
            raise ConfigError(
                f"backward-selection cannot follow this network's forward pass ({error}). Try --method taylor."
            ) from error
        self._nodes = list(self._runner.module.graph.nodes)
        names = dict(model.named_modules(remove_duplicate=False))
        self._places: dict[nn.Module, list[fx.Node]] = {}
        for node in self._nodes:
            module = names[node.target] if node.op == "call_module" else None
            if module is not None and (is_layer(module) or isinstance(module, nn.modules.batchnorm._BatchNorm)):
                self._places.setdefault(module, []).append(node)
        self._kept: dict[fx.Node, object] = {}

    @torch.no_grad()
    def refresh(self) -> torch.Tensor:
        """Run the whole network; return its output, (S, classes)."""
        self._runner.kept = self._kept = {}
        with evaluating(self._model):
            output = self._runner.run(self._inputs)
        self._runner.kept = None
        return output

    def slopes(self, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, dict[nn.Module, torch.Tensor]]:
        """Run the whole network, and back; return the loss, and -sum z * dL/dz over the maps z of each channel, (C,).

        That is by how much the loss changes without the channel, to first order: for every layer and BatchNorm.

        Args:
            loss_of: the loss from the network's output.
        """
        self._runner.kept, self._runner.own = {}, {}
        with evaluating(self._model), torch.enable_grad():
            inputs = self._inputs.detach().requires_grad_().clone()  # gradients flow whatever is frozen
            loss = loss_of(self._runner.run(inputs))
        self._kept, own = self._runner.kept, self._runner.own
        self._runner.kept = self._runner.own = None
        modules = [(module, own[node]) for module, nodes in self._places.items() for node in nodes]
        slopes = torch.autograd.grad(loss, [value for _, value in modules], allow_unused=True)
        found: dict[nn.Module, torch.Tensor] = {}
        for (module, value), slope in zip(modules, slopes, strict=True):
            if slope is not None:
                total = -(value.detach() * slope).transpose(0, 1).flatten(1).sum(1)
                found[module] = found[module] + total if module in found else total
        return loss.item(), found

    @torch.no_grad()
    def without(self, units: Sequence[Unit]) -> Iterator[torch.Tensor]:
        """Yield, in order, the network's output without each of the units, (S, classes) each.

        Args:
            units: to leave out, one at a time; neighbours that are channels of the same modules run together.
        """
        for modules, some in groupby(units, key=lambda unit: [module for module, _ in unit]):
            starts = {node: index for index, module in enumerate(modules) for node in self._places[module]}
            channels = [[own for _, own in unit] for unit in some]
            at_a_time = max(1, STACKED // max(self._kept[node].numel() for node in starts))
            for first in range(0, len(channels), at_a_time):
                yield from self._run(starts, channels[first : first + at_a_time])

    def _run(self, starts: dict[fx.Node, int], channels: list[list[tuple[int, ...]]]) -> torch.Tensor:
        """Return the outputs, (units, S, classes), where channels of the nodes ``starts`` are zero.

        Args:
            starts: nodes, and where their channels stand in each unit's list.
            channels: of each unit.
        """
        copies = len(channels)
        self._runner.env = env = {}
        found: set[fx.Node] = set()
        with evaluating(self._model):
            for node in self._nodes:
                if any(source in found for source in node.all_input_nodes):
                    for source in node.all_input_nodes:
                        if source not in env:
                            env[source] = self._enlarged(source, copies)
                    env[node] = self._runner.run_node(node)
                elif node in starts:
                    env[node] = self._enlarged(node, copies)
                else:
                    continue
                found.add(node)
                if node in starts:
                    parts = env[node].unflatten(0, (copies, -1))
                    for part, unit in zip(parts, channels, strict=True):
                        part[:, list(unit[starts[node]])] = 0
                for done in self._runner.user_to_last_uses.get(node, ()):
                    env.pop(done, None)
        return env[node].unflatten(0, (copies, -1))

    def _enlarged(self, node: fx.Node, copies: int) -> object:
        """Return a kept value for the larger batch, or a copy of it; constants and parameters are as they are."""
        value = self._kept[node]
        if node.op == "get_attr" or not isinstance(value, torch.Tensor) or len(value) != len(self._inputs):
            return value
        return value.repeat(copies, *[1] * (value.dim() - 1))
