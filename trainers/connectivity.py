"""Which units still reach the network's output, whatever lies between: sums, concatenations, poolings."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .trace import Layer

SHIFT = 2.0**-7
"""Small and positive: keeps every activation open."""


def reaching(model: nn.Module, layers: list[Layer], shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return for each layer which of its units a path of weights that are not zero leads on to the output.

    A copy of the network gets positive weights where there were any, and positive inputs and shifts, so that nothing
    cancels and every ReLU is open; a unit reaches the output where the output's gradient is not zero. What a unit
    computes itself plays no part: one with no weights left at its input may still reach the output.

    Args:
        model: left as it is.
        layers: of :func:`~.trace.trace`.
        shape: of an input, (C, H, W).

    Returns:
        By name, boolean (units,).
    """
    network = copy.deepcopy(model).double().eval()
    modules = dict(network.named_modules())
    outputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    with torch.no_grad():
        for module in modules.values():
            _open(module)
    for layer in layers:
        modules[layer.name].register_forward_hook(lambda _, __, output, name=layer.name: outputs[name].append(output))
    device = next(model.parameters()).device
    with torch.enable_grad():
        result = network(torch.ones(1, *shape, dtype=torch.float64, device=device))
        flat = [(name, output) for name, several in outputs.items() for output in several]
        slopes = torch.autograd.grad(result.sum(), [output for _, output in flat], allow_unused=True)
    found = {layer.name: torch.zeros(len(layer.module.weight), dtype=torch.bool, device=device) for layer in layers}
    for (name, _), slope in zip(flat, slopes, strict=True):
        if slope is not None:  # units are the second axis of a map, the last one behind a linear layer
            axis = -1 if isinstance(modules[name], nn.Linear) else 1
            found[name] |= (slope != 0).movedim(axis, 0).flatten(1).any(1)
    return found


def _open(module: nn.Module) -> None:
    """Make a module's weights positive where they are not zero, of a size that neither grows nor vanishes."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        kernels = module.weight.flatten(2) if module.weight.dim() > 2 else module.weight.unsqueeze(2)
        live = (kernels != 0).any(2, keepdim=True).expand_as(kernels).to(module.weight.dtype)
        fan_in = live.sum((1, 2), keepdim=True).clamp_min(1)
        module.weight.copy_((live / fan_in).view_as(module.weight))
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.reset_running_stats()
        if module.weight is not None:
            module.weight.copy_(module.weight != 0)
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter):
        bias.fill_(SHIFT)
