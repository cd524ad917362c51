"""Refitting what reads pruned channels: from the first layer to the last.

Two streams run side by side, the dense network and the pruned one, on a few hundred unlabelled inputs; the graph's
BatchNorms are folded. Each layer is fitted to the dense output on the inputs that the pruned network really gives it;
where it ends a residual branch, the target is what the sum still lacks. Outputs that a Relu or Clip follows are fitted
after it. Channels that one layer alone reads are chosen on the way, on those inputs.

Source: the reconstruction of He et al. 2017 ("Channel pruning for accelerating very deep neural networks") and ThiNet,
with the structured OBS of :mod:`prune_onnx.graph_ops.obs` in place of their selection.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.obs import Fit, Gram, Path, Reader, moments, removal_path, solve
from prune_onnx.graph_ops.patches import unit_columns
from prune_onnx.graph_ops.progress import SILENT, Progress

from .layerwise import RIDGE, Layerwise
from .probing import Feeds
from .sites import Site
from .streams import Stream

# Ridges that a layer's fit may have, and the part of its positions that decides which.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
DECIDING = 0.1
# Of a layer with more columns the channels are those of the survey, and the ridge is the usual one.
MANY = 2000
RELU_PASSES = 4


class Reconstruction(Layerwise):
    """The pass over both networks.

    Attributes:
        keep: units that stay.
        weights: refitted operands, by (node index, input index).
    """

    widest = 6000
    numbers = 2**26
    effort = 2.2e12
    passes = 1 + 2 * RELU_PASSES

    def __init__(
        self,
        analysis: Analysis,
        chunks: Sequence[Feeds],
        *,
        keep: np.ndarray | None = None,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        """Prepare; ``keep`` are the units that stay, where that is decided already."""
        super().__init__(analysis, chunks, seed=seed, progress=progress)
        self.keep = np.ones(analysis.units, bool) if keep is None else keep.copy()
        self.weights: dict[tuple[int, int], np.ndarray] = {}

    def run(self, counts: dict[int, int], paths: dict[int, Path]) -> None:
        """Prune every part to its count and refit all layers; ``keep`` and ``weights`` hold the result."""
        readers = self.readers
        late: dict[int, dict[int, int]] = {}  # parts that are chosen at a site, on the pruned network's own inputs
        for number, count in counts.items():
            units = self.parts[number].units
            if count >= len(units):
                continue
            layer = readers[number][0].layer
            if len(readers[number]) == 1 and layer.groups == 1 and layer.width <= MANY:
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
            ridge = _ridge(most, check, w0[q], use)
            del most, check
            if site.bounds is None:
                result[q] = solve(gram, w0[q], use, ridge)
            else:
                there = None if other is None else other[q]
                result[q] = _within(site.bounds, Fit(gram, w0[q], use, ridge), gram.b, x[q], dense_total[q], there)
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


def _ridge(most: Gram, check: Gram, w0: np.ndarray, use: np.ndarray) -> float:
    """The ridge whose fit to most positions is best on the others."""
    if len(w0[0]) > MANY:
        return RIDGE
    return min(RIDGES, key=lambda ridge: check.error(solve(most, w0, use, ridge)))


def _within(
    bounds: tuple[float, float],
    fit: Fit,
    b: np.ndarray,
    x: np.ndarray,
    dense: np.ndarray,
    other: np.ndarray | None,
) -> np.ndarray:
    """Fit what comes out of a Relu or Clip: where the dense sum is beyond a bound, anything beyond it will do.

    Majorise-minimise: with the prediction p, the target becomes d where it is within the bounds, and beyond a bound p,
    as far as that is beyond it too.
    """
    low, high = bounds
    w = fit.weights(b)
    for _ in range(RELU_PASSES):
        p = x @ w.T.astype(x.dtype)
        if other is not None:
            p += other
        z = np.where(dense > low, dense, np.minimum(p, low))
        if high < np.inf:
            z = np.where(dense < high, z, np.maximum(p, high))
        if other is not None:
            z -= other
        w = fit.weights(moments(z, x))
    return w
