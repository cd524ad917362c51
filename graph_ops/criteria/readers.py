"""What a channel gives the layers that read it: energy, and the share of their signal."""

from __future__ import annotations

import numpy as np

from ..analysis import Analysis
from ..exact import weight_grid
from ..patches import Layer
from ..records import Contraction
from .base import ACTIVATIONS, Evidence, Scores, Total, criterion

PATCHES = 2**23
"""Entries of unfolded maps that are held at a time."""


@criterion("activation", needs=ACTIVATIONS)
def activation(evidence: Evidence) -> Scores:
    """Energy that a channel brings into the layers that read it, |W_c|^2 E[x_c^2]; needs --calibration.

    What all readers of coupled channels get adds up, each reader's parts taken as shares of its sum. Global: divided by
    the group's mean.
    """
    analysis = evidence.analysis
    assert evidence.taps is not None
    total = Total(analysis.units)
    energy: dict[tuple[str, int], np.ndarray] = {}
    count: dict[str, int] = {}
    sides = {(c.node.inputs[i], axis) for c in analysis.contractions for i, axis in c.sides}
    sides = {side for side in sides if side[0] in analysis.graph.dynamic}
    for name, value in evidence.taps(sorted({name for name, _ in sides})):
        count[name] = count.get(name, 0) + len(value)
        for _, axis in [side for side in sides if side[0] == name]:
            x = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
            squares = np.einsum("cp,cp->c", x, x, dtype=np.float64) / (x.shape[1] / len(value))
            energy[name, axis] = energy.get((name, axis), 0.0) + squares
    for contraction in analysis.contractions:
        parts = _gain(analysis, contraction)
        for i, axis in contraction.sides:
            side = contraction.node.inputs[i], axis
            if side in energy:
                parts = parts * energy[side] / count[side[0]]
        if parts.sum() > 0:
            total.add(contraction.labels, parts / parts.sum())
    return total.sum()


def _gain(analysis: Analysis, contraction: Contraction) -> np.ndarray:
    """Squared norm of the weights on each position, (positions,); 1 where there are no readable weights."""
    if contraction.weight is not None:
        weight = analysis.value(contraction.node.inputs[contraction.weight[0]])
        if weight is not None and weight.dtype.kind in "fV":
            grid = weight_grid(analysis, contraction, np.asarray(weight, np.float32))
            gain = np.einsum("goik,goik->gi", grid, grid, dtype=np.float64).reshape(-1)
            if len(gain) == len(contraction.labels):
                return gain
    return np.ones(len(contraction.labels))


@criterion("nnrelief", comparable=True, needs=ACTIVATIONS)
def nnrelief(evidence: Evidence) -> Scores:
    """Mean share of its readers' signals that a channel carries (NNrelief, Dekhovich et al. 2021); needs --calibration.

    a_ij = mean over the inputs of | |K_ij| * |x_i| |_F, bias |b_j| sqrt(positions); s_ij = a_ij over the sum for j
    (Algorithms 1 and 2, with the paper's norms). A unit's score is the mean of s_ij over the outputs j, times the units
    that the layer reads, added up over coupled channels and readers. Global: so 1 is an average channel of any layer.
    """
    analysis = evidence.analysis
    assert evidence.taps is not None
    readers: dict[str, list[tuple[Contraction, Layer]]] = {}
    for contraction in analysis.contractions:
        layer = _layer(analysis, contraction)
        if layer is not None:
            readers.setdefault(layer.node.inputs[0], []).append((contraction, layer))
    sums: dict[int, np.ndarray] = {}
    count: dict[int, int] = {}
    for name, value in evidence.taps(list(readers)):
        for _, layer in readers[name]:
            index = layer.node.index
            y = analysis.probe.shapes[layer.node.outputs[0]]
            sums[index] = sums.get(index, 0.0) + _contributions(layer, value, y)
            count[index] = count.get(index, 0) + len(value)
    total = Total(analysis.units)
    for contraction, layer in [pair for pairs in readers.values() for pair in pairs]:
        index = layer.node.index
        y = analysis.probe.shapes[layer.node.outputs[0]]
        kernels = sums[index] / count[index]
        positions = int(np.prod(y[2:])) if layer.is_conv else 1
        bias = np.abs(layer.matrix()[:, :, -1:]) * np.sqrt(positions)
        signal = kernels.sum(2, keepdims=True) + bias
        shares = np.divide(kernels, signal, out=np.zeros_like(kernels), where=signal > 0).mean(1).reshape(-1)
        total.add(contraction.labels, shares * len(np.unique(contraction.labels)))
    return total.sum()


def _layer(analysis: Analysis, contraction: Contraction) -> Layer | None:
    """The contraction as a matrix; ``None`` for what is none: products of activations, quantised or stacked weights."""
    node = contraction.node
    if contraction.weight is None or node.domain or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    weight = analysis.value(node.inputs[contraction.weight[0]])
    plain = weight is not None and weight.dtype.kind in "fV" and contraction.weight[0] == 1
    plain = plain and not node.attribute("transA", 0)
    plain = plain and (node.op_type in ("Conv", "ConvTranspose") or weight.ndim == 2)
    bias = analysis.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    return Layer(node, weight, bias) if plain else None


def _contributions(layer: Layer, x: np.ndarray, y_shape: tuple[int, ...]) -> np.ndarray:
    """Return | |K_ij| * |x_ni| |_F summed over n, (groups, outputs, inputs of a group).

    The square of the norm is a quadratic form in the kernel, k^T (P P^T) k with the patches P that the layer sees. All
    filters of an input channel share P P^T, and nothing in it is negative, so nothing cancels.
    """
    kernels = np.abs(layer.matrix()[:, :, :-1]).astype(np.float32)
    kernels = kernels.reshape(*kernels.shape[:2], -1, layer.kernel)  # (groups, O, C, k)
    if not layer.is_conv:
        rows = np.abs(x).reshape(-1, x.shape[-1])
        return kernels[:, :, :, 0] * (rows.sum(0, dtype=np.float64) * len(x) / len(rows))
    positions = np.arange(int(np.prod(y_shape[2:])))
    step = max(1, PATCHES // max(1, len(positions) * layer.groups * layer.width))
    right = kernels.transpose(0, 2, 3, 1)  # (groups, C, k, O)
    total = np.zeros(kernels.shape[:3])
    for first in range(0, len(x), step):
        part = np.abs(x[first : first + step])
        rows = layer.columns(part, y_shape, positions)[:, :, :-1]
        rows = rows.reshape(layer.groups, len(part), len(positions), -1, layer.kernel).transpose(1, 0, 3, 4, 2)
        for patches in rows:  # (groups, C, k, positions)
            gram = patches @ patches.swapaxes(2, 3)
            squares = ((gram @ right) * right).sum(2)  # (groups, C, O)
            total += np.sqrt(squares).transpose(0, 2, 1)
    return total
