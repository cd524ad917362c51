"""Post-training pruning: choose channels by what their readers lose, and refit the readers, layer by layer.

Works on a graph whose BatchNorms are folded. Two passes over a few hundred unlabelled inputs:

1. *Statistics*, on the dense network: every layer that reads prunable channels gets its Gram matrix, every group its
   removal path (structured OBS over all of its readers), and the path's error is put into the unit of the output by
   pruning single groups and looking at the logits. An allocator shares the budget out.
2. *Reconstruction*: from the first layer to the last, two streams run side by side, the dense network and the pruned
   one. Each layer is fitted to the dense output on the inputs that the pruned network really gives it; where it ends a
   residual branch, the target is what the sum still lacks. Outputs that a Relu or Clip follows are fitted after it.

Source: the reconstruction of He et al. 2017 ("Channel pruning for accelerating very deep neural networks") and ThiNet,
with the structured OBS of :mod:`prune_onnx.graph_ops.obs` in place of their selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from prune_onnx.graph_ops.alignment import Part, parts
from prune_onnx.graph_ops.allocate import Curve
from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.obs import Gram, Path, Reader, removal_path, solve
from prune_onnx.graph_ops.patches import unit_columns
from prune_onnx.graph_ops.progress import SILENT, Progress

from .calibration import MEMORY, size_of
from .divergence import Outputs, divergence, joined
from .probing import Feeds
from .sites import Site, find_sites
from .streams import Stream, alive

RIDGE = 1e-3
# Ridges that a layer's fit may have, and the part of its positions that decides which.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
DECIDING = 0.1
RELU_PASSES = 4
LEVELS = (0.75, 0.5, 0.25, 0.0)
# Sampled positions of a layer, and numbers that they may hold at most (256 MB in float32).
ROWS, NUMBERS = 131072, 2**26
# Inputs that levels are measured on, at most and at least, and the multiply-accumulates that all of that may take.
MEASURED, FEWEST, EFFORT = 256, 16, 4e12


@dataclass
class Statistics:
    """What the first pass found, by the number of the part."""

    paths: dict[int, Path] = field(default_factory=dict)
    curves: dict[int, Curve] = field(default_factory=dict)


class Reconstruction:
    """One network, its calibration inputs, and what is decided so far.

    Attributes:
        parts: what is counted together: units of a channel group that occur in the same layers, all of them free.
        keep: units that stay.
        weights: refitted operands, by (node index, input index).
    """

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
        self.sites = find_sites(analysis)
        free = [p for group in parts(analysis) for p in group if not analysis.pinned[p.units].any()]
        self.parts: list[Part] = [p for p in free if len(p.units)]
        # How many inputs fit into memory from a node on, in one stream.
        held = np.maximum.accumulate(np.asarray(alive(self.graph, analysis.probe) or [1])[::-1])[::-1]
        self._room = MEMORY // np.maximum(held, 1)
        self.keep = np.ones(analysis.units, bool) if keep is None else keep.copy()
        self.weights: dict[tuple[int, int], np.ndarray] = {}

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

    def some(self, count: int) -> list[Feeds]:
        """The first chunks, of ``count`` inputs or a few more."""
        sizes = np.cumsum([size_of(chunk) for chunk in self.chunks])
        return self.chunks[: int(np.searchsorted(sizes, count)) + 1]

    def shared(self) -> set[int]:
        """Parts that several layers read."""
        return {number for number, sites in self._readers().items() if len(sites) > 1}

    def _stream(self, count: int, weights: dict[str, np.ndarray] | None = None) -> Stream:
        """A stream at the beginning, with as many inputs as fit into memory beside ``count - 1`` others."""
        return Stream(self.graph, self.analysis.probe, self.chunks[: self._fitting(0, count)], weights)

    def _join(self, index: int, *streams: Stream) -> None:
        """Take in the inputs that there is room for from a node on."""
        fitting = self._fitting(index, len(streams))
        for stream in streams:
            stream.advance(index)
            stream.join(self.chunks[len(stream.chunks) : fitting])

    def _fitting(self, index: int, count: int) -> int:
        """How many chunks fit from a node on, in each of ``count`` streams; one at least."""
        sizes = np.cumsum([size_of(chunk) for chunk in self.chunks])
        return max(1, int(np.searchsorted(sizes, self._room[index] // count, side="right")))

    # -- first pass --------------------------------------------------------------------------------------------------
    def statistics(self) -> Statistics:
        """Removal paths of all parts, and what removing costs at the output."""
        readers: dict[int, list[tuple[Site, Reader]]] = {}
        found = Statistics()
        reading = self._readers()
        stream = self._stream(1)
        starts: dict[int, Stream] = {}
        first = {number: min(s.node.index for s in sites) for number, sites in reading.items()}
        last = {number: max(s.node.index for s in sites) for number, sites in reading.items()}
        few = self._measured(first)
        dense = self._outputs(Stream(self.graph, self.analysis.probe, self.chunks[:few]))
        with self.progress.task("statistics", len(self.sites)) as advance:
            for site in self.sites:
                self._join(site.node.index, stream)
                for number, index in first.items():
                    if index == site.node.index:
                        starts[number] = stream.fork({}, few)
                self._open(site, stream)
                of = [number for number, sites in reading.items() if site in sites]
                if of:
                    x, t, other = self._sample(site, stream, stream)
                    t = t if other is None else t - other
                    grams = [Gram.of(x[q], t[q]) for q in range(site.layer.groups)]
                    weights = site.layer.matrix()
                for number in of:
                    columns = unit_columns(site.labels, site.layer.kernel, self.parts[number].units)
                    pairs = [(site, Reader(gram, w0, columns)) for gram, w0 in zip(grams, weights, strict=True)]
                    readers.setdefault(number, []).extend(pairs)
                for number in [number for number in of if last[number] == site.node.index]:
                    path, curve = self._measure(number, readers.pop(number), starts.pop(number), dense)
                    found.paths[number], found.curves[number] = path, curve
                advance(1)
        return found

    def _measured(self, first: dict[int, int]) -> int:
        """How many chunks the levels are measured on: what that may take decides, between two bounds."""
        work = np.zeros(len(self.graph.nodes) + 1)
        for part in self.analysis.works:
            work[part.node.index] += part.scale * np.prod([len(v) for v in part.factors], dtype=np.float64)
        rest = work[::-1].cumsum()[::-1]
        each = len(LEVELS) * sum(rest[index] for index in first.values())
        inputs = int(np.clip(EFFORT / max(each, 1.0), FEWEST, MEASURED))
        return min(max(1, -(-inputs // size_of(self.chunks[0]))), self._fitting(0, 1))

    def _readers(self) -> dict[int, list[Site]]:
        """The sites that read each part; parts that anything else reads are left alone."""
        by_contraction = {s.contraction.node.index: s for s in self.sites if s.contraction is not None}
        result: dict[int, list[Site]] = {}
        for number, part in enumerate(self.parts):
            reading = [c for c in self.analysis.contractions if np.isin(c.labels, part.units).any()]
            sites = [by_contraction.get(c.node.index) for c in reading]
            if sites and all(s is not None for s in sites):
                result[number] = sites
        return result

    def _measure(
        self, number: int, readers: list[tuple[Site, Reader]], start: Stream, dense: Outputs
    ) -> tuple[Path, Curve]:
        """The part's path, and the output's divergence at a few levels of it."""
        units = self.parts[number].units
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
                    fed = reader.columns[gone]
                    columns[fed[fed >= 0]] = False
                    matrix[q] = solve(reader.gram, reader.w0, columns, RIDGE)
                self._put(weights, same[0][0], matrix)
            kept.append(stay)
            damage.append(divergence(dense, self._outputs(start.fork(weights))))
        return path, Curve(len(units), path.error, np.asarray(kept), np.asarray(damage))

    def _outputs(self, stream: Stream) -> Outputs:
        stream.advance(len(self.graph.nodes))
        return joined([[chunk[name] for name in self.graph.outputs] for chunk in stream.chunks])

    def _put(self, weights: dict[str, np.ndarray], site: Site, matrix: np.ndarray) -> None:
        w, b = site.layer.tensors(matrix)
        weights[site.node.inputs[1]] = w
        if len(site.node.inputs) > 2 and site.node.inputs[2]:
            weights[site.node.inputs[2]] = b

    # -- second pass -------------------------------------------------------------------------------------------------
    def run(self, counts: dict[int, int], paths: dict[int, Path]) -> None:
        """Prune every part to its count and refit all layers; ``keep`` and ``weights`` hold the result."""
        readers = self._readers()
        late: dict[int, dict[int, int]] = {}  # parts that are chosen at a site, on the pruned network's own inputs
        for number, count in counts.items():
            units = self.parts[number].units
            if count >= len(units):
                continue
            if len(readers[number]) == 1 and readers[number][0].layer.groups == 1:
                late.setdefault(readers[number][0].node.index, {})[number] = count
            else:
                self.keep[units[paths[number].order[: len(units) - count]]] = False
        dense = self._stream(2)
        new: dict[str, np.ndarray] = {}
        pruned = self._stream(2, new)
        changed = False
        with self.progress.task("reconstruction", len(self.sites)) as advance:
            for site in self.sites:
                cut_here = site.contraction is not None and not self.keep[site.contraction.labels].all()
                if changed or cut_here or site.node.index in late:
                    self._join(site.node.index, dense, pruned)
                    self._open(site, dense)
                    matrix = self._fit(site, dense, pruned, late.get(site.node.index, {}))
                    self._put(new, site, matrix)
                    changed = True
                advance(1)
        for site in self.sites:
            for i in (1, 2):
                if i < len(site.node.inputs) and site.node.inputs[i] in new:
                    self.weights[site.node.index, i] = new[site.node.inputs[i]]

    def _fit(self, site: Site, dense: Stream, pruned: Stream, choose: dict[int, int]) -> np.ndarray:
        """Choose the channels that the layer keeps, if that is to be done here, and refit it.

        Args:
            site: the layer.
            dense, pruned: streams; the pruned one stands before the layer.
            choose: counts of the parts that this layer alone reads.
        """
        x, dense_total, other = self._sample(site, dense, pruned)
        w0 = site.layer.matrix()
        result = np.zeros_like(w0)
        deciding = max(1, round(DECIDING * x.shape[1]))
        for q in range(site.layer.groups):
            target = dense_total[q] if other is None else dense_total[q] - other[q]
            most = Gram.of(x[q, :-deciding], target[:-deciding])
            check = Gram.of(x[q, -deciding:], target[-deciding:])
            gram = most + check
            for number, count in choose.items():
                self._choose(site, number, count, gram, w0[q])
            use = self._columns(site, gram.a.shape[0])
            ridge = min(RIDGES, key=lambda r: check.error(solve(most, w0[q], use, r)))
            w = solve(gram, w0[q], use, ridge)
            if site.bounds is not None:
                rest = None if other is None else other[q]
                w = self._within(site.bounds, gram, w0[q], use, x[q], dense_total[q], rest, w, ridge)
            result[q] = w
        return result

    def _choose(self, site: Site, number: int, count: int, gram: Gram, w0: np.ndarray) -> None:
        """Choose ``count`` units of a part by what the layer loses, given what is gone already."""
        units = self.parts[number].units
        use = np.flatnonzero(self._columns(site, gram.a.shape[0]))
        place = np.full(len(gram.a) + 1, -1)  # the last stays -1, for columns that are not there
        place[use] = np.arange(len(use))
        reader = Reader(gram.on(use), w0[:, use], place[unit_columns(site.labels, site.layer.kernel, units)])
        path = removal_path([reader], RIDGE, np.ones(len(units), bool), count)
        self.keep[units[path.order]] = False

    def _columns(self, site: Site, size: int) -> np.ndarray:
        use = np.ones(size, bool)
        if site.contraction is not None:
            use[:-1] = np.repeat(self.keep[site.labels], site.layer.kernel)
        return use

    @staticmethod
    def _within(
        bounds: tuple[float, float],
        gram: Gram,
        w0: np.ndarray,
        use: np.ndarray,
        x: np.ndarray,
        dense: np.ndarray,
        other: np.ndarray | None,
        w: np.ndarray,
        ridge: float,
    ) -> np.ndarray:
        """Fit what comes out of the Relu: where the dense sum is negative, anything negative will do.

        Majorise-minimise: with the prediction p, the target becomes d where it is within the bounds, and beyond a bound
        p, as far as that is beyond it too.
        """
        low, high = bounds
        for _ in range(RELU_PASSES):
            p = x @ w.T.astype(x.dtype)
            if other is not None:
                p += other
            z = np.where(dense > low, dense, np.minimum(p, low))
            if high < np.inf:
                z = np.where(dense < high, z, np.maximum(p, high))
            if other is not None:
                z -= other
            b = np.zeros_like(gram.b)
            for i in range(0, len(x), 16384):
                b += z[i : i + 16384].T @ x[i : i + 16384]
            w = solve(Gram(gram.a, b / len(x), gram.t, gram.count), w0, use, ridge)
        return w
