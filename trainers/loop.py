"""The training loop.

``fit`` takes a network, a method and batches, and leaves the network trained. What it writes lies in the run folder:
``checkpoint.pt`` from before the first step on, ``metrics.jsonl``, one line an epoch, and with ``early_stop`` the best
epoch's ``best.pt``. On a CPU the result depends on the configuration alone, and a run that was stopped at any step and
resumed ends bit for bit like one that was not (for the same number of threads: they decide the order of additions).
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError, ProviderError, Terminated, TrainingError
from prune_onnx.graph_ops.files import write_text
from prune_onnx.graph_ops.memory import keep_at_hand
from prune_onnx.graph_ops.progress import SILENT, Progress

from . import checkpoint
from .batches import Batches
from .board import Board
from .checkpoint import Position
from .config import BEST, Schedule, TrainConfig
from .distributed import Ranks, current
from .methods.base import Method
from .placement import Placed, placed

CHECK_EVERY = 50
"""Steps between looks at the loss: each look waits for the device."""

AGREE_EVERY = 10
"""Steps between which several processes ask one another whether to stop: each time waits for the device."""

EVALUATION_BATCH = 500


def choose_device(config: TrainConfig) -> torch.device:
    """Return the device to train on.

    Raises:
        ProviderError: CUDA was asked for and is absent.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ProviderError("device 'cuda' was asked for, but torch sees no CUDA device. Take --device cpu.")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Mean loss of a batch, from its inputs, the network's logits for them, and their labels."""


def supervised(inputs: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy with the labels."""
    return F.cross_entropy(logits, labels)


def fit(
    model: nn.Module,
    method: Method,
    config: TrainConfig,
    train: Batches,
    validation: Batches | None = None,
    *,
    run: Path,
    loss: Loss = supervised,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Train ``model`` in place, on the device where the batches are, together with other processes if there are any.

    Args:
        model: takes (N, C, H, W) and returns logits (N, classes).
        method: shapes the network while it trains; its ``finish`` is left to the caller.
        config: resolved options (:func:`.config.resolve`). With ``resume``, training goes on from the run folder's
            checkpoint if there is one.
        train: training images.
        validation: held-out images, measured after each epoch.
        run: existing folder for checkpoint and metrics.
        loss: what is minimised; a network in it, a teacher, must be on the batches' device.
        progress: hears one note an epoch.

    Returns:
        One record an epoch: ``epoch``, ``loss`` (mean over the epoch), ``lr`` (of its last step), ``validation_loss``,
        ``validation_accuracy`` (fraction; both ``None`` without validation images), ``dead_channels``,
        ``zero_weights`` (of methods that make any), ``seconds``.

    Raises:
        TrainingError: loss or weights are no longer finite (the checkpoint is then the last good one), or the
            checkpoint cannot be used.
        ConfigError: the checkpoint belongs to other options; or ``early_stop`` without validation images.
        OutputError: the run folder cannot be written.
        KeyboardInterrupt: SIGINT or (:class:`Terminated`) SIGTERM came; a checkpoint was saved first.
    """
    if config.early_stop and not validation:
        raise ConfigError("early_stop goes by validation images, and none are held out. Give --validation 0.1.")
    device, ranks = train.labels.device, current()
    schedule = Schedule.of(config, len(train))
    model.to(device)
    method.prepare(model, schedule, seed=config.seed, progress=progress)
    optimizer = _optimizer(model, config)
    method.attach(optimizer, train)
    with (
        keep_at_hand() if device.type == "cpu" else nullcontext(),
        placed(model, optimizer, config, device, ranks) as at,
        Board(run, config.tensorboard and ranks.first) as board,
    ):
        loop = _Loop(model, method, config, schedule, train, validation, run, progress, at, loss, ranks, board)
        loop.start()
        with _stop_requests() as stop, progress.task("training", schedule.steps) as advance:
            advance(loop.position.epoch * schedule.steps_per_epoch + loop.position.step)
            while loop.position.epoch < schedule.epochs and not loop.has_stalled():
                loop.epoch(stop, advance)
            if asked := loop.asked(stop):  # it came while the last epoch was measured, after which there is no step
                raise _stopped(asked)
    if config.early_stop:
        loop.take_best()
    return loop.position.history


def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy (a fraction) of ``model``, in evaluation mode.

    Several processes measure a part each; the network must be the same in all of them.
    """
    model.eval()
    ranks = current()
    loss = torch.zeros((), dtype=torch.float64, device=batches.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=batches.labels.device)
    with torch.no_grad():
        for inputs, labels in batches.in_order(EVALUATION_BATCH, ranks):
            logits = model(inputs)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
    return ranks.total(loss).item() / len(batches), ranks.total(correct).item() / len(batches)


@dataclass
class _Loop:
    """What the loop works with. One step, one epoch, one checkpoint."""

    model: nn.Module
    method: Method
    config: TrainConfig
    schedule: Schedule
    train: Batches
    validation: Batches | None
    run: Path
    progress: Progress
    placed: Placed
    loss: Loss
    ranks: Ranks
    board: Board
    position: Position = field(default_factory=Position)

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoint.pt"

    def start(self) -> None:
        """Resume, or save where the run begins, so that it can be resumed from there at once."""
        if self.config.resume and self.checkpoint.exists():
            content = checkpoint.read(self.checkpoint)
            checkpoint.check_essence(self.run, content["essence"], self.config.essence())
            rank = self.ranks.rank
            self.position = checkpoint.restore(self.checkpoint, content, self.model, self.placed.optimizer, rank)
        else:
            if self.ranks.rank:  # dropout differs from process to process
                torch.manual_seed(self.config.seed + self.ranks.rank)
            self.method.begin()
            self.ranks.align(self.model)
            self.save()
        self.write_metrics()

    @property
    def batch(self) -> int:
        """Images of the step's batch, of all processes."""
        return min(self.config.batch_size, len(self.train) - self.position.step * self.config.batch_size)

    def step(self, inputs: torch.Tensor, labels: torch.Tensor, lr: float) -> torch.Tensor:
        """Take one optimiser step; return the mean loss of this process's share of the batch, detached."""
        for group in self.placed.optimizer.param_groups:
            group["lr"] = lr * group.get("size", 1.0)
        loss = self.loss(inputs, self.placed.forward(inputs), labels)
        self.placed.optimizer.zero_grad()
        # Gradients are averaged over the processes, whose shares differ in size.
        factor = self.ranks.weight(len(labels), self.batch) * self.ranks.size / self.batch
        self.placed.backward(loss if factor == 1 else loss * factor)
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.method.before_step()
        self.placed.optimizer.step()
        self.method.after_step(lr)
        return loss.detach()

    def epoch(self, stop: list[int], advance: Callable[[int], None]) -> None:
        """Finish the epoch in progress, and record it."""
        at, steps = self.position, self.schedule.steps_per_epoch
        began = time.perf_counter() - at.seconds
        first = at.epoch * steps
        so_far = at.loss_sum if self.ranks.first else 0.0
        loss_sum = torch.tensor(so_far, dtype=torch.float64, device=self.train.labels.device)
        self.model.train()
        shown = self.train.shuffled(at.epoch, self.config.batch_size, steps, start=at.step, ranks=self.ranks)
        for inputs, labels in shown:
            loss = self.step(inputs, labels, self.schedule.at(first + at.step))
            loss_sum += loss * self.ranks.weight(len(labels), self.batch)
            at.images += self.batch
            at.step += 1
            advance(1)
            asked = self.asked(stop) if self.ranks.size == 1 or at.step % AGREE_EVERY == 0 else 0
            due = self.config.checkpoint_every and (first + at.step) % self.config.checkpoint_every == 0
            if due or asked or at.step % CHECK_EVERY == 0:
                at.loss_sum, at.seconds = self.ranks.total(loss_sum).item(), time.perf_counter() - began
                self.check_loss()
            if due or asked:
                self.check_state()
                self.save()
            if asked:
                raise _stopped(asked)
        at.loss_sum = self.ranks.total(loss_sum).item()
        self.check_loss()
        self.check_state()
        lr = self.schedule.at(first + steps - 1)
        self.method.after_epoch(lr, at.epoch + 1)
        self.ranks.align(self.model)
        self.record(lr, began)

    def record(self, lr: float, began: float) -> None:
        """Measure the network after an epoch; save; tell."""
        at = self.position
        held = evaluate(self.model, self.validation) if self.validation else (None, None)
        facts = self.method.sparsity(self.model)
        entry = {
            "epoch": at.epoch + 1,
            "loss": at.loss_sum / at.images,
            "lr": lr,
            "validation_loss": held[0],
            "validation_accuracy": held[1],
            **{key: facts[key] for key in ("dead_channels", "zero_weights") if key in facts},
            "seconds": time.perf_counter() - began,
        }
        self.position = Position(epoch=at.epoch + 1, history=[*at.history, entry])
        if self.config.early_stop and self.best_epoch() == entry["epoch"]:
            self.save(self.run / BEST)
        self.save()
        self.write_metrics()
        self.board.add(entry)
        accuracy = "" if held[1] is None else f", validation accuracy {held[1]:.2%}"
        dead = f", {facts['dead_channels']} of {facts['channels']} channels dead" if facts["dead_channels"] else ""
        if facts.get("zero_weights"):
            dead += f", {facts['zero_weights'] / facts['weights']:.1%} of the weights zero"
        self.progress.note(
            f"epoch {entry['epoch']}/{self.schedule.epochs}: loss {entry['loss']:.4f}{accuracy}{dead}, "
            f"lr {lr:.3g}, {entry['seconds']:.1f} s"
        )

    def best_epoch(self) -> int:
        """Return the first epoch of the highest validation accuracy; epochs before the last pruning do not count."""
        pruned = (0, *self.schedule.restarts)[-1]
        counted = [entry for entry in self.position.history if entry["epoch"] > pruned]
        return max(counted, key=lambda entry: entry["validation_accuracy"])["epoch"] if counted else pruned

    def has_stalled(self) -> bool:
        """Return whether the validation accuracy has not risen for as many epochs as ``early_stop`` says."""
        patience = self.config.early_stop
        return patience is not None and self.position.epoch - self.best_epoch() >= patience

    def take_best(self) -> None:
        """Give the network the state of the best epoch."""
        content = checkpoint.read(self.run / BEST)
        self.model.load_state_dict(content["model"])
        self.progress.note(f"the best validation accuracy is that of epoch {self.best_epoch()}")

    def asked(self, stop: list[int]) -> int:
        """Return the signal that asks for a stop, whichever process it reached, or 0."""
        return self.ranks.highest(stop[0] if stop else 0, self.train.labels.device)

    def save(self, path: Path | None = None) -> None:
        """Write the checkpoint, or one of the same form elsewhere."""
        rng = self.ranks.gather(checkpoint.rng())
        if self.ranks.first:
            optimizer = self.placed.optimizer
            checkpoint.save(path or self.checkpoint, self.model, optimizer, self.position, self.config.essence(), rng)

    def write_metrics(self) -> None:
        """Write ``metrics.jsonl`` from the history, so that it never disagrees with the checkpoint."""
        if self.ranks.first:
            lines = (json.dumps(entry) + "\n" for entry in self.position.history)
            write_text(self.run / "metrics.jsonl", "".join(lines))

    def check_loss(self) -> None:
        """Stop when the epoch's loss is not a number any more."""
        if not math.isfinite(self.position.loss_sum):
            self.diverged("the loss is no longer finite")

    def check_state(self) -> None:
        """Stop before a network with infinities replaces a good checkpoint."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                self.diverged(f"{name!r} is no longer finite")

    def diverged(self, what: str) -> None:
        raise TrainingError(
            f"training diverged: {what} (epoch {self.position.epoch + 1}, step {self.position.step}). "
            f"Try a lower --lr, --warmup-epochs or --clip. The last good state is in {self.checkpoint}."
        )


SMALLEST = 0.01
"""What a tensor's size counts at least for Adam's steps: biases begin at zero."""


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return SGD or Adam; without ``norm_decay``, BatchNorm's parameters are in groups that do not decay.

    The steps of ``adam`` are relative to the size of a tensor (the root of its mean square when training begins), so
    that one rate does for weights of all sizes, as they are after BatchNorm was folded into them. ``adam-l2`` is Adam
    as it was published, with the decay in the gradient: where the loss asks for little, the decay takes steps of full
    size towards zero, which NNrelief's shares of weights left rest on.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    spared = set() if config.norm_decay else norms
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in spared], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) in spared], "weight_decay": 0.0},
    ]
    if config.optimizer == "adam":
        sized = [{**group, "params": [p], "size": _size(p)} for group in groups for p in group["params"]]
        return torch.optim.AdamW(sized, lr=config.lr)
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adam-l2":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
    )


def _size(parameter: torch.Tensor) -> float:
    """Return the root of the mean square, but at least ``SMALLEST``."""
    return max(parameter.detach().square().mean().sqrt().item(), SMALLEST)


def _stopped(asked: int) -> KeyboardInterrupt:
    return Terminated() if asked == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Yield a list that fills when SIGINT or SIGTERM asks for a stop; a second SIGINT does not wait for the step."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
