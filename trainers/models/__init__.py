"""Networks to train: one family a file, listed once, here.

:data:`MODELS` names where each factory lives, so that listing the names does not import torch. A factory is called as
``factory(num_classes, in_shape=(C, H, W), width=1.0)`` and returns a module that takes (N, C, H, W) and gives logits
(N, num_classes). Nothing in a forward pass depends on the data, so every network can be exported.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.registry import Registry

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "build_model"]

MODELS: Registry[str] = Registry("model")
MODELS.register("bn-cnn")("bn_cnn:bn_cnn")
MODELS.register("lenet300")("lenet:lenet300")
MODELS.register("lenet5")("lenet:lenet5")
MODELS.register("lenet5-bn")("lenet:lenet5_bn")
MODELS.register("frank-wolfe-cnn")("lenet:frank_wolfe_cnn")
MODELS.register("vgg11")("vgg:vgg11")
MODELS.register("vgg13")("vgg:vgg13")
MODELS.register("vgg14")("vgg:vgg14")
MODELS.register("vgg16")("vgg:vgg16")
MODELS.register("vgg19")("vgg:vgg19")
MODELS.register("vgg-like")("vgg:vgg_like")
MODELS.register("resnet20")("resnet:resnet20")
MODELS.register("resnet32")("resnet:resnet32")
MODELS.register("resnet56")("resnet:resnet56")
MODELS.register("resnet110")("resnet:resnet110")
MODELS.register("resnet20-b")("resnet:resnet20_b")
MODELS.register("resnet32-b")("resnet:resnet32_b")
MODELS.register("resnet56-b")("resnet:resnet56_b")
MODELS.register("resnet110-b")("resnet:resnet110_b")
MODELS.register("resnet18")("resnet_stages:resnet18")
MODELS.register("resnet34")("resnet_stages:resnet34")
MODELS.register("resnet18-7x7")("resnet_stages:resnet18_large")
MODELS.register("resnet34-7x7")("resnet_stages:resnet34_large")
MODELS.register("resnet18-narrow")("resnet_stages:resnet18_narrow")
MODELS.register("preresnet110")("preresnet:preresnet110")
MODELS.register("preresnet164")("preresnet:preresnet164")
MODELS.register("densenet40")("densenet:densenet40")


def build_model(name: str, num_classes: int, in_shape: tuple[int, int, int], width: float = 1.0) -> nn.Module:
    """Make a network with fresh weights, drawn from torch's global generator.

    Args:
        name: a listed name, or ``"package.module:factory"`` for a factory of the user's own.
        num_classes: size of the output.
        in_shape: (channels, height, width) of an image.
        width: factor on the number of channels of every hidden layer.

    Raises:
        ConfigError: an unknown name, a factory that fails or returns no module, a size that the network does not take.
    """
    if num_classes < 1 or len(in_shape) != 3 or min(in_shape) < 1:
        raise ConfigError(f"a network needs at least one class and images of (channels, height, width); "
                          f"got {num_classes} classes and images of {in_shape}.")
    if not (math.isfinite(width) and width > 0):
        raise ConfigError(f"width must be a positive number, not {width}.")
    if ":" in name:
        from .custom import build_custom

        return build_custom(name, num_classes, in_shape, width)
    module, _, factory = MODELS.get(name).partition(":")
    return getattr(import_module(f".{module}", __package__), factory)(num_classes, in_shape=in_shape, width=width)
