"""Windows over space: where a Conv's or a pooling's window lies, and the padding that puts it there.

Padding is written as ONNX has it, ``(begin of every axis, end of every axis)``, and becomes zeros around the map unless
torch's own padding, the same on both sides, does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ModelError

from .base import Tensor


@dataclass(frozen=True)
class Window:
    """The window of a Conv or a pooling.

    Attributes:
        kernel: its size along each spatial axis.
        strides: its step.
        dilations: distance of its entries.
        pads: (begin, ..., end, ...); what ``auto`` works out is not in it.
        auto: ``NOTSET``, ``VALID``, ``SAME_UPPER`` or ``SAME_LOWER``.
        ceil: whether a last window that sticks out counts.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto: str = "NOTSET"
    ceil: bool = False

    @classmethod
    def of(cls, node: object, kernel: Sequence[int]) -> Window:
        """Read the attributes of a node or an operation."""
        attribute, rank = node.attribute, len(kernel)  # type: ignore[attr-defined]
        auto = attribute("auto_pad", "NOTSET") or "NOTSET"
        pads = attribute("pads") if auto == "NOTSET" else None
        return cls(
            tuple(kernel),
            tuple(attribute("strides") or (1,) * rank),
            tuple(attribute("dilations") or (1,) * rank),
            tuple(pads or (0,) * (2 * rank)),
            auto,
            bool(attribute("ceil_mode", 0)),
        )

    @property
    def symmetric(self) -> bool:
        """Whether torch's own padding does: known in advance, and the same on both sides."""
        rank = len(self.kernel)
        return not self.auto.startswith("SAME") and self.pads[:rank] == self.pads[rank:] and min(self.pads) >= 0

    @property
    def extents(self) -> list[int]:
        """Size of the dilated window along each axis."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    def padding(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return (begin, ..., end, ...) for a map of these spatial sizes."""
        if not self.auto.startswith("SAME"):
            return self.pads
        begins, ends = [], []
        for size, extent, stride in zip(sizes, self.extents, self.strides, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
            small, large = total // 2, total - total // 2
            begins.append(small if self.auto == "SAME_UPPER" else large)
            ends.append(large if self.auto == "SAME_UPPER" else small)
        return (*begins, *ends)

    def overhang(self, sizes: Sequence[int], pads: Sequence[int]) -> list[int]:
        """Return by how much the last window sticks out behind the padding, along each axis, with ``ceil``."""
        rank = len(self.kernel)
        if not self.ceil:
            return [0] * rank
        found = []
        for axis, (size, extent, stride) in enumerate(zip(sizes, self.extents, self.strides, strict=True)):
            room = size + pads[axis] + pads[axis + rank]
            steps = math.ceil((room - extent) / stride)
            if steps * stride >= size + pads[axis]:  # a window must begin inside the map or the padding before it
                steps -= 1
            found.append(max(0, steps * stride + extent - room))
        return found


def pad(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Surround the spatial axes by ``value``; negative amounts crop."""
    if not any(pads):
        return x
    rank = len(pads) // 2
    return F.pad(x, [pads[axis + side] for axis in reversed(range(rank)) for side in (0, rank)], value=value)


def by_rank(functions: Sequence[object], rank: int, op: object) -> object:
    """Return the function for 1, 2 or 3 spatial axes.

    Raises:
        ModelError: torch has none for so many.
    """
    if not 1 <= rank <= len(functions):
        raise ModelError(f"{op} has {rank} spatial axes; torch takes 1 to {len(functions)}.")
    return functions[rank - 1]


def sums(x: Tensor, window: Window) -> Tensor:
    """Return the sums over all windows of a map that is padded already."""
    rank = len(window.kernel)
    ones = torch.ones((1, 1, *window.kernel), dtype=x.dtype, device=x.device)
    convolve = by_rank((F.conv1d, F.conv2d, F.conv3d), rank, "a pooling")
    y = convolve(x.flatten(0, 1).unsqueeze(1), ones, stride=window.strides, dilation=window.dilations)
    return y.view(*x.shape[:2], *y.shape[2:])
