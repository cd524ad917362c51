"""Training by stochastic Frank-Wolfe: kernels stay in a polytope of sparse vertices; one cut at the end is cheap.

    P_K(tau) = conv{v : K entries are +-tau, the others 0} = {w : |w|_1 <= tau K, |w|_inf <= tau}    for each kernel
    d <- rho d + (1 - rho) gradient
    v  = -tau sign(d) on the K largest |d|, 0 elsewhere                     (the vertex that minimises <d, v>)
    w <- w + eta (v - w)

eta is the learning rate, made comparable with SGD's (``variant``):

* ``gradient``: eta = lr |d| / |v - w|, at most 1: the step is as long as SGD's.
* ``diameter``: eta = lr / (2 tau sqrt(K)), the polytope's diameter.

K is the number of weights that are to stay, and tau such that the radius tau sqrt(K) is 300 times the norm of the
initial weights. Convolutions and linear layers are trained so; biases and BatchNorm by the run's optimiser. Weight
decay plays no part: the polytope has its place. In the end the smallest weights become zero, without retraining;
``fine-tune`` goes on from there.

Sources: Pokutta, Spiegel, Zimmer, "Deep Neural Network Training with Frank-Wolfe" (2020), the polytope, step lengths
and radius; Miao et al., "Learning Pruning-Friendly Networks via Frank-Wolfe" (2022), the cut at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.progress import SILENT, Progress

from ..masks import prunable, weight_facts
from .base import Method
from .magnitude import RATIO, prune_lowest
from .pruning import pruned_count

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

RADIUS = 300.0
"""Radius of a kernel's polytope, in norms of its initial weights."""

AVERAGE, BOUND = "fw_average", "fw_bound"
"""Buffers beside each kernel: d, and tau."""


def sparse_vertex(direction: torch.Tensor, count: int, bound: torch.Tensor) -> torch.Tensor:
    """Return the vertex of P_K(tau) that minimises the product with ``direction``; K is ``count``, tau is ``bound``."""
    flat = direction.flatten()
    chosen = flat.abs().topk(count).indices
    vertex = torch.zeros_like(flat)
    vertex[chosen] = -bound * flat[chosen].sign()
    return vertex.view_as(direction)


def shifted_inside(weight: torch.Tensor, count: int, bound: torch.Tensor) -> torch.Tensor:
    """Return a point of P_K(tau) in the direction of ``weight``: itself, if it is one."""
    excess = torch.maximum(weight.abs().max(), weight.abs().sum() / count) / bound
    return weight / excess.clamp_min(1)


@dataclass
class StochasticFrankWolfe(Method):
    """Stochastic Frank-Wolfe training: weights move towards sparse vertices, so that pruning in the end costs little.

    Attributes:
        prune_ratio: fraction of weights that are zero in the end, and of a vertex's entries.
        scope: rank over all layers in the end (``global``), or take the same fraction of each ``layer``.
        rho: weight of the past in the average of gradients.
        variant: ``gradient`` or ``diameter``.
    """

    name: ClassVar[str] = "sfw"
    VARIANTS: ClassVar[tuple[str, ...]] = ("gradient", "diameter")

    prune_ratio: float = RATIO
    scope: str = "global"
    rho: float = 0.9
    variant: str = "gradient"

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {"prune_ratio": RATIO, "scope": "global", "rho": 0.9, "variant": "gradient"}

    @classmethod
    def check(cls, model: nn.Module) -> None:
        if not prunable(model):
            raise ConfigError(f"method {cls.name!r} works on convolutions and linear layers; this network has none.")

    @torch.no_grad()
    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        if self.variant not in self.VARIANTS:
            raise ConfigError(f"{self.name} has no variant {self.variant!r}; it has {', '.join(self.VARIANTS)}.")
        self._layers = prunable(model)
        self._vertices: list[tuple[nn.Module, torch.Tensor]] = []
        for layer in self._layers:
            bound = RADIUS * layer.weight.norm() / self._count(layer) ** 0.5
            layer.register_buffer(AVERAGE, torch.zeros_like(layer.weight))
            layer.register_buffer(BOUND, bound.detach().clone())
            layer.weight.copy_(shifted_inside(layer.weight, self._count(layer), bound))

    def _count(self, layer: nn.Module) -> int:
        """Return K."""
        total = layer.weight.numel()
        return max(1, total - pruned_count(self.prune_ratio, total))

    @torch.no_grad()
    def before_step(self) -> None:
        """Choose the vertices, and keep the kernels from the optimiser: without a gradient it leaves them alone."""
        self._vertices = []
        for layer in self._layers:
            if layer.weight.grad is None:
                continue
            average = getattr(layer, AVERAGE)
            average.lerp_(layer.weight.grad, 1 - self.rho)
            self._vertices.append((layer, sparse_vertex(average, self._count(layer), getattr(layer, BOUND))))
            layer.weight.grad = None

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        for layer, vertex in self._vertices:
            way = vertex - layer.weight
            if self.variant == "gradient":
                length = lr * getattr(layer, AVERAGE).norm() / way.norm().clamp_min(torch.finfo(way.dtype).tiny)
            else:
                length = lr / (2 * getattr(layer, BOUND) * self._count(layer) ** 0.5)
            layer.weight.addcmul_(way, length.clamp_max(1).expand_as(way))

    @torch.no_grad()
    def finish(self, model: nn.Module) -> dict[str, int]:
        """Set the smallest weights to zero."""
        layers = prunable(model)
        dead = prune_lowest([layer.weight.abs() for layer in layers], self.prune_ratio, self.scope)
        for layer, gone in zip(layers, dead, strict=True):
            layer.weight.masked_fill_(gone, 0)
            delattr(layer, AVERAGE)
            delattr(layer, BOUND)
        return self.sparsity(model)

    def sparsity(self, model: nn.Module) -> dict[str, int]:
        return {**super().sparsity(model), **weight_facts(model)}
