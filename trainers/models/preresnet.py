"""Pre-activation ResNets with bottlenecks for CIFAR (He et al. 2016, "Identity mappings"): depth 9n + 2.

The residual stream is a sum that no activation follows, and every block reads it through a BatchNorm of its own: scales
that die there are cut per reader, and the stream stays whole (``slim --select-inputs``). As in the code of network
slimming: shortcuts where a stage begins are 1x1 convolutions, without BatchNorm, on the raw stream.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .common import ImageShape, initialise, require_side, scaled

EXPANSION = 4
"""A block's output has this many times the channels of its 3x3 convolution."""


class Bottleneck(nn.Module):
    """BN-ReLU-conv 1x1, BN-ReLU-conv 3x3, BN-ReLU-conv 1x1, plus the shortcut."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * inner
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return self.conv3(F.relu(self.bn3(y))) + self.shortcut(x)


class PreResNet(nn.Module):
    """Stem without BatchNorm, three stages of ``blocks`` blocks, BN-ReLU, global average, linear.

    Args:
        blocks: n of depth 9n + 2.
        num_classes: size of the output.
        in_shape: (C, H, W) of the images.
        width: factor on the numbers of channels.
    """

    def __init__(self, blocks: int, num_classes: int, in_shape: ImageShape, width: float) -> None:
        super().__init__()
        require_side(in_shape, 8, f"preresnet{9 * blocks + 2}")
        channels = scaled(16, width)
        self.conv1 = nn.Conv2d(in_shape[0], channels, 3, padding=1, bias=False)
        stages = []
        for stage, base in enumerate((16, 32, 64)):
            inner = scaled(base, width)
            stack = []
            for index in range(blocks):
                stack.append(Bottleneck(channels, inner, 2 if stage and not index else 1))
                channels = EXPANSION * inner
            stages.append(nn.Sequential(*stack))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, mode="fan_out", linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stages(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


def preresnet110(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> PreResNet:
    """Pre-activation ResNet-110 of proximal network slimming. 1 146 842 parameters, 8080 BN channels."""
    return PreResNet(12, num_classes, in_shape, width)


def preresnet164(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> PreResNet:
    """Pre-activation ResNet-164 of network slimming. 1 703 258 parameters, 12112 BN channels."""
    return PreResNet(18, num_classes, in_shape, width)
