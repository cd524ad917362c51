"""Weights to start from: those of another run, or of a file that torch wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.errors import ConfigError, TrainingError
from prune_onnx.graph_ops.graph import tensor_value

COUNTER = "num_batches_tracked"
"""BatchNorm's buffer that ONNX does not have; it matters with cumulative averages only."""

CONTAINERS = ("model", "state_dict", "model_state_dict")
"""Where checkpoints, ours first, keep the network's state."""


def load_weights(network: nn.Module, source: Path) -> None:
    """Set a network's parameters and buffers, in place.

    Args:
        network: of the same architecture.
        source: a run folder, whose ``model.onnx`` has what the run's method made of the weights; such a file itself; or
            a checkpoint or state dictionary (.pt, .pth). Entries that the network has not are passed over: a method's
            own buffers.

    Raises:
        ConfigError: no such file, or weights of another network.
        ModelError: an ONNX file that cannot be read.
        TrainingError: a file of torch that cannot be read.
    """
    path = source / "model.onnx" if source.is_dir() else source
    if not path.is_file():
        raise ConfigError(f"init: {path} does not exist. Give a run folder, its checkpoint.pt or another state_dict.")
    found = _from_onnx(path) if path.suffix.lower() == ".onnx" else _from_torch(path)
    state = network.state_dict()
    for name, value in state.items():
        if name not in found and not name.endswith(COUNTER):
            raise ConfigError(f"init: {path} has no weights {name!r}: they are of another network than this one.")
        if name in found and found[name].shape != value.shape:
            sizes = ["x".join(map(str, tensor.shape)) or "a single number" for tensor in (found[name], value)]
            raise ConfigError(f"init: {name!r} is {sizes[0]} in {path}, but {sizes[1]} in this network.")
    network.load_state_dict({name: found[name] for name in state if name in found}, strict=False)


def _from_onnx(path: Path) -> dict[str, torch.Tensor]:
    """Return the initializers, which :mod:`.export` names after the network's parameters."""
    model = model_io.load(path)
    return {tensor.name: torch.from_numpy(tensor_value(tensor).copy()) for tensor in model.graph.initializer}


def _from_torch(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint or state dictionary. Nothing in the file is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen unrelated types, by where the damage is
        raise TrainingError(f"init: {path} cannot be read: it is damaged, or no state_dict of tensors.") from error
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    values = content if isinstance(content, dict) else {}
    return {str(k).removeprefix("module."): value for k, value in values.items() if isinstance(value, torch.Tensor)}
