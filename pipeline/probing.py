"""Runs a graph once with every tensor exposed, in ONNX Runtime without optimisations."""

from __future__ import annotations

import numpy as np
import onnx

from prune_onnx.graph_ops.errors import ConfigError, ModelError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.probe import Probe, Shape

from .runner import RunError, Runner

# Sizes tried for a dynamic axis that is not the batch; the first that runs is taken.
SIDES = (64, 224, 256, 32, 28, 512, 16, 8)
OTHER_BATCH = 3

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
                raise ConfigError(f"--input-shape {value.name}: {'x'.join(map(str, wish))} does not fit the model's "
                                  f"{'x'.join('?' if f is None else str(f) for f in fixed)}.")
            shapes[value.name] = (batch if fixed and fixed[0] is None and batch != 1 else wish[0], *wish[1:]) if wish else ()
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
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = shapes[value.name]
        if dtype.kind in "iub":
            feeds[value.name] = rng.integers(0, 2, shape).astype(dtype)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def is_dynamic(graph: Graph) -> bool:
    """Whether any input has a size that the file leaves open."""
    return any(not (d.HasField("dim_value") and d.dim_value > 0)
               for i in graph.inputs for d in i.type.tensor_type.shape.dim)


def has_dynamic_side(graph: Graph) -> bool:
    """Whether an input has an open size other than its first axis."""
    return any(not (d.HasField("dim_value") and d.dim_value > 0)
               for i in graph.inputs for d in list(i.type.tensor_type.shape.dim)[1:])


class Prober:
    """Holds the exposed session of one graph and runs it at chosen sizes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names = list(dict.fromkeys([*graph.outputs, *(o for n in graph.nodes for o in n.outputs if o)]))
        self.runner = Runner(graph.model, expose=self.names)

    def run(self, feeds: Feeds) -> tuple[dict[str, Shape], dict[str, np.ndarray], dict[str, list[np.ndarray]]]:
        """Return shapes, static values and one line per axis of every tensor."""
        shapes: dict[str, Shape] = {}
        values: dict[str, np.ndarray] = {}
        lines: dict[str, list[np.ndarray]] = {}
        outputs = self.runner.run(self.names, feeds)
        for name, array in [*feeds.items(), *zip(self.names, outputs, strict=True)]:
            if not isinstance(array, np.ndarray):
                continue  # a sequence or an absent optional: no axis to cut
            shapes[name] = array.shape
            if self.graph.is_static(name):
                values[name] = array
            if array.size:
                lines[name] = [np.array(array[(0,) * a + (slice(None),) + (0,) * (array.ndim - a - 1)])
                               for a in range(array.ndim)]
        return shapes, values, lines


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
    prober = Prober(graph)
    given = given or {}
    sides = SIDES if has_dynamic_side(graph) else SIDES[:1]
    failure: Exception | None = None
    first = None
    for side in sides:
        feeds = random_feeds(graph, input_shapes(graph, given, batch=1, side=side), seed)
        try:
            first = prober.run(feeds)
            break
        except RunError as error:
            failure = failure or error
    if first is None:
        hint = " Name a size that the model takes with --input-shape NAME:1x3x224x224." if is_dynamic(graph) else ""
        raise ModelError(f"the model does not run in ONNX Runtime: {failure}.{hint}")
    shapes, values, lines = first
    for name, tensor in graph.initializers.items():
        shapes[name] = tuple(tensor.dims)
    other_feeds: Feeds | None = None
    other_shapes: dict[str, Shape] = {}
    varying: set[str] = set()
    if is_dynamic(graph):
        # Sizes that are open in the file may be fixed inside the graph, so ask for less and less.
        for batch, other_side in ((OTHER_BATCH, side + 32), (OTHER_BATCH, side), (1, side + 32)):
            try:
                other_feeds = random_feeds(graph, input_shapes(graph, given, batch=batch, side=other_side), seed)
                other_shapes, other_values, _ = prober.run(other_feeds)
            except RunError:
                other_feeds = None
                continue
            varying = {name for name, value in other_values.items() if not np.array_equal(value, values[name])}
            break
    return Probe(shapes, values, lines, frozenset(varying), other_shapes), feeds, other_feeds
