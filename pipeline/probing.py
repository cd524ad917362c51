"""Runs a graph once and keeps what the analysis wants to know of every tensor: its shape, its value where that is
static, and one line along every axis. The tensors themselves are not kept: all of them together would fill the memory.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from prune_onnx.graph_ops.errors import ConfigError, ModelError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.model_io import split_weights
from prune_onnx.graph_ops.probe import Probe, Shape

from .runner import RunError, Runner

# Sizes tried for a dynamic axis that is not the batch; the first that runs is taken.
SIDES = (64, 224, 256, 32, 28, 512, 16, 8)
OTHER_BATCH = 3
# A tensor of more bytes than this is a damaged size, not a network (a 4K super-resolution net has 2.1 GB).
LARGEST = 3 * 2**30
# The same for sizes and positions, which ONNX Runtime takes one by one when it infers shapes.
LARGEST_SIZES = 2**28
# Gathering single positions (GatherND) came with this version of the operator set.
GATHERS = 11
# Static nodes that stay when what they compute is cut: their inputs are cut instead.
PASSED_BY = frozenset({"Identity", "Cast", "Transpose", "DequantizeLinear"})
# What the names of added nodes and tensors begin with.
MARK = "prune_onnx_probe"

Feeds = dict[str, np.ndarray]


def input_shapes(graph: Graph, given: dict[str, Shape], *, batch: int, side: int) -> dict[str, Shape]:
    """Fill in dynamic sizes: the first axis is the batch, other axes get ``side``.

    Raises:
        ConfigError: ``given`` names no input of the model, or has another rank or another fixed size.
    """
    names = [i.name for i in graph.inputs]
    for name in given:
        if name not in names:
            raise ConfigError(f"--input-shape: the model has no input {name!r}; its inputs are {', '.join(names)}.")
    shapes: dict[str, Shape] = {}
    for value in graph.inputs:
        dims = value.type.tensor_type.shape.dim
        fixed = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims]
        wish = given.get(value.name)
        if wish is not None:
            if len(wish) != len(fixed) or any(f not in (None, w) for f, w in zip(fixed, wish, strict=True)):
                raise ConfigError(
                    f"--input-shape {value.name}: {'x'.join(map(str, wish))} does not fit the model's "
                    f"{'x'.join('?' if f is None else str(f) for f in fixed)}."
                )
            shapes[value.name] = (
                (batch if fixed and fixed[0] is None and batch != 1 else wish[0], *wish[1:]) if wish else ()
            )
        else:
            shapes[value.name] = tuple(f if f is not None else batch if i == 0 else side for i, f in enumerate(fixed))
    return shapes


def random_feeds(graph: Graph, shapes: dict[str, Shape], seed: int = 0) -> Feeds:
    """Return random inputs: standard normal for floats, 0 and 1 for integers and booleans."""
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for value in graph.inputs:
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"input {value.name!r} is not a tensor; only tensor inputs are supported.")
        dtype = _dtype(value)
        shape = shapes[value.name]
        _check_size(f"input {value.name!r}", shape, dtype.itemsize)
        if dtype.kind in "iub":
            feeds[value.name] = rng.integers(0, 2, shape).astype(dtype)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def is_dynamic(graph: Graph) -> bool:
    """Whether any input has a size that the file leaves open."""
    return any(
        not (d.HasField("dim_value") and d.dim_value > 0) for i in graph.inputs for d in i.type.tensor_type.shape.dim
    )


def batch_of(graph: Graph) -> int:
    """The batch size that the file fixes, 0 where it leaves it open."""
    dims = graph.inputs[0].type.tensor_type.shape.dim
    return dims[0].dim_value if len(dims) and dims[0].HasField("dim_value") and dims[0].dim_value > 0 else 0


def has_dynamic_side(graph: Graph) -> bool:
    """Whether an input has an open size other than its first axis."""
    return any(
        not (d.HasField("dim_value") and d.dim_value > 0)
        for i in graph.inputs
        for d in list(i.type.tensor_type.shape.dim)[1:]
    )


def _dtype(value: onnx.ValueInfoProto) -> np.dtype:
    try:
        return helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    except KeyError:
        raise ModelError(f"input {value.name!r} has an unknown type ({value.type.tensor_type.elem_type}).") from None


def _itemsize(kind: int) -> int:
    try:
        return helper.tensor_dtype_to_np_dtype(kind).itemsize
    except KeyError:
        return 1


def _check_size(what: str, shape: Shape, itemsize: int, limit: int = LARGEST) -> None:
    """Refuse what would not fit into memory before anything is allocated."""
    size = math.prod(shape) * itemsize
    if size > limit:
        raise ModelError(
            f"{what} of shape {'x'.join(map(str, shape))} would take {size / 2**30:.3g} GB. "
            "Where the model's sizes are dynamic, name smaller ones with --input-shape."
        )


def infer(graph: Graph, shapes: dict[str, Shape]) -> dict[str, Shape | None]:
    """Infer shapes without running anything.

    Args:
        graph: the model.
        shapes: of its inputs.

    Returns:
        Shapes that inference found completely, ``None`` for what is not a tensor; names that it knows nothing of are
        missing.

    Raises:
        ModelError: a tensor would not fit into memory.
    """
    skeleton = split_weights(graph.model)[0]
    del skeleton.graph.value_info[:]
    for value in skeleton.graph.output:  # what the file says of them need not be true
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    for value in skeleton.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            dim.dim_value = size
    try:
        # Without the propagation of data, whose cost has no bound.
        skeleton = shape_inference.infer_shapes(skeleton)
    except (shape_inference.InferenceError, ValueError):
        return {}  # not our judge: ONNX Runtime is about to say whether the model runs
    found: dict[str, Shape | None] = {}
    for value in [*skeleton.graph.value_info, *skeleton.graph.output]:
        if not value.type.HasField("tensor_type"):
            if value.type.WhichOneof("value"):
                found[value.name] = None
            continue
        kind = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
        if kind.HasField("shape") and all(d >= 0 for d in dims):
            found[value.name] = tuple(dims)
            what, size = f"tensor {value.name!r}", _itemsize(kind.elem_type)
            small = graph.is_static(value.name) and kind.elem_type == onnx.TensorProto.INT64
            _check_size(what, tuple(dims), size, LARGEST_SIZES if small else LARGEST)
    return found


class Prober:
    """One graph in a session that tells shapes, static values and one line along every axis.

    Nodes are added to the graph for that: ``Shape`` of every tensor whose shape is not known beforehand, and a
    ``GatherND`` that picks the lines. A tensor is exposed as a whole only when it is a static operand, or when its
    shape is not known.
    """

    def __init__(self, graph: Graph, known: dict[str, Shape | None], *, lines: bool = True, add: bool = True) -> None:
        """Open the session.

        Args:
            graph: the model.
            known: shapes as :func:`infer` gives them; lines are to be had at these shapes only.
            lines: whether lines are wanted.
            add: whether nodes may be added; without them every tensor is exposed as a whole.

        Raises:
            ModelError: ONNX Runtime does not take the model, or a tensor would not fit into memory.
        """
        self.graph = graph
        self.whole: list[str] = []
        self.measured: dict[str, str] = {}  # tensor -> what holds its shape
        self.inferred: dict[str, Shape] = {}  # tensor -> its shape, where no input has an open size
        self.lines: dict[str, tuple[str, Shape]] = {}  # tensor -> what holds its lines, its shape
        names = list(dict.fromkeys([*graph.outputs, *(o for n in graph.nodes for o in n.outputs if o)]))
        dynamic = is_dynamic(graph)
        prefix = MARK
        while any(name.startswith(prefix) for name in names):
            prefix += "_"
        nodes: list[onnx.NodeProto] = []
        picks: dict[Shape, onnx.TensorProto] = {}
        for i, name in enumerate(names):
            shape = known.get(name)
            if name in known and shape is None and add:
                continue  # a sequence or an optional: no axis to cut
            pick = shape is not None and (graph.opset >= GATHERS or not all(shape))
            static = graph.is_static(name)
            if not add or (_is_operand(graph, name) if static else lines and not pick):
                self.whole.append(name)
                continue
            if shape is not None and add and not dynamic:
                self.inferred[name] = shape
            else:
                self.measured[name] = f"{prefix}_shape_{i}"
                nodes.append(helper.make_node("Shape", [name], [self.measured[name]], name=self.measured[name]))
            if lines and not static and all(shape):
                if shape not in picks:
                    picks[shape] = numpy_helper.from_array(_positions(shape), f"{prefix}_at_{len(picks)}")
                line = f"{prefix}_line_{i}"
                self.lines[name] = line, shape
                if shape:
                    nodes.append(helper.make_node("GatherND", [name, picks[shape].name], [line], name=line))
        constants = [tensor for shape, tensor in picks.items() if shape]
        expose = [*self.whole, *(o for n in nodes for o in n.output)]
        self.runner = Runner(graph.model, expose=expose, nodes=nodes, constants=constants) if expose else None

    def run(
        self, feeds: Feeds, *, lines: bool = True
    ) -> tuple[dict[str, Shape], dict[str, np.ndarray], dict[str, list[np.ndarray]]]:
        """Return shapes, static values and one line per axis of every tensor.

        Raises:
            RunError: the model fails on these inputs.
        """
        picked = self.lines if lines else {}
        names = [*self.whole, *self.measured.values(), *(line for line, shape in picked.values() if shape)]
        got = dict(zip(names, self.runner.run(names, feeds), strict=True)) if self.runner and names else {}
        shapes = self.inferred | {name: tuple(got[key].tolist()) for name, key in self.measured.items()}
        for name, (_, shape) in picked.items():
            if shapes[name] != shape:
                raise RunError(f"{MARK}: {name} has another shape than inferred")
        found = {
            name: np.split(got[key], np.cumsum(shape[:-1])) if shape else [] for name, (key, shape) in picked.items()
        }
        values: dict[str, np.ndarray] = {}
        for name, array in [*feeds.items(), *((name, got[name]) for name in self.whole)]:
            if not isinstance(array, np.ndarray):
                continue  # a sequence or an absent optional
            shapes[name] = array.shape
            if self.graph.is_static(name):
                values[name] = array
            if array.size:
                found[name] = [
                    np.array(array[(0,) * a + (slice(None),) + (0,) * (array.ndim - a - 1)]) for a in range(array.ndim)
                ]
        return shapes, values, found


def _is_operand(graph: Graph, name: str) -> bool:
    """Whether anybody will ask for a static tensor's value: the nodes that compute data with it, or those that are
    sliced together with their inputs. What lies further back is a second copy of the weights."""
    if name in graph.outputs or name in graph.captured:
        return True
    return any(
        node.op_type in PASSED_BY or not all(map(graph.is_static, filter(None, node.outputs)))
        for node, _ in graph.readers.get(name, ())
    )


def _open(
    graph: Graph, feeds: Feeds, *, lines: bool = True
) -> tuple[Prober, tuple[dict[str, Shape], dict[str, np.ndarray], dict[str, list[np.ndarray]]]]:
    """Open a session and run it; without added nodes where these are what fails (types that they do not take)."""
    known = infer(graph, {name: value.shape for name, value in feeds.items()})
    try:
        if lines and any(o and o not in known and not graph.is_static(o) for n in graph.nodes for o in n.outputs):
            known |= Prober(graph, known, lines=False).run(feeds)[0]
        prober = Prober(graph, known, lines=lines)
        return prober, prober.run(feeds)
    except (ModelError, RunError) as error:
        if MARK not in str(error):
            raise
    prober = Prober(graph, known, add=False)
    return prober, prober.run(feeds)


@functools.lru_cache(maxsize=256)
def _positions(shape: Shape) -> np.ndarray:
    """Indices of all lines through the first element, one axis after the other, int64 (sum of sizes, rank)."""
    rows = np.zeros((sum(shape), len(shape)), np.int64)
    start = 0
    for axis, size in enumerate(shape):
        rows[start : start + size, axis] = np.arange(size)
        start += size
    return rows


def shapes_at(graph: Graph, feeds: Feeds) -> dict[str, Shape]:
    """Shapes of all tensors of a model on some inputs.

    Raises:
        ModelError: the model does not run.
    """
    try:
        shapes = _open(graph, feeds, lines=False)[1][0]
    except RunError as error:
        raise ModelError(f"the model does not run in ONNX Runtime: {error}.") from error
    return shapes | {name: tuple(tensor.dims) for name, tensor in graph.initializers.items()}


def probe(graph: Graph, given: dict[str, Shape] | None = None, seed: int = 0) -> tuple[Probe, Feeds, Feeds | None]:
    """Run the model at one choice of its dynamic sizes, and at a second one where it has any.

    Args:
        graph: the model.
        given: input shapes chosen by the user.
        seed: of the random inputs.

    Returns:
        The probe, the inputs it ran on, and the inputs of the second run (``None`` without dynamic sizes).

    Raises:
        ModelError: the model does not run at any size tried.
    """
    given = given or {}
    sides = SIDES if has_dynamic_side(graph) else SIDES[:1]
    failure: Exception | None = None
    first = None
    for side in sides:
        feeds = random_feeds(graph, input_shapes(graph, given, batch=1, side=side), seed)
        try:
            prober, first = _open(graph, feeds)
            break
        except (ModelError, RunError) as error:
            failure = failure or error
    if isinstance(failure, ModelError) and first is None:
        raise failure
    if first is None:
        hint = " Name a size that the model takes with --input-shape NAME:1x3x224x224." if is_dynamic(graph) else ""
        raise ModelError(f"the model does not run in ONNX Runtime: {failure}.{hint}")
    shapes, values, lines = first
    for name, tensor in graph.initializers.items():
        shapes[name] = tuple(tensor.dims)
    other_feeds: Feeds | None = None
    other_shapes: dict[str, Shape] = {}
    others: dict[str, np.ndarray] = {}
    varying: set[str] = set()
    if is_dynamic(graph):
        # Sizes that are open in the file may be fixed inside the graph, so ask for less and less.
        for batch, other_side in ((OTHER_BATCH, side + 32), (OTHER_BATCH, side), (1, side + 32)):
            try:
                other_feeds = random_feeds(graph, input_shapes(graph, given, batch=batch, side=other_side), seed)
                other_shapes, other_values, _ = prober.run(other_feeds, lines=False)
            except RunError:
                other_feeds = None
                continue
            spread = _spread(graph, shapes, other_shapes, values)
            if spread:
                graph.add_spread(spread)
                prober, (shapes, values, lines) = _open(graph, feeds)
                shapes |= {name: tuple(tensor.dims) for name, tensor in graph.initializers.items()}
                other_shapes, other_values, _ = prober.run(other_feeds, lines=False)
            varying = {name for name, value in other_values.items() if not np.array_equal(value, values[name])}
            others = {name: other_values[name] for name in varying if other_values[name].dtype.kind == "i"}
            break
    return Probe(shapes, values, lines, frozenset(varying), other_shapes, others), feeds, other_feeds


def _spread(graph: Graph, shapes: dict[str, Shape], other: dict[str, Shape], values: dict[str, np.ndarray]) -> set[str]:
    """Static tensors that are constants spread over a dynamic size (a class token, one for every image of a batch).

    Such a tensor has no fixed value that could be sliced and written, but it has channels that can be cut, like any
    tensor that is computed. Sizes and positions, which are integers, are not meant.
    """
    found: set[str] = set()
    for node in reversed(graph.nodes):
        for name in node.outputs:
            if not name or not graph.is_static(name) or not _moves(shapes.get(name, ()), other.get(name, ())):
                continue
            if name in values:
                real = values[name].dtype.kind not in "iub"
            else:
                real = any(o in found for reader, _ in graph.readers.get(name, ()) for o in reader.outputs)
            if real:
                found.add(name)
    return found


def _moves(shape: Shape, other: Shape) -> bool:
    """Whether some but not all axes that are longer than 1 follow a dynamic size."""
    moves = [a != b for a, b in zip(shape, other, strict=True)] if len(shape) == len(other) else []
    return any(moves) and any(n > 1 and not m for n, m in zip(shape, moves, strict=True))
