"""BatchNorm scales (gamma): finding them, starting them, and how strong a term must be to take them to zero."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_onnx.graph_ops.errors import ConfigError

INIT_GAMMA = 0.5
"""Initial scale in both network-slimming papers."""


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the network's BatchNorm layers that have scales, each once, in the order of their definition."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]


def require_batch_norms(model: nn.Module, method: str) -> None:
    """Refuse a network without scales.

    Raises:
        ConfigError: :func:`batch_norms` finds none.
    """
    if not batch_norms(model):
        raise ConfigError(
            f"method {method!r} works on the scales of BatchNorm layers, and this network has none. "
            "Take a network with BatchNorm (bn-cnn, vgg16, resnet20, ...), or --method plain."
        )


@torch.no_grad()
def start_scales(norms: list[nn.Module], value: float) -> None:
    """Set every scale to ``value``."""
    for norm in norms:
        norm.weight.fill_(value)


def sufficient_lambda(published: float, start: float, reach: float, strongest: float) -> float:
    """Return the published lambda, raised if with it a scale that no gradient holds would not get to zero.

    The published values belong to runs of 125,000 steps; on a small data set they would leave every channel as it is.
    Where even ``strongest`` would, the schedule is simply too short.

    Args:
        published: the paper's lambda for this network.
        start: initial scale.
        reach: how far such a scale drifts, per unit of lambda, in the time that it has.
        strongest: what lambda is not raised above.
    """
    return max(published, min(float(f"{start / reach:.3g}"), strongest))
