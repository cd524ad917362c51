"""What a layer sees at sampled output positions: im2col for convolutions of any rank, rows for matrix products.

Columns are ordered channel by channel, kernel positions inside, and end with a 1 for the bias. With that the layer is
``y = W x`` with W of shape (groups, O, D). A transposed convolution is a convolution too, of the flipped kernel over
its input with zeros put between the positions.

Where D is too large for a Gram matrix, :class:`ChannelLayer` asks less: how well the layer's input channels can be
told from those that stay, whatever the position.
"""

from __future__ import annotations

import itertools

import numpy as np

from .graph import Node

# Outputs of a wide layer whose weights are changed at a time.
OUTPUTS = 64


class Layer:
    """A Conv, ConvTranspose, Gemm or MatMul with a constant weight, as a matrix.

    Attributes:
        node: the layer.
        weight: in the operator's layout.
        bias: likewise; ``None`` where there is none.
        groups: of a convolution.
        kernel: columns of each input channel: window positions, 1 for matrix products.
    """

    def __init__(self, node: Node, weight: np.ndarray, bias: np.ndarray | None) -> None:
        self.node = node
        self.weight, self.bias = weight, bias
        self.upwards = node.op_type == "ConvTranspose"
        self.is_conv = self.upwards or node.op_type == "Conv"
        self.groups = node.attribute("group", 1) if self.is_conv else 1
        self.kernel = int(np.prod(weight.shape[2:])) if self.is_conv else 1
        self.transposed = node.op_type == "Gemm" and bool(node.attribute("transB", 0))

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        if self.upwards:
            return self.weight.shape[0] // self.groups
        return self.weight.shape[1] if self.is_conv or self.transposed else self.weight.shape[0]

    @property
    def width(self) -> int:
        """Columns of one group's matrix, D."""
        return self.channels * self.kernel + 1

    @property
    def outputs(self) -> int:
        """Rows of one group's matrix, O."""
        if self.upwards:
            return self.weight.shape[1]
        if self.is_conv:
            return self.weight.shape[0] // self.groups
        return self.weight.shape[0 if self.transposed else 1]

    def positions(self, y_shape: tuple[int, ...]) -> int:
        """How many positions an output of this shape has; of a matrix product rows of each input."""
        return int(np.prod(y_shape[2:] if self.is_conv else y_shape[1:-1]))

    def matrix(self) -> np.ndarray:
        """Weights and bias as (groups, O, D), float64."""
        w = np.asarray(self.weight, np.float64)
        if self.upwards:
            w = w.reshape(self.groups, self.channels, w.shape[1], *w.shape[2:])
            w = np.flip(w, tuple(range(3, w.ndim))).swapaxes(1, 2).reshape(self.groups, w.shape[2], -1)
        elif self.is_conv:
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
        if self.upwards:
            w = w.reshape(self.groups, w.shape[1], self.channels, *self.weight.shape[2:]).swapaxes(1, 2)
            w = np.flip(w, tuple(range(3, w.ndim))).reshape(self.weight.shape)
        elif self.is_conv:
            w = w.reshape(self.weight.shape)
        else:
            w = w[0] if self.transposed else w[0].T
        return np.ascontiguousarray(w, self.weight.dtype), bias.astype(self.weight.dtype)

    def sample_positions(self, y_shape: tuple[int, ...], count: int, rng: np.random.Generator) -> np.ndarray:
        """Choose output positions, flat indexes into the output's space; all of them when there are few."""
        total = self.positions(y_shape)
        return np.arange(total) if total <= count else np.sort(rng.choice(total, count, replace=False))

    def columns(self, x: np.ndarray, y_shape: tuple[int, ...], positions: np.ndarray) -> np.ndarray:
        """Return (groups, M, D) inputs at the positions, a trailing 1 for the bias; M = batch x positions."""
        if not self.is_conv:
            rows = x.reshape(len(x), -1, x.shape[-1])[:, positions].reshape(1, -1, x.shape[-1])
            return np.concatenate([rows, np.ones_like(rows[:, :, :1])], 2)
        rank = x.ndim - 2
        kernel = self.weight.shape[2:]
        strides = self.node.attribute("strides", [1] * rank)
        dilations = self.node.attribute("dilations", [1] * rank)
        if self.upwards:
            return self._columns_between(x, y_shape, positions)
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

    def _columns_between(self, x: np.ndarray, y_shape: tuple[int, ...], positions: np.ndarray) -> np.ndarray:
        """The columns of a transposed convolution: most of what its window sees are the zeros between positions."""
        rank = x.ndim - 2
        kernel = self.weight.shape[2:]
        strides = self.node.attribute("strides", [1] * rank)
        dilations = self.node.attribute("dilations", [1] * rank)
        before = self._cropped(x.shape, y_shape, strides, dilations)
        where = np.unravel_index(positions, y_shape[2:])
        n, channels = x.shape[:2]
        out = np.zeros((n, len(positions), channels, self.kernel), x.dtype)
        for k, offset in enumerate(itertools.product(*map(range, kernel))):
            seen = np.ones(len(positions), bool)
            index = []
            for axis, (p, o) in enumerate(zip(where, offset, strict=True)):
                place = p + before[axis] - (kernel[axis] - 1 - o) * dilations[axis]
                at, between = np.divmod(place, strides[axis])
                seen &= (between == 0) & (at >= 0) & (at < x.shape[2 + axis])
                index.append(at)
            chosen = tuple(at[seen] for at in index)
            out[..., k][:, seen] = x[(slice(None), slice(None), *chosen)].transpose(0, 2, 1)
        rows = out.reshape(n * len(positions), self.groups, -1).transpose(1, 0, 2)
        return np.concatenate([rows, np.ones((*rows.shape[:2], 1), x.dtype)], 2)

    def _cropped(self, x: tuple[int, ...], y: tuple[int, ...], strides: list[int], dilations: list[int]) -> list[int]:
        """How much of a transposed convolution's full output is cut off at the beginning of each axis."""
        rank = len(strides)
        mode = str(self.node.attribute("auto_pad", "NOTSET"))
        if mode in ("NOTSET", "VALID") and self.node.attribute("output_shape") is None:
            return list(self.node.attribute("pads", [0] * 2 * rank)[:rank])
        extra = self.node.attribute("output_padding", [0] * rank)
        window = [(k - 1) * d + 1 for k, d in zip(self.weight.shape[2:], dilations, strict=True)]
        total = [max(0, strides[i] * (x[2 + i] - 1) + extra[i] + window[i] - y[2 + i]) for i in range(rank)]
        return [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total]

    def targets(self, y: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return (groups, M, O) outputs at the positions."""
        if not self.is_conv:
            return y.reshape(len(y), -1, y.shape[-1])[:, positions].reshape(1, -1, y.shape[-1])
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


class ChannelLayer(Layer):
    """A layer whose input channels stand for it: ``s_c x_c = sum over j of M_cj x_j``, s_c the norm of c's weights.

    Its columns are the input's channels at sampled positions, its targets the same of the dense network, times s. What
    channels that stay tell of one that goes is handed to their weights, ``W_j += M_cj / s_c W_c``, the same at every
    position of the window; the constant goes into the bias. (At padded borders the constant is then a little wrong.)
    """

    def __init__(self, node: Node, weight: np.ndarray, bias: np.ndarray | None, repeats: int = 1) -> None:
        """Prepare.

        Args:
            node, weight, bias: of the layer; a convolution of one group, or a matrix product.
            repeats: neighbouring inputs of a matrix product that are one channel's, as after a Flatten.
        """
        super().__init__(node, weight, bias)
        self.repeats, self.kernel = repeats, 1
        blocks = self._blocks(weight)
        squares = np.einsum("ock,ock->c", blocks, blocks, dtype=np.float64)
        self.norms = np.maximum(np.sqrt(squares), 1e-12)

    def _blocks(self, weight: np.ndarray) -> np.ndarray:
        """A view of the weights, or of an array in their layout, as (outputs, channels, weights of one channel)."""
        if self.upwards:
            return weight.reshape(self.channels, weight.shape[1], -1).swapaxes(0, 1)
        if self.is_conv or self.transposed:
            return weight.reshape(weight.shape[0], self.channels, -1)
        return weight.reshape(self.channels, -1, weight.shape[1]).transpose(2, 0, 1)

    @property
    def channels(self) -> int:
        return super().channels // getattr(self, "repeats", 1)

    @property
    def outputs(self) -> int:
        return self.channels

    def positions(self, x_shape: tuple[int, ...]) -> int:
        """How many positions of each channel an input of this shape has."""
        return int(np.prod(x_shape[2:])) if self.is_conv else self.repeats

    def matrix(self) -> np.ndarray:
        return np.concatenate([np.diag(self.norms), np.zeros((self.channels, 1))], 1)[None]

    def tensors(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mix = matrix[0] / self.norms[:, None]
        new = np.empty_like(self.weight)
        old, room = self._blocks(self.weight), self._blocks(new)
        bias = np.zeros(len(old)) if self.bias is None else np.asarray(self.bias, np.float64).reshape(-1)
        bias = bias + old.sum(2, dtype=np.float64) @ mix[:, -1]
        for i in range(0, len(old), OUTPUTS):  # in float64 all at once would take more room than the model
            part = np.asarray(old[i : i + OUTPUTS], np.float64)
            room[i : i + OUTPUTS] = np.einsum("ock,cj->ojk", part, mix[:, :-1], optimize=True)
        return new, bias.astype(self.weight.dtype)

    def columns(self, x: np.ndarray, x_shape: tuple[int, ...], positions: np.ndarray) -> np.ndarray:
        rows = x.reshape(-1, self.channels, self.positions(x.shape))
        rows = rows[:, :, positions].transpose(0, 2, 1).reshape(1, -1, self.channels)
        return np.concatenate([rows, np.ones_like(rows[:, :, :1])], 2)

    def targets(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.columns(x, x.shape, positions)[:, :, :-1] * self.norms.astype(x.dtype)


def unit_columns(labels: np.ndarray, kernel: int, units: np.ndarray) -> np.ndarray:
    """Columns (of one group's matrix) that each unit feeds, (units, k); -1 fills up rows of units that feed fewer.

    Args:
        labels: the unit of each input channel of one group.
        kernel: columns of each input channel.
        units: ids.
    """
    rows = []
    for unit in units:
        positions = np.flatnonzero(labels == unit)
        rows.append((positions[:, None] * kernel + np.arange(kernel)).reshape(-1))
    columns = np.full((len(units), max(map(len, rows), default=0)), -1)
    for row, found in zip(columns, rows, strict=True):
        row[: len(found)] = found
    return columns
