"""Group regularisers: sparse terms on whole filters, in six forms.

    min over W of  loss(W) + lambda * sum over layers of R(W^l)

W^l of a convolution has kernels K_ij (output channel i, input channel j); a group g is all kernels of one output
channel (``direction="neuron"``) or of one input channel (``"feature"``). With the kernels of a group in the inner sum:

    group-lasso          sum_g sqrt(sum |K|_F^2)       exclusive-sparsity   sum_g (sum |K|_1)^2
    group-l12            sum_g sqrt(sum |K|_1)
    hsq-gl               sum_g (sum |K|_F)^2           hsq-es               sum_g (sum |K|_1^2)^2
    hsq-gl12             sum_g (sum |K|_1^(1/2))^2

Source: Mitsuno and Kurita, "Filter Pruning using Hierarchical Group Sparse Regularization for Deep Convolutional Neural
Networks" (hsq-*), where the first three are the baselines: Yuan and Lin (2006), Zhou et al. (2010), Li et al. (2018).

How it is done here:

* Gradients are closed forms, added to the loss's before the optimiser's step. Where a kernel or a group is zero, the
  square roots have none: there the sub-gradient 0 is taken. Towards zero those of the l1/2 forms grow without bound, so
  kernels count as :data:`SMALL` at least: the papers' threshold for a zero.
* ``prox`` (group-lasso) replaces the gradient by the exact group soft-threshold after the optimiser's step, W_g <- W_g
  * max(0, 1 - lr * lambda / |W_g|): groups then become exactly zero. No gradient step does that: without it which
  channels go is decided afterwards (``slim --keep-channels``).
* Groups over the inputs of the first layer would be image channels, groups over the outputs of the last layer classes:
  both are left out. With ``layers="all"`` linear layers take part (the papers leave them out); behind a Flatten the
  H * W columns of one channel are its kernel. In a grouped convolution j runs within the group, so a depthwise kernel
  is a group of its own.
* The reference program minimises loss + lambda/2 * R + lambda/2 * |W|_1; the paper, and this, loss + lambda * R.

Degrees in W differ (1, 2, 1/2, 2, 4, 1), so no lambda fits all; the paper names only the range that it searched, 1e-1
to 1e-7. The defaults are a place to start from: bn-cnn keeps its accuracy with them on scikit-learn's digits in 8
epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.progress import SILENT, Progress

from ..masks import prunable, weight_facts
from ..trace import INPUT, Layer, trace
from .base import Method

if TYPE_CHECKING:
    from ..batches import Batches
    from ..config import Schedule, TrainConfig

SMALL = 1e-3
"""Mean |w| that a kernel counts as at least where a gradient divides by it."""


def grouped(weight: torch.Tensor, direction: str, *, groups: int = 1, block: int = 1) -> torch.Tensor:
    """Return a layer's weights as (part, group of the part, kernel of the group, element of the kernel).

    Args:
        weight: (out, in / groups, ...) of a convolution or (out, in) of a linear layer.
        direction: ``"neuron"`` or ``"feature"``.
        groups: of the convolution: its parts.
        block: neighbouring inputs of a linear layer that are one channel.
    """
    kernels = weight.reshape(groups, len(weight) // groups, weight.shape[1] // block, -1)
    return kernels if direction == "neuron" else kernels.transpose(1, 2)


def ungrouped(kernels: torch.Tensor, direction: str, shape: torch.Size) -> torch.Tensor:
    """Undo :func:`grouped`."""
    return (kernels if direction == "neuron" else kernels.transpose(1, 2)).reshape(shape)


@dataclass
class GroupRegulariser(Method):
    """Base of the regularisers; :meth:`value` and :meth:`gradient` take kernels as :func:`grouped` gives them.

    Attributes:
        lambda_: strength of the term.
        direction: groups are output channels (``neuron``) or input channels (``feature``).
        layers: ``conv``, or ``all`` for linear layers too.
    """

    LAMBDA: ClassVar[float]

    lambda_: float
    direction: str = "feature"
    layers: str = "conv"

    @staticmethod
    def value(kernels: torch.Tensor) -> torch.Tensor:
        """Return R, a scalar."""
        raise NotImplementedError

    @staticmethod
    def gradient(kernels: torch.Tensor) -> torch.Tensor:
        """Return R's gradient, finite everywhere, in the shape of ``kernels``."""
        raise NotImplementedError

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {"lambda_": cls.LAMBDA, "direction": "feature", "layers": "conv"}

    @classmethod
    def check(cls, model: nn.Module) -> None:
        if not prunable(model):
            raise ConfigError(f"method {cls.name!r} works on convolutions and linear layers; this network has none.")

    def attach(self, optimizer: torch.optim.Optimizer, images: Batches) -> None:
        inputs, _ = next(images.in_order(2))
        self._terms = [layer for layer in trace(self._model, inputs) if self._takes_part(layer)]
        if not self._terms:
            raise ConfigError(
                f"{self.name} has no layer to work on with direction {self.direction!r} and layers {self.layers!r}: "
                "the first layer's inputs and the last one's outputs cannot go. "
                "Try --layers all, or the other --direction."
            )

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        self._model = model

    @torch.no_grad()
    def before_step(self) -> None:
        for layer in self._terms:
            weight = layer.module.weight
            if weight.grad is not None:
                term = ungrouped(self.gradient(self._kernels(layer)), self.direction, weight.shape)
                weight.grad.add_(term, alpha=self.lambda_)

    def penalty(self) -> torch.Tensor:
        """Return the sum of R over the layers that take part, without lambda."""
        return torch.stack([self.value(self._kernels(layer)) for layer in self._terms]).sum()

    def sparsity(self, model: nn.Module) -> dict[str, int]:
        return {**super().sparsity(model), **weight_facts(model)}

    def _takes_part(self, layer: Layer) -> bool:
        if isinstance(layer.module, nn.Linear) and self.layers == "conv":
            return False
        return INPUT not in layer.sources if self.direction == "feature" else not layer.output

    def _kernels(self, layer: Layer) -> torch.Tensor:
        block = 1 if INPUT in layer.sources else layer.block  # each pixel of the image is an input of its own
        groups = getattr(layer.module, "groups", 1)
        return grouped(layer.module.weight, self.direction, groups=groups, block=block)


@dataclass
class GroupLasso(GroupRegulariser):
    """Group lasso: the sum of the groups' norms.

    Attributes:
        prox: exact group soft-threshold after each step instead of the gradient: groups become exactly zero.
    """

    name: ClassVar[str] = "group-lasso"
    LAMBDA: ClassVar[float] = 1e-2

    prox: bool = False

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        return {**super().defaults(config, schedule), "prox": False}

    @staticmethod
    def value(kernels: torch.Tensor) -> torch.Tensor:
        return _norms(kernels).sum()

    @staticmethod
    def gradient(kernels: torch.Tensor) -> torch.Tensor:
        return kernels / _positive(_norms(kernels))

    def before_step(self) -> None:
        if not self.prox:
            super().before_step()

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        if not self.prox:
            return
        for layer in self._terms:
            kernels, weight = self._kernels(layer), layer.module.weight
            weight.copy_(ungrouped(soft_threshold(kernels, lr * self.lambda_), self.direction, weight.shape))


@dataclass
class ExclusiveSparsity(GroupRegulariser):
    """Exclusive sparsity: the groups' squared L1 norms, so that the weights of a group compete."""

    name: ClassVar[str] = "exclusive-sparsity"
    LAMBDA: ClassVar[float] = 1e-4

    @staticmethod
    def value(kernels: torch.Tensor) -> torch.Tensor:
        return _absolute(kernels).sum(2).square().sum()

    @staticmethod
    def gradient(kernels: torch.Tensor) -> torch.Tensor:
        return kernels.sign().mul_(2 * _absolute(kernels).sum(2, keepdim=True))


@dataclass
class GroupL12(GroupRegulariser):
    """Group L1/2: square roots of the groups' L1 norms."""

    name: ClassVar[str] = "group-l12"
    LAMBDA: ClassVar[float] = 1e-2

    @staticmethod
    def value(kernels: torch.Tensor) -> torch.Tensor:
        return _absolute(kernels).sum(2).sqrt().sum()

    @staticmethod
    def gradient(kernels: torch.Tensor) -> torch.Tensor:
        least = SMALL * kernels.shape[2] * kernels.shape[3]
        return kernels.sign().div_(2 * _absolute(kernels).sum(2, keepdim=True).clamp_min(least).sqrt())


@dataclass
class HsqGL(GroupRegulariser):
    """Hierarchical square of the group lasso: within a group the norms of the kernels, summed and squared."""

    name: ClassVar[str] = "hsq-gl"
    LAMBDA: ClassVar[float] = 1e-3

    @staticmethod
    def value(kernels: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(kernels, dim=3).sum(2).square().sum()

    @staticmethod
    def gradient(kernels: torch.Tensor) -> torch.Tensor:
        norms = torch.linalg.vector_norm(kernels, dim=3, keepdim=True)
        return kernels * (2 * norms.sum(2, keepdim=True) / _positive(norms))


@dataclass
class HsqES(GroupRegulariser):
    """Hierarchical square of exclusive sparsity: squared L1 norms of the kernels, summed and squared."""

    name: ClassVar[str] = "hsq-es"
    LAMBDA: ClassVar[float] = 1e-4

    @staticmethod
    def value(kernels: torch.Tensor) -> torch.Tensor:
        return _absolute(kernels).square().sum(2).square().sum()

    @staticmethod
    def gradient(kernels: torch.Tensor) -> torch.Tensor:
        sums = _absolute(kernels)
        return kernels.sign().mul_(4 * sums.square().sum(2, keepdim=True) * sums)


@dataclass
class HsqGL12(GroupRegulariser):
    """Hierarchical square of group L1/2: square roots of the kernels' L1 norms, summed and squared."""

    name: ClassVar[str] = "hsq-gl12"
    LAMBDA: ClassVar[float] = 1e-4

    @staticmethod
    def value(kernels: torch.Tensor) -> torch.Tensor:
        return _absolute(kernels).sqrt().sum(2).square().sum()

    @staticmethod
    def gradient(kernels: torch.Tensor) -> torch.Tensor:
        sums = _absolute(kernels)
        roots = sums.clamp_min(SMALL * kernels.shape[3]).sqrt()
        return kernels.sign().mul_(sums.sqrt().sum(2, keepdim=True) / roots)


def soft_threshold(kernels: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the minimiser of ``threshold * sum_g |V_g| + |V - kernels|^2 / 2``: groups shrunk, or exactly zero."""
    norms = _norms(kernels)
    return torch.where(norms > threshold, kernels * (1 - threshold / _positive(norms)), 0)


def _norms(kernels: torch.Tensor) -> torch.Tensor:
    """Return the groups' Frobenius norms, (part, group, 1, 1)."""
    return torch.linalg.vector_norm(kernels, dim=(2, 3), keepdim=True)


def _absolute(kernels: torch.Tensor) -> torch.Tensor:
    """Return the kernels' L1 norms, (part, group, kernel, 1)."""
    return kernels.abs().sum(3, keepdim=True)  # vector_norm takes twenty times as long for norms other than 2


def _positive(norms: torch.Tensor) -> torch.Tensor:
    """Return norms to divide by: where one is zero, so is what is divided, and the quotient shall be 0."""
    return norms.masked_fill(norms == 0, 1)
