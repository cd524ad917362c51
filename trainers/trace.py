"""How the layers of a network hang together, seen from one forward pass: no source code, no class is looked at.

Every tensor of the pass carries its origins: the layers, and the network's input, that it was computed from without
another layer in between. BatchNorm, activations, pooling, sums and concatenations pass origins on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .masks import is_layer

INPUT = "<input>"
"""Origin of what is computed from the network's input directly."""

RECTIFIERS = {"relu", "relu_", "relu6", "threshold", "threshold_"}
"""Functions that make a unit's output exactly zero where they are closed."""


@dataclass
class Layer:
    """A convolution or linear layer.

    Attributes:
        name: as in ``named_modules``.
        module: itself; a module that is used twice is one layer.
        sources: origins of its input: names of layers, ``INPUT``.
        output: whether the network's output is computed from it directly.
        block: in a linear layer behind a Flatten, how many neighbouring inputs belong to one channel; else 1.
        norm: BatchNorm that takes its output as it comes.
    """

    name: str
    module: nn.Module
    sources: set[str] = field(default_factory=set)
    output: bool = False
    block: int = 1
    norm: nn.Module | None = None


class Watch(TorchFunctionMode):
    """Follows origins through a forward pass.

    Attributes:
        seen: by ``id``: the tensor (kept, so that its id stays its own), its origins, and the size of its blocks.
        maps: of each layer, by name: what its ReLU gave, or its BatchNorm, or the layer itself where neither follows.
        rectified: names of the layers that a ReLU follows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[torch.Tensor, frozenset[str], int]] = {}
        self.maps: dict[str, torch.Tensor] = {}
        self.rectified: set[str] = set()

    def mark(self, tensor: torch.Tensor, origins: frozenset[str], block: int = 1) -> None:
        """Note what a tensor comes from."""
        self.seen[id(tensor)] = (tensor, origins, block)

    def of(self, tensor: torch.Tensor) -> tuple[frozenset[str], int]:
        """Return origins and size of blocks."""
        _, origins, block = self.seen.get(id(tensor), (None, frozenset(), 1))
        return origins, block

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Looked up before the call: one that works in place returns the tensor it was given.
        inputs = list(_tensors((args, kwargs)))
        origins = frozenset().union(*(self.of(tensor)[0] for tensor in inputs))
        result = func(*args, **kwargs)
        for tensor in _tensors(result) if origins else ():
            block = 1
            if inputs and inputs[0].dim() == tensor.dim():
                block = self.of(inputs[0])[1] if inputs[0].shape == tensor.shape else 1
            elif inputs and inputs[0].dim() > 2 and tensor.dim() == 2 and inputs[0].numel() == tensor.numel():
                block = math.prod(inputs[0].shape[2:])
            self.mark(tensor, origins, block)
            if len(origins) == 1 and getattr(func, "__name__", "") in RECTIFIERS:
                self.rectified |= origins
                self.maps[next(iter(origins))] = tensor
        return result


@contextmanager
def watched(model: nn.Module, layers: dict[nn.Module, Layer]) -> Iterator[Watch]:
    """Watch one forward pass, made inside the ``with``; ``layers`` grows by every layer that runs, in that order."""
    names = {module: name for name, module in model.named_modules()}
    watch = Watch()
    outputs: dict[int, Layer] = {}

    def ran(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if is_layer(module):
            layer = layers.setdefault(module, Layer(names[module], module))
            origins, block = watch.of(args[0])
            layer.sources |= origins
            if isinstance(module, nn.Linear):
                layer.block = block
            watch.mark(output, frozenset({layer.name}))
            watch.maps[layer.name] = output
            outputs[id(output)] = layer
        elif id(args[0]) in outputs:
            layer = outputs[id(args[0])]
            layer.norm = module
            watch.maps[layer.name] = output

    norms = nn.modules.batchnorm._BatchNorm
    hooks = [m.register_forward_hook(ran) for m in model.modules() if is_layer(m) or isinstance(m, norms)]
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode for a while: BatchNorm by its statistics, no dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by its batch for a while, and leave its own statistics as they are."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm, norm.training, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, training, momentum, tracked in before:
            norm.training, norm.momentum = training, momentum
            norm.num_batches_tracked.copy_(tracked)


@torch.no_grad()
def trace(model: nn.Module, inputs: torch.Tensor) -> list[Layer]:
    """Return the layers that run, in the order in which they first do.

    Args:
        model: run once, in evaluation mode; left as it is.
        inputs: a small batch.
    """
    layers: dict[nn.Module, Layer] = {}
    with evaluating(model), watched(model, layers) as watch:
        watch.mark(inputs, frozenset({INPUT}))
        results = list(_tensors(model(inputs)))
    last = frozenset().union(*(watch.of(result)[0] for result in results))
    for layer in layers.values():
        layer.output = layer.name in last
    return list(layers.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments or results, lists and dictionaries of them included."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
