"""A pass over a network layer by layer: what is common to choosing channels and to refitting what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from prune_onnx.graph_ops.alignment import Part, parts
from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.progress import SILENT, Progress

from .calibration import MEMORY, size_of
from .probing import Feeds
from .sites import Site, find_sites
from .streams import Stream, alive

RIDGE = 1e-3
# Sampled positions of a layer, at most; and at least so many for each of its columns, where the maps have them.
ROWS, FEWEST_ROWS = 131072, 2


class Layerwise:
    """One network, its calibration inputs, and the layers that can be fitted.

    Attributes:
        sites: the layers.
        parts: what is counted together: units of a channel group that occur in the same layers, all of them free.
    """

    widest: int
    """Layers with more columns are fitted channel by channel."""
    numbers: int
    """What the samples of a layer's inputs and outputs may hold."""
    effort: float
    """Multiply-accumulates that the products of all layers' samples may take; more positions are not sampled."""
    passes: int = 1
    """How often a sample's inputs are multiplied with its outputs."""

    def __init__(
        self,
        analysis: Analysis,
        chunks: Sequence[Feeds],
        *,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        """Prepare a network.

        Args:
            analysis: of the graph, its BatchNorms folded.
            chunks: calibration inputs, in batches that the graph takes.
            seed: of the sampled positions.
            progress: told how far it is.
        """
        self.analysis, self.graph = analysis, analysis.graph
        self.chunks, self.seed, self.progress = list(chunks), seed, progress
        self.sites = find_sites(analysis, self.widest)
        self.parts: list[Part] = free_parts(analysis)
        # How many inputs fit into memory from a node on, in one stream.
        held = np.maximum.accumulate(np.asarray(alive(self.graph, analysis.probe) or [1])[::-1])[::-1]
        self._room = MEMORY // np.maximum(held, 1)
        work = sum(self._most_rows(site) * self._work(site) for site in self.sites)
        self._density = min(1.0, self.effort / max(work, 1.0))

    def _sample(self, site: Site, dense: Stream, pruned: Stream) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Inputs (groups, M, D) of the pruned stream, dense targets (groups, M, O), what the pruned sum has already."""
        rng = np.random.default_rng([self.seed, site.node.index])
        layer, shape = site.layer, dense.chunks[0][site.y].shape
        images = sum(len(chunk[site.y]) for chunk in dense.chunks)
        rows = max(self._density * self._most_rows(site), FEWEST_ROWS * layer.width)
        per_image = max(1, round(rows / max(1, images)))
        xs, ts, others = Rows(), Rows(), Rows()
        for d, p in zip(dense.chunks, pruned.chunks, strict=True):
            where = layer.sample_positions(shape, per_image, rng)
            part = images / len(d[site.y])
            xs.add(layer.columns(p[site.x], shape, where), part)
            target = layer.targets(d[site.y], where)
            if site.other is not None:
                target = target + layer.targets(d[site.other], where)
                others.add(layer.targets(p[site.other], where), part)
            ts.add(target, part)
        return xs.values, ts.values, others.values if site.other is not None else None

    def _most_rows(self, site: Site) -> int:
        """Positions that there is memory for; as many as the map has, if all inputs were there."""
        every = sum(map(size_of, self.chunks)) * site.layer.positions(self.analysis.probe.shapes[site.y])
        return min(ROWS, every, self.numbers // (site.layer.groups * (site.layer.width + site.layer.outputs)))

    def _work(self, site: Site) -> float:
        """Multiply-accumulates for a position."""
        layer = site.layer
        return layer.groups * layer.width * (layer.width + self.passes * layer.outputs)

    def _open(self, site: Site, *streams: Stream) -> None:
        want = [site.x, site.y] + ([site.other] if site.other else [])
        for stream in streams:
            stream.advance(site.node.index + 1, want)

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

    def shared(self) -> set[int]:
        """Parts that several layers read."""
        return {number for number, sites in self.readers.items() if len(sites) > 1}

    @cached_property
    def readers(self) -> dict[int, list[Site]]:
        """The sites that read each part; parts that anything else reads are left alone."""
        by_contraction = {s.contraction.node.index: s for s in self.sites if s.contraction is not None}
        result: dict[int, list[Site]] = {}
        for number, part in enumerate(self.parts):
            reading = [c for c in self.analysis.contractions if np.isin(c.labels, part.units).any()]
            sites = [by_contraction.get(c.node.index) for c in reading]
            if sites and all(s is not None for s in sites):
                result[number] = sites
        return result

    def _put(self, weights: dict[str, np.ndarray], site: Site, matrix: np.ndarray) -> None:
        w, b = site.layer.tensors(matrix)
        weights[site.node.inputs[1]] = w
        if len(site.node.inputs) > 2 and site.node.inputs[2]:
            weights[site.node.inputs[2]] = b


class Rows:
    """Rows (groups, M, K) that come in parts: they are never held twice."""

    def __init__(self) -> None:
        self._room = np.empty((0, 0, 0))
        self._used = 0

    def add(self, values: np.ndarray, parts: float) -> None:
        """Append (groups, m, K); the first time, room is made for ``parts`` times as many."""
        groups, count, width = values.shape
        if not self._used:
            self._room = np.empty((groups, round(count * parts), width), values.dtype)
        self._room[:, self._used : self._used + count] = values
        self._used += count

    @property
    def values(self) -> np.ndarray:
        """All rows."""
        return self._room[:, : self._used]


def free_parts(analysis: Analysis) -> list[Part]:
    """Return the parts of all groups that have no pinned unit; they are known by their place in this list."""
    return [p for group in parts(analysis) for p in group if len(p.units) and not analysis.pinned[p.units].any()]
