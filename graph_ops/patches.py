"""What a layer sees at sampled output positions: im2col for convolutions of any rank, rows for matrix products.

Columns are ordered channel by channel, kernel positions inside, and end with a 1 for the bias. With that the layer is
``y = W x`` with W of shape (groups, O, D).
"""

from __future__ import annotations

import itertools

import numpy as np

from .analysis import Contraction
from .graph import Node


class Layer:
    """A Conv, Gemm or MatMul with a constant weight, as a matrix.

    Attributes:
        node: the layer.
        weight_input, bias_input: input indexes (the bias may not be there).
        groups: of a convolution.
        kernel: window positions, 1 for matrix products.
    """

    def __init__(self, node: Node, weight: np.ndarray, bias: np.ndarray | None) -> None:
        self.node = node
        self.weight, self.bias = weight, bias
        self.is_conv = node.op_type == "Conv"
        self.groups = node.attribute("group", 1) if self.is_conv else 1
        self.kernel = int(np.prod(weight.shape[2:])) if self.is_conv else 1
        self.transposed = node.op_type == "Gemm" and bool(node.attribute("transB", 0))

    @property
    def width(self) -> int:
        """Columns of one group's matrix, D."""
        inside = self.weight.shape[1] if self.is_conv or self.transposed else self.weight.shape[0]
        return inside * self.kernel + 1

    def matrix(self) -> np.ndarray:
        """Weights and bias as (groups, O, D), float64."""
        w = np.asarray(self.weight, np.float64)
        if self.is_conv:
            w = w.reshape(self.groups, w.shape[0] // self.groups, -1)
        else:
            w = (w if self.transposed else w.T)[None]
        bias = (
            np.zeros(w.shape[:2])
            if self.bias is None
            else np.broadcast_to(np.asarray(self.bias, np.float64).reshape(-1), (w.shape[0] * w.shape[1],)).reshape(
                w.shape[:2]
            )
        )
        return np.concatenate([w, bias[:, :, None]], 2)

    def tensors(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of :meth:`matrix`: weight and bias in the operator's layout and type."""
        w, bias = matrix[:, :, :-1], matrix[:, :, -1].reshape(-1)
        if self.is_conv:
            w = w.reshape(self.weight.shape)
        else:
            w = w[0] if self.transposed else w[0].T
        return w.astype(self.weight.dtype), bias.astype(self.weight.dtype)

    def sample_positions(self, y_shape: tuple[int, ...], count: int, rng: np.random.Generator) -> np.ndarray:
        """Choose output positions, flat indexes into the output's space; all of them when there are few."""
        total = int(np.prod(y_shape[2:])) if self.is_conv else 1
        return np.arange(total) if total <= count else np.sort(rng.choice(total, count, replace=False))

    def columns(self, x: np.ndarray, y_shape: tuple[int, ...], positions: np.ndarray) -> np.ndarray:
        """Return (groups, M, D) inputs at the positions, a trailing 1 for the bias; M = batch x positions."""
        if not self.is_conv:
            rows = x.reshape(1, -1, x.shape[-1])
            return np.concatenate([rows, np.ones_like(rows[:, :, :1])], 2)
        rank = x.ndim - 2
        kernel = self.weight.shape[2:]
        strides = self.node.attribute("strides", [1] * rank)
        dilations = self.node.attribute("dilations", [1] * rank)
        before, after = self._pads(x.shape, y_shape, kernel, strides, dilations)
        padded = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)]) if any(before) or any(after) else x
        where = np.unravel_index(positions, y_shape[2:])
        n, channels = x.shape[:2]
        out = np.empty((n, len(positions), channels, self.kernel), x.dtype)
        for k, offset in enumerate(itertools.product(*map(range, kernel))):
            index = tuple(p * s + o * d for p, s, o, d in zip(where, strides, offset, dilations, strict=True))
            out[:, :, :, k] = padded[(slice(None), slice(None), *index)].transpose(0, 2, 1)
        rows = out.reshape(n * len(positions), self.groups, -1).transpose(1, 0, 2)
        return np.concatenate([rows, np.ones((*rows.shape[:2], 1), x.dtype)], 2)

    def targets(self, y: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return (groups, M, O) outputs at the positions."""
        if not self.is_conv:
            return y.reshape(1, -1, y.shape[-1])
        n, channels = y.shape[:2]
        rows = (
            y.reshape(n, channels, -1)[:, :, positions].transpose(0, 2, 1).reshape(n * len(positions), self.groups, -1)
        )
        return np.ascontiguousarray(rows.transpose(1, 0, 2))

    def _pads(
        self, x: tuple[int, ...], y: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
    ) -> tuple[list[int], list[int]]:
        rank = len(kernel)
        mode = str(self.node.attribute("auto_pad", "NOTSET"))
        if mode.startswith("SAME"):
            need = [
                max(0, (y[2 + i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - x[2 + i]) for i in range(rank)
            ]
            small = [n // 2 for n in need]
            large = [n - n // 2 for n in need]
            return (small, large) if mode == "SAME_UPPER" else (large, small)
        pads = self.node.attribute("pads", [0] * 2 * rank)
        return list(pads[:rank]), list(pads[rank:])


def unit_columns(contraction: Contraction, kernel: int, units: np.ndarray) -> np.ndarray | None:
    """Columns (of one group's matrix) that each unit feeds, (units, k).

    Args:
        contraction: the layer's.
        kernel: window positions.
        units: ids.

    Returns:
        ``None`` where the units feed different numbers of columns.
    """
    inside = contraction.labels[: len(contraction.labels) // contraction.groups]
    rows = []
    for unit in units:
        positions = np.flatnonzero(inside == unit)
        rows.append((positions[:, None] * kernel + np.arange(kernel)).reshape(-1))
    sizes = {len(row) for row in rows}
    return np.stack(rows) if len(sizes) == 1 and 0 not in sizes else None
