"""Post-training pruning: choose channels by what their readers lose, and refit the readers, layer by layer.

Works on a graph whose BatchNorms are folded. Two passes over a few hundred unlabelled inputs:

1. *Statistics*, on the dense network: every layer that reads prunable channels gets its Gram matrix, every group its
   removal path (structured OBS over all of its readers), and the path's error is put into the unit of the output by
   pruning single groups and looking at the logits. An allocator shares the budget out.
2. *Reconstruction*: from the first layer to the last, two streams run side by side, the dense network and the pruned
   one. Each layer is fitted to the dense output on the inputs that the pruned network really gives it; where it ends a
   residual branch, the target is what the sum still lacks. Outputs that a Relu follows are fitted after the Relu.

Source: the reconstruction of He et al. 2017 ("Channel pruning for accelerating very deep neural networks") and ThiNet,
with the structured OBS of :mod:`prune_onnx.graph_ops.obs` in place of their selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from prune_onnx.graph_ops.allocate import Curve
from prune_onnx.graph_ops.analysis import Analysis, Contraction
from prune_onnx.graph_ops.graph import Node
from prune_onnx.graph_ops.obs import Gram, Path, Reader, removal_path, solve
from prune_onnx.graph_ops.patches import Layer, unit_columns
from prune_onnx.graph_ops.progress import SILENT, Progress

from .probing import Feeds
from .streams import Stream

RIDGE = 1e-3
RELU_PASSES = 4
TEMPERATURE = 4.0
LEVELS = (0.75, 0.5, 0.25, 0.0)
# Sampled positions of a layer, and numbers that they may hold at most (256 MB in float32).
ROWS, NUMBERS = 131072, 2**26
# Wider layers (a Gemm after Flatten) are left as they are: their Gram matrix alone would take gigabytes.
WIDEST = 6000


@dataclass
class Site:
    """A layer that can be refitted, and how its output goes on.

    Attributes:
        layer: its matrix form.
        contraction: of its input; ``None`` when its input cannot be cut.
        x, y: input and output tensors.
        other: the other operand of the addition that its output alone feeds, when that is known before.
        total: that addition's output.
        relu: whether a Relu alone reads ``total`` (or ``y``).
    """

    node: Node
    layer: Layer
    contraction: Contraction | None
    x: str
    y: str
    other: str | None = None
    total: str | None = None
    relu: bool = False


@dataclass
class Statistics:
    """What the first pass found."""

    paths: dict[int, Path] = field(default_factory=dict)
    curves: dict[int, Curve] = field(default_factory=dict)


class Reconstruction:
    """One network, its calibration inputs, and what is decided so far."""

    def __init__(
        self,
        analysis: Analysis,
        chunks: Sequence[Feeds],
        *,
        keep: np.ndarray | None = None,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        """Prepare a network.

        Args:
            analysis: of the graph, its BatchNorms folded.
            chunks: calibration inputs, in batches that the graph takes.
            keep: units that stay, where that is decided already.
            seed: of the sampled positions.
            progress: told how far it is.
        """
        self.analysis, self.graph = analysis, analysis.graph
        self.chunks, self.seed, self.progress = list(chunks), seed, progress
        self.sites = self._find_sites()
        self.keep = np.ones(analysis.units, bool) if keep is None else keep.copy()
        self.weights: dict[tuple[int, int], np.ndarray] = {}

    # -- structure ---------------------------------------------------------------------------------------------------
    def _find_sites(self) -> list[Site]:
        contractions = {c.node.index: c for c in self.analysis.contractions}
        sites = []
        for node in self.graph.nodes:
            if (
                node.op_type not in ("Conv", "Gemm", "MatMul")
                or node.domain
                or node.outputs[0] not in self.graph.dynamic
            ):
                continue
            weight = self.analysis.value(node.inputs[1])
            bias = self.analysis.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
            plain = weight is not None and weight.dtype.kind == "f" and node.inputs[0] in self.graph.dynamic
            plain &= len(node.inputs) < 3 or not node.inputs[2] or bias is not None
            if node.op_type == "Gemm":
                plain &= not node.attribute("transA", 0) and node.attribute("alpha", 1.0) == 1.0 == node.attribute(
                    "beta", 1.0
                )
            if node.op_type == "MatMul":
                plain &= weight is not None and weight.ndim == 2
            if plain and Layer(node, weight, bias).width <= WIDEST:
                site = Site(
                    node, Layer(node, weight, bias), contractions.get(node.index), node.inputs[0], node.outputs[0]
                )
                self._follow(site)
                sites.append(site)
        return sites

    def _follow(self, site: Site) -> None:
        """Find the addition and the Relu that the layer's output goes into."""
        readers = self.graph.readers.get(site.y, [])
        end = site.y
        if len(readers) == 1 and readers[0][0].op_type == "Add" and site.y not in self.graph.outputs:
            add = readers[0][0]
            other = add.inputs[1 - readers[0][1]]
            maker = self.graph.producer.get(other)
            known = other in self.graph.dynamic and (maker is None or maker.index < site.node.index)
            if known and self.analysis.probe.shapes[other] == self.analysis.probe.shapes[site.y]:
                site.other, site.total, end = other, add.outputs[0], add.outputs[0]
        after = self.graph.readers.get(end, [])
        site.relu = len(after) == 1 and after[0][0].op_type == "Relu" and end not in self.graph.outputs

    # -- sampling ----------------------------------------------------------------------------------------------------
    def _sample(self, site: Site, dense: Stream, pruned: Stream) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Inputs (groups, M, D) of the pruned stream, dense targets (groups, M, O), what the pruned sum has already."""
        rng = np.random.default_rng([self.seed, site.node.index])
        shape = dense.chunks[0][site.y].shape
        images = sum(len(chunk[site.y]) for chunk in dense.chunks)
        rows = min(ROWS, NUMBERS // (site.layer.groups * site.layer.width))
        per_image = max(1, rows // max(1, images))
        xs, ts, others = [], [], []
        for d, p in zip(dense.chunks, pruned.chunks, strict=True):
            where = site.layer.sample_positions(shape, per_image, rng)
            xs.append(site.layer.columns(p[site.x], shape, where))
            ts.append(site.layer.targets(d[site.y], where))
            if site.other is not None:
                mine = site.layer.targets(p[site.other], where)
                ts[-1] = ts[-1] + site.layer.targets(d[site.other], where)
                others.append(mine)
        return np.concatenate(xs, 1), np.concatenate(ts, 1), np.concatenate(others, 1) if others else None

    def _open(self, site: Site, *streams: Stream) -> None:
        want = [site.x, site.y] + ([site.other] if site.other else [])
        for stream in streams:
            stream.advance(site.node.index + 1, want)

    # -- first pass --------------------------------------------------------------------------------------------------
    def statistics(self, measured: int = 256) -> Statistics:
        """Removal paths of all groups, and what removing costs at the output."""
        readers: dict[int, list[tuple[Site, Reader]]] = {}
        found = Statistics()
        groups = self._prunable_groups()
        stream = Stream(self.graph, self.analysis.probe, self.chunks)
        starts: dict[int, Stream] = {}
        first = {g: min(s.node.index for s in sites) for g, sites in groups.items()}
        few = max(1, -(-measured // max(1, _batch(self.chunks[0]))))
        logits = self._logits(Stream(self.graph, self.analysis.probe, self.chunks[:few]))
        with self.progress.task("statistics", len(self.sites)) as advance:
            for site in self.sites:
                stream.advance(site.node.index)
                for g, index in first.items():
                    if index == site.node.index:
                        starts[g] = stream.fork({}, few)
                self._open(site, stream)
                for g in [g for g, sites in groups.items() if site in sites]:
                    x, t, other = self._sample(site, stream, stream)
                    t = t if other is None else t - other
                    units = self.analysis.groups[g].units
                    for q in range(site.layer.groups):
                        columns = unit_columns(site.contraction, site.layer.kernel, units)
                        gram = Gram.of(x[q], t[q])
                        readers.setdefault(g, []).append((site, Reader(gram, site.layer.matrix()[q], columns)))
                for g in [g for g, sites in groups.items() if max(s.node.index for s in sites) == site.node.index]:
                    path, curve = self._measure(g, readers.pop(g), starts.pop(g), logits)
                    found.paths[g], found.curves[g] = path, curve
                advance(1)
        return found

    def _prunable_groups(self) -> dict[int, list[Site]]:
        """Groups with free units, and the sites that read them; groups that anything else reads are left alone."""
        by_contraction = {s.contraction.node.index: s for s in self.sites if s.contraction is not None}
        result: dict[int, list[Site]] = {}
        for g, group in enumerate(self.analysis.groups):
            if self.analysis.pinned[group.units].any():
                continue
            reading = [c for c in self.analysis.contractions if np.isin(c.labels, group.units).any()]
            sites = [by_contraction.get(c.node.index) for c in reading]
            if sites and all(
                s is not None and unit_columns(s.contraction, s.layer.kernel, group.units) is not None for s in sites
            ):
                result[g] = sites
        return result

    def _measure(
        self, g: int, readers: list[tuple[Site, Reader]], start: Stream, logits: np.ndarray
    ) -> tuple[Path, Curve]:
        """The group's path, and the output's divergence at a few levels of it."""
        units = self.analysis.groups[g].units
        path = removal_path([r for _, r in readers], RIDGE, np.ones(len(units), bool))
        kept, damage = [], []
        for level in LEVELS:
            stay = min(len(units) - 1, round(level * len(units)))
            gone = path.order[: len(units) - stay]
            weights: dict[str, np.ndarray] = {}
            for site in dict.fromkeys(id(s) for s, _ in readers):
                same = [(s, r) for s, r in readers if id(s) == site]
                matrix = same[0][0].layer.matrix()
                for q, (_, reader) in enumerate(same):
                    columns = np.ones(reader.gram.a.shape[0], bool)
                    columns[reader.columns[gone].reshape(-1)] = False
                    matrix[q] = solve(reader.gram, reader.w0, columns, RIDGE)
                self._put(weights, same[0][0], matrix)
            kept.append(stay)
            damage.append(divergence(logits, self._logits(start.fork(weights))))
        return path, Curve(len(units), path.error, np.asarray(kept), np.asarray(damage))

    def _logits(self, stream: Stream) -> np.ndarray:
        stream.advance(len(self.graph.nodes))
        return np.concatenate(
            [np.concatenate([c[o].reshape(len(c[o]), -1) for o in self.graph.outputs], 1) for c in stream.chunks]
        ).astype(np.float64)

    def _put(self, weights: dict[str, np.ndarray], site: Site, matrix: np.ndarray) -> None:
        w, b = site.layer.tensors(matrix)
        weights[site.node.inputs[1]] = w
        if len(site.node.inputs) > 2 and site.node.inputs[2]:
            weights[site.node.inputs[2]] = b

    # -- second pass -------------------------------------------------------------------------------------------------
    def run(self, counts: dict[int, int], paths: dict[int, Path]) -> None:
        """Prune every group to its count and refit all layers; ``keep`` and ``weights`` hold the result."""
        readers = self._prunable_groups()
        late: dict[int, int] = {}  # site index -> group that is chosen there, on the pruned network's own inputs
        for g, count in counts.items():
            units = self.analysis.groups[g].units
            if count >= len(units):
                continue
            if len(readers[g]) == 1 and readers[g][0].layer.groups == 1:
                late[readers[g][0].node.index] = g
            else:
                self.keep[units[paths[g].order[: len(units) - count]]] = False
        dense = Stream(self.graph, self.analysis.probe, self.chunks)
        new: dict[str, np.ndarray] = {}
        pruned = Stream(self.graph, self.analysis.probe, self.chunks, new)
        changed = False
        with self.progress.task("reconstruction", len(self.sites)) as advance:
            for site in self.sites:
                cut_here = site.contraction is not None and not self.keep[site.contraction.labels].all()
                if changed or cut_here or site.node.index in late:
                    dense.advance(site.node.index)
                    pruned.advance(site.node.index)
                    self._open(site, dense)
                    matrix = self._fit(site, dense, pruned, late.get(site.node.index), counts)
                    self._put(new, site, matrix)
                    changed = True
                advance(1)
        for site in self.sites:
            for i in (1, 2):
                if i < len(site.node.inputs) and site.node.inputs[i] in new:
                    self.weights[site.node.index, i] = new[site.node.inputs[i]]

    def _fit(self, site: Site, dense: Stream, pruned: Stream, choose: int | None, counts: dict[int, int]) -> np.ndarray:
        """Choose the channels that the layer keeps, if that is to be done here, and refit it."""
        x, dense_total, other = self._sample(site, dense, pruned)
        w0 = site.layer.matrix()
        result = np.zeros_like(w0)
        for q in range(site.layer.groups):
            target = dense_total[q] if other is None else dense_total[q] - other[q]
            gram = Gram.of(x[q], target)
            if choose is not None:
                units = self.analysis.groups[choose].units
                columns = unit_columns(site.contraction, site.layer.kernel, units)
                path = removal_path([Reader(gram, w0[q], columns)], RIDGE, np.ones(len(units), bool), counts[choose])
                self.keep[units[path.order]] = False
            use = self._columns(site, gram.a.shape[0])
            w = solve(gram, w0[q], use, RIDGE)
            if site.relu:
                w = self._after_relu(gram, w0[q], use, x[q], dense_total[q], None if other is None else other[q], w)
            result[q] = w
        return result

    def _columns(self, site: Site, size: int) -> np.ndarray:
        use = np.ones(size, bool)
        if site.contraction is not None:
            labels = site.contraction.labels
            inside = labels[: len(labels) // site.contraction.groups]
            use[:-1] = np.repeat(self.keep[inside], site.layer.kernel)
        return use

    @staticmethod
    def _after_relu(
        gram: Gram,
        w0: np.ndarray,
        use: np.ndarray,
        x: np.ndarray,
        dense: np.ndarray,
        other: np.ndarray | None,
        w: np.ndarray,
    ) -> np.ndarray:
        """Fit what comes out of the Relu: where the dense sum is negative, anything negative will do.

        Majorise-minimise: with the prediction p, the target becomes d where d > 0 and min(p, 0) elsewhere.
        """
        for _ in range(RELU_PASSES):
            p = x @ w.T.astype(x.dtype)
            if other is not None:
                p += other
            z = np.where(dense > 0, dense, np.minimum(p, 0))
            if other is not None:
                z -= other
            b = np.zeros_like(gram.b)
            for i in range(0, len(x), 16384):
                b += z[i : i + 16384].T @ x[i : i + 16384]
            w = solve(Gram(gram.a, b / len(x), gram.t, gram.count), w0, use, RIDGE)
        return w


def _batch(chunk: Feeds) -> int:
    return len(next(iter(chunk.values())))


def divergence(dense: np.ndarray, other: np.ndarray) -> float:
    """How far outputs (N, K) are from the dense network's: Kullback-Leibler at a temperature, averaged.

    At temperature 1 a network is certain of the inputs that it was trained on, and damage would hardly show.
    """
    p, q = (_log_softmax(z / TEMPERATURE) for z in (dense, other))
    return float((np.exp(p) * (p - q)).sum(1).mean()) * TEMPERATURE**2


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))
