"""DenseNet for CIFAR (Huang et al. 2017), basic layers without bottleneck or compression: depth 3n + 4.

Every layer is BatchNorm, ReLU, 3x3 convolution, and appends its ``growth`` channels to what it read. So each BatchNorm
has scales of its own for channels that many layers read: those that die are cut per reader (``slim --select-inputs``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import ImageShape, initialise, require_side, scaled

GROWTH = 12


class DenseLayer(nn.Module):
    """BN-ReLU-conv 3x3; (N, C, H, W) to (N, C + growth, H, W)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class DenseNet(nn.Module):
    """Stem of ``2 * growth`` channels, three blocks of ``layers`` layers with transitions between them, BN, average.

    A transition is BN-ReLU-conv 1x1 of as many channels, and a 2x2 average.

    Args:
        layers: n of depth 3n + 4.
        num_classes: size of the output.
        in_shape: (C, H, W) of the images.
        width: factor on the growth, and with it on every number of channels.
    """

    def __init__(self, layers: int, num_classes: int, in_shape: ImageShape, width: float) -> None:
        super().__init__()
        require_side(in_shape, 8, f"densenet{3 * layers + 4}")
        growth = scaled(GROWTH, width)
        channels = 2 * growth
        self.conv1 = nn.Conv2d(in_shape[0], channels, 3, padding=1, bias=False)
        parts: list[nn.Module] = []
        for block in range(3):
            if block:
                parts += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False)]
                parts.append(nn.AvgPool2d(2))
            for _ in range(layers):
                parts.append(DenseLayer(channels, growth))
                channels += growth
        self.blocks = nn.Sequential(*parts)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, mode="fan_out", linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


def densenet40(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> DenseNet:
    """DenseNet-40, growth 12, as network slimming has it. 1 059 298 parameters, 9360 BN channels."""
    return DenseNet(12, num_classes, in_shape, width)
