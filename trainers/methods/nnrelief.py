"""NNrelief: connections that carry little of a neuron's signal go, as long as most of the signal stays.

    linear layer, neuron j:   a_ij = mean over n of |w_ij x_ni|,              bias |b_j|
    convolution, filter j:    a_ij = mean over n of | |K_ij| * |x_ni| |_F,    bias |b_j| sqrt(h_out w_out)
    s_ij = a_ij / S_j,   S_j = the sum of all a_ij and the bias

Sorted from the largest down, the first scores that reach ``alpha`` together set the bound, the smallest of them; what
is below it is pruned, ties stay. In a convolution a kernel K_ij goes as a whole. What neuron j loses is then S_j (1 -
alpha) in the mean over the samples, at most (equations 5 to 11; the text says that it grows with alpha: it falls).

Source: Dekhovich, Tax, Sluiter, Bessa, "Neural network relief: a pruning algorithm based on neural activity",
Algorithms 1 and 2. All scores are of the unpruned network's signals, as there; each round is followed by retraining,
for the LeNets from the initial weights (``rewind``), for other networks from where they are. As in the reference
program, and not in the text:

* A unit whose activation (ReLU) is zero on all samples loses its inputs, its bias and its BatchNorm.
* So does, from the output back, a unit without a surviving connection to what comes after it.
* With ``residual``, of the ResNets, channels of a block that add next to nothing to its shortcut go (:mod:`.residual`).

What differs from the reference program: the norm is the paper's (there a plain sum, or a norm of means), ties are not
pruned (there equal scores all go, and the smallest does always), linear layers are scored on the unpruned network too,
the first convolution of a ResNet is pruned like the others, and identity shortcuts stay.

Published (conv_alpha, alpha, rounds): LeNet-300-100 (-, .95, 15); LeNet-5 (.9, .95, 20); VGG-like .95, .95, 6; VGG-13
.95, .95, 5; ResNet .95, .99, 10. The LeNets train and retrain for 60 epochs each: ``--epochs 960`` and ``1260``;
shorter runs have fewer rounds by default. Scores come from 1000 training images, not augmented. The shares of weights
left that are published need the paper's optimiser, whose decay empties connections in those epochs, and pixels from 0
to 1, so that a pixel that is never on carries no signal: ``--optimizer adam-l2 --weight-decay 5e-4 --batch-size 120
--milestones 0.5 --mean 0 --std 1 --augment none`` (``benchmarks/papers.py nnrelief``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError

from .. import initial
from ..connectivity import reaching
from ..masks import prunable
from ..trace import Layer, evaluating, watched
from .pruning import SAMPLES, Pruning
from .residual import weak_channels

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

PUBLISHED = {
    "lenet300": (0.95, 0.95, 15, True),
    "lenet5": (0.9, 0.95, 20, True),
    "vgg-like": (0.95, 0.95, 6, False),
    "vgg13": (0.95, 0.95, 5, False),
    "resnet": (0.95, 0.99, 10, False),
}
"""(conv_alpha, alpha, rounds, rewind) by the beginning of the network's name."""

OTHERWISE = (0.95, 0.95, 5, False)

ROUNDING = 1e-12
"""Sums of scores that fall short of alpha by this much reach it: .5 + .2 + .2 does .9."""

PATCHES = 2**24
"""Entries of unfolded maps that are held at a time."""


@dataclass
class NNrelief(Pruning):
    """NNrelief: connections that carry little of a neuron's signal go, as long as most of the signal stays.

    Attributes:
        alpha: share of a neuron's signal that stays, in linear layers.
        conv_alpha: likewise, in convolutions.
        samples: training images that the signals are measured on.
        rewind: retrain from the initial weights.
        residual: drop channels of residual blocks that are small beside the shortcut's.
    """

    name: ClassVar[str] = "nnrelief"

    alpha: float = 0.95
    conv_alpha: float = 0.95
    samples: int = SAMPLES
    rewind: bool = False
    residual: bool = False

    @classmethod
    def usual_rounds(cls, config: TrainConfig) -> int:
        return _published(config)[2]

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        conv_alpha, alpha, _, rewind = _published(config)
        own = {"alpha": alpha, "conv_alpha": conv_alpha, "samples": SAMPLES, "rewind": rewind}
        own["residual"] = config.model.startswith("resnet")
        return {**super().defaults(config, schedule), **own}

    @classmethod
    def check(cls, model: nn.Module) -> None:
        super().check(model)
        if any(isinstance(layer, nn.Conv1d | nn.Conv3d) for layer in prunable(model)):
            raise ConfigError("method 'nnrelief' works on two-dimensional convolutions and linear layers.")

    def add_masks(self, model: nn.Module) -> None:
        if self.rewind:
            initial.keep(model)
        for layer in self._layers:
            self.add_unit_masks(layer, units=False)

    @torch.no_grad()
    def prune(self, number: int) -> None:
        images = self.scoring_batches(self.samples)
        weak = weak_channels(self._model, self._layers, images, self.conv_alpha) if self.residual else {}
        for layer, kernels, biases in self._contributions():
            keep = essential(torch.cat([kernels, biases], 1), self._share(layer))
            columns = kernels.shape[1]
            weight, mask = layer.module.weight, self._masks.get(layer.module)
            kept = keep[:, :columns].view(*keep[:, :columns].shape, *[1] * (weight.dim() - 2))
            self._masks.narrow(layer.module, "weight", kept.expand_as(mask))
            if biases.numel():
                self._masks.narrow(layer.module, "bias", keep[:, columns])
        for layer in self._layers:
            if layer.name in weak:
                self.drop_units(layer, weak[layer.name])
        self._masks.apply()
        self._drop_silent()
        self._masks.apply()
        shape = tuple(next(self._images.in_order(1))[0].shape[1:])
        live = reaching(self._model, self._layers, shape)
        for layer in self._layers:
            self.drop_units(layer, ~live[layer.name])
        if self.rewind:
            initial.restore(self._model)

    def _share(self, layer: Layer) -> float:
        return self.alpha if isinstance(layer.module, nn.Linear) else self.conv_alpha

    def _contributions(self) -> list[tuple[Layer, torch.Tensor, torch.Tensor]]:
        """Return for each layer the mean contributions of its kernels, (out, in), and biases, (out, 1) or (out, 0)."""
        by_module = {layer.module: layer for layer in self._layers}
        sums: dict[nn.Module, list[torch.Tensor]] = {}
        count = 0

        def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            parts = contributions(module, args[0].float(), output)
            sums[module] = [a + b for a, b in zip(sums[module], parts, strict=True)] if module in sums else list(parts)

        hooks = [module.register_forward_hook(add) for module in by_module]
        try:
            with evaluating(self._model):
                for inputs, _ in self.scoring_batches(self.samples):
                    self._model(inputs)
                    count += len(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return [(by_module[module], kernels / count, biases / count) for module, (kernels, biases) in sums.items()]

    def _drop_silent(self) -> None:
        """Drop the units whose ReLU is zero on all samples."""
        active: dict[str, torch.Tensor] = {}
        with evaluating(self._model):
            for inputs, _ in self.scoring_batches(self.samples):
                with watched(self._model, {}) as watch:
                    self._model(inputs)
                for name in watch.rectified:
                    units = (watch.maps[name] != 0).movedim(1, 0).flatten(1).any(1)
                    active[name] = active[name] | units if name in active else units
        for layer in self._layers:
            if layer.name in active and len(active[layer.name]) == len(layer.module.weight):
                self.drop_units(layer, ~active[layer.name])


def contributions(module: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each kernel and bias of a layer contributes, summed over the batch (section 2 of the paper).

    Args:
        module: convolution (two-dimensional) or linear layer.
        inputs: (N, in, H, W), or (N, ..., in).
        output: of the layer for them; its size decides the bias's contribution.

    Returns:
        (out, in / groups) of the kernels, (out, 1) of the biases ((out, 0) where there are none).
    """
    bias = module.bias
    if isinstance(module, nn.Linear):
        rows = inputs.abs().flatten(0, -2)
        scale = len(rows) / len(inputs)  # several positions of an input are averaged
        kernels = module.weight.abs() * (rows.sum(0) / scale)
        positions = 1.0
    else:
        kernels = _convolved_norms(module, inputs.abs())
        positions = (output.shape[2] * output.shape[3]) ** 0.5
    empty = kernels.new_zeros(len(kernels), 0)
    return kernels, empty if bias is None else (bias.abs() * positions * len(inputs)).unsqueeze(1)


def _convolved_norms(module: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
    """Return sum over n of | |K_ij| * x_ni |_F for inputs that are not negative, (out, in / groups).

    The norm's square is a quadratic form in the kernel: |K * x|^2 = k^T (P P^T) k, where the columns of P are the
    patches that the convolution sees, with its stride, padding and dilation. P P^T does not depend on the filter, so
    all filters of an input channel share it; nothing is negative, so nothing cancels.
    """
    size, groups = module.kernel_size, module.groups
    inputs = F.pad(inputs, _padding(module), "constant" if module.padding_mode == "zeros" else module.padding_mode)
    area = size[0] * size[1]
    kernels = module.weight.abs().view(groups, -1, inputs.shape[1] // groups, area)
    kernels = kernels.transpose(1, 2).reshape(inputs.shape[1], -1, area)  # (in, out / groups, area)
    norms = torch.zeros(kernels.shape[:2], device=inputs.device)
    for part in inputs.split(max(1, PATCHES // (area * inputs[0].numel()))):
        patches = F.unfold(part, size, module.dilation, stride=module.stride)
        patches = patches.view(len(part), part.shape[1], area, -1)
        squares = ((kernels @ (patches @ patches.transpose(2, 3))) * kernels).sum(3)  # (n, in, out / groups)
        norms += squares.sqrt().sum(0)
    return norms.view(groups, -1, norms.shape[1]).transpose(1, 2).reshape(len(module.weight), -1)


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    """Return a convolution's padding as :func:`torch.nn.functional.pad` takes it."""
    if module.padding == "same":
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    elif module.padding == "valid":
        pairs = [(0, 0), (0, 0)]
    else:
        pairs = [(padding, padding) for padding in module.padding]
    return (*pairs[1], *pairs[0])


def essential(contributed: torch.Tensor, share: float) -> torch.Tensor:
    """Return what stays of each neuron's connections: the largest that together reach ``share`` of its signal.

    Args:
        contributed: (neurons, connections), not negative.
        share: alpha. What equals the smallest of them stays too; of a neuron without any signal nothing does.
    """
    values = contributed.double()
    totals = values.sum(1, keepdim=True)
    scores = values / totals.masked_fill(totals == 0, 1)
    ranked = scores.sort(1, descending=True).values
    enough = (ranked.cumsum(1) < share - ROUNDING).sum(1, keepdim=True).clamp_max(scores.shape[1] - 1)
    return (scores >= ranked.gather(1, enough)) & (scores > 0)


def _published(config: TrainConfig) -> tuple[float, float, int, bool]:
    return next((values for network, values in PUBLISHED.items() if config.model.startswith(network)), OTHERWISE)
