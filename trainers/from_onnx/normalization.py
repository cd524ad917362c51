"""Normalisations other than BatchNormalization."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .base import Operation, Outputs, Tensor, operator


@operator("BatchNormalization")
def batch_normalization(op: Operation, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Outputs:
    """Normalise by the given statistics; one that is part of the network is a module, see :mod:`.layers`."""
    fresh = bool(op.attribute("training_mode", 0))
    y = F.batch_norm(
        x, None if fresh else mean, None if fresh else var, scale, bias, fresh, 0.0, op.attribute("epsilon", 1e-5)
    )
    if len(op.outputs) == 1:
        return y
    keep, axes = op.attribute("momentum", 0.9), [a for a in range(x.dim()) if a != 1]
    now, spread = x.mean(axes), x.var(axes, unbiased=False)
    return y, keep * mean + (1 - keep) * now, keep * var + (1 - keep) * spread


@operator("InstanceNormalization")
def instance_normalization(op: Operation, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1], scale, bias, op.attribute("epsilon", 1e-5))


@operator("GroupNormalization")
def group_normalization(op: Operation, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalise groups of channels; before opset 21 scale and bias have one entry a group."""
    groups, channels = op.attribute("num_groups"), x.shape[1]
    if len(scale) != channels:
        scale, bias = (v.repeat_interleave(channels // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, op.attribute("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_normalization(op: Operation, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Outputs:
    """Normalise over the last axes; the further outputs are mean and inverse standard deviation."""
    first = op.attribute("axis", -1) % x.dim()
    epsilon, shape = op.attribute("epsilon", 1e-5), x.shape[first:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        y = F.layer_norm(x, shape, scale, bias, epsilon)
    else:
        y = F.layer_norm(x, shape, eps=epsilon) * scale
        y = y if bias is None else y + bias
    if len(op.outputs) == 1:
        return y
    axes = tuple(range(first, x.dim()))
    return y, x.mean(axes, True), torch.rsqrt(x.var(axes, unbiased=False, keepdim=True) + epsilon)


@operator("RMSNormalization")
def rms_normalization(op: Operation, x: Tensor, scale: Tensor) -> Tensor:
    axes = tuple(range(op.attribute("axis", -1) % x.dim(), x.dim()))
    return x * torch.rsqrt(x.square().mean(axes, True) + op.attribute("epsilon", 1e-5)) * scale


@operator("LpNormalization")
def lp_normalization(op: Operation, x: Tensor) -> Tensor:
    axis, p = op.attribute("axis", -1), op.attribute("p", 2)
    size = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(size == 0, torch.zeros_like(x), x / size)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(op: Operation, x: Tensor) -> Tensor:
    axes = tuple(op.attribute("axes", (0, 2, 3)))
    centred = x - x.mean(axes, True)
    return centred / (centred.square().mean(axes, True).sqrt() + 1e-9)


@operator("LRN")
def local_response_normalization(op: Operation, x: Tensor) -> Tensor:
    """Divide by a power of the energy of neighbouring channels (Krizhevsky et al., 2012)."""
    size = op.attribute("size")
    before = (size - 1) // 2
    squares = F.pad(x.square(), [0, 0] * (x.dim() - 2) + [before, size - 1 - before])
    energy = sum(squares.narrow(1, shift, x.shape[1]) for shift in range(size))
    scale = op.attribute("bias", 1.0) + op.attribute("alpha", 1e-4) / size * energy
    return x / scale ** op.attribute("beta", 0.75)
