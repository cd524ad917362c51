"""What a network would give without one channel: the part behind the channel is run again, for many channels at once.

A pass over a batch is kept, node by node of the network's graph (torch.fx). To leave out a channel only the nodes that
depend on it are computed again, on the kept values of all others; channels of one layer are stacked along the batch.
As long as only a few channels differ, only these are computed (:mod:`.deltas`). Networks in evaluation mode treat the
images of a batch one by one, so this gives what a full pass would, up to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from prune_onnx.graph_ops.errors import ConfigError

from .deltas import Change, as_product, is_product, passed, shape_of, wants_shape
from .from_onnx.base import Operation
from .masks import is_layer
from .trace import evaluating

IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv}

STACKED = 2**21
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
        kept: where they go.
    """

    kept: dict[fx.Node, object] | None = None

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if self.kept is not None:
            self.kept[n] = value
        return value

    def call_module(self, target: fx.node.Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        module = self.fetch_attr(target)
        return as_product(module, args[0]) if is_product(module, *args) else module(*args, **kwargs)


def _works_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a node overwrites what it is given."""
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function" or node.target in IN_PLACE:
        return node.op == "call_function"
    named = node.target.__name__.endswith("_") and node.target.__module__ != operator.add.__module__  # and_ is &
    return named or bool(node.kwargs.get("inplace"))


def _without_overwriting(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Let nodes that work in place do so on a copy, which later nodes then take; return the copies."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    copies = set()
    for node, number in order.items():
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and _works_in_place(node, modules.get(str(node.target))):
            with graph.inserting_before(node):
                copy = graph.call_method("clone", (source,))
            source.replace_all_uses_with(node, lambda user, after=number: order.get(user, -1) > after)
            node.update_arg(0, copy)
            copies.add(copy)
    return copies


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
        names = dict(model.named_modules(remove_duplicate=False))
        try:
            with evaluating(model):  # a functional dropout reads the mode when the graph is made
                graph = _Tracer().trace(model)
                self._copies = _without_overwriting(graph, names)
                self._runner = _Runner(fx.GraphModule(model, graph))
        except Exception as error:  # the network's own code runs on stand-ins for tensors: anything may come
            raise ConfigError(
                f"backward-selection cannot follow this network's forward pass ({error}). Try --method taylor."
            ) from error
        self._nodes = list(self._runner.module.graph.nodes)
        self._modules = {node: names[node.target] for node in self._nodes if node.op == "call_module"}
        self._places: dict[nn.Module, list[fx.Node]] = {}
        for node, module in self._modules.items():
            if is_layer(module) or isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._places.setdefault(module, []).append(node)
        self._kept: dict[fx.Node, object] = {}

    @torch.no_grad()
    def refresh(self) -> torch.Tensor:
        """Run the whole network; return its output, (S, classes)."""
        return self._keep(self._inputs)

    def slopes(
        self, loss_of: Callable[[torch.Tensor], torch.Tensor], modules: Iterable[nn.Module] | None = None
    ) -> tuple[float, dict[nn.Module, torch.Tensor]]:
        """Run the whole network, and back; return the loss, and -sum z * dL/dz over the maps z of each channel, (C,).

        That is by how much the loss changes without the channel, to first order.

        Args:
            loss_of: the loss from the network's output.
            modules: layers and BatchNorms that are asked for; all of them if not given.
        """
        with torch.enable_grad():
            inputs = self._inputs.detach().requires_grad_().clone()  # gradients flow whatever is frozen
            loss = loss_of(self._keep(inputs))
        wanted = self._places if modules is None else modules
        places = [(module, self._kept[node]) for module in wanted for node in self._places.get(module, ())]
        slopes = torch.autograd.grad(loss, [value for _, value in places], allow_unused=True)
        found: dict[nn.Module, torch.Tensor] = {}
        for (module, value), slope in zip(places, slopes, strict=True):
            if slope is not None:
                total = -(value.detach() * slope).transpose(0, 1).flatten(1).sum(1)
                found[module] = found[module] + total if module in found else total
        self._kept = {
            node: value.detach() if isinstance(value, torch.Tensor) else value for node, value in self._kept.items()
        }
        return loss.item(), found

    def _keep(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run the whole network and keep every value; return its output."""
        self._runner.kept = self._kept = {}
        with evaluating(self._model):
            output = self._runner.run(inputs)
        self._runner.kept = None
        for copy in self._copies:  # it has been overwritten
            self._kept[copy] = self._kept[copy.args[0]]
        return output

    @torch.no_grad()
    def without(self, units: Sequence[Unit]) -> Iterator[torch.Tensor]:
        """Yield, in order, the network's outputs without each of some of the units, (units, S, classes).

        Args:
            units: to leave out, one at a time; neighbours that are channels of the same modules run together.
        """
        for kind, some in groupby(units, key=lambda unit: [(module, len(own)) for module, own in unit]):
            every = list(some)
            starts = {
                node: torch.tensor([unit[index][1] for unit in every], device=self._inputs.device)
                for index, (module, _) in enumerate(kind) for node in self._places[module]
            }  # fmt: skip
            at_a_time = max(1, STACKED // self._largest(starts))
            for first in range(0, len(every), at_a_time):
                with evaluating(self._model):
                    yield self._run({node: own[first : first + at_a_time] for node, own in starts.items()})

    def _largest(self, starts: Collection[fx.Node]) -> int:
        """Return the numbers in the largest map from the first of some nodes on."""
        first = next(index for index, node in enumerate(self._nodes) if node in starts)
        values = (self._kept[node] for node in self._nodes[first:])
        return max(value.numel() for value in values if isinstance(value, torch.Tensor))

    def _run(self, starts: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        """Return the outputs, (copies, S, classes), where channels of some nodes are zero.

        Args:
            starts: nodes, and their channels that are zero in each copy, (copies, k).
        """
        copies = len(next(iter(starts.values())))
        state = _State(self._kept, copies, len(self._inputs))
        for node in self._nodes:
            if any(source in state.found for source in node.all_input_nodes):
                state.found[node] = self._passed(node, state)
            elif node not in starts:
                continue
            if node in starts:
                state.clear(node, starts[node])
            for done in self._runner.user_to_last_uses.get(node, ()):
                state.drop(done)
        return state.whole(node).unflatten(0, (copies, -1))

    def _passed(self, node: fx.Node, state: _State) -> object:
        """Return what a node gives for all copies."""
        target = self._modules.get(node, node.target)
        changes = [state.found[source] for source in node.all_input_nodes if source in state.found]
        if node.op.startswith("call") and all(isinstance(change, Change) for change in changes):
            if wants_shape(node, target):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), state.stand_in)
                return getattr(self._runner, node.op)(node.target, args, kwargs)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), state.changed)
            result = passed(target, args, kwargs, self._kept[node])
            if result is not None:
                return result
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), state.whole)
        if node in self._copies and len(node.args[0].users) == 1:  # nothing else reads what is overwritten
            return args[0]
        return getattr(self._runner, node.op)(node.target, args, kwargs)


class _State:
    """What is known of a run with several copies.

    Args:
        kept: what each node gives without any change.
        copies: how many.
        images: of the batch.

    Attributes:
        found: what nodes give that a change reaches: for all copies, or the change.
    """

    def __init__(self, kept: dict[fx.Node, object], copies: int, images: int) -> None:
        self._kept, self._copies, self._images = kept, copies, images
        self._wholes: dict[fx.Node, object] = {}
        self.found: dict[fx.Node, object] = {}

    def changed(self, node: fx.Node) -> object:
        """Return what a node gives: a change, or what it always gives."""
        return self.found.get(node, self._kept[node])

    def stand_in(self, node: fx.Node) -> object:
        """Return something of the shape of what a node gives for all copies."""
        found = self.found.get(node)
        return shape_of(found) if isinstance(found, Change) else self.whole(node)

    def whole(self, node: fx.Node) -> object:
        """Return what a node gives for all copies; constants and parameters are as they are."""
        found = self.found.get(node)
        if node not in self._wholes and isinstance(found, Change):
            self._wholes[node] = found.whole()
        elif node not in self._wholes and node not in self.found:
            self._wholes[node] = self._enlarged(node)
        return self._wholes.get(node, found)

    def _enlarged(self, node: fx.Node) -> object:
        value = self._kept[node]
        batch = isinstance(value, torch.Tensor) and value.shape[:1] == (self._images,)
        if node.op == "get_attr" or not batch:
            return value
        return value.repeat(self._copies, *[1] * (value.dim() - 1))

    def clear(self, node: fx.Node, channels: torch.Tensor) -> None:
        """Let channels of a node be zero, (copies, k)."""
        found = self.found.get(node)
        if found is None or (isinstance(found, Change) and torch.equal(found.channels, channels)):
            self.found[node] = Change.zeros(self._kept[node], channels)
            return
        self.found[node] = whole = self.whole(node)
        self._wholes.pop(node, None)
        index = torch.arange(self._copies, device=whole.device)[:, None]
        whole.unflatten(0, (self._copies, -1))[index, :, channels] = 0

    def drop(self, node: fx.Node) -> None:
        """Forget what a node gives for all copies."""
        self.found.pop(node, None)
        self._wholes.pop(node, None)
