"""What can be switched on: early stop, compilation, channels last, TensorBoard."""

from __future__ import annotations

import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError, ProviderError
from prune_onnx.trainers import checkpoint, loop
from prune_onnx.trainers.config import BEST, BOARD
from prune_onnx.trainers.loop import evaluate, fit

from .test_loop import CONFIG, Scripted, images, network, plainly, same_weights, timeless

pytestmark = pytest.mark.usefixtures("one_thread")


# Early stop


def scripted_accuracy(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the validation accuracy of each epoch be the next of ``values``."""
    left = iter(values)
    monkeypatch.setattr(loop, "evaluate", lambda model, batches: (1.0, next(left)))


@pytest.mark.parametrize(("values", "patience", "best", "epochs"), [
    ((0.5, 0.7, 0.7, 0.6, 0.9, 0.9), 2, 2, 4),
    ((0.5, 0.7, 0.7, 0.6, 0.9, 0.8), 3, 5, 6),
    ((0.5, 0.4), 1, 1, 2),
])  # fmt: skip
def test_run_ends_when_accuracy_has_stalled_and_the_best_epoch_is_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: tuple[float, ...], patience: int, best: int, epochs: int
) -> None:
    scripted_accuracy(monkeypatch, list(values))
    model, states = network(), []
    save = checkpoint.save

    def kept(path: Path, model: nn.Module, *rest: object) -> None:
        if path.name == "checkpoint.pt":
            states.append({key: value.clone() for key, value in model.state_dict().items()})
        save(path, model, *rest)

    monkeypatch.setattr(checkpoint, "save", kept)
    history = plainly(tmp_path, None, model, early_stop=patience, epochs=6, checkpoint_every=None)
    assert len(history) == epochs
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in states[best].items())
    assert not all(torch.equal(found[key], value) for key, value in states[-1].items()) or best == epochs


def test_early_stop_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.5, 0.7, 0.6, 0.6, 0.9]
    scripted_accuracy(monkeypatch, values)
    whole = network()
    history = plainly(tmp_path / "a", None, whole, early_stop=2, epochs=5)

    class KilledError(Exception):
        pass

    def kill(step: int) -> None:
        if step == 15:
            raise KilledError

    scripted_accuracy(monkeypatch, values)
    with pytest.raises(KilledError):
        plainly(tmp_path / "b", Scripted(action=kill), early_stop=2, epochs=5)
    scripted_accuracy(monkeypatch, values[2:])
    again = network(seed=1)
    assert timeless(plainly(tmp_path / "b", None, again, early_stop=2, epochs=5, resume=True)) == timeless(history)
    assert same_weights(whole, again)


def test_accuracy_before_the_last_pruning_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted_accuracy(monkeypatch, [0.9, 0.9, 0.3, 0.5, 0.4, 0.4])
    history = plainly(tmp_path, None, early_stop=2, epochs=6, rounds=2, retrain_epochs=2)  # pruned after 2 and after 4
    assert len(history) == 6
    content = checkpoint.read(tmp_path / BEST)
    assert content["position"]["epoch"] == 5


def test_early_stop_without_validation_images_is_an_error(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"early_stop": 1})
    with pytest.raises(ConfigError, match="--validation"):
        fit(network(), Scripted(), config, images(), None, run=tmp_path)


# Optimisers


def test_decay_of_adam_as_published_takes_full_steps_where_the_loss_asks_for_nothing(tmp_path: Path) -> None:
    options = {"lr": 1e-3, "weight_decay": 1e-4, "epochs": 1, "schedule": "constant", "warmup_epochs": 0.0}
    moved = {}
    for optimizer in ("adam", "adam-l2"):
        model = network()
        idle = nn.Parameter(torch.tensor([1.0, -2.0]))
        model.register_parameter("idle", idle)
        before = idle.detach().clone()
        model.register_forward_hook(lambda module, _, output: output + 0 * module.idle.sum())
        plainly(tmp_path / optimizer, None, model, optimizer=optimizer, **options)
        moved[optimizer] = (before - idle.detach()) * before.sign()
    assert torch.allclose(moved["adam-l2"], torch.full((2,), 6e-3), rtol=1e-2)  # 6 steps, whatever the size
    assert (moved["adam"] < 1e-5).all()


def test_adam_as_published_resumes_to_the_same_end(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(step: int) -> None:
        if step == 8:
            raise KilledError

    whole = network()
    options = {"optimizer": "adam-l2", "lr": 1e-3, "epochs": 2}
    history = plainly(tmp_path / "a", None, whole, **options)
    with pytest.raises(KilledError):
        plainly(tmp_path / "b", Scripted(action=kill), **options)
    again = network(seed=1)
    assert timeless(plainly(tmp_path / "b", None, again, resume=True, **options)) == timeless(history)
    assert same_weights(whole, again)


# Faster code


def sure_network() -> nn.Module:
    """A network without dropout: its draws follow the layout in memory."""
    model = network()
    model[3].p = 0.0
    return model


def test_compiled_network_trains_as_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(model: nn.Module) -> object:
        compiled.append(model)
        return original(model, backend="eager")  # the tracing is real; C++ would take a minute

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    found, expected = sure_network(), sure_network()
    plainly(tmp_path / "a", None, found, compile=True, epochs=2)
    plainly(tmp_path / "b", None, expected, epochs=2)
    assert compiled == [found]
    for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_network_that_cannot_be_compiled_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, example: object) -> None:
        raise RuntimeError("no compiler here\nmore")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with pytest.raises(ProviderError, match=r"no compiler here.*--compile") as caught:
        plainly(tmp_path, compile=True, epochs=1)
    assert "\n" not in str(caught.value)
    torch._dynamo.reset()


def test_channels_last_is_only_another_layout(tmp_path: Path) -> None:
    found, expected = sure_network(), sure_network()
    plainly(tmp_path / "a", None, found, channels_last=True, epochs=2)
    plainly(tmp_path / "b", None, expected, epochs=2)
    assert found[0].weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert evaluate(found, images(30, seed=1))[1] == evaluate(expected, images(30, seed=1))[1]


# TensorBoard


def test_tensorboard_hears_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[object, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            written.append((folder,))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            written.append((key, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            written.append(())

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    history = plainly(tmp_path, tensorboard=True, epochs=2)
    assert written[0] == (str(tmp_path / BOARD),)
    assert [step for key, _, step in written[1:-1] if key == "loss"] == [1, 2]
    assert ("validation_accuracy", history[1]["validation_accuracy"], 2) in written
    assert written[-1] == (), "closed"


def test_tensorboard_that_is_not_installed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'prune-onnx\[tensorboard\]'"):
        plainly(tmp_path, tensorboard=True)
    plainly(tmp_path, epochs=1)
