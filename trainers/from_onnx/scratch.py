"""Fresh weights for a network that is to be trained from scratch."""

from __future__ import annotations

import torch
from torch import nn

from .module import OnnxModule
from .weights import KERNEL, SCALE


@torch.no_grad()
def draw_weights(module: OnnxModule) -> None:
    """Draw all weights anew, from torch's global generator, and let BatchNorm begin as identity.

    Kernels are normal with variance 2 / fan-in (He et al., 2015), scales are 1, shifts 0. With as many epochs as the
    dense network had this is Scratch-E of Liu et al., "Rethinking the Value of Network Pruning" (ICLR 2019); with as
    much computation, epochs times the quotient of the MACs, Scratch-B (``budget_of``).
    """
    for name, parameter in module.parameters_by_name.items():
        weight = module.weights[name]
        if weight.role == KERNEL:
            parameter.normal_(0, (2 / weight.fan_in) ** 0.5)
        else:
            parameter.fill_(1.0 if weight.role == SCALE else 0.0)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
