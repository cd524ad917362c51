"""What the tests of the pruning methods share: a small problem, and runs of the loop that stop and go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from prune_onnx.trainers.batches import Batches
from prune_onnx.trainers.config import Schedule, TrainConfig, resolve
from prune_onnx.trainers.loop import _Loop, fit
from prune_onnx.trainers.methods import method_class
from prune_onnx.trainers.methods.base import Method


class StopHereError(Exception):
    """Ends a run where a test wants it."""


def network(seed: int = 0) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU, pooling, Flatten and two linear layers, for 8x8 images."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


def images(count: int = 60, seed: int = 0) -> Batches:
    """Noise with a bright patch whose place is the class."""
    draws = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pictures = draws.integers(0, 100, (count, 1, 8, 8), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[0, 2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += 150
    return Batches(pictures, labels, mean=(0.3,), std=(0.3,), seed=seed)


def attached(
    method: Method, model: nn.Module, shown: Batches | None = None, restarts: tuple[int, ...] = (1,)
) -> Method:
    """Prepare a method outside of a run; its one pruning is after the first epoch."""
    method.prepare(model, Schedule(lr=0.1, steps_per_epoch=2, epochs=2, restarts=restarts))
    method.attach(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), shown or images())
    return method


def train(run: Path, name: str, *, stop_before: int | None = None, **options: object) -> tuple[nn.Module, Method, list]:
    """Train, or with ``resume`` go on; ``stop_before`` ends the run without notice before that step."""
    config = TrainConfig(
        model="test", dataset="test", method=name, output="run", batch_size=10, lr=0.05, checkpoint_every=4,
        **{"epochs": 4, **options},
    )  # fmt: skip
    model, shown = network(), images()
    config = resolve(config, model, images=len(shown), augment="none", mean=(0.3,), std=(0.3,))
    method = method_class(name).of(config)
    steps = 0
    original = _Loop.step

    def step(self: _Loop, *args: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == stop_before:
            raise StopHereError
        return original(self, *args)

    run.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more are slower by far for a network so small, on a busy machine
    _Loop.step = step
    try:
        history = fit(model, method, config, shown, images(30, 1), run=run)
    finally:
        _Loop.step = original
        torch.set_num_threads(threads)
    return model, method, history


def resumed_equals_uninterrupted(folder: Path, name: str, *, stop_before: int, **options: object) -> nn.Module:
    """Assert that a run that was stopped and resumed ends bit for bit like one that was not; return the network."""
    whole, method, history = train(folder / "whole", name, **options)
    try:
        train(folder / "parts", name, stop_before=stop_before, **options)
        raise AssertionError("the run was not stopped")
    except StopHereError:
        pass
    parts, other, again = train(folder / "parts", name, resume=True, **options)
    first, second = whole.state_dict(), parts.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    timeless = [[{k: v for k, v in entry.items() if k != "seconds"} for entry in log] for log in (history, again)]
    assert timeless[0] == timeless[1]
    assert method.finish(whole) == other.finish(parts)
    return whole
