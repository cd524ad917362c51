"""Where and how the network runs while it is trained: device, mixed precision, several processes, compilation.

None of this changes what the network is: when training ends it is an ordinary float32 module again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_onnx.graph_ops.errors import ConfigError, ProviderError

from .config import TrainConfig
from .distributed import Ranks

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Placed:
    """What a step works with.

    Attributes:
        forward: inputs to logits.
        optimizer: the optimiser, perhaps wrapped.
        backward: from the loss to gradients, averaged over the processes.
    """

    forward: Forward
    optimizer: torch.optim.Optimizer
    backward: Callable[[torch.Tensor], None]


@contextmanager
def placed(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, device: torch.device, ranks: Ranks
) -> Iterator[Placed]:
    """Prepare the network for training, for the body.

    accelerate does the work where there is some: on a GPU, in mixed precision, in several processes. In float32 on the
    CPU it would add 0.15 ms to each step and settings that hold for the whole process, for nothing.

    Raises:
        ConfigError: this process has trained in another way before.
        ProviderError: from ``forward``: the network cannot be compiled here.
    """
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    with _synchronised(model, enabled=config.sync_bn and ranks.size > 1):
        if device.type == "cpu" and config.precision == "fp32" and ranks.size == 1:
            yield Placed(_compiled(model, config), optimizer, torch.Tensor.backward)
            return
        from accelerate import Accelerator

        precision = "no" if config.precision == "fp32" else config.precision
        try:
            accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        except ValueError as error:
            raise ConfigError("this process has trained on another device or precision; start a new one.") from error
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        made = Placed(_compiled(wrapped, config), optimizer, accelerator.backward)
        try:
            yield made
        finally:
            accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            # The wrapper around the network holds connections to the other processes, which threads serve. It must be
            # gone before the processes part, and before Python ends, when such a thread would take the process down.
            made.forward, made.backward = model, torch.Tensor.backward
            del wrapped
            accelerator.free_memory()  # collects garbage: the wrapper lies in a cycle


def _compiled(model: nn.Module, config: TrainConfig) -> Forward:
    """Return the network, compiled if that was asked for."""
    if not config.compile:
        return model
    compiled = torch.compile(model)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        try:
            return compiled(inputs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            said = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0].rstrip(".")
            raise ProviderError(f"torch.compile fails here: {said}. Leave out --compile.") from error

    return forward


class _Sum(torch.autograd.Function):
    """Sum over all processes, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def normalise_together(norm: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Return BatchNorm's output, in training mode with the statistics of the batch over all processes.

    torch's own SyncBatchNorm does the same on GPUs, and nothing on CPUs.

    Args:
        norm: its running statistics are updated.
        x: this process's share, (N, C, ...).
    """
    if not norm.training:
        return type(norm).forward(norm, x)
    axes, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    values = x.float()
    count = values.new_tensor([values.numel() / values.shape[1]])
    sums = _Sum.apply(torch.cat([values.sum(axes), count]))
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    centred = values - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(axes)) / count
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(variance * count / (count - 1), share)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    y = centred * scale.view(shape)
    return (y + norm.bias.view(shape) if norm.affine else y).to(x.dtype)


@contextmanager
def _synchronised(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Let BatchNorm layers normalise over all processes, for the body."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)] if enabled else []
    for norm in norms:
        norm.forward = types.MethodType(normalise_together, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
