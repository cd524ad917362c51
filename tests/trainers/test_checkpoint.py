"""Checkpoints: whole or refused, never executed, and only for the run that they belong to."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError, OutputError, TrainingError
from prune_onnx.trainers import checkpoint
from prune_onnx.trainers.checkpoint import Position

ESSENCE = {"model": "bn-cnn", "lr": 0.1, "milestones": [0.5, 0.75], "clip": None}


def trained(width: int = 4, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network after two steps, so that momentum and running statistics are not trivial."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    model[1].register_buffer("xi", torch.rand(width))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    model, optimizer = trained()
    checkpoint.save(path, model, optimizer, Position(epoch=3, step=7, loss_sum=0.1, history=[{"epoch": 1}]), ESSENCE)
    return path


def test_everything_comes_back_bit_for_bit(saved: Path) -> None:
    model, optimizer = trained()
    draws = torch.rand(5)  # what the generator gives after saving
    other, other_optimizer = trained(seed=1)
    content = checkpoint.read(saved)
    position = checkpoint.restore(saved, content, other, other_optimizer)
    assert position == Position(epoch=3, step=7, loss_sum=0.1, history=[{"epoch": 1}])
    assert content["essence"] == ESSENCE
    assert torch.equal(torch.rand(5), draws)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], other_optimizer.state[b]["momentum_buffer"])


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(saved: Path, part: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(part * len(data))])
    with pytest.raises(TrainingError, match="truncated, corrupt"):
        checkpoint.read(saved)


def test_flipped_bits_in_the_weights_are_noticed(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    weights = trained()[0][0].weight.detach().numpy().tobytes()
    data[data.index(weights) + 5] ^= 0x40
    saved.write_bytes(data)
    with pytest.raises(TrainingError, match="truncated, corrupt"):
        checkpoint.read(saved)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1]), pickle.dumps({"format": 1})])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(TrainingError):
        checkpoint.read(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": 99}, path)
    with pytest.raises(TrainingError, match="not written by this version"):
        checkpoint.read(path)


class Trap:
    """An object whose unpickling would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.target,))


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    path, target = tmp_path / "checkpoint.pt", tmp_path / "sprung"
    buffer = io.BytesIO()
    torch.save({"format": 1, "model": Trap(target)}, buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(TrainingError):
        checkpoint.read(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # so the trap works


def test_other_options_are_refused_by_name_and_value() -> None:
    checkpoint.check_essence(Path("run"), ESSENCE, dict(ESSENCE))
    with pytest.raises(ConfigError, match=r"cannot resume run: lr was 0\.1, now 0\.2; clip was None, now 1\.0\."):
        checkpoint.check_essence(Path("run"), ESSENCE, {**ESSENCE, "lr": 0.2, "clip": 1.0})
    with pytest.raises(ConfigError, match="extra was None, now 1"):
        checkpoint.check_essence(Path("run"), ESSENCE, {**ESSENCE, "extra": 1})


def test_state_of_another_network_is_refused(saved: Path) -> None:
    model, optimizer = trained(width=5)
    with pytest.raises(TrainingError, match="does not fit this network"):
        checkpoint.restore(saved, checkpoint.read(saved), model, optimizer)


def test_failed_write_keeps_the_older_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        checkpoint.save(saved, *trained(seed=2), Position(), ESSENCE)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
