"""Checkpoints: everything that a run needs to go on as if it had never stopped, in one file that is whole or absent."""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError, TrainingError
from prune_onnx.graph_ops.files import write_bytes

FORMAT = 2
"""Raised when the content or the options' names change."""

KEYS = {"essence", "position", "model", "optimizer", "rng"}


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the epoch in progress.
        loss_sum: sum over those steps of loss times images.
        images: images of those steps.
        seconds: wall time of those steps.
        history: one record for each finished epoch.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    images: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def rng() -> dict[str, Any]:
    """Return the state of this process's generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    essence: dict[str, Any],
    states: list[dict[str, Any]] | None = None,
) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file; an older one stays until the new one is complete.
        model: parameters and buffers, a method's auxiliary variables among them.
        optimizer: momentum buffers.
        position: where the run is. Order and augmentation follow from it and the seed (see :mod:`.batches`), the
            learning rate likewise.
        essence: the options that decide the result (:meth:`~.config.TrainConfig.essence`).
        states: of each process's generators; default: of this one's alone.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "essence": essence,
        "position": asdict(position),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": states or [rng()],
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content, on the CPU. Nothing in the file is executed.

    Raises:
        TrainingError: the file is corrupt, truncated, or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes a zip file, but does not look at its checksums
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises half a dozen unrelated types, by where the damage is
        content = None
    if content is None:
        raise TrainingError(
            f"checkpoint {path} cannot be read: it is truncated, corrupt or no checkpoint. "
            "Restore it, or start the run again with --force."
        )
    if not isinstance(content, dict) or content.get("format") != FORMAT or KEYS - content.keys():
        raise TrainingError(f"checkpoint {path} was not written by this version of prune-onnx.")
    return content


def check_essence(path: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to go on with a run under other options.

    Raises:
        ConfigError: the options differ; the message says which, and how.
    """
    differing = [
        f"{key} was {saved.get(key)!r}, now {asked.get(key)!r}"
        for key in dict.fromkeys((*saved, *asked))
        if saved.get(key) != asked.get(key)
    ]
    if differing:
        raise ConfigError(
            f"cannot resume {path}: {'; '.join(differing)}. Give the run's own values, or another run folder."
        )


def restore(
    path: Path, content: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0
) -> Position:
    """Load a checkpoint's state into network, optimiser and torch's generators; return where the run is.

    ``rank`` is the number of this process; one that the run did not have before keeps its generators as they are.

    Raises:
        TrainingError: the state does not fit the network.
    """
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        if rank < len(content["rng"]):
            state = content["rng"][rank]
            torch.set_rng_state(state["cpu"])
            if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["cuda"])
        return Position(**content["position"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"checkpoint {path} does not fit this network: {error}") from error
