"""Proximal Network Slimming: exact zeros while training, no threshold afterwards.

An auxiliary variable xi carries the L1 term, and a quadratic penalty ties it to the BatchNorm scales gamma:

    F(W, gamma, xi) = loss(W, gamma) + lambda * |xi|_1 + (penalty / 2) * |gamma - xi|^2

Proximal alternating linearised minimisation (PALM) with alpha = 1 / learning rate, after every optimiser step that
took gamma to gamma':

    gamma <- (alpha * gamma' + penalty * xi) / (alpha + penalty)
    xi    <- S((alpha * xi + penalty * gamma) / (alpha + penalty), lambda / (alpha + penalty))

where S(x, t) = sign(x) * max(|x| - t, 0). For plain gradient descent this is equation (8b) and step 4 of Algorithm 1;
momentum and weight decay enter through gamma'.

Source: Bui, Xue, Park, Qi, Xin, "A Proximal Algorithm for Network Slimming". Its ``beta`` is ``penalty`` here, since
beta is also BatchNorm's shift. What differs from the printed algorithm, and why:

* The updates follow every *step*. Algorithm 1 says every epoch, but then xi falls by at most
  ``lambda / (2 * alpha + penalty)`` an epoch: 0.004 of 0.5 in 160 epochs for VGG-19, and no channel can die.
  ``every="epoch"`` keeps the printed form.
* alpha follows the current learning rate, warm-up and all schedules included.
* xi decides which channels are dead, since only xi is exactly zero; gamma keeps ``|gamma - xi| <= lambda / penalty``.
  :meth:`ProximalNS.finish` sets gamma to 0 where xi is 0 and leaves the trained gamma elsewhere. BatchNorm's shift
  stays: a dead channel is then a constant, not zero, and the graph pass carries that constant on.
* With momentum ``m`` a channel dies when the loss's gradient at its scale is within ``lambda * (1 - m)``.

The convergence theorem (alpha above the Lipschitz constant, full gradients) covers neither momentum nor mini-batches.

Published values (lambda, penalty): VGG-19 .0045, 100; DenseNet-40 .004, 100; ResNet-110 .002, 1; ResNet-164 .002, .25.
Other VGGs and DenseNets take their family's; all other networks take .002, 10.

On schedules that are too short for the published lambda, as on small data sets, its default is raised, up to a limit
(:func:`.scales.sufficient_lambda`). The gap ``lambda / penalty`` grows with it, and with the gap what the network loses
when gamma becomes 0 where xi is, so the penalty is then 10 at least. (On scikit-learn's digits in 20 epochs, penalty 1:
accuracy 99.4 % before, 91.9 % after; penalty 10: 99.4 % before and after.) What is given is taken as it is, with a
warning if no channel can die.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from prune_onnx.graph_ops.progress import SILENT, Progress

from ..batches import generator
from .base import Method
from .scales import INIT_GAMMA, batch_norms, require_batch_norms, start_scales, sufficient_lambda

if TYPE_CHECKING:
    from ..config import Schedule, TrainConfig

PUBLISHED = {
    "vgg": (0.0045, 100.0),
    "densenet": (0.004, 100.0),
    "resnet110": (0.002, 1.0),
    "resnet164": (0.002, 0.25),
    "preresnet110": (0.002, 1.0),
    "preresnet164": (0.002, 0.25),
}
"""(lambda, penalty) by the beginning of the network's name."""

OTHERWISE = (0.002, 10.0)

DEATH_SHARE = 0.5
"""Share of the run's drift in which a channel without a gradient is to die: the rest is for what then recovers."""

STRONGEST = 0.2
"""What a default lambda is not raised above: it would take channels that the network needs. (Digits, 5 epochs of 22
steps: accuracy 16 % with .5; 5 epochs of 45 steps: 99.7 % with .27.)"""

SHORT_PENALTY = 10.0
"""Smallest default penalty when lambda had to be raised."""

INIT_XI = (0.47, 0.50)
"""xi starts uniformly in this interval."""


@dataclass
class ProximalNS(Method):
    """Proximal Network Slimming: scales become exactly zero while training, so that no threshold is needed.

    Attributes:
        lambda_: strength of the L1 term on xi.
        penalty: coefficient of the quadratic term.
        every: update after each ``"step"`` or each ``"epoch"``.
        init_gamma: initial BatchNorm scale; ``None`` goes on with trained ones.
    """

    name: ClassVar[str] = "proximal-ns"

    lambda_: float
    penalty: float
    every: str = "step"
    init_gamma: float | None = INIT_GAMMA

    @classmethod
    def defaults(cls, config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
        pairs = (pair for network, pair in PUBLISHED.items() if config.model.startswith(network))
        published, penalty = next(pairs, OTHERWISE)
        start = config.init_gamma or INIT_GAMMA

        def sufficient(penalty: float) -> float:
            return sufficient_lambda(published, start, DEATH_SHARE * reach(schedule, penalty, "step"), STRONGEST)

        if config.every == "epoch":  # the printed algorithm, with the printed values
            lambda_ = published
        else:
            if sufficient(penalty) > published:
                penalty = max(penalty, SHORT_PENALTY)
            lambda_ = sufficient(config.penalty or penalty)
        init_gamma = None if config.starts_trained else INIT_GAMMA
        return {"lambda_": lambda_, "penalty": penalty, "every": "step", "init_gamma": init_gamma}

    @classmethod
    def check(cls, model: nn.Module) -> None:
        require_batch_norms(model, cls.name)

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        self._norms = batch_norms(model)
        if self.init_gamma is not None:
            start_scales(self._norms, self.init_gamma)
        draws = generator(seed, "xi")
        for norm in self._norms:
            xi = torch.empty(norm.num_features).uniform_(*INIT_XI, generator=draws)
            norm.register_buffer("xi", norm.weight.detach().clone() if self.init_gamma is None else xi.to(norm.weight))
        self._warn_if_none_can_die(schedule, progress)

    def after_step(self, lr: float) -> None:
        if self.every == "step":
            self._update(lr)

    def after_epoch(self, lr: float, epoch: int = 0) -> None:
        if self.every == "epoch":
            self._update(lr)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> dict[str, int]:
        """Set gamma to 0 where xi is 0, and take xi off: what remains is an ordinary network."""
        for norm in batch_norms(model):
            norm.weight[norm.xi == 0] = 0
            del norm.xi
        return self.sparsity(model)

    def support(self, norm: nn.Module) -> torch.Tensor:
        """Return xi while training; after :meth:`finish`, gamma has its zeros."""
        return getattr(norm, "xi", norm.weight)

    @torch.no_grad()
    def _update(self, lr: float) -> None:
        alpha = 1 / lr
        share = self.penalty / (alpha + self.penalty)
        threshold = self.lambda_ / (alpha + self.penalty)
        # Read from the modules each time: a network that moves to another device replaces its buffers.
        gammas = [norm.weight for norm in self._norms]
        xis = [norm.xi for norm in self._norms]
        torch._foreach_lerp_(gammas, xis, share)
        torch._foreach_lerp_(xis, gammas, share)
        # S(x, t) = x - clamp(x, -t, t), which is exactly 0 where |x| <= t.
        clamped = torch._foreach_clamp_min(xis, -threshold)
        torch._foreach_clamp_max_(clamped, threshold)
        torch._foreach_sub_(xis, clamped)

    def _warn_if_none_can_die(self, schedule: Schedule, progress: Progress) -> None:
        distance = self.lambda_ * reach(schedule, self.penalty, self.every)
        if self.init_gamma is None:
            start = min(norm.xi.abs().min().item() for norm in self._norms)
        else:
            start = min(self.init_gamma, INIT_XI[0])
        if distance >= start:
            return
        if distance < 1e-6:
            advice = "Give a larger --lambda."
        else:
            epochs = math.ceil(schedule.epochs * start / distance)
            advice = f"It takes --epochs {epochs} or --lambda {self.lambda_ * start / distance:.3g} at least."
            if self.every == "epoch":
                advice += " --every step updates after every mini-batch."
        progress.warn(
            f"proximal-ns: no channel can die in this schedule unless the loss itself pushes it: xi starts "
            f"at {start:g} and drifts by {distance:.2g} in {schedule.epochs} epochs. {advice}"
        )


def reach(schedule: Schedule, penalty: float, every: str) -> float:
    """Return how far gamma and xi drift towards zero over a run without a gradient, per unit of lambda.

    One update moves the pair by ``lambda / (2 * alpha + penalty)``: the threshold ``lambda / (alpha + penalty)``
    falls on xi, and the averaging shares it between the two (left eigenvector of the linear part).
    """
    last = schedule.steps_per_epoch - 1
    steps = range(schedule.steps) if every == "step" else range(last, schedule.steps, schedule.steps_per_epoch)
    return math.fsum(1 / (2 / schedule.at(step) + penalty) for step in steps)
