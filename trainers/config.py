"""What a training run takes: its options, the papers' values for what is not given, and the learning rate.

Nothing here imports torch, so that the command line can read the options at no cost.
"""

from __future__ import annotations

import bisect
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

METHOD_OPTIONS = (
    "lambda_", "penalty", "every", "init_gamma", "direction", "layers", "prox", "prune_ratio", "prune_ratio_start",
    "scope", "rounds", "retrain_epochs", "rewind", "samples", "alpha", "conv_alpha", "variant", "rho", "fw_steps",
    "norm_share", "coupled", "residual",
)  # fmt: skip
"""Options that only some methods take; each method says which (its dataclass fields)."""

INCIDENTAL = (
    "output", "data_dir", "download", "memory", "workers", "device", "tensorboard", "checkpoint_every", "resume",
    "force",
)  # fmt: skip
"""Options that leave the result as it is, up to the device's rounding: a resumed run may change them."""

BEST, BOARD = "best.pt", "tensorboard"
"""What ``early_stop`` and ``tensorboard`` leave in the run folder: a file and a folder."""

TEMPERATURE = 4.0
"""Of distillation: the teacher is almost certain on images that it was trained on."""

WARMUP = 0.05
"""Part of a distillation over which the rate rises."""

ADAM_L2_RATE = 1e-3
"""Of Adam as it is usually taken: the size of a step, whatever the tensor."""

ADAM_RATE = 3e-3
"""Part of a tensor's size that a step of Adam may change at first."""

DISTILLING_RATE = 6e-3
"""The same for learning from a teacher, whose answers are a steadier aim than labels."""

CUTMIX = 0.7
"""Part of the images that distillation shows with a patch of another one."""

SHOWN = 100_000
"""Images, repetitions counted, that distillation shows when the number of epochs is not given."""

LONG_TRAINED = ("vgg", "resnet", "preresnet", "densenet")
"""Families that the papers train for 160 epochs."""


class TrainConfig(BaseModel):
    """Options of ``prune-onnx train``; field names are the flags' names with underscores (``lambda_`` for ``lambda``).

    ``None`` means: the paper's value for this network, see :func:`resolve`.

    Attributes:
        model: a listed network, ``"package.module:factory"``, or an ONNX file, whose weights are trained on and which
            is written back with the same graph.
        dataset: a listed data set.
        method: a listed method; plain without one.
        output: the run folder.
        reinit: an ONNX file: draw its weights anew and train the net from scratch. With the ``epochs`` of the dense net
            this is Scratch-E.
        budget_of: with ``reinit``, the ONNX file of the dense net: train until as much has been computed as its
            ``epochs`` would take, which is Scratch-B. ``stretch`` is then the quotient of the MACs.
        stretch: the run is this many times ``epochs`` long.
        init: weights to start from in the place of fresh ones: a run folder, a checkpoint.pt, or a state_dict (.pt) of
            the network. Pruning methods then prune before the first epoch.
        teacher: an ONNX file whose answers are learnt in the place of labels (distillation).
        temperature: softens the answers of ``teacher``; 4.
        data: images of your own in the place of ``dataset``: a folder of pictures, an .npz or an .npy. They need no
            labels when there is a ``teacher``; a tenth of them is kept for the test.
        train_size: take this many of the training images, those that slim's calibration takes for the same seed.
        epochs: passes over the training set; 160 for VGG, ResNet and DenseNet with fresh weights, with ``teacher`` as
            many as show 100,000 images, else 20.
        batch_size: images a step.
        optimizer: ``sgd``, ``adam`` with steps relative to the size of each tensor and decoupled weight decay, or
            ``adam-l2``, whose decay is part of the gradient, as in the papers; adam for trained weights (``init``, ONNX
            files), else sgd.
        lr: initial learning rate; of SGD 0.1 with BatchNorm, 0.01 without or for trained weights; of adam 0.003, or
            0.006 with ``teacher``; of adam-l2 0.001.
        momentum: of SGD.
        nesterov: Nesterov's form of the momentum.
        weight_decay: on all parameters, BatchNorm's included, as in the papers.
        norm_decay: ``False`` takes BatchNorm's parameters out of the weight decay.
        schedule: ``step`` multiplies the rate by ``lr_decay`` at each milestone; ``cosine`` falls to 0, and is meant
            for ONNX files.
        milestones: fractions of the run.
        lr_decay: factor of the step schedule.
        warmup_epochs: epochs, or a part of one, over which the rate rises linearly from 0; a twentieth
            of the run with ``teacher``, else 0.
        clip: largest norm of the gradient; ``None`` does not clip.
        lambda_: strength of the sparse term.
        penalty: proximal-ns: the coefficient that couples scale and auxiliary variable (the paper's beta).
        every: proximal-ns: update after each ``step`` (what makes channels die) or each ``epoch`` (as printed).
        init_gamma: initial BatchNorm scale; ``None`` is the method's (0.5), and for ``plain`` the network's own.
        direction: group regularisers: groups are a layer's output ``neuron`` or its input ``feature`` channels.
        layers: group regularisers: ``conv``, as in the papers, or ``all``, linear layers too.
        prox: group-lasso: the exact group soft-threshold instead of the gradient.
        prune_ratio: fraction of weights, or of filters, that are zero in the end.
        prune_ratio_start: frank-wolfe-momentum: where the schedule of ratios starts.
        scope: rank weights or filters over the network (``global``) or within each ``layer``.
        rounds: how often the network is pruned; each time retraining follows, with the schedule from its beginning.
        retrain_epochs: length of each retraining; what is left of ``epochs`` comes before the first pruning.
        rewind: nnrelief, backward-selection: retrain from the initial weights.
        samples: training images from which pruning scores are computed.
        alpha: nnrelief: share of a neuron's signal that is kept, in linear layers.
        conv_alpha: nnrelief: likewise, in convolutions.
        variant: form of the method, where it has several; its documentation lists them.
        rho: frank-wolfe-momentum, sfw: weight of the past in the average of gradients.
        fw_steps: frank-wolfe methods: Frank-Wolfe steps in each pruning.
        norm_share: fpgm-mix: part of ``prune_ratio`` that goes by the norm instead of the distance.
        coupled: methods that prune filters: those that meet others in a sum, as in a ResNet, go together with them.
        residual: nnrelief: channels of residual blocks that add next to nothing to the shortcut go; on for ResNets.
        augment: ``none``, ``shift`` (1 or 2 pixels), ``flip``, ``flip-crop``; ``None`` is the data set's own.
        cutmix: part of the images into which a patch of another one is pasted; 0.7 with ``teacher``, who alone knows
            what they show then.
        validation: fraction of the training set that is held out, for every choice; 0 holds out none. 0.1, but 0 with
            ``teacher``.
        width: width multiplier of the network.
        data_dir: folder of the data files.
        download: fetch missing files.
        memory: GiB of pictures that are read into memory; larger folders are read by ``workers`` as they are needed.
        workers: processes that read pictures which do not fit into ``memory``.
        mean: per channel, of pixel/255; ``None`` is the data set's own.
        std: per channel, of pixel/255.
        seed: of initialisation, split, order, augmentation and the method's draws.
        device: ``auto`` is CUDA when there is one.
        precision: ``bf16`` runs the network in mixed precision.
        compile: let torch.compile make faster code of the network; the first step then takes a minute or so.
        channels_last: hold images with their channels last, which tensor cores and many CPUs are faster with.
        sync_bn: under torchrun: BatchNorm normalises by the whole batch, not by each process's share of it.
        early_stop: end the run after this many epochs without a higher validation accuracy; the network is then the
            best epoch's. Epochs before the last pruning do not count.
        tensorboard: write what each epoch says for TensorBoard, too.
        checkpoint_every: steps between checkpoints inside an epoch; ``None`` saves after each epoch only.
        resume: go on from the run folder's checkpoint.
        force: replace an existing run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    model: str
    dataset: str | None = None
    method: str = "plain"
    output: Path
    reinit: bool = False
    budget_of: Path | None = None
    stretch: Positive | None = None
    init: Path | None = None
    teacher: Path | None = None
    temperature: Positive | None = None
    data: Path | None = None
    train_size: Annotated[int, Field(ge=2)] | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=2)] = 64
    optimizer: Literal["sgd", "adam", "adam-l2"] | None = None
    lr: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 1e-4
    norm_decay: bool = True
    schedule: Literal["step", "cosine", "constant"] | None = None
    milestones: tuple[Share, ...] = (0.5, 0.75)
    lr_decay: Share = 0.1
    warmup_epochs: NotNegative | None = None
    clip: Positive | None = None
    lambda_: NotNegative | None = Field(default=None, alias="lambda")
    penalty: Positive | None = None
    every: Literal["step", "epoch"] | None = None
    init_gamma: Positive | None = None
    direction: Literal["neuron", "feature"] | None = None
    layers: Literal["conv", "all"] | None = None
    prox: bool | None = None
    prune_ratio: Share | None = None
    prune_ratio_start: Annotated[float, Field(ge=0, lt=1)] | None = None
    scope: Literal["global", "layer"] | None = None
    rounds: Annotated[int, Field(ge=1)] | None = None
    retrain_epochs: Annotated[int, Field(ge=1)] | None = None
    rewind: bool | None = None
    samples: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    conv_alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    variant: str | None = None
    rho: Annotated[float, Field(ge=0, lt=1)] | None = None
    fw_steps: Annotated[int, Field(ge=1)] | None = None
    norm_share: Annotated[float, Field(ge=0, le=1)] | None = None
    coupled: bool | None = None
    residual: bool | None = None
    augment: Literal["none", "shift", "flip", "flip-crop"] | None = None
    cutmix: Annotated[float, Field(ge=0, le=1)] | None = None
    validation: Annotated[float, Field(ge=0, le=0.5)] | None = None
    width: Positive = 1.0
    data_dir: Path | None = None
    download: bool = False
    memory: NotNegative = 4.0
    workers: Annotated[int, Field(ge=0)] = 4
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    channels_last: bool = False
    sync_bn: bool = False
    early_stop: Annotated[int, Field(ge=1)] | None = None
    tensorboard: bool = False
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    resume: bool = False
    force: bool = False

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.resume and self.force:
            raise ValueError("resume and force exclude each other: go on with a run, or replace it")
        if (self.dataset is None) == (self.data is None):
            raise ValueError("give either dataset, a listed one, or data, images of your own")
        if self.reinit and not is_onnx(self.model):
            raise ValueError("reinit is for ONNX files: listed networks begin with fresh weights anyway")
        if self.budget_of is not None and not self.reinit:
            raise ValueError("budget_of is for training from scratch: it goes with reinit")
        if self.init is not None and is_onnx(self.model):
            raise ValueError("init is for listed networks and factories: an ONNX file has its weights")
        if self.temperature is not None and self.teacher is None:
            raise ValueError("temperature softens the answers of a teacher: it goes with --teacher")
        if self.cutmix and self.teacher is None:
            raise ValueError("cutmix makes images that no label fits: it goes with --teacher")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must increase")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError("mean and std must have one value per channel each")
        return self

    @property
    def starts_trained(self) -> bool:
        """Whether training goes on where another one ended."""
        return self.init is not None or (is_onnx(self.model) and not self.reinit)

    @property
    def length(self) -> int:
        """Epochs of the run; of a configuration whose ``epochs`` are known."""
        return max(1, round(self.epochs * (self.stretch or 1)))

    def essence(self) -> dict[str, Any]:
        """Return what decides the result, as JSON values under the flags' names: what a resumed run may not change."""
        return self.model_dump(mode="json", by_alias=True, exclude=set(INCIDENTAL))

    def to_toml(self) -> str:
        """Return the options as TOML that ``--config`` reads back; ``resume`` and ``force`` are left to the command."""
        values = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"resume", "force"})
        # JSON's strings, numbers, booleans and arrays of them are TOML's as well, but for one character.
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
        return "".join(lines).replace("\x7f", "\\u007F")


def is_onnx(model: str) -> bool:
    """Return whether ``--model`` names an ONNX file."""
    return model.lower().endswith(".onnx")


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
        restarts: epochs, counted from 0, before which the network is pruned and the schedule starts anew. What lies
            between two of them has milestones, cosine and warm-up of its own.
    """

    lr: float
    steps_per_epoch: int
    epochs: int
    kind: str = "step"
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    warmup_epochs: float = 0.0
    restarts: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: TrainConfig, images: int) -> Schedule:
        """Return the schedule of a resolved ``config`` over ``images`` training images."""
        return cls(
            lr=config.lr,
            steps_per_epoch=steps_per_epoch(images, config.batch_size),
            epochs=config.length,
            kind=config.schedule or "step",
            milestones=config.milestones,
            decay=config.lr_decay,
            warmup_epochs=config.warmup_epochs or 0.0,
            restarts=_restarts(config),
        )

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def at(self, step: int) -> float:
        """Return the learning rate of step ``step``, counted from 0 over the whole run."""
        bounds = [0, *(epoch * self.steps_per_epoch for epoch in self.restarts), self.steps]
        index = bisect.bisect_right(bounds, step, hi=len(bounds) - 1)
        at, length = step - bounds[index - 1], bounds[index] - bounds[index - 1]
        lr = self.lr
        if self.kind == "step":
            lr *= self.decay ** sum(at >= milestone * length for milestone in self.milestones)
        elif self.kind == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * at / length))
        warmup = self.warmup_epochs * self.steps_per_epoch
        return lr * min(1.0, (at + 1) / warmup) if warmup else lr


def _restarts(config: TrainConfig) -> tuple[int, ...]:
    """Return the epochs before which the method prunes; none as long as they are open."""
    if config.rounds is None or config.retrain_epochs is None:
        return ()
    return tuple(range(config.length - config.rounds * config.retrain_epochs, config.length, config.retrain_epochs))


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
    tuned = config.starts_trained
    optimizer = config.optimizer or ("adam" if tuned else "sgd")
    epochs = config.epochs or _usual_epochs(config, images)
    rates = {
        "sgd": 0.1 if batch_norms(model) and not tuned else 0.01,
        "adam": DISTILLING_RATE if config.teacher else ADAM_RATE,
        "adam-l2": ADAM_L2_RATE,
    }
    found: dict[str, Any] = {
        "epochs": epochs,
        "warmup_epochs": WARMUP * epochs * (config.stretch or 1) if config.teacher else 0.0,
        "optimizer": optimizer,
        "schedule": "cosine" if tuned else "step",
        "lr": rates[optimizer],
        "validation": usual_validation(config),
        "temperature": TEMPERATURE if config.teacher else None,
        "augment": augment,
        "cutmix": CUTMIX if config.teacher else 0.0,
        "mean": tuple(map(float, mean)),
        "std": tuple(map(float, std)),
    }
    chosen = _fill(config, found)
    return _fill(chosen, method.defaults(chosen, Schedule.of(chosen, images)))


def usual_validation(config: TrainConfig) -> float:
    """Return the fraction of images that is held out, the given one or the usual one."""
    if config.validation is not None:
        return config.validation
    return 0.0 if config.teacher else 0.1


def _usual_epochs(config: TrainConfig, images: int) -> int:
    """Return how long a run is when not told."""
    if config.teacher:
        return max(20, math.ceil(SHOWN / images))
    family = config.model.rpartition(":")[2].lower()
    return 160 if family.startswith(LONG_TRAINED) and not config.starts_trained and not is_onnx(config.model) else 20


def _fill(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """Return ``config`` with ``values`` where it has ``None``."""
    return config.model_copy(update={key: value for key, value in values.items() if getattr(config, key) is None})
