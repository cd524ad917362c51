"""Small networks for MNIST. Logits come out: the softmax is part of the loss."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from .common import ImageShape, initialise, require_side, scaled


def lenet300(num_classes: int = 10, in_shape: ImageShape = (1, 28, 28), width: float = 1.0) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998): 784-300-100-10, ReLU; He initialisation as in NNrelief. 266 610 parameters."""
    first, second = scaled(300, width), scaled(100, width)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(in_shape), first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, num_classes),
    )
    initialise(model)
    return model


def lenet5(num_classes: int = 10, in_shape: ImageShape = (1, 28, 28), width: float = 1.0) -> nn.Module:
    """LeNet-5 in Caffe's form: conv 20 and 50 of 5x5 without padding, ReLU, pool 2; 500 ReLU. 431 080 parameters.

    Initialised as in NNrelief. Takes images from 16x16.
    """
    require_side(in_shape, 16, "lenet5")
    channels, *sides = in_shape
    first, second, hidden = (scaled(size, width) for size in (20, 50, 500))
    model = nn.Sequential(
        nn.Conv2d(channels, first, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * math.prod(((side - 4) // 2 - 4) // 2 for side in sides), hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )
    initialise(model)
    return model


def lenet5_bn(num_classes: int = 10, in_shape: ImageShape = (1, 28, 28), width: float = 1.0) -> nn.Module:
    """LeNet-5 in Caffe's form with BatchNorm in its three hidden layers, for sparse training. 431 650 parameters.

    The convolutions are unpadded, so the constant of a dead channel can always be absorbed into the next bias. Takes
    images from 16x16.
    """
    require_side(in_shape, 16, "lenet5-bn")
    channels, *sides = in_shape
    first, second, hidden = (scaled(size, width) for size in (20, 50, 500))
    features = second * math.prod(((side - 4) // 2 - 4) // 2 for side in sides)
    layers = {
        "conv1": nn.Conv2d(channels, first, 5, bias=False),
        "norm1": nn.BatchNorm2d(first),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(first, second, 5, bias=False),
        "norm2": nn.BatchNorm2d(second),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(features, hidden, bias=False),
        "norm3": nn.BatchNorm1d(hidden),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(hidden, num_classes),
    }
    model = nn.Sequential(OrderedDict(layers))
    initialise(model)
    return model


def frank_wolfe_cnn(num_classes: int = 10, in_shape: ImageShape = (1, 28, 28), width: float = 1.0) -> nn.Module:
    """The MNIST network of the Frank-Wolfe pruning paper: conv 32 and 64 of 3x3, pool 2, dropout. 34 826 parameters.

    The paper gives no padding; none, as here, makes it Keras's own MNIST example, whose (Glorot) initialisation it
    then has. Takes images from 10x10.
    """
    require_side(in_shape, 10, "frank-wolfe-cnn")
    channels, *sides = in_shape
    first, second = scaled(32, width), scaled(64, width)
    model = nn.Sequential(
        nn.Conv2d(channels, first, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(second * math.prod(((side - 2) // 2 - 2) // 2 for side in sides), num_classes),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model
