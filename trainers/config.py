"""What a training run takes: its options, the papers' values for what is not given, and the learning rate.

Nothing here imports torch, so that the command line can read the options at no cost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prune_onnx.graph_ops.errors import ConfigError

from .methods import method_class

if TYPE_CHECKING:
    from torch import nn

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]

METHOD_OPTIONS = ("lambda_", "penalty", "every", "init_gamma")
"""Options that only some methods take; each method says which (its dataclass fields)."""

INCIDENTAL = ("output", "data_dir", "download", "device", "checkpoint_every", "resume", "force")
"""Options that leave the result as it is, up to the device's rounding: a resumed run may change them."""

LONG_TRAINED = ("vgg", "resnet", "preresnet", "densenet")
"""Families that the papers train for 160 epochs."""


class TrainConfig(BaseModel):
    """Options of ``prune-onnx train``; field names are the flags' names with underscores (``lambda_`` for ``lambda``).

    ``None`` means: the paper's value for this network, see :func:`resolve`.

    Attributes:
        model: a listed network or ``"package.module:factory"``.
        dataset: a listed data set.
        method: a listed method.
        output: the run folder.
        epochs: passes over the training set; 160 for VGG, ResNet and DenseNet, else 20.
        batch_size: images a step.
        lr: initial learning rate; 0.1 with BatchNorm, 0.01 without.
        momentum: of SGD.
        nesterov: Nesterov's form of the momentum.
        weight_decay: on all parameters, BatchNorm's included, as in the papers.
        norm_decay: ``False`` takes BatchNorm's parameters out of the weight decay.
        schedule: ``step`` multiplies the rate by ``lr_decay`` at each milestone; ``cosine`` falls to 0.
        milestones: fractions of the run.
        lr_decay: factor of the step schedule.
        warmup_epochs: epochs, or a part of one, over which the rate rises linearly from 0.
        clip: largest norm of the gradient; ``None`` does not clip.
        lambda_: strength of the sparse term.
        penalty: proximal-ns: the coefficient that couples scale and auxiliary variable (the paper's beta).
        every: proximal-ns: update after each ``step`` (what makes channels die) or each ``epoch`` (as printed).
        init_gamma: initial BatchNorm scale; ``None`` is the method's (0.5), and for ``plain`` the network's own.
        augment: ``none``, ``shift`` (1 or 2 pixels), ``flip-crop``; ``None`` is the data set's own.
        validation: fraction of the training set that is held out, for every choice; 0 holds out none.
        width: width multiplier of the network.
        data_dir: folder of the data files.
        download: fetch missing files.
        mean: per channel, of pixel/255; ``None`` is the data set's own.
        std: per channel, of pixel/255.
        seed: of initialisation, split, order, augmentation and the method's draws.
        device: ``auto`` is CUDA when there is one.
        precision: ``bf16`` runs the network in mixed precision.
        checkpoint_every: steps between checkpoints inside an epoch; ``None`` saves after each epoch only.
        resume: go on from the run folder's checkpoint.
        force: replace an existing run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    model: str
    dataset: str
    method: str
    output: Path
    epochs: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 1e-4
    norm_decay: bool = True
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[Share, ...] = (0.5, 0.75)
    lr_decay: Share = 0.1
    warmup_epochs: NotNegative = 0.0
    clip: Positive | None = None
    lambda_: NotNegative | None = Field(default=None, alias="lambda")
    penalty: Positive | None = None
    every: Literal["step", "epoch"] | None = None
    init_gamma: Positive | None = None
    augment: Literal["none", "shift", "flip-crop"] | None = None
    validation: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    width: Positive = 1.0
    data_dir: Path | None = None
    download: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    resume: bool = False
    force: bool = False

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.resume and self.force:
            raise ValueError("resume and force exclude each other: go on with a run, or replace it")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must increase")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError("mean and std must have one value per channel each")
        return self

    def essence(self) -> dict[str, Any]:
        """Return what decides the result, as JSON values under the flags' names: what a resumed run may not change."""
        return self.model_dump(mode="json", by_alias=True, exclude=set(INCIDENTAL))

    def to_toml(self) -> str:
        """Return the options as TOML that ``--config`` reads back; ``resume`` and ``force`` are left to the command."""
        values = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"resume", "force"})
        # JSON's strings, numbers, booleans and arrays of them are TOML's as well, but for one character.
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
        return "".join(lines).replace("\x7f", "\\u007F")


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step alone, so that a resumed run needs no scheduler's state.

    Attributes:
        lr: initial rate.
        steps_per_epoch: optimiser steps an epoch.
        epochs: length of the run.
        kind: ``step``, ``cosine`` or ``constant``.
        milestones: fractions of the run; a half and three quarters are epochs 80 and 120 of the papers' 160.
        decay: factor at each milestone.
        warmup_epochs: length of the linear rise; the schedule itself starts at step 0 all the same.
    """

    lr: float
    steps_per_epoch: int
    epochs: int
    kind: str = "step"
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    warmup_epochs: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig, images: int) -> Schedule:
        """Return the schedule of a resolved ``config`` over ``images`` training images."""
        return cls(
            lr=config.lr,
            steps_per_epoch=steps_per_epoch(images, config.batch_size),
            epochs=config.epochs,
            kind=config.schedule,
            milestones=config.milestones,
            decay=config.lr_decay,
            warmup_epochs=config.warmup_epochs,
        )

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def at(self, step: int) -> float:
        """Return the learning rate of step ``step``, counted from 0 over the whole run."""
        lr = self.lr
        if self.kind == "step":
            lr *= self.decay ** sum(step >= milestone * self.steps for milestone in self.milestones)
        elif self.kind == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        warmup = self.warmup_epochs * self.steps_per_epoch
        return lr * min(1.0, (step + 1) / warmup) if warmup else lr


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the steps of one epoch: the last batch may be smaller, but BatchNorm cannot normalise one image alone."""
    full, rest = divmod(images, batch_size)
    return full + (rest > 1)


def resolve(
    config: TrainConfig,
    model: nn.Module,
    *,
    images: int,
    augment: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> TrainConfig:
    """Return ``config`` with a value in the place of every ``None`` (but ``clip`` and other real absences).

    Args:
        config: the options as given.
        model: the network; whether it has BatchNorm decides the default rate.
        images: size of the training set, validation images taken out.
        augment: the data set's own augmentation.
        mean: the data set's own, per channel of pixel/255.
        std: likewise.

    Raises:
        ConfigError: a network that the method does not work on, an option that it does not take, too few images, or
            statistics for another number of channels.
    """
    from .methods.scales import batch_norms  # imports torch

    method = method_class(config.method)
    method.check(model)
    for option in METHOD_OPTIONS:
        if getattr(config, option) is not None and option not in method.options():
            raise ConfigError(f"method {config.method!r} takes no option {option.rstrip('_')!r}.")
    if config.mean is not None and len(config.mean) != len(mean):
        raise ConfigError(f"mean has {len(config.mean)} values, but the images have {len(mean)} channels.")
    if steps_per_epoch(images, config.batch_size) < 1:
        raise ConfigError(f"{images} training images are too few; take less for validation, or another data set.")
    family = config.model.rpartition(":")[2].lower()
    found: dict[str, Any] = {
        "epochs": 160 if family.startswith(LONG_TRAINED) else 20,
        "lr": 0.1 if batch_norms(model) else 0.01,
        "augment": augment,
        "mean": tuple(map(float, mean)),
        "std": tuple(map(float, std)),
    }
    chosen = _fill(config, found)
    return _fill(chosen, method.defaults(chosen, Schedule.of(chosen, images)))


def _fill(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """Return ``config`` with ``values`` where it has ``None``."""
    return config.model_copy(update={key: value for key, value in values.items() if getattr(config, key) is None})
