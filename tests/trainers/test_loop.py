"""The loop: determinism, resuming after any end, divergence, signals, and what it tells.

Run as a script, ``test_loop.py RUN WHERE NUMBER``, this file trains in the folder ``RUN`` and kills itself: before the
optimiser's step ``NUMBER`` (``WHERE`` is ``step``), or inside the write of that checkpoint (``save``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError, ProviderError, Terminated, TrainingError
from prune_onnx.graph_ops.progress import SILENT, Progress
from prune_onnx.trainers import checkpoint, loop
from prune_onnx.trainers.batches import Batches
from prune_onnx.trainers.config import Schedule, TrainConfig
from prune_onnx.trainers.loop import choose_device, evaluate, fit
from prune_onnx.trainers.methods import method_class
from prune_onnx.trainers.methods.base import Method

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS, STEPS = 4, 6
"""60 images in batches of 10."""

CONFIG = TrainConfig(
    model="test", dataset="test", method="proximal-ns", output="run", epochs=EPOCHS, batch_size=10, lr=0.1,
    lambda_=2.0, penalty=10.0, every="step", init_gamma=0.5, augment="shift", mean=(0.5,), std=(0.3,),
    warmup_epochs=0.5, checkpoint_every=4,
)  # fmt: skip


def network(seed: int = 0) -> nn.Module:
    """Convolution, BatchNorm and dropout: each kind of state that a run has."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 3),
    )  # fmt: skip


def images(count: int = 60, seed: int = 0, **options: object) -> Batches:
    """Noise with a bright patch whose place is the class."""
    draws = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pictures = draws.integers(0, 100, (count, 1, 8, 8), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[0, 2 + 2 * (label == 1) : 4 + 2 * (label == 1), 2 + 2 * (label == 2) : 4 + 2 * (label == 2)] += 150
    return Batches(pictures, labels, mean=(0.5,), std=(0.3,), **options)


def train(run: Path, config: TrainConfig = CONFIG, progress: Progress = SILENT) -> tuple[nn.Module, list[dict]]:
    """Train, or with ``config.resume`` go on; return network and history."""
    model = network()
    method = method_class(config.method).of(config)
    shown = images(augment=config.augment, seed=config.seed)
    history = fit(model, method, config, shown, images(30, seed=1), run=run, progress=progress)
    return model, history


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(run: Path, where: str, number: int) -> None:
    """Train until the step or the checkpoint ``number``, and die there without notice."""
    torch.set_num_threads(1)
    count = 0

    def counted(original):
        def call(*args: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                die()
            return original(*args)

        return call

    if where == "step":
        loop._Loop.step = counted(loop._Loop.step)
    else:  # the temporary file is written, its rename into place is not reached

        def replace(source: str, target: str, original=os.replace) -> None:
            nonlocal count
            count += Path(target).name == "checkpoint.pt"
            if count == number:
                die()
            original(source, target)

        os.replace = replace
    train(run)


RESUMED = CONFIG.model_copy(update={"resume": True})


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def timeless(history: list[dict]) -> list[dict]:
    """The history without the one thing that differs from run to run."""
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, list[dict]]:
    return train(tmp_path_factory.mktemp("whole"))


@dataclass
class Scripted(Method):
    """A method that calls ``action(number of the step)`` after each step, and keeps what it sees."""

    name: ClassVar[str] = "scripted"

    action: Callable[[int], None] = lambda step: None
    rates: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)

    def prepare(self, model: nn.Module, schedule: Schedule, **kwargs: object) -> None:
        self.model = model

    def before_step(self) -> None:
        norms = [parameter.grad.norm() for parameter in self.model.parameters()]
        self.gradients.append(torch.stack(norms).norm().item())

    def after_step(self, lr: float) -> None:
        self.rates.append(lr)
        self.action(len(self.rates))


def plainly(run: Path, method: Method | None = None, model: nn.Module | None = None, **options: object) -> list[dict]:
    config = CONFIG.model_copy(update={"method": "plain", "lambda_": None, "penalty": None, **options})
    return fit(model or network(), method or Scripted(), config, images(), images(30, seed=1), run=run)


# Learning


def test_network_learns_and_channels_die(uninterrupted: tuple[nn.Module, list[dict]], tmp_path: Path) -> None:
    model, history = uninterrupted
    assert 0 < history[-1]["dead_channels"] == int((model[1].xi == 0).sum())
    longer = CONFIG.model_copy(update={"epochs": 15, "lambda_": 1e-3})
    assert train(tmp_path, longer)[1][-1]["validation_accuracy"] > 0.9  # chance is 0.33


def test_loss_is_the_mean_over_the_epochs_images(tmp_path: Path) -> None:
    model = network().eval()
    model[3].p = 0.0
    frozen = [parameter.requires_grad_(False) for parameter in model.parameters()]
    frozen[-1].requires_grad_(True)
    model[1].momentum = 0.0
    # One batch an epoch with a vanishing rate: the loss of an unchanged network in training mode.
    history = plainly(tmp_path, Plain(), model, epochs=1, batch_size=60, lr=1e-30, warmup_epochs=0.0, augment="none")
    model.train()
    inputs, labels = next(images().in_order(60))
    assert history[0]["loss"] == pytest.approx(nn.functional.cross_entropy(model(inputs), labels).item(), rel=1e-6)


def test_evaluate_counts_right_answers_and_leaves_the_network_alone() -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    held = images(31, seed=3)
    loss, accuracy = evaluate(model, held)
    inputs, labels = next(held.in_order(31))
    logits = model.eval()(inputs)
    assert accuracy == (logits.argmax(1) == labels).sum().item() / 31
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_steps_follow_the_schedule_and_clipping_comes_before_the_method(tmp_path: Path) -> None:
    free, clipped = Scripted(), Scripted()
    plainly(tmp_path, free)
    schedule = Schedule.of(CONFIG, 60)
    assert free.rates == [schedule.at(step) for step in range(EPOCHS * STEPS)]
    assert max(free.gradients) > 0.1
    plainly(tmp_path, clipped, clip=0.1, force=True)
    assert max(clipped.gradients) == pytest.approx(0.1, rel=1e-4)


def test_weight_decay_can_spare_batchnorm(tmp_path: Path) -> None:
    for spare in (True, False):
        model = network()
        for parameter in model.parameters():
            parameter.register_hook(torch.zeros_like)  # nothing but decay moves
        start = {name: value.clone() for name, value in model.named_parameters()}
        plainly(tmp_path, Plain(), model, weight_decay=0.1, norm_decay=not spare, force=True)
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
        assert {"0.weight", "0.bias", "6.weight", "6.bias"} <= moved
        assert ("1.weight" in moved) is not spare


class Plain(Method):
    name = "none"


# Determinism and resuming


def test_same_seed_is_the_same_run_bit_for_bit(
    uninterrupted: tuple[nn.Module, list[dict]], tmp_path: Path
) -> None:
    torch.manual_seed(99)
    model, history = train(tmp_path)
    assert same_weights(model, uninterrupted[0])
    assert timeless(history) == timeless(uninterrupted[1])


def test_another_seed_is_another_run(uninterrupted: tuple[nn.Module, list[dict]], tmp_path: Path) -> None:
    model, _ = train(tmp_path, CONFIG.model_copy(update={"seed": 1}))
    assert not same_weights(model, uninterrupted[0])


def test_checkpoints_inside_epochs_change_nothing(
    uninterrupted: tuple[nn.Module, list[dict]], tmp_path: Path
) -> None:
    model, _ = train(tmp_path, CONFIG.model_copy(update={"checkpoint_every": None}))
    assert same_weights(model, uninterrupted[0])


@pytest.mark.parametrize(
    ("where", "number", "epoch", "step"),
    [
        ("step", 1, 0, 0),  # before anything but the first checkpoint
        ("step", 11, 1, 2),  # after the checkpoint of step 8, in the second epoch
        ("step", 13, 2, 0),  # first step of the third epoch
        ("save", 5, 1, 2),  # in the write of the second epoch's end
    ],
)
def test_run_killed_without_notice_resumes_to_the_same_end(
    uninterrupted: tuple[nn.Module, list[dict]], tmp_path: Path, where: str, number: int, epoch: int, step: int
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / ".typing")}
    command = [sys.executable, __file__, str(tmp_path), where, str(number)]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    content = checkpoint.read(tmp_path / "checkpoint.pt")
    assert (content["position"]["epoch"], content["position"]["step"]) == (epoch, step)
    torch.manual_seed(1234)
    model, history = train(tmp_path, RESUMED)
    assert same_weights(model, uninterrupted[0])
    assert timeless(history) == timeless(uninterrupted[1])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert timeless([json.loads(line) for line in lines]) == timeless(history)


@contextmanager
def handlers_untouched() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [3, STEPS, STEPS + 1])
def test_signal_saves_after_the_step_and_stops(tmp_path: Path, number: int, at: int) -> None:
    def interrupt(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), number)

    whole, stopped = network(), Scripted(interrupt)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    plainly(tmp_path / "whole", model=whole)
    with handlers_untouched(), pytest.raises(KeyboardInterrupt) as caught:
        plainly(tmp_path / "cut", stopped)
    assert isinstance(caught.value, Terminated) == (number == signal.SIGTERM)
    assert len(stopped.rates) == at
    position = checkpoint.read(tmp_path / "cut" / "checkpoint.pt")["position"]
    assert position["epoch"] * STEPS + position["step"] == at
    rest, model = Scripted(), network(seed=5)
    history = plainly(tmp_path / "cut", rest, model, resume=True)
    assert len(rest.rates) == EPOCHS * STEPS - at
    assert len(history) == EPOCHS
    assert same_weights(model, whole)


def test_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("still running")

    with handlers_untouched(), pytest.raises(KeyboardInterrupt):
        plainly(tmp_path, Scripted(interrupt))


def test_finished_run_has_nothing_left_to_do(uninterrupted: tuple[nn.Module, list[dict]], tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / "checkpoint.pt").stat()
    model, history = train(tmp_path, RESUMED)
    after = (tmp_path / "checkpoint.pt").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert same_weights(model, uninterrupted[0])
    assert timeless(history) == timeless(uninterrupted[1])


def test_resuming_with_other_options_is_refused(tmp_path: Path) -> None:
    train(tmp_path, CONFIG.model_copy(update={"epochs": 1}))
    with pytest.raises(ConfigError, match="epochs was 1, now 4"):
        train(tmp_path, RESUMED)


# Divergence


@pytest.mark.parametrize("bad", ["loss", "weights"])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, bad: str) -> None:
    model = network()

    def spoil(step: int) -> None:
        # Weights of the last step of an epoch are not in any loss of it.
        if step == {"loss": STEPS + 1, "weights": 2 * STEPS}[bad]:
            with torch.no_grad():
                model[6].weight[0, 0] = {"loss": float("nan"), "weights": float("inf")}[bad]

    match = {"loss": "the loss is no longer finite", "weights": r"'6\.weight' is no longer finite"}[bad]
    with pytest.raises(TrainingError, match=match) as caught:
        plainly(tmp_path, Scripted(spoil), model, checkpoint_every=None)
    assert "epoch 2" in str(caught.value)
    assert "--lr" in str(caught.value)
    content = checkpoint.read(tmp_path / "checkpoint.pt")
    assert content["position"]["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in content["model"].values())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_divergence_is_noticed_before_a_checkpoint_inside_an_epoch(tmp_path: Path) -> None:
    model = network()

    def spoil(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                model[1].running_var[0] = float("inf")

    with pytest.raises(TrainingError, match=r"'1\.running_var'"):
        plainly(tmp_path, Scripted(spoil), model, checkpoint_every=2)
    assert checkpoint.read(tmp_path / "checkpoint.pt")["position"]["step"] == 0


# Telling, devices, precision


class Listener(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = self.total = 0

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        self.total = total
        yield self._advance

    def _advance(self, steps: int) -> None:
        self.done += steps

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_progress_hears_each_epoch_and_ends_at_its_total(tmp_path: Path) -> None:
    told, again = Listener(), Listener()
    train(tmp_path, progress=told)
    assert (told.done, told.total) == (EPOCHS * STEPS, EPOCHS * STEPS)
    assert [note.split(":")[0] for note in told.notes] == [f"epoch {epoch}/{EPOCHS}" for epoch in range(1, EPOCHS + 1)]
    assert "channels dead" in told.notes[-1]
    train(tmp_path, RESUMED, again)
    assert (again.done, again.notes) == (EPOCHS * STEPS, [])


def test_without_validation_images_nothing_is_measured(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 1})
    history = fit(network(), Scripted(), config, images(), None, run=tmp_path)
    assert (history[0]["validation_loss"], history[0]["validation_accuracy"]) == (None, None)


def test_cuda_that_is_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(CONFIG) == torch.device("cpu")
    with pytest.raises(ProviderError, match="--device cpu"):
        choose_device(TrainConfig(**{**CONFIG.model_dump(), "device": "cuda"}))


def test_mixed_precision_trains_and_leaves_an_ordinary_float32_network(tmp_path: Path) -> None:
    model = network()
    forward = type(model).forward
    history = plainly(tmp_path, Scripted(), model, precision="bf16", epochs=6)
    assert history[-1]["loss"] < history[0]["loss"]
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model) or model.forward.__func__ is forward
    inputs, _ = next(images().in_order(4))
    assert torch.equal(model.eval()(inputs), forward(model, inputs))

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
