"""What the networks share: widths, initial weights, and the check of the image size."""

from __future__ import annotations

from typing import Literal

from torch import nn

from prune_onnx.graph_ops.errors import ConfigError

ImageShape = tuple[int, int, int]
"""(channels, height, width)."""


def scaled(channels: int, width: float) -> int:
    """Return ``channels`` times the width multiplier, rounded, at least 1."""
    return max(1, round(channels * width))


def require_side(in_shape: ImageShape, least: int, name: str) -> None:
    """Refuse images that would be pooled away.

    Raises:
        ConfigError: height or width is less than ``least``.
    """
    _, height, width = in_shape
    if min(height, width) < least:
        raise ConfigError(f"model {name!r} takes images of at least {least}x{least} pixels, not {height}x{width}. "
                          "Try 'bn-cnn', which takes small images.")


def initialise(
    model: nn.Module, *, mode: Literal["fan_in", "fan_out"] = "fan_in", linear_std: float | None = None
) -> None:
    """Draw normal weights of He et al. (2015), variance 2 / fan; biases are 0, BatchNorm starts as identity.

    Args:
        model: changed in place.
        mode: ``fan_out`` is ``N(0, sqrt(2 / (k * k * Cout)))`` in a convolution.
        linear_std: standard deviation in linear layers; ``None`` draws them like convolutions.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if isinstance(module, nn.Linear) and linear_std is not None:
                nn.init.normal_(module.weight, 0, linear_std)
            else:
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
