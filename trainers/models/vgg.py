"""VGG networks in their CIFAR form: 3x3 convolutions with BatchNorm, max pooling, a small classifier.

Two families. In network slimming's (vgg11, vgg14, vgg16, vgg19) a global average follows the last convolution and one
linear layer the average; on 32x32 images that is the papers' 2x2 average pooling, and other sizes work as well. In
NNrelief's (vgg13, vgg-like) convolutions have biases, a fifth max pooling comes last, and there are hidden linear
layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .common import ImageShape, initialise, require_side, scaled

POOL = 0
"""Marks a max pooling in a plan; other entries are numbers of channels."""

PLAN_11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512)
PLAN_13 = (64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512)
PLAN_16 = (64, 64, POOL, 128, 128, POOL, *[256] * 3, POOL, *[512] * 3, POOL, *[512] * 3)
PLAN_19 = (64, 64, POOL, 128, 128, POOL, *[256] * 4, POOL, *[512] * 4, POOL, *[512] * 4)


class VGG(nn.Module):
    """Convolutions by a plan, then a classifier on the flattened map.

    Args:
        layers: what :func:`convolutions` made, and what makes the map small.
        classifier: takes the flattened map.
    """

    def __init__(self, layers: list[nn.Module], classifier: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def convolutions(plan: Sequence[int], channels: int, width: float, *, bias: bool, stride: int = 1) -> list[nn.Module]:
    """Return conv-BatchNorm-ReLU for every number of channels in ``plan``, and its poolings.

    Args:
        plan: numbers of channels, and ``POOL``.
        channels: of the image.
        width: factor on the numbers of channels.
        bias: whether convolutions have one, which BatchNorm makes redundant.
        stride: of the first convolution.
    """
    layers: list[nn.Module] = []
    for entry in plan:
        if entry == POOL:
            layers.append(nn.MaxPool2d(2))
            continue
        out = scaled(entry, width)
        conv = nn.Conv2d(channels, out, 3, stride=1 if layers else stride, padding=1, bias=bias)
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return layers


def _slimming(
    plan: Sequence[int], num_classes: int, in_shape: ImageShape, width: float, name: str, *, bias: bool = False
) -> VGG:
    require_side(in_shape, 16, name)
    layers = convolutions(plan, in_shape[0], width, bias=bias)
    model = VGG([*layers, nn.AdaptiveAvgPool2d(1)], nn.Linear(scaled(512, width), num_classes))
    initialise(model, mode="fan_out", linear_std=0.01)
    return model


def _nnrelief(
    plan: Sequence[int], num_classes: int, in_shape: ImageShape, width: float, name: str, *, hidden: int
) -> VGG:
    require_side(in_shape, 32, name)
    channels, *sides = in_shape
    stride = 2 if min(sides) >= 64 else 1  # the paper's, for Tiny-ImageNet
    height, breadth = ((side + stride - 1) // stride // 32 for side in sides)
    size = scaled(512, width)
    layers = convolutions((*plan, POOL), channels, width, bias=True, stride=stride)
    head: list[nn.Module] = []
    for inputs in [size * height * breadth, *[size] * (hidden - 1)]:
        head += [nn.Dropout(), nn.Linear(inputs, size), nn.ReLU()]
    model = VGG(layers, nn.Sequential(*head, nn.Linear(size, num_classes)))
    initialise(model)
    return model


def vgg11(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> VGG:
    """VGG-A (Simonyan and Zisserman 2015) with the head of network slimming. 9 228 362 parameters, 2752 BN channels."""
    return _slimming(PLAN_11, num_classes, in_shape, width, "vgg11")


def vgg13(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> VGG:
    """VGG-13 of NNrelief (Dekhovich et al.), two hidden linear layers. 9 941 322 parameters, 2944 BN channels."""
    return _nnrelief(PLAN_13, num_classes, in_shape, width, "vgg13", hidden=2)


def vgg14(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> VGG:
    """VGG-14 of Mitsuno and Kurita: 13 convolutions with bias, 1 linear. 14 728 266 parameters, 4224 BN channels."""
    return _slimming(PLAN_16, num_classes, in_shape, width, "vgg14", bias=True)


def vgg16(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> VGG:
    """VGG-16 as pruning papers have it for CIFAR: vgg14 without biases. 14 724 042 parameters, 4224 BN channels."""
    return _slimming(PLAN_16, num_classes, in_shape, width, "vgg16")


def vgg19(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> VGG:
    """VGG-19 of network slimming (Liu et al. 2017) and its proximal form. 20 035 018 parameters, 5504 BN channels."""
    return _slimming(PLAN_19, num_classes, in_shape, width, "vgg19")


def vgg_like(num_classes: int = 10, in_shape: ImageShape = (3, 32, 32), width: float = 1.0) -> VGG:
    """VGG-like of NNrelief (Dekhovich et al.), one hidden linear layer. 14 990 922 parameters, 4224 BN channels."""
    return _nnrelief(PLAN_16, num_classes, in_shape, width, "vgg-like", hidden=1)
