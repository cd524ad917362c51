"""Predicts how long a cut model runs, from measured times of its layers at a few widths.

The time of a convolution or matrix product is a step function of its channels: a runtime computes blocks of them (16
with AVX-512), and leaves its fast path where their number is no multiple of 4. Input and output channels multiply. So
a layer's time is taken as ``a + b u + c v + d u v``, where ``u`` follows the input channels and ``v`` the output
channels, each a step function that was measured with the other one whole; the four numbers come from the corners.
Everything else (sums, poolings, activations that are not fused) is memory traffic, in proportion to its elements.

Times of layers do not quite add up, so the sum is scaled to the whole model's measured time, and whoever needs a
certain latency measures the result and corrects the target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from .allocate import FractionalCost
from .analysis import Analysis
from .cost import CostModel, Term
from .graph import Node
from .labels import Vector
from .records import Work
from .rules.base import product

Point = tuple[int, int]

# Block sizes that are looked for, largest first; a smaller one has to explain the times this much better.
BLOCKS = (16, 8, 4, 1)
BETTER = 0.7
# Runtimes are fast on multiples of this.
ALIGNED = 4
# A count is worth stopping at when going there from the next larger one saves this share of what channels save on
# average.
WORTH = 0.3
# Operators that move no data, or that the runtime computes once.
FREE = frozenset(
    {"Reshape", "Flatten", "Identity", "Dropout", "Squeeze", "Unsqueeze", "Constant", "Shape", "ConstantOfShape"}
)
# Operators that ONNX Runtime computes with the convolution before them.
FUSED = frozenset({"BatchNormalization", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "Add"})
WINDOW = ("strides", "pads", "dilations", "auto_pad", "output_padding")


@dataclass(frozen=True)
class Layer:
    """What a layer's time depends on.

    Attributes:
        op: ``Conv``, ``ConvTranspose`` or ``Gemm`` (every product with a stored matrix).
        batch: samples of a run; rows of a matrix product.
        spatial: size of the input, ``()`` for a matrix product.
        window: attributes of a convolution, as (name, value).
        kernel: size of the window.
        group: of a convolution.
        inputs: channels.
        outputs: channels.
        cuts: ``in``, ``out`` or both, as the analysis allows; ``groups`` alone where whole groups go.
    """

    op: str
    batch: int
    spatial: tuple[int, ...]
    window: tuple[tuple[str, object], ...]
    kernel: tuple[int, ...]
    group: int
    inputs: int
    outputs: int
    cuts: tuple[str, ...]

    @property
    def key(self) -> str:
        """Name in a table; the same on every machine."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @property
    def whole(self) -> Point:
        """Input and output channels before any cut."""
        return self.inputs, self.outputs

    def unit(self, cut: str) -> int:
        """Channels that go together on an axis: those of one group, or one of every group."""
        return self.outputs // self.group if cut == "groups" else self.group

    def size(self, cut: str) -> int:
        """How many units an axis has."""
        return (self.inputs if cut == "in" else self.outputs) // self.unit(cut)

    def at(self, cut: str, count: int, other: int | None = None) -> Point:
        """Channels when ``count`` units stay on an axis and ``other`` on the other one (``None``: all)."""
        if cut == "groups":
            return count * self.inputs // self.group, count * self.unit(cut)
        here, there = count * self.group, None if other is None else other * self.group
        inputs, outputs = (here, there) if cut == "in" else (there, here)
        return self.inputs if inputs is None else inputs, self.outputs if outputs is None else outputs

    def groups(self, outputs: int) -> int:
        """Number of groups when ``outputs`` channels stay."""
        return outputs // self.unit("groups") if "groups" in self.cuts else self.group

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Where the layer is measured."""
        found = {self.whole: None}
        for cut in self.cuts:
            size = self.size(cut)
            found.update({self.at(cut, count): None for count in (*widths(size), *odd_width(size))})
        if self.cuts == ("in", "out"):
            found[self.at("in", widths(self.size("in"))[0], widths(self.size("out"))[0])] = None
        return tuple(found)


def widths(size: int) -> list[int]:
    """Aligned counts at which an axis is measured, ascending: where steps show, and enough others to interpolate."""
    if size < ALIGNED:
        return list(range(1, size + 1))
    top = min(size, 64) // 16 * 16
    found = {size, *(c for c in (4, 8, 12, 16, 32, 48, 64) if size <= 64 or c in (8, 16, 32))}
    found |= {top - 12, top - 8, top - 4, top} | {size * i // 4 // 16 * 16 for i in (1, 2, 3)}
    return sorted(c for c in found if 0 < c <= size)


def odd_width(size: int) -> tuple[int, ...]:
    """A count that is no multiple of 4, among those where steps show; none on a narrow axis."""
    top = min(size, 64) // 16 * 16
    return (top - 3,) if top else ()


class Table:
    """Times of one layer at its points."""

    def __init__(self, layer: Layer, seconds: Mapping[Point, float]) -> None:
        """Fit the step functions.

        Args:
            layer: what was measured.
            seconds: at :attr:`Layer.points`.
        """
        self.layer = layer
        self.full = seconds[layer.whole]
        self._shape: dict[str, np.ndarray] = {}  # 0 at the smallest measured width, 1 with everything
        self._odd: dict[str, np.ndarray] = {}
        self._least: dict[str, float] = {}
        self.blocks: dict[str, int] = {}
        for cut in layer.cuts:
            self._fit(cut, seconds)
        if layer.cuts == ("in", "out"):
            first = [widths(layer.size(cut))[0] for cut in layer.cuts]
            low_in, low_out = self._least["in"], self._least["out"]
            corner = min(seconds[layer.at("in", *first)], low_in, low_out)
            self._corners = corner, low_in - corner, low_out - corner, self.full - low_in - low_out + corner

    def _fit(self, cut: str, seconds: Mapping[Point, float]) -> None:
        layer = self.layer
        size = layer.size(cut)
        counts = np.asarray(widths(size))
        times = np.asarray([seconds[layer.at(cut, int(c))] for c in counts])
        every = np.arange(size + 1)
        if cut != "groups" and layer.group > 1:
            # Fewer channels in every group can take longer, off the fast path: the two axes' factors as they are.
            self.blocks[cut] = ALIGNED
            steps = np.minimum(np.maximum(-(-every // ALIGNED) * ALIGNED, counts[0]), size)
            curve, low, span = np.interp(steps, counts, times), 0.0, self.full
        else:
            block = self.blocks[cut] = _block(counts, times)
            known = (counts % block == 0) | (counts == size)
            steps = np.minimum(np.maximum(-(-every // block) * block, counts[known][0]), size)
            curve = np.interp(steps, counts[known], _isotonic(times)[known])
            low = float(curve[0])
            span = self.full - low
        self._least[cut] = low
        self._shape[cut] = (curve - low) / span if span > 0 else np.ones(size + 1)
        odd = np.ones(size + 1)
        for count in odd_width(size):
            slower = seconds[layer.at(cut, count)] / max(curve[count], 1e-12)
            odd[(every % ALIGNED > 0) & (every < size)] = max(1.0, slower)
        self._odd[cut] = odd

    def terms(self, axes: Mapping[str, Vector], scale: float) -> tuple[float, list[Term]]:
        """The layer's time, as a fixed part and terms of a cost.

        Args:
            axes: cut to the units of that axis, for the axes that are cut in this place.
            scale: of all times.
        """
        curves = {cut: self._along(self._shape[cut], cut, vector) for cut, vector in axes.items()}
        odd = {cut: self._along(self._odd[cut], cut, vector) for cut, vector in axes.items()}
        if not axes:
            return scale * self.full, []
        if len(axes) == 1:
            ((cut, vector),) = axes.items()
            low = self._least[cut]
            curve = (low + (self.full - low) * curves[cut]) * odd[cut]
            return 0.0, [Term(scale, (vector,), (curve,))]
        both = axes["in"], axes["out"]
        pairs = [
            (odd["in"], odd["out"]),
            (odd["in"], curves["out"] * odd["out"]),
            (curves["in"] * odd["in"], odd["out"]),
            (curves["in"] * odd["in"], curves["out"] * odd["out"]),
        ]
        return 0.0, [Term(scale * c, both, pair) for c, pair in zip(self._corners, pairs, strict=True)]

    def seconds(self, inputs: int, outputs: int) -> float:
        """Predicted time at a number of channels."""
        kept = {"in": (self.layer.inputs, inputs), "out": (self.layer.outputs, outputs)}
        kept["groups"] = kept["out"]
        total, terms = self.terms({cut: np.arange(kept[cut][0]) for cut in self.layer.cuts}, 1.0)
        for term in terms:
            values = (c[kept[cut][1]] for c, cut in zip(term.curves, self.layer.cuts, strict=True))
            total += term.scale * float(np.prod(list(values)))
        return total

    def _along(self, curve: np.ndarray, cut: str, vector: Vector) -> np.ndarray:
        """A curve over an axis's units as one over the positions of its vector, which may hold each unit repeatedly."""
        times = len(vector) // self.layer.size(cut)
        return np.repeat(curve, times)[: len(vector) + 1]


def _isotonic(times: np.ndarray) -> np.ndarray:
    """The closest non-decreasing values: neighbours that are out of order are replaced by their mean."""
    pools: list[list[float]] = []
    for value in times:
        pools.append([float(value), 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return np.concatenate([np.full(int(n), value) for value, n in pools])


def _block(counts: np.ndarray, times: np.ndarray) -> int:
    """The step of the time: the largest block whose line through the padded counts explains the times."""
    near = counts <= 64
    if near.sum() < 4:
        return 1 if counts[-1] < ALIGNED else ALIGNED
    counts, times = counts[near], times[near]
    best, least = 1, np.inf
    for block in BLOCKS:
        padded = -(-counts // block) * block
        design = np.stack([np.ones(len(counts)), padded], 1)
        solution = np.linalg.lstsq(design, times, rcond=None)[0]
        error = float(((design @ solution - times) ** 2).sum())
        if error < BETTER * least:
            best, least = block, error
    return max(best, ALIGNED) if counts[-1] >= ALIGNED else best


@dataclass(frozen=True)
class Place:
    """A layer in the graph, and the units of its axes."""

    node: Node
    layer: Layer
    axes: Mapping[str, Vector]


def places(analysis: Analysis, batch: int = 1) -> tuple[list[Place], list[Work]]:
    """Return the layers that are measured, and the work of costly nodes that have no table.

    Args:
        analysis: of the graph.
        batch: samples of a run, over those of the probe.
    """
    follows = {(o.node.name, o.input): o.axes for o in analysis.operands}
    found = []
    known = set()
    for node in analysis.graph.nodes:
        if not any(name in analysis.graph.dynamic for name in node.outputs):
            continue
        place = _place(node, analysis, follows, batch)
        if place is not None:
            found.append(place)
            known.add(node.name)
    rest = [work for work in analysis.works if work.node.name not in known]
    return found, rest


def _place(
    node: Node, analysis: Analysis, follows: Mapping[tuple[str, int], dict[int, Vector]], batch: int
) -> Place | None:
    shapes = analysis.probe.shapes
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or not analysis.graph.is_static(node.inputs[1]):
        return None
    x, w = shapes[node.inputs[0]], shapes[node.inputs[1]]
    axes = {a: v for a, v in follows.get((node.name, 1), {}).items() if not analysis.pinned[v].all()}
    if node.op_type in ("Gemm", "MatMul"):
        if len(w) != 2:
            return None
        k_axis = 1 if node.attribute("transB", 0) else 0
        cuts = {name: axes[a] for name, a in (("in", k_axis), ("out", 1 - k_axis)) if a in axes}
        rows = product(x) // w[k_axis] * batch
        layer = Layer("Gemm", rows, (), (), (), 1, w[k_axis], w[1 - k_axis], tuple(cuts))
        return Place(node, layer, cuts)
    group, inputs, outputs = node.attribute("group", 1), x[1], shapes[node.outputs[0]][1]
    out_axis = 0 if node.op_type == "Conv" else 1
    reads = analysis.axes.get(node.inputs[0], {}).get(1)
    if group > 1 and reads is not None and 1 not in follows.get((node.name, 1), {}):
        vector = analysis.axes.get(node.outputs[0], {}).get(1)
        cuts = {} if vector is None or not axes else {"groups": vector}
    else:
        cuts = {name: axes[a] for name, a in (("in", 1 - out_axis), ("out", out_axis)) if a in axes}
    window = tuple((name, _plain(node.attribute(name))) for name in WINDOW if node.attribute(name) is not None)
    layer = Layer(node.op_type, x[0] * batch, x[2:], window, w[2:], group, inputs, outputs, tuple(cuts))
    return Place(node, layer, cuts)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, list | tuple) else value


def traffic_layer(batch: int) -> Layer:
    """The sum of two tensors, whose time tells what memory traffic costs."""
    return Layer("Add", batch, (56, 56), (), (), 1, 64, 64, ())


class LatencyModel:
    """The predicted latency of cuts of one model on one provider.

    Args:
        analysis: of the graph.
        tables: by the layers' keys; of every layer of :func:`places` and of :func:`traffic_layer`.
        batch: samples of a run, over those of the probe.
        seconds: measured latency of the whole model; what the layers' sum is scaled to.
    """

    def __init__(self, analysis: Analysis, tables: Mapping[str, Table], batch: int, seconds: float) -> None:
        self.analysis = analysis
        found, works = places(analysis, batch)
        layers = [(p, tables[p.layer.key]) for p in found]
        macs = {w.node.name: _size(w.scale, w.factors) for w in analysis.works}
        rates = [t.full / macs[p.node.name] for p, t in layers if macs.get(p.node.name)]
        traffic = tables[traffic_layer(batch).key]
        a_sum = traffic.full / product((batch, *traffic.layer.spatial, traffic.layer.inputs))
        moved = [Term(batch * a_sum * t.scale, t.factors) for t in _traffic(analysis, {p.node.name for p in found})]
        loose = [Term(batch * float(np.median(rates)) * w.scale, w.factors) for w in works] if rates else []
        total = sum(t.full for _, t in layers) + sum(_size(t.scale, t.factors) for t in (*moved, *loose))
        self.scale = seconds / total if total else 1.0
        fixed, terms = 0.0 if total else seconds, []
        for place, table in layers:
            part, more = table.terms(place.axes, self.scale)
            fixed += part
            terms += more
        terms += [Term(self.scale * t.scale, t.factors) for t in (*moved, *loose)]
        terms = [t for t in terms if t.scale]
        fixed += sum(t.scale for t in terms if not t.factors)
        self.cost = CostModel(analysis, (fixed, [t for t in terms if t.factors]))

    @cached_property
    def steps(self) -> list[list[int]]:
        """For each group the kept counts worth stopping at, ascending; the last one is everything."""
        return self.stops([group.units for group in self.analysis.groups])

    def stops(self, parts: Sequence[np.ndarray]) -> list[list[int]]:
        """For each of several disjoint sets of units the kept counts worth stopping at, ascending; the last is all."""
        cost = FractionalCost(self.analysis, "latency", self.cost, parts)
        whole = np.ones(cost.groups)
        result = []
        for g, units in enumerate(parts):
            n = len(units)
            times = cost.along(whole, g, np.arange(1, n + 1) / n)
            worth = WORTH * (times[-1] - times[0]) / max(n - 1, 1)
            stops = [n]
            for count in range(n - 1, 0, -1):
                saved = times[stops[-1] - 1] - times[count - 1]
                # The best count of a step is its largest one: what is just below the next step up.
                if saved > worth * (stops[-1] - count) and saved > 0:
                    stops.append(count)
            result.append(stops[::-1])
        return result


def _size(scale: float, factors: Sequence[Vector]) -> float:
    return scale * product(len(v) for v in factors)


def _traffic(analysis: Analysis, layers: set[str]) -> list[Term]:
    """Elements that the other nodes write or read, whichever is more."""
    graph, shapes = analysis.graph, analysis.probe.shapes
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    for name in graph.outputs:
        readers[name] = readers.get(name, 0) + 1
    alone = {n for n, count in readers.items() if count == 1}
    joined = {o for node in graph.nodes if node.name in layers and node.op_type == "Conv" for o in node.outputs}
    terms = []
    for node in graph.nodes:
        if node.name in layers or node.op_type in FREE or not any(o in graph.dynamic for o in node.outputs):
            continue
        if node.op_type in FUSED and any(i in joined and i in alone for i in node.inputs):
            joined.update(node.outputs)
            continue
        sizes = {n: product(shapes.get(n, ())) for n in (*node.inputs, *node.outputs) if n in graph.dynamic}
        name = max(sizes, key=sizes.__getitem__)
        axes = analysis.axes.get(name, {})
        rest = product(d for a, d in enumerate(shapes.get(name, ())) if a not in axes)
        terms.append(Term(rest, tuple(axes.values())))
    return terms
