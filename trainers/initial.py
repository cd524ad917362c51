"""Initial weights, kept beside the trained ones for rewinding: in buffers, so that checkpoints have them too."""

from __future__ import annotations

import torch
from torch import nn

SUFFIX = "_initial"


def keep(model: nn.Module) -> None:
    """Give each parameter and buffer (BatchNorm's statistics) a copy of itself, as it is now."""
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, value in own:
            module.register_buffer(name + SUFFIX, value.detach().clone())


@torch.no_grad()
def restore(model: nn.Module) -> None:
    """Set everything that :func:`keep` copied back to its copy."""
    for module in model.modules():
        for name, value in _copies(module).items():
            getattr(module, name.removesuffix(SUFFIX)).copy_(value)


def forget(model: nn.Module) -> None:
    """Take the copies off."""
    for module in model.modules():
        for name in _copies(module):
            delattr(module, name)


def _copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.named_buffers(recurse=False) if name.endswith(SUFFIX)}
