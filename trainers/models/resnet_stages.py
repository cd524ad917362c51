"""ResNets of four stages with basic blocks (He et al. 2016, table 1), for Tiny-ImageNet's 64x64 and other images.

Two stems. ``small`` is one 3x3 convolution that leaves the map its size, as is usual for images of 32 and 64 pixels;
``large`` is the 7x7 convolution of stride 2 and the pooling of the paper, for photographs. Shortcuts are of option B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from .common import ImageShape, initialise, require_side, scaled
from .resnet import basic_stages

WIDTHS = (64, 128, 256, 512)
NARROW = (16, 32, 64, 128)

Stem = Literal["small", "large"]


class FourStages(nn.Module):
    """Stem, four stages of basic blocks, global average, linear.

    Args:
        name: what messages call the network.
        blocks: number of blocks in each stage.
        widths: channels of each stage.
        num_classes: size of the output.
        in_shape: (C, H, W) of the images.
        width: factor on the numbers of channels.
        stem: kind of the first layers.
    """

    def __init__(
        self,
        name: str,
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_shape: ImageShape,
        width: float,
        stem: Stem = "small",
    ) -> None:
        super().__init__()
        require_side(in_shape, 8, name)
        channels = scaled(widths[0], width)
        size, stride = (3, 1) if stem == "small" else (7, 2)
        first: list[nn.Module] = [
            nn.Conv2d(in_shape[0], channels, size, stride=stride, padding=size // 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
        if stem == "large":
            first.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.stem = nn.Sequential(*first)
        self.stages, channels = basic_stages(channels, widths, blocks, width, "B")
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.stages(self.stem(x))).flatten(1))


def resnet18(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> FourStages:
    """ResNet-18 with a 3x3 stem, for images of 32 and 64 pixels. 11 173 962 parameters, 4800 BN channels."""
    return FourStages("resnet18", (2, 2, 2, 2), WIDTHS, num_classes, in_shape, width)


def resnet34(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> FourStages:
    """ResNet-34 with a 3x3 stem, for images of 32 and 64 pixels. 21 282 122 parameters, 8512 BN channels."""
    return FourStages("resnet34", (3, 4, 6, 3), WIDTHS, num_classes, in_shape, width)


def resnet18_large(num_classes: int = 10, in_shape: ImageShape = (3, 64, 64), width: float = 1.0) -> FourStages:
    """ResNet-18 (He et al. 2016) with its 7x7 stem and pooling. 11 181 642 parameters, 4800 BN channels."""
    return FourStages("resnet18-7x7", (2, 2, 2, 2), WIDTHS, num_classes, in_shape, width, "large")


def resnet34_large(num_classes: int = 10, in_shape: ImageShape = (3, 64, 64), width: float = 1.0) -> FourStages:
    """ResNet-34 (He et al. 2016) with its 7x7 stem and pooling. 21 289 802 parameters, 8512 BN channels."""
    return FourStages("resnet34-7x7", (3, 4, 6, 3), WIDTHS, num_classes, in_shape, width, "large")


def resnet18_narrow(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> FourStages:
    """ResNet-18 of NNrelief (Dekhovich et al.), 16-32-64-128 channels. 701 466 parameters, 1200 BN channels."""
    return FourStages("resnet18-narrow", (2, 2, 2, 2), NARROW, num_classes, in_shape, width)
