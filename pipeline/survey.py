"""What removing channels costs: a pass over the dense network before anything is decided.

Every layer that reads prunable channels gets its Gram matrix, every part of a channel group its removal path
(structured OBS over all of its readers), and the path's error is put into the unit of the output: single parts are
pruned, their readers refitted, and the outputs compared. An allocator shares the budget out by that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from prune_onnx.graph_ops.allocate import Curve
from prune_onnx.graph_ops.obs import Gram, Path, Reader, removal_path, solve
from prune_onnx.graph_ops.patches import unit_columns

from .calibration import size_of
from .divergence import Outputs, divergence, joined
from .layerwise import RIDGE, Layerwise
from .sites import Site
from .streams import Stream

# What is kept at the levels that are measured, and at the only one where a look must do.
LEVELS, FEW_LEVELS = (0.75, 0.5, 0.25, 0.0), (0.5,)
# Inputs that levels are measured on, at most and at least, and the multiply-accumulates that all of that may take;
# with fewer than so many there are few levels.
MEASURED, FEWEST, EFFORT = 256, 16, 2e12
MANY = 64


@dataclass
class Statistics:
    """What a survey found, by the number of the part."""

    paths: dict[int, Path] = field(default_factory=dict)
    curves: dict[int, Curve] = field(default_factory=dict)


class Survey(Layerwise):
    """The pass over the dense network; a layer of many inputs is looked at channel by channel."""

    widest = 1200
    numbers = 2**25
    effort = 1e12

    def statistics(self) -> Statistics:
        """Removal paths of all parts, and what removing costs at the output."""
        readers: dict[int, list[tuple[Site, Reader]]] = {}
        found = Statistics()
        reading = self.readers
        stream = self._stream(1)
        starts: dict[int, Stream] = {}
        first = {number: min(s.node.index for s in sites) for number, sites in reading.items()}
        last = {number: max(s.node.index for s in sites) for number, sites in reading.items()}
        few, levels = self._measured(first)
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
                    path, curve = self._measure(number, readers.pop(number), starts.pop(number), dense, levels)
                    found.paths[number], found.curves[number] = path, curve
                advance(1)
        return found

    def _measured(self, first: dict[int, int]) -> tuple[int, tuple[float, ...]]:
        """How many chunks which levels are measured on: what that may take decides, between two bounds."""
        work = np.zeros(len(self.graph.nodes) + 1)
        for part in self.analysis.works:
            work[part.node.index] += part.scale * np.prod([len(v) for v in part.factors], dtype=np.float64)
        rest = work[::-1].cumsum()[::-1]
        each = len(LEVELS) * sum(rest[index] for index in first.values())
        inputs = int(np.clip(EFFORT / max(each, 1.0), FEWEST, MEASURED))
        chunks = min(max(1, -(-inputs // size_of(self.chunks[0]))), self._fitting(0, 1))
        return chunks, LEVELS if inputs >= MANY else FEW_LEVELS

    def _measure(
        self,
        number: int,
        readers: list[tuple[Site, Reader]],
        start: Stream,
        dense: Outputs,
        levels: tuple[float, ...],
    ) -> tuple[Path, Curve]:
        """The part's path, and the output's divergence at a few levels of it."""
        units = self.parts[number].units
        path = removal_path([r for _, r in readers], RIDGE, np.ones(len(units), bool))
        kept, damage = [], []
        for level in levels:
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
        if kept[-1] > 0:  # damage is taken to grow like the error
            kept.append(0)
            damage.append(damage[-1] * path.error[-1] / max(path.error[len(units) - kept[-2]], 1e-12))
        return path, Curve(len(units), path.error, np.asarray(kept), np.asarray(damage))

    def _outputs(self, stream: Stream) -> Outputs:
        stream.advance(len(self.graph.nodes))
        return joined([[chunk[name] for name in self.graph.outputs] for chunk in stream.chunks])
