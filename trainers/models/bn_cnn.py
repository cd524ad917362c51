"""A small network with BatchNorm that trains in seconds to minutes on a CPU."""

from __future__ import annotations

from torch import nn

from .common import ImageShape, initialise, require_side, scaled
from .vgg import POOL, VGG, convolutions

PLAN = (32, POOL, 64, POOL, 64, 64)


def bn_cnn(num_classes: int = 10, in_shape: ImageShape = (1, 28, 28), width: float = 1.0) -> VGG:
    """Four 3x3 convolutions with BatchNorm, two poolings, a global average, one linear layer. 93 546 parameters.

    Made for this project: it takes any image from 8x8 up, and small data sets do not need nearly all of its 224
    channels, so that sparse training has something to remove.
    """
    require_side(in_shape, 8, "bn-cnn")
    layers = convolutions(PLAN, in_shape[0], width, bias=False)
    model = VGG([*layers, nn.AdaptiveAvgPool2d(1)], nn.Linear(scaled(PLAN[-1], width), num_classes))
    initialise(model, mode="fan_out", linear_std=0.01)
    return model
