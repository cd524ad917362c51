"""CIFAR ResNets with basic blocks (He et al. 2016, section 4.2): depth 6n + 2, stages of 16, 32 and 64 channels.

Where a stage begins, the shortcut has to halve the map and double the channels. Option A takes every second pixel and
pads zero channels on both sides; option B has a 1x1 convolution with BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from .common import ImageShape, initialise, require_side, scaled

Option = Literal["A", "B"]


def _conv(channels: int, out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, bias=False)


class PadShortcut(nn.Module):
    """Option A: (N, C, H, W) to (N, C + left + right, ceil(H/2), ceil(W/2)), without parameters."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.left = (out - channels) // 2
        self.right = out - channels - self.left

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.left, self.right))


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, then ReLU."""

    def __init__(self, channels: int, out: int, stride: int, option: Option) -> None:
        super().__init__()
        self.conv1 = _conv(channels, out, 3, stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = _conv(out, out, 3)
        self.bn2 = nn.BatchNorm2d(out)
        if stride == 1:
            self.shortcut = nn.Identity()
        elif option == "A":
            self.shortcut = PadShortcut(channels, out)
        else:
            self.shortcut = nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def basic_stages(
    channels: int, widths: Sequence[int], blocks: Sequence[int], width: float, option: Option
) -> tuple[nn.Sequential, int]:
    """Return stages of basic blocks, each but the first at half the resolution, and the channels of the last one.

    Args:
        channels: that the first stage gets.
        widths: of the stages, before the multiplier ``width``.
        blocks: of each stage.
        option: the shortcut where sizes differ.
    """
    stages = []
    for stage, (count, base) in enumerate(zip(blocks, widths, strict=True)):
        out = scaled(base, width)
        strides = [2 if stage else 1, *[1] * (count - 1)]
        stages.append(nn.Sequential(*[
            BasicBlock(out if index else channels, out, stride, option) for index, stride in enumerate(strides)
        ]))  # fmt: skip
        channels = out
    return nn.Sequential(*stages), channels


class ResNet(nn.Module):
    """Stem, three stages of ``blocks`` blocks, global average, linear.

    Args:
        blocks: n of depth 6n + 2.
        num_classes: size of the output.
        in_shape: (C, H, W) of the images.
        width: factor on the numbers of channels.
        option: kind of the shortcuts where a stage begins.
    """

    def __init__(self, blocks: int, num_classes: int, in_shape: ImageShape, width: float, option: Option = "A") -> None:
        super().__init__()
        require_side(in_shape, 8, f"resnet{6 * blocks + 2}")
        channels = scaled(16, width)
        self.conv1 = _conv(in_shape[0], channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages, channels = basic_stages(channels, (16, 32, 64), (blocks,) * 3, width, option)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


def resnet20(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> ResNet:
    """ResNet-20 (He et al. 2016), option A. 269 722 parameters, 688 BN channels."""
    return ResNet(3, num_classes, in_shape, width)


def resnet32(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> ResNet:
    """ResNet-32 (He et al. 2016), option A. 464 154 parameters, 1136 BN channels."""
    return ResNet(5, num_classes, in_shape, width)


def resnet56(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> ResNet:
    """ResNet-56 (He et al. 2016), option A. 853 018 parameters, 2032 BN channels."""
    return ResNet(9, num_classes, in_shape, width)


def resnet110(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> ResNet:
    """ResNet-110 (He et al. 2016), option A. 1 727 962 parameters, 4048 BN channels."""
    return ResNet(18, num_classes, in_shape, width)


def resnet20_b(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> ResNet:
    """ResNet-20 (He et al. 2016), option B. 272 474 parameters, 784 BN channels."""
    return ResNet(3, num_classes, in_shape, width, "B")


def resnet32_b(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> ResNet:
    """ResNet-32 (He et al. 2016), option B. 466 906 parameters, 1232 BN channels."""
    return ResNet(5, num_classes, in_shape, width, "B")


def resnet56_b(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> ResNet:
    """ResNet-56 (He et al. 2016), option B. 855 770 parameters, 2128 BN channels."""
    return ResNet(9, num_classes, in_shape, width, "B")


def resnet110_b(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> ResNet:
    """ResNet-110 (He et al. 2016), option B. 1 730 714 parameters, 4144 BN channels."""
    return ResNet(18, num_classes, in_shape, width, "B")
