"""The property that every cut must have.

``check_cut`` is the heart of the tests of the graph engine: a random part of all removable units goes, and then every
tensor that is left must hold what the same tensor of the masked original holds at the kept positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import checker, helper, shape_inference
from onnx.reference import ReferenceEvaluator

from prune_onnx.graph_ops import cost, model_io
from prune_onnx.graph_ops.analysis import Analysis, analyse
from prune_onnx.graph_ops.constants import Constants
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.exact import Edits, carry, removable
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.masked import masked_reference
from prune_onnx.graph_ops.probe import Probe
from prune_onnx.pipeline.probing import Feeds, probe, random_feeds
from prune_onnx.pipeline.sessions import create_session

from .net import MICROSOFT, Net

__all__ = [
    "MICROSOFT",
    "Net",
    "Result",
    "Runner",
    "analysed",
    "check_cut",
    "check_valid",
    "compare",
    "distance",
    "outputs_of",
    "random_keep",
    "removed_units",
    "run_ort",
    "run_reference",
    "value_info",
]

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 5e-3}
Runner = Callable[[onnx.ModelProto, Feeds, list[str]], list[np.ndarray]]


# -- running ---------------------------------------------------------------------------------------
def exposed(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return the model with more tensors as outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    have = {o.name for o in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in have)
    return copy


def run_ort(model: onnx.ModelProto, feeds: Feeds, names: list[str]) -> list[np.ndarray]:
    """Run in ONNX Runtime without optimisations."""
    return create_session(exposed(model, names), "cpu", optimize=False, threads=1).run(names, feeds)


def run_reference(model: onnx.ModelProto, feeds: Feeds, names: list[str]) -> list[np.ndarray]:
    """Run in ONNX's own interpreter, which also convolves in float64."""
    return ReferenceEvaluator(exposed(model, names)).run(names, feeds)


def reference_probe(graph: Graph, seed: int = 0) -> tuple[Probe, Feeds, None]:
    """Probe a graph of fixed sizes with ONNX's own interpreter."""
    shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.inputs}
    feeds = random_feeds(graph, shapes, seed)
    names = [name for node in graph.nodes for name in node.outputs if name]
    arrays = dict(feeds) | dict(zip(names, run_reference(graph.model, feeds, names), strict=True))
    shapes = {name: a.shape for name, a in arrays.items()} | {
        t.name: tuple(t.dims) for t in graph.initializers.values()
    }
    values = {name: a for name, a in arrays.items() if graph.is_static(name)}
    lines = {
        name: [a[(0,) * axis + (slice(None),) + (0,) * (a.ndim - axis - 1)] for axis in range(a.ndim)]
        for name, a in arrays.items()
    }
    return Probe(shapes, values, lines), feeds, None


def outputs_of(model: onnx.ModelProto, feeds: Feeds, runner: Runner = run_ort) -> list[np.ndarray]:
    """Run a model and return its outputs."""
    return runner(model, feeds, [o.name for o in model.graph.output])


def distance(a: np.ndarray, b: np.ndarray, size: float | None = None) -> float:
    """Largest difference divided by ``size`` (default: the largest value of ``a``).

    NaN and infinity must be in the same places.
    """
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    assert a.dtype == b.dtype, f"types {a.dtype} and {b.dtype}"
    if not a.size:
        return 0.0
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(x[~finite], y[~finite])
    gap = np.abs(x[finite] - y[finite]).max(initial=0.0)
    return float(gap / (largest(x) if size is None else size))


def largest(x: np.ndarray) -> float:
    """Largest absolute value that is finite; 1 where there is none but zero."""
    x = x.astype(np.float64)
    return float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) or 1.0


# -- the property ----------------------------------------------------------------------------------
@dataclass
class Result:
    """What a check went through.

    Attributes:
        analysis: of the original.
        keep: units that stayed.
        edits: constants that were carried.
        model: the cut model.
        feeds: what it ran on.
        moved: how far the cut moved the outputs away from the unmasked original's (relative).
        compared: names of the tensors that were compared.
        touched: operators with a data input or output that lost positions.
    """

    analysis: Analysis
    keep: np.ndarray
    edits: Edits
    model: onnx.ModelProto
    feeds: list[Feeds]
    moved: float = 0.0
    compared: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)

    @property
    def pinned(self) -> dict[str, tuple[str, ...]]:
        """Groups that may not be cut freely, with the reasons."""
        return {g.name: g.pinned_by for g in self.analysis.groups if self.analysis.pinned[g.units].any()}

    def size(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor after the cut."""
        shape = list(self.analysis.probe.shapes[name])
        for axis, vector in self.analysis.axes.get(name, {}).items():
            shape[axis] = int(self.keep[vector].sum())
        return tuple(shape)


def analysed(
    model: onnx.ModelProto,
    *,
    release: bool = False,
    select: bool = False,
    ignore: Sequence[str] = (),
    reference: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
) -> tuple[Analysis, list[Feeds]]:
    """Load, probe and analyse; return the analysis and inputs to compare on."""
    graph = Graph(model_io.load(model))
    found, feeds, other = reference_probe(graph, seed) if reference else probe(graph, dict(shapes or {}), seed)
    every = [feeds, random_feeds(graph, {n: a.shape for n, a in feeds.items()}, seed + 1)]
    analysis = analyse(graph, found, release_norms=release, select_inputs=select, ignore=ignore)
    return analysis, every + ([other] if other is not None else [])


def random_keep(analysis: Analysis, seed: int, fraction: float) -> np.ndarray:
    """Drop a random part of every group's removable units; every axis keeps a position."""
    rng = np.random.default_rng(seed)
    keep = np.ones(analysis.units, bool)
    for group in analysis.groups:
        free = group.units[~analysis.pinned[group.units]]
        keep[rng.permutation(free)[: int(np.ceil(fraction * len(free)))]] = False
    for vector in analysis.vectors():
        if not keep[vector].any():
            keep[rng.choice(vector)] = True
    while True:  # what a reader keeps must be there
        needed = [fork.source[keep[fork.labels]] for fork in analysis.forks]
        if all(keep[units].all() for units in needed):
            break
        keep[np.concatenate(needed)] = True
    return keep


def check_cut(
    model: onnx.ModelProto,
    *,
    seed: int = 0,
    fraction: float = 0.5,
    keep: np.ndarray | None = None,
    release: bool = False,
    select: bool = False,
    ignore: Sequence[str] = (),
    reference: bool = False,
    predict: Collection[str] = ("macs", "params"),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    vacuous: bool = False,
) -> Result:
    """Cut at random and compare every tensor that is left with the masked original.

    Args:
        model: to be cut.
        seed: of the choice of units.
        fraction: of each group's free units that goes.
        keep: the units that stay, instead of a random choice.
        release: cut axes that statistics run across.
        select: let readers of a shared tensor drop channels of their own.
        ignore: globs of nodes whose channels stay.
        reference: run in ONNX's own interpreter instead of ONNX Runtime.
        predict: costs whose prediction is held against the counted ones.
        shapes: of dynamic inputs.
        vacuous: whether the outputs may stay as they are.
    """
    analysis, feeds = analysed(model, release=release, select=select, ignore=ignore, reference=reference, shapes=shapes)
    if keep is None:
        keep = random_keep(analysis, seed, fraction)
    edits = carry(analysis, Constants(analysis), keep)
    result = Result(analysis, keep, edits, cut(analysis, keep, edits), feeds)
    masked = masked_reference(analysis, keep, edits)
    check_valid(result.model, model)
    runner = run_reference if reference else run_ort
    compare(result, masked, runner)
    for inputs in feeds:
        pairs = zip(
            outputs_of(analysis.graph.model, inputs, runner), outputs_of(result.model, inputs, runner), strict=True
        )
        result.moved = max(result.moved, *(distance(a, b) if a.shape == b.shape else np.inf for a, b in pairs))
    result.touched = touched(analysis, keep)
    if not vacuous:
        assert not keep.all(), "nothing was removed"
        assert result.moved > 1e-3, f"the cut moved the outputs by {result.moved:.1e} only"
    check_prediction(result, predict)
    return result


def check_valid(result: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """The checker's complete check passes where it passed before, with shapes that agree with strict inference."""
    model_io.check(result, original)
    try:
        checker.check_model(original, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError):
        checker.check_model(result)
    else:
        checker.check_model(result, full_check=True)


def compare(result: Result, masked: onnx.ModelProto, runner: Runner = run_ort) -> None:
    """Hold every tensor that both models have by name against each other, at the kept positions."""
    analysis, keep = result.analysis, result.keep
    tolerance = min_precision(analysis.graph.model)
    made = [{name for node in m.graph.node for name in node.output if name} for m in (masked, result.model)]
    names = sorted(
        name for name in made[0] & made[1] if name in analysis.graph.dynamic and name in analysis.probe.lines
    )
    assert set(analysis.graph.outputs) <= set(names) | set(analysis.graph.initializers)
    for inputs in result.feeds:
        for name, a, b in zip(names, runner(masked, inputs, names), runner(result.model, inputs, names), strict=True):
            # Rounding goes with the size of the whole tensor: a mean of a few kept channels may happen to be near zero.
            size = largest(a)
            for axis, vector in analysis.axes.get(name, {}).items():
                # A flat copy of several images has every image's channels one after the other.
                mask = np.tile(keep[vector], a.shape[axis] // len(vector))
                a = a.take(np.flatnonzero(mask), axis)
            gap, allowed = distance(a, b, size), tolerance if a.dtype.kind == "f" else 0.0
            assert gap <= allowed, f"tensor {name!r} differs by {gap:.1e}"
    result.compared = names


def min_precision(model: onnx.ModelProto) -> float:
    """What rounding may change in a model of this float type."""
    types = {helper.tensor_dtype_to_np_dtype(t.data_type).name for t in model.graph.initializer}
    types |= {helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type).name for i in model.graph.input}
    return max(TOLERANCE[name] for name in types & set(TOLERANCE))


def touched(analysis: Analysis, keep: np.ndarray) -> set[str]:
    """Operators (``domain.Op``) with a data input or output that lost positions."""
    less = {name for name, axes in analysis.axes.items() if any(not keep[v].all() for v in axes.values())}
    return {
        f"{n.domain}.{n.op_type}" if n.domain else n.op_type
        for n in analysis.graph.nodes
        if less & {*n.inputs, *n.outputs}
    }


def check_prediction(result: Result, which: Collection[str] = ("macs", "params")) -> None:
    """Predicted MACs and parameters are the counted ones of the cut model."""
    if not which:
        return
    model = cost.CostModel(result.analysis)
    smaller = Graph(result.model)
    shapes = {name: result.size(name) for name in result.analysis.probe.shapes}
    shapes |= {t.name: tuple(t.dims) for t in smaller.initializers.values()}
    made = [name for node in smaller.nodes for name in node.outputs if name and name not in shapes]
    arrays = run_ort(result.model, result.feeds[0], made) if made else []
    shapes |= {name: np.shape(a) for name, a in zip(made, arrays, strict=True) if isinstance(a, np.ndarray)}
    if "macs" in which:
        assert model.macs(result.keep) == cost.macs(smaller, shapes)
    added = sum(len(np.atleast_1d(shift)) for shift in result.edits.shifts.values())
    if "params" in which and not added and not result.edits.operands:
        assert model.params(result.keep) == cost.params(smaller)


def removed_units(analysis: Analysis) -> np.ndarray:
    """Units that exact removal takes out."""
    return removable(analysis, Constants(analysis))


def value_info(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with a stored shape for every tensor, as exporters write them."""
    return shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
