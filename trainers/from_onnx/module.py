"""An ONNX graph as a torch module that can be trained, and its way back into the file.

Each node runs as torch operations, in the graph's order; shape arithmetic runs with it, so sizes that the file leaves
open may be any. What is trained are the file's own weights (:mod:`.weights`); they go back into the model that was
read, whose graph stays as it is: names, opset, metadata and everything that was not trained.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from torch import nn

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.graph_ops.graph import Graph, Node

from .base import OPERATORS, Batch, Operation, key
from .layers import LAYERS, Shelf, signature
from .values import as_tensor, from_array
from .weights import find_weights

OLDEST = 7
"""Opset from which on operators broadcast as they do now."""

NAMED = 5
"""Nodes that an error names at most."""


@dataclass
class Step:
    """A node in its place.

    Attributes:
        node: itself.
        module: what runs.
        inputs: names of the tensors that go into the module; empty for those left out.
        free: names that nothing reads any more afterwards.
        watched: names of outputs that are to be observed.
    """

    node: Node
    module: nn.Module
    inputs: list[str]
    free: list[str] = field(default_factory=list)
    watched: list[str] = field(default_factory=list)


class OnnxModule(nn.Module):
    """The main graph of an ONNX model.

    Parameters carry the names of the file's weights as far as torch allows: ``conv1.weight`` is the weight of the
    module ``conv1``. :attr:`parameters_by_name` has all of them under the file's names.

    Args:
        source: a path or a model.
        logits: whether a softmax that makes the graph's output is left out: losses want what goes into it.

    Attributes:
        model: as it was read; not changed.
        input_names: the graph's inputs.
        output_names: the graph's outputs, or what goes into their softmax.
        weights: the constants that are trained, by the file's name.
        parameters_by_name: their parameters.
        transposed: names of those that are held the other way round than in the file.
        norms: BatchNorm modules to the outputs of their nodes.
        batch: the batch size that the file fixes, if it does.
        observed: tensors of the last pass, by name, of those that :meth:`observe` was asked for.
        nhwc: whether its input has the channels last; it is given (N, C, H, W) all the same. Set by the caller.

    Raises:
        ModelError: not a valid model, or operators that cannot be trained; the nodes are named.
    """

    def __init__(self, source: str | Path | onnx.ModelProto, *, logits: bool = False) -> None:
        super().__init__()
        self.model = model_io.load(source)
        graph = Graph(self.model)
        self.input_names = [value.name for value in graph.inputs]
        self.output_names = [_before_softmax(graph, name) if logits else name for name in graph.outputs]
        nodes = _needed(graph, self.output_names)
        _check(graph, nodes)
        self.nhwc = False
        self.observed: dict[str, torch.Tensor] = {}
        self.batch = Batch(_fixed_batch(graph))
        self.weights = find_weights(graph, nodes)
        self.norms: dict[nn.Module, list[str]] = {}
        self._shelf = shelf = Shelf(graph, self.weights)
        self._constants = _constants(graph, nodes, shelf)
        self._modules_of: dict[object, nn.Module] = {}
        self._steps: list[Step] = []
        for node in nodes:
            if node.op_type != "Constant":
                self._add(node, graph)
        used = {name for step in self._steps for name in step.inputs} | set(self.output_names)
        self._loose = {name: shelf.take(name) for name in shelf.weights if name in used}
        for name, parameter in self._loose.items():
            holder, leaf = self._holder(name)
            holder.register_parameter(_free_name(holder, leaf), parameter)
        self.parameters_by_name: dict[str, nn.Parameter] = shelf.parameters
        self.transposed = shelf.transposed
        del self._shelf, self._modules_of
        self._place_constants(used)
        self._plan_memory()

    # -- building ----------------------------------------------------------------------------------
    def _add(self, node: Node, graph: Graph) -> None:
        """Add a node: as a layer, as a function, or as the constant that it always gives."""
        if all(name in self._constants for name in node.inputs if name) and node.op_type != "Dropout":
            outputs = _run(Step(node, Operation(node, graph.opset, self.batch), node.inputs), self._constants)
            self._constants.update(zip(node.outputs, outputs, strict=False))
            return
        build = LAYERS.get(node.op_type) if not node.domain else None
        known = signature(node)
        built = self._modules_of.get(known) if build else None
        if build and built is None:
            made = build(node, self._shelf)
            if made is not None:
                built = self._modules_of[known] = made[0]
                self._register(built, node)
        if isinstance(built, nn.BatchNorm2d):
            self.norms.setdefault(built, []).append(node.outputs[0])
        if built is not None:
            self._steps.append(Step(node, built, node.inputs[:1]))
            return
        constants = [index for index, name in enumerate(node.inputs) if name in self._constants]
        still = constants and all(graph.is_static(name) for name in node.inputs if name)
        operation = Operation(node, graph.opset, Batch() if still else self.batch, constants)
        self._register(operation, node)
        self._steps.append(Step(node, operation, node.inputs))

    def _register(self, module: nn.Module, node: Node) -> None:
        """Put a module where its weight's name says (``layer1.conv.weight``), else where the node's name does."""
        names = [name for name in node.inputs[1:2] if name in self._shelf.weights and name.endswith(".weight")]
        layer = not isinstance(module, Operation)
        path = names[0].removesuffix(".weight") if names and layer else node.name.replace(".", "_")
        holder, leaf = self._holder(path or node.op_type)
        holder.add_module(_free_name(holder, leaf), module)

    def _holder(self, path: str) -> tuple[nn.Module, str]:
        """Return the module that holds what stands at a dotted path, and its name there."""
        *parents, leaf = path.split(".")
        holder: nn.Module = self
        for part in filter(None, parents):
            inner = holder._modules.get(part)
            if inner is None:
                part = _free_name(holder, part)
                inner = nn.Module()
                holder.add_module(part, inner)
            holder = inner
        return holder, leaf

    def _place_constants(self, used: set[str]) -> None:
        """Keep float constants on the module's device; integers, which are sizes and positions, on the CPU."""
        self._buffered: dict[str, str] = {}
        self._host: dict[str, torch.Tensor] = {}
        for name, value in self._constants.items():
            if name not in used:
                continue
            if value.is_floating_point():
                self._buffered[name] = place = f"constant_{len(self._buffered)}"
                self.register_buffer(place, value, persistent=False)
            else:
                self._host[name] = value
        self._constants = {}

    def _plan_memory(self) -> None:
        """Note after which step each tensor can go."""
        last: dict[str, Step] = {}
        for step in self._steps:
            for name in (*step.inputs, *step.node.outputs):
                last[name] = step
        for name, step in last.items():
            if name and name not in self.output_names:
                step.free.append(name)

    @property
    def made(self) -> set[str]:
        """Names of all tensors that nodes make."""
        return {name for step in self._steps for name in step.node.outputs if name}

    def observe(self, names: Collection[str]) -> None:
        """Keep these tensors of every pass in :attr:`observed`."""
        self.observed = {}
        for step in self._steps:
            step.watched = [name for name in step.node.outputs if name in names]

    # -- running -----------------------------------------------------------------------------------
    def forward(self, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the graph.

        Args:
            first: for the first of :attr:`input_names`.
            others: for those that follow.

        Returns:
            The graph's output; a tuple of them when there are several.

        Raises:
            ModelError: a node does not take what it gets; it is named.
        """
        inputs = [first, *others] if len(self.input_names) > 1 else [first]  # torch.fx cannot look into ``others``
        if self.nhwc:
            inputs = [x.permute(0, 2, 3, 1) for x in inputs]
        self.batch.actual = len(inputs[0]) if self.batch.fixed else 0
        values = {**self._host, **self._loose}
        for name, place in self._buffered.items():
            values[name] = getattr(self, place)
        values.update(zip(self.input_names, inputs, strict=True))
        for step in self._steps:
            values.update(zip(step.node.outputs, _run(step, values), strict=False))
            for name in step.watched:
                self.observed[name] = values[name]
            for name in step.free:
                values.pop(name, None)  # a BatchNorm layer has the one output that inference needs
        outputs = tuple(values[name] for name in self.output_names)
        return outputs[0] if len(outputs) == 1 else outputs


def _run(step: Step, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return a step's outputs.

    Raises:
        ModelError: it does not take its inputs.
    """
    inputs = [values[name] if name else None for name in step.inputs]
    try:
        result = step.module(*inputs)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{step.node} fails: {model_io.first_line(error)}.") from error
    return result if isinstance(result, tuple) else (result,)


def _free_name(holder: nn.Module, name: str) -> str:
    """Return a name that nothing in ``holder`` has: the given one, or with underscores behind it."""
    name = name.replace(".", "_") or "_"
    while hasattr(holder, name):
        name += "_"
    return name


def _before_softmax(graph: Graph, output: str) -> str:
    """Return what goes into the softmax that makes an output, else the output."""
    maker = graph.producer.get(output)
    return maker.inputs[0] if maker is not None and maker.op_type in ("Softmax", "LogSoftmax") else output


def _needed(graph: Graph, outputs: list[str]) -> list[Node]:
    """Return the nodes on which an output depends, in order."""
    wanted = set(outputs)
    found = []
    for node in reversed(graph.nodes):
        if wanted.intersection(node.outputs):
            found.append(node)
            wanted.update((*node.inputs, *node.captured))
    return found[::-1]


def _check(graph: Graph, nodes: list[Node]) -> None:
    """Refuse what has no translation.

    Raises:
        ModelError: names operators and nodes.
    """
    if graph.opset < OLDEST and any(not node.domain for node in nodes):
        raise ModelError(
            f"the graph is of opset {graph.opset}; {OLDEST} and later can be trained. "
            "Convert it with onnx.version_converter."
        )
    if graph.sparse:
        raise ModelError(f"sparse initializers cannot be trained: {', '.join(sorted(graph.sparse)[:NAMED])}.")
    missing = [node for node in nodes if node.op_type != "Constant" and key(node.domain, node.op_type) not in OPERATORS]
    if missing:
        shown = ", ".join(map(str, missing[:NAMED]))
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise ModelError(f"the graph cannot be trained: no translation to torch for {shown}{more}.")


def _fixed_batch(graph: Graph) -> int:
    """Return the first size of the only input, if the file fixes it."""
    if len(graph.inputs) != 1:
        return 0
    dims = graph.inputs[0].type.tensor_type.shape.dim
    return dims[0].dim_value if dims else 0


def _constants(graph: Graph, nodes: list[Node], shelf: Shelf) -> dict[str, torch.Tensor]:
    """Return the values of initializers and Constant nodes that are not trained."""
    read = {name for node in nodes for name in node.inputs} | set(graph.outputs)
    found = {
        name: as_tensor(tensor)
        for name, tensor in graph.initializers.items()
        if name in read and name not in shelf.weights
    }
    for node in nodes:
        if node.op_type == "Constant" and node.outputs[0] not in shelf.weights:
            attribute = node.proto.attribute[0]
            if attribute.name == "value":
                found[node.outputs[0]] = as_tensor(attribute.t)
                continue
            value = graph.constant(node.outputs[0])
            if value is None:
                raise ModelError(f"{node} holds text or a sparse tensor, which cannot be trained on.")
            found[node.outputs[0]] = from_array(value)
    return found
