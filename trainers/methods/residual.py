"""NNrelief's rule for sums: a residual block's channel goes where it adds next to nothing to the shortcut.

    r_k = | mean over n of |block_k(x_n)| |_F  /  | mean over n of |shortcut_k(x_n)| |_F

Channel k of the block goes if r_k < (1 - alpha) / alpha: if it is less than the share 1 - alpha of the two. Where the
shortcut has a convolution of its own, its channel goes if 1 / r_k is. An identity has no weights that could be zero, so
it always stays; the reference program masks it, which no file of weights can say.

Source: the reference program of Dekhovich et al.; the paper says only that blocks may be pruned as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..trace import Layer, evaluating

if TYPE_CHECKING:
    from ..batches import Batch

SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


class _Sums(TorchFunctionMode):
    """Watches sums of two maps, of which at least one comes from a layer, or its BatchNorm, as it is.

    Attributes:
        owners: by ``id``: a tensor (kept, so that its id stays its own) and the layer that it comes from.
        found: in the order of the pass, both sides' layers (``None`` of what is no layer's) and absolute values, summed
            over the examples, (C, H, W).
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[int, tuple[torch.Tensor, Layer]] = {}
        self.found: list[tuple[list[Layer | None], list[torch.Tensor]]] = []

    def owner(self, tensor: torch.Tensor) -> Layer | None:
        return self.owners.get(id(tensor), (None, None))[1]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        sides = [side for side in args[:2] if isinstance(side, torch.Tensor)]
        if getattr(func, "__name__", "") in SUMS and len(sides) == 2 and sides[0].dim() == 4:
            owners = [self.owner(side) for side in sides]
            if sides[0].shape == sides[1].shape and any(owners):
                self.found.append((owners, [side.abs().sum(0) for side in sides]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def weak_channels(
    model: nn.Module, layers: list[Layer], batches: Iterable[Batch], alpha: float
) -> dict[str, torch.Tensor]:
    """Return which units of layers that end in a sum add less than 1 - ``alpha`` of it, by name, boolean (units,).

    Args:
        model: run in evaluation mode; left as it is.
        layers: of :func:`~..trace.trace`.
        batches: images that the sums are measured on.
        alpha: share of the signal that stays.
    """
    by_module = {layer.module: layer for layer in layers} | {layer.norm: layer for layer in layers if layer.norm}
    sums: list[tuple[list[Layer | None], list[torch.Tensor]]] = []
    with evaluating(model):
        for inputs, _ in batches:
            watch = _Sums()
            hooks = [
                module.register_forward_hook(lambda m, _, y, w=watch: w.owners.update({id(y): (y, by_module[m])}))
                for module in by_module
            ]
            try:
                with watch:
                    model(inputs)
            finally:
                for hook in hooks:
                    hook.remove()
            for (_, before), (_, now) in zip(sums, watch.found, strict=False):  # nothing before the first batch
                torch._foreach_add_(before, now)
            sums = sums or watch.found
    weak: dict[str, torch.Tensor] = {}
    for owners, totals in sums:
        norms = [total.flatten(1).norm(dim=1) for total in totals]
        for owner, own, other in zip(owners, norms, norms[::-1], strict=True):
            if owner is not None:
                weak[owner.name] = own < (1 - alpha) / alpha * other
    return weak
