"""Masks that keep pruned weights at zero while training goes on.

Zeroing the gradient is not enough: a momentum buffer from before the mask goes on moving the weight. What is safe with
every optimiser is: mask the gradient, step, mask the weight, and clear the optimiser's state where the mask is new.

A mask is a boolean buffer beside its parameter (``weight_mask`` for ``weight``, true where weights live), so it moves
with the network, is in every checkpoint, and comes back with it. It has the parameter's shape (unstructured) or one
entry for each output unit (structured), as a shape that broadcasts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

SUFFIX = "_mask"

WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number."""


class Masks:
    """The masks of one network."""

    def __init__(self) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._active: list[tuple[nn.Parameter, torch.Tensor]] | None = None

    def add(self, module: nn.Module, name: str = "weight", *, units: bool = False) -> None:
        """Give a parameter a mask that lets everything live.

        Args:
            module: owner of the parameter.
            name: the parameter's name there.
            units: one entry for each index of the first axis, in place of one for each weight.
        """
        parameter = getattr(module, name)
        shape = (len(parameter), *[1] * (parameter.dim() - 1)) if units else parameter.shape
        module.register_buffer(name + SUFFIX, torch.ones(shape, dtype=torch.bool, device=parameter.device))
        self._places.append((module, name))

    def __iter__(self) -> Iterator[tuple[nn.Module, str]]:
        """Yield module and name of every masked parameter."""
        return iter(self._places)

    def get(self, module: nn.Module, name: str = "weight") -> torch.Tensor:
        """Return the mask of a parameter."""
        return getattr(module, name + SUFFIX)

    @torch.no_grad()
    def set(self, module: nn.Module, name: str, mask: torch.Tensor) -> None:
        """Replace a mask; weights that it takes become zero with the next :meth:`apply`.

        Args:
            module: owner of the parameter.
            name: the parameter's name there.
            mask: true where weights live, as many entries as the mask has.
        """
        old = self.get(module, name)
        old.copy_(mask.reshape(old.shape))
        self._active = None

    def narrow(self, module: nn.Module, name: str, mask: torch.Tensor) -> None:
        """Take away from a mask: what it has masked already stays masked."""
        old = self.get(module, name)
        self.set(module, name, old & mask.reshape(old.shape))

    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights: before the optimiser's step."""
        for parameter, bits in self._bits():
            if parameter.grad is not None:
                zero_where_dead(parameter.grad, bits)

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the masked weights: after the optimiser's step, and after a mask is set."""
        for parameter, bits in self._bits():
            zero_where_dead(parameter, bits)

    @torch.no_grad()
    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero what the optimiser remembers of masked weights."""
        for parameter, bits in self._bits():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    zero_where_dead(value, bits)

    def reload(self) -> None:
        """Forget what was read from the buffers: they have been loaded, or moved."""
        self._active = None

    def remove(self) -> None:
        """Take the masks off: what remains is an ordinary network with zeros in it."""
        for module, name in self._places:
            delattr(module, name + SUFFIX)
        self._places, self._active = [], None

    def _bits(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Return the parameters of which something is masked, with what :func:`zero_where_dead` takes."""
        if self._active is None:
            pairs = [(getattr(module, name), self.get(module, name)) for module, name in self._places]
            self._active = [(parameter, bit_mask(mask, parameter)) for parameter, mask in pairs if not mask.all()]
        return self._active


def bit_mask(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return integers as wide as ``values``: all bits are set where ``mask`` is true, none elsewhere."""
    return -mask.to(WHOLE_NUMBERS[values.element_size()])


def zero_where_dead(values: torch.Tensor, bits: torch.Tensor) -> None:
    """Set numbers to zero in place, infinities and NaN too: their bits are and-ed with a :func:`bit_mask`.

    Filling by a boolean mask does the same; it takes twenty times as long on a CPU, twice in each step.
    """
    values.detach().view(bits.dtype).bitwise_and_(bits)


def prunable(model: nn.Module) -> list[nn.Module]:
    """Return convolutions and linear layers, each once, in the order of their definition: those with kernels.

    Transposed convolutions are not among them: their first axis is the input.
    """
    return [module for module in model.modules() if is_layer(module)]


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a convolution (not transposed) or a linear layer."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)


def weight_facts(model: nn.Module) -> dict[str, int]:
    """Return ``weights`` (of convolutions and linear layers, without biases) and ``zero_weights`` among them."""
    kernels = [layer.weight for layer in prunable(model)]
    return {
        "weights": sum(kernel.numel() for kernel in kernels),
        "zero_weights": sum(int((kernel == 0).sum()) for kernel in kernels),
    }


@torch.no_grad()
def lowest(scores: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Return, for tensors ranked together, which entries are the ``count`` lowest: exactly so many, ties or not.

    Args:
        scores: of any shapes.
        count: how many; of equal scores the earlier go first.

    Returns:
        Boolean tensors of the same shapes.
    """
    together = torch.cat([score.flatten() for score in scores])
    chosen = torch.zeros_like(together, dtype=torch.bool)
    chosen[together.argsort(stable=True)[:count]] = True
    parts = chosen.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]
