"""A MobileNetV2 for 32x32 images (Sandler et al. 2018): inverted residual blocks of depthwise convolutions.

In the folder of this file: ``prune-onnx train --model mobilenet:mobilenet_v2 --dataset cifar10``.
"""

from __future__ import annotations

from torch import Tensor, nn

PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 3, 2), (6, 96, 2, 1), (6, 160, 2, 1))
"""Expansion, channels, blocks and stride of the first block of each stage: fewer blocks than for 224x224 pixels."""
STEM, LAST = 32, 640


def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, active: bool = True) -> list:
    """Return convolution, BatchNorm and, if ``active``, ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if active else [])]


class Inverted(nn.Module):
    """Widen by a 1x1 convolution, convolve each channel alone, and narrow again; with a shortcut where sizes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = layer(inputs, hidden, 1) if expansion > 1 else []
        self.body = nn.Sequential(
            *widen, *layer(hidden, hidden, 3, stride, hidden), *layer(hidden, outputs, 1, active=False)
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


def mobilenet_v2(num_classes: int, in_shape: tuple[int, int, int], width: float = 1.0) -> nn.Module:
    """Build the network for images of ``in_shape`` (C, H, W)."""
    channels = round(STEM * width)
    layers = layer(in_shape[0], channels, 3)
    for expansion, outputs, blocks, stride in PLAN:
        for block in range(blocks):
            layers.append(Inverted(channels, round(outputs * width), stride if block == 0 else 1, expansion))
            channels = round(outputs * width)
    last = round(LAST * width)
    layers += [*layer(channels, last, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes)]
    return nn.Sequential(*layers)
