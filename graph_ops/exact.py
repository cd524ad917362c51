"""Which units can go without changing the output, and how their constants are carried on.

A removed position whose value is the constant c still contributes c * W to every sum that read it. It can be

* dropped, when c = 0 or no remaining output reads it;
* absorbed into the bias, when the sum sees every position equally (no zero padding);
* merged into one constant channel that stays, W[:, kept] += c / c_kept * W[:, removed]: exact for any map size and any
  padding, because the padded map of a constant is linear in the constant.

Algebra and measured errors of the alternatives: Network Slimming drops the constant (beta is lost), absorbing it under
zero padding is wrong at the borders.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .analysis import Analysis
from .constants import Constants
from .records import Contraction
from .rules.conv import reads_anything


@dataclass
class Edits:
    """New values of the original graph's operands, made before the cut.

    Attributes:
        operands: (node index, input index) to the full-size new value.
        shifts: node index to a vector that is added along the output's channel axis (operators without a bias).
        dropped: removed positions that contributed nothing.
        absorbed: removed positions whose constant went into a bias.
        merged: removed positions whose constant went into a channel that stays.
    """

    operands: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    shifts: dict[int, np.ndarray] = field(default_factory=dict)
    dropped: int = 0
    absorbed: int = 0
    merged: int = 0


def weight_grid(analysis: Analysis, contraction: Contraction, weight: np.ndarray) -> np.ndarray:
    """View a contraction's weight as (groups, out / group, in / group, kernel positions).

    Args:
        analysis: the graph's analysis.
        contraction: one with a weight.
        weight: its value.

    Returns:
        An array that shares memory with ``weight`` where numpy can.
    """
    g = contraction.groups
    k_axis = contraction.weight[1]
    if contraction.out is None:
        return np.moveaxis(weight, k_axis, 0).reshape(1, 1, weight.shape[k_axis], -1)
    out_axis = contraction.out[1]
    moved = np.moveaxis(weight, (out_axis, k_axis), (0, 1))
    moved = moved.reshape(*moved.shape[:2], -1)
    if g == 1:
        return moved[None]
    if k_axis == 1:  # Conv: (out, in / group)
        return moved.reshape(g, -1, *moved.shape[1:])
    # ConvTranspose: (out / group, in)
    return moved.reshape(moved.shape[0], g, -1, moved.shape[2]).transpose(1, 0, 2, 3)


def write_grid(contraction: Contraction, grid: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Inverse of :func:`weight_grid`: return a new weight with the values of ``grid``."""
    k_axis = contraction.weight[1]
    if contraction.out is None:
        shape = [weight.shape[k_axis], *(n for a, n in enumerate(weight.shape) if a != k_axis)]
        return np.moveaxis(grid.reshape(shape), 0, k_axis).astype(weight.dtype)
    out_axis = contraction.out[1]
    rest = [n for a, n in enumerate(weight.shape) if a not in (k_axis, out_axis)]
    if contraction.groups > 1 and k_axis == 0:
        grid = grid.transpose(1, 0, 2, 3)
    moved = grid.reshape(weight.shape[out_axis], weight.shape[k_axis], *rest)
    return np.moveaxis(moved, (0, 1), (out_axis, k_axis)).astype(weight.dtype)


@dataclass
class _Sum:
    """A contraction with a static weight, looked at position by position (groups side by side)."""

    contraction: Contraction
    reads: np.ndarray  # bool (groups, out / group, in / group)
    out_units: np.ndarray | None  # (groups, out / group)
    constant: np.ndarray  # bool (positions,)
    value: np.ndarray  # float64 (positions,)

    def read(self, keep: np.ndarray) -> np.ndarray:
        """Which positions a remaining output reads, bool (positions,)."""
        reads = self.reads if self.out_units is None else self.reads & keep[self.out_units][:, :, None]
        return reads.any(1).reshape(-1)


def _sums(analysis: Analysis, known: Constants) -> tuple[list[_Sum], list[Contraction]]:
    """Contractions with a usable static weight, and the others; looked at once per analysis."""
    if known.memo is not None:
        return known.memo
    sums, others = [], []
    made = {p.node.index: p.labels for p in reversed(analysis.producers)}
    for contraction in analysis.contractions:
        name = contraction.node.inputs[contraction.weight[0]] if contraction.weight else ""
        weight = known.value(name) if name else None
        if not _is_plain(contraction, weight):
            others.append(contraction)
            continue
        grid = weight_grid(analysis, contraction, weight)
        x, axis = contraction.node.inputs[contraction.sides[0][0]], contraction.sides[0][1]
        constant = known.flags(x, axis)
        value = np.where(constant, known.line(x, axis), 0.0)
        out_units = None
        if contraction.out is not None:
            vector = made.get(contraction.node.index)
            if vector is not None and len(vector) == grid.shape[0] * grid.shape[1]:
                out_units = vector.reshape(grid.shape[:2])
        sums.append(_Sum(contraction, reads_anything(grid), out_units, constant, value))
    known.memo = (sums, others)
    return known.memo


def _is_plain(contraction: Contraction, weight: np.ndarray | None) -> bool:
    """Whether a constant can be carried through: a float weight, one matrix, on the right of the data."""
    if weight is None or weight.dtype.kind not in "fV" or contraction.weight[0] < contraction.sides[0][0]:
        return False
    return contraction.node.op_type != "MatMul" or weight.ndim == 2


def removable(analysis: Analysis, known: Constants) -> np.ndarray:
    """Return the units that can go exactly, bool (units,).

    The largest set found by going back and forth until nothing changes: outputs that nobody reads, inputs that are
    constant. One channel stays where merging needs it, and one wherever a whole axis would vanish.
    """
    sums, others = _sums(analysis, known)
    vectors = analysis.vectors()
    forced = analysis.pinned.copy()
    for released in analysis.released:  # statistics over fewer channels are other statistics
        forced[released.labels] = True
    while True:
        remove = _fixed_point(analysis, known, sums, others, forced)
        wanted = _representatives(sums, remove)
        wanted |= {int(v[0]) for v in vectors if remove[v].all()}
        if not wanted:
            return remove
        forced[list(wanted)] = True


def _fixed_point(
    analysis: Analysis, known: Constants, sums: list[_Sum], others: list[Contraction], forced: np.ndarray
) -> np.ndarray:
    """Units of which every reading sum can do without, given those that must stay."""
    blocked = forced.copy()
    for contraction in others:
        silent = np.zeros(len(contraction.labels), bool)
        for i, axis in contraction.sides:
            silent |= known.zeros(contraction.node.inputs[i], axis)
        blocked[contraction.labels[~silent]] = True
    remove = np.zeros(analysis.units, bool)
    while True:
        stay = blocked.copy()
        for s in sums:
            needed = s.read(~remove) & ~s.constant
            stay[s.contraction.labels[needed]] = True
        for fork in analysis.forks:
            stay[fork.source[~remove[fork.labels]]] = True
        if np.array_equal(remove, ~stay):
            return remove
        remove = ~stay


def _representatives(sums: list[_Sum], remove: np.ndarray) -> set[int]:
    """Units that must stay so that the constants of padded sums can be merged into them."""
    wanted: set[int] = set()
    for s in sums:
        if not s.contraction.padded:
            continue
        labels, live = s.contraction.labels, s.value != 0
        gone = remove[labels] & live & s.read(~remove)
        groups = s.reads.shape[0]
        for lost, size, ids in zip(
            gone.reshape(groups, -1), np.abs(s.value).reshape(groups, -1), labels.reshape(groups, -1), strict=True
        ):
            stays = ~remove[ids] & (size > 0)
            stays |= np.isin(ids, list(wanted)) & (size > 0)
            if lost.any() and not stays.any():
                wanted.add(int(ids[np.argmax(np.where(lost, size, -1))]))
    return wanted


def carry(analysis: Analysis, known: Constants, keep: np.ndarray) -> Edits:
    """Carry the constants of removed positions on, wherever that can be done exactly.

    Args:
        analysis: the graph's analysis.
        known: its constants.
        keep: units that stay, bool (units,).

    Returns:
        The edits that make the cut graph compute what the original does, as far as constants go.
    """
    edits = Edits()
    sums, _ = _sums(analysis, known)
    for s in sums:
        contraction = s.contraction
        gone = ~keep[contraction.labels]
        live = gone & s.constant & (s.value != 0) & s.read(keep)
        edits.dropped += int((gone & s.constant & ~live).sum())
        if not live.any():
            continue
        i = contraction.weight[0]
        node = contraction.node
        weight = known.value(node.inputs[i])
        grid = weight_grid(analysis, contraction, weight).astype(np.float64)
        groups = grid.shape[0]
        amount = np.where(live, s.value, 0.0).reshape(groups, -1)
        if not contraction.padded:
            shift = np.einsum("goik,gi->go", grid, amount).reshape(-1)
            _shift(analysis, contraction, shift, edits)
            edits.absorbed += int(live.sum())
            continue
        stays = (keep[contraction.labels] & s.constant & (s.value != 0)).reshape(groups, -1)
        for g in range(groups):
            if not amount[g].any() or not stays[g].any():
                continue
            value = s.value.reshape(groups, -1)[g]
            into = int(np.argmax(np.where(stays[g], np.abs(value), -1)))
            grid[g, :, into] += np.einsum("oik,i->ok", grid[g], amount[g]) / value[into]
            edits.merged += int((amount[g] != 0).sum())
        edits.operands[node.index, i] = write_grid(contraction, grid, weight)
    return edits


def _shift(analysis: Analysis, contraction: Contraction, shift: np.ndarray, edits: Edits) -> None:
    """Add ``shift`` to a node's outputs, through its bias where it has one."""
    node = contraction.node
    i = contraction.bias
    if node.op_type == "Gemm":
        alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
        shift = shift * alpha / beta if beta else shift * alpha
        if beta == 0:
            i = None
    if i is None:
        edits.shifts[node.index] = edits.shifts.get(node.index, 0.0) + shift
        return
    bias = analysis.value(node.inputs[i]) if i < len(node.inputs) and node.inputs[i] else None
    weight = analysis.value(node.inputs[contraction.weight[0]])
    old = edits.operands.get((node.index, i), bias)
    total = shift if old is None else np.asarray(old, np.float64) + shift
    edits.operands[node.index, i] = total.astype(weight.dtype)
