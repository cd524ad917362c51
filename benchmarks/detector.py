"""A small one-stage detector in the style of current YOLO models.

CSP blocks, spatial pyramid pooling, a feature pyramid with two scales, and heads whose boxes are expectations over a
softmax.
"""

from __future__ import annotations

import torch
from torch import nn


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
        )


class Bottleneck(nn.Module):
    """Two convolutions, with or without a shortcut."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = (
            ConvBlock(channels, channels, 3),
            ConvBlock(channels, channels, 3),
            shortcut,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x))
        return x + y if self.shortcut else y


class SplitBlock(nn.Module):
    """Half of the channels goes through bottlenecks; every intermediate map is concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.first = ConvBlock(inputs, outputs)
        self.blocks = nn.ModuleList(Bottleneck(outputs // 2, shortcut) for _ in range(depth))
        self.last = ConvBlock((2 + depth) * (outputs // 2), outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class PyramidPooling(nn.Module):
    """Max pooling of growing reach, concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.pool = ConvBlock(channels, channels // 2), nn.MaxPool2d(5, 1, 2)
        self.last = ConvBlock(2 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [self.first(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.last(torch.cat(maps, 1))


class Detector(nn.Module):
    """Backbone, pyramid and heads; the output is (batch, 4 + classes, anchors)."""

    def __init__(self, classes: int = 20, bins: int = 8) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.stem = nn.Sequential(ConvBlock(3, 16, 3, 2), ConvBlock(16, 32, 3, 2), SplitBlock(32, 32))
        self.middle = nn.Sequential(ConvBlock(32, 64, 3, 2), SplitBlock(64, 64, 2))
        self.deep = nn.Sequential(ConvBlock(64, 128, 3, 2), SplitBlock(128, 128, 2), PyramidPooling(128))
        self.up = nn.Upsample(scale_factor=2)
        self.merge_up = SplitBlock(192, 64, 1, False)
        self.down = ConvBlock(64, 64, 3, 2)
        self.merge_down = SplitBlock(192, 128, 1, False)
        self.boxes = nn.ModuleList(self._head(c, 4 * bins) for c in (64, 128))
        self.scores = nn.ModuleList(self._head(c, classes) for c in (64, 128))
        self.register_buffer("values", torch.arange(bins).float())

    @staticmethod
    def _head(channels: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(ConvBlock(channels, 32, 3), nn.Conv2d(32, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = self.middle(self.stem(x))
        deep = self.deep(middle)
        fine = self.merge_up(torch.cat([self.up(deep), middle], 1))
        coarse = self.merge_down(torch.cat([self.down(fine), deep], 1))
        found = [
            torch.cat([boxes(maps), scores(maps)], 1).flatten(2)
            for maps, boxes, scores in zip((fine, coarse), self.boxes, self.scores, strict=True)
        ]
        boxes, scores = torch.cat(found, 2).split((4 * self.bins, self.classes), 1)
        batch, _, anchors = boxes.shape
        bins = boxes.view(batch, 4, self.bins, anchors).softmax(2)
        low, high = (bins * self.values.view(1, 1, -1, 1)).sum(2).chunk(2, 1)
        return torch.cat([high - low, (low + high) / 2, scores.sigmoid()], 1)
