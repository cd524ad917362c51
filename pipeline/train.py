"""The ``train`` stage: from the names of a network, a data set and a method to an ONNX file with its history.

The run folder holds ``model.onnx`` (BatchNorm kept), ``config.toml`` (every option with the value that was used; it can
be given back to ``train``), ``metrics.jsonl`` (one line an epoch), ``checkpoint.pt`` (the training state before the
method's ``finish``), ``environment.json`` and, once all is done, ``result.json``.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_onnx.graph_ops.errors import ConfigError, ModelError, OutputError
from prune_onnx.graph_ops.files import check_output, write_text
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.progress import SILENT, Progress
from prune_onnx.trainers.config import BEST, BOARD, TrainConfig, is_onnx, resolve, usual_validation
from prune_onnx.trainers.data import DATASETS, Dataset
from prune_onnx.trainers.methods import METHODS, method_class
from prune_onnx.trainers.models import MODELS, build_model

from .environment import capture
from .onnx_training import (
    in_memory,
    label,
    open_images,
    open_network,
    open_teacher,
    save_network,
    saved_macs,
    unlabelled,
    with_recipe,
)
from .results import Model, StageResult

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from prune_onnx.trainers.batches import Batches
    from prune_onnx.trainers.distributed import Ranks

ARTIFACTS = {
    "model": "model.onnx",
    "config": "config.toml",
    "metrics": "metrics.jsonl",
    "checkpoint": "checkpoint.pt",
    "environment": "environment.json",
    "result": "result.json",
}
NOTABLE_DROP = 0.005
"""Loss of accuracy in ``finish`` from which the user is warned: half a point."""


class Accuracy(Model):
    """Fractions of correctly classified images; ``validation`` is ``None`` when no images were held out.

    Of images without labels, fractions of those on which the network agrees with its teacher.
    """

    validation: float | None
    test: float

COMPACT = "compact.onnx"
"""What methods that work on weights leave as well: the model without what became dead."""


class Sparsity(Model):
    """Channels of all BatchNorm layers, and those whose scale is exactly zero.

    Methods that work on weights add the weights of convolutions and linear layers, and those that are exactly zero.
    """

    channels: int
    dead_channels: int
    weights: int | None = None
    zero_weights: int | None = None


class TrainResult(StageResult):
    """Result of ``train``.

    Attributes:
        model: the network's name, or its ONNX file.
        dataset: the data set's name, or the user's own images.
        method: the method's name.
        teacher: the ONNX file whose answers were learnt.
        epochs: length of the run; less than what was asked for when it was ended early.
        accuracy: of the network that was exported.
        accuracy_before_finish: before the method set the scales of dead channels to zero.
        sparsity: of the network that was exported.
        artifacts: paths of the files in the run folder, by kind.
    """

    command: str = "train"
    model: str
    dataset: str
    method: str
    teacher: str | None = None
    epochs: int
    accuracy: Accuracy
    accuracy_before_finish: Accuracy
    sparsity: Sparsity
    artifacts: dict[str, str]


def train(config: TrainConfig, progress: Progress = SILENT) -> TrainResult:
    """Train a network, finish it by its method, measure it, and export it.

    The test images are looked at once, at the end. With ``config.resume`` the run folder's options hold where none is
    given, training goes on where its checkpoint is, and a run that is finished already is returned as it is.

    Raises:
        ConfigError: an unknown name, an option that does not fit, or options that differ from the resumed run's.
        DataError: a data file is missing or corrupt.
        OutputError: the run folder is taken, or cannot be written.
        ProviderError: the device is absent.
        TrainingError: training diverged, or the checkpoint cannot be read.
        ModelError: the network cannot be exported.
    """
    from prune_onnx.trainers.distributed import joined

    with joined(config.device) as ranks:
        return _train(config, ranks, progress if ranks.first else SILENT)


def _train(config: TrainConfig, ranks: Ranks, progress: Progress) -> TrainResult:
    """Do what :func:`train` says; the first of several processes writes the files."""
    began = time.perf_counter()
    _check_names(config)
    run = _check_run(config)
    config, resumed = _resumed(config, run, progress)
    if resumed and all((run / ARTIFACTS[kind]).exists() for kind in ("model", "result")):
        progress.note(f"{run} is finished already")
        return TrainResult.model_validate_json((run / ARTIFACTS["result"]).read_text(encoding="utf-8"))

    import torch

    from prune_onnx.trainers.batches import split
    from prune_onnx.trainers.distill import Distillation
    from prune_onnx.trainers.export import export_onnx
    from prune_onnx.trainers.loop import choose_device, fit, supervised
    from prune_onnx.trainers.pretrained import load_weights

    device = choose_device(config)
    with ranks.first_before_others():  # it downloads
        images = open_images(config, progress)
    config, data = with_recipe(config, in_memory(images, config, progress))
    teacher = open_teacher(config, data, device) if config.teacher else None
    if teacher is not None and unlabelled(data):
        data = label(data, teacher, config, device)
    torch.manual_seed(config.seed)
    network = _build(config, data)
    if config.init is not None and not resumed:
        load_weights(network, config.init)
    if config.budget_of is not None and config.stretch is None:
        shape = tuple(data.train_images.shape[1:])
        config = config.model_copy(update={"stretch": saved_macs(config.model, config.budget_of, shape)})
    chosen, held = split(data.train_labels, usual_validation(config), config.seed)
    config = resolve(config, network, images=len(chosen), augment=data.augment, mean=data.mean, std=data.std)
    method = method_class(config.method).of(config)
    training, validation, test = _batches(data, chosen, held, config, device)
    environment = capture()
    provenance = {key: str(getattr(config, key)) for key in ("model", "dataset", "method", "seed")}
    provenance["version"] = environment["versions"].get("prune-onnx", "unknown")
    _, *size = shape = tuple(data.train_images.shape[1:])
    recipe = Preprocessing(mean=config.mean, std=config.std, size=tuple(size))
    if ":" in config.model and not is_onnx(config.model):  # that torch cannot export it should be known in advance
        export_onnx(network, shape, None, recipe, provenance)
    ranks.wait()  # every process has looked at the run folder
    if not resumed and ranks.first:
        _open_run(run, config, environment)

    loss = supervised
    if teacher is not None:
        example, _ = next(training.in_order(2))
        loss = Distillation(teacher, network, config.temperature, example, bf16=config.precision == "bf16")
    history = fit(network, method, config, training, validation, run=run, loss=loss, progress=progress)
    before = _measure(network, validation, test)
    trained = {name: value.clone() for name, value in network.state_dict().items()}
    sparsity = Sparsity(**method.finish(network))
    changed = any(not value.equal(trained[name]) for name, value in network.state_dict().items())
    after = _measure(network, validation, test) if changed else before
    _compare(before, after, config.method, progress)
    if ranks.first:
        if is_onnx(config.model):
            save_network(network, run / ARTIFACTS["model"], recipe)
        else:
            export_onnx(network, shape, run / ARTIFACTS["model"], recipe, provenance)
    artifacts = {kind: str(run / name) for kind, name in ARTIFACTS.items()}
    if ranks.first and sparsity.zero_weights:
        artifacts["compact"] = str(_compact(run, progress))
    result = TrainResult(
        seconds=time.perf_counter() - began,
        environment=environment,
        model=config.model,
        dataset=data.name,
        method=config.method,
        teacher=None if config.teacher is None else str(config.teacher),
        epochs=len(history),
        accuracy=after,
        accuracy_before_finish=before,
        sparsity=sparsity,
        artifacts=artifacts,
    )
    if ranks.first:
        result.write(run / ARTIFACTS["result"])
    return result


def _compact(run: Path, progress: Progress) -> Path:
    """Finish a method that works on weights: write the model without the channels that their zeros made dead."""
    from .slim import slim
    from .slim_schema import SlimConfig

    small = run / COMPACT
    result = slim(SlimConfig(input=run / ARTIFACTS["model"], output=small, force=True))
    progress.note(f"{small}: {result.removed.channels:,} channels that became dead are gone, exactly")
    return small


def _check_names(config: TrainConfig) -> None:
    """Refuse unknown names before anything is imported or read.

    Raises:
        ConfigError: with close matches.
    """
    METHODS.get(config.method)
    if config.dataset is not None:
        DATASETS.get(config.dataset)
    if ":" not in config.model and not is_onnx(config.model):
        MODELS.get(config.model)


def _check_run(config: TrainConfig) -> Path:
    """Return the run folder, if it may be used.

    Raises:
        OutputError: it holds a run already, or cannot be written.
    """
    run = config.output
    for name in ARTIFACTS.values():
        check_output(run / name, force=True)
    own = {run.resolve(), *((run / ARTIFACTS[kind]).resolve() for kind in ("model", "checkpoint"))}
    for file in (config.model, config.teacher, config.init, config.budget_of):
        if file is not None and Path(file).resolve() in own:
            raise OutputError(f"{file} is where this run would write its own model. Give another run folder.")
    taken = [name for name in ARTIFACTS.values() if (run / name).exists()]
    if taken and not (config.resume or config.force):
        raise OutputError(
            f"{run} holds a training run already ({', '.join(taken)}). "
            "Pass --resume to go on with it, --force to replace it, or another folder."
        )
    return run


def _resumed(config: TrainConfig, run: Path, progress: Progress) -> tuple[TrainConfig, bool]:
    """Return the options of the run to go on with, and whether there is one.

    What is not given is as the run has it; what is given must agree.
    """
    path = run / ARTIFACTS["checkpoint"]
    if not config.resume:
        return config, False
    if not path.exists():
        progress.note(f"{run} has no checkpoint yet: training starts at the beginning")
        return config, False
    from prune_onnx.trainers import checkpoint

    essence = checkpoint.read(path)["essence"]
    given = config.model_dump(by_alias=True, exclude_unset=True, exclude_none=True)
    config = TrainConfig(**{**essence, **given})
    checkpoint.check_essence(run, essence, config.essence())
    return config, True


def _build(config: TrainConfig, data: Dataset) -> nn.Module:
    """Return the network, after it has shown that it takes the images.

    Raises:
        ConfigError: an unknown name, or a network for images of another size.
    """
    import torch

    shape = tuple(data.train_images.shape[1:])
    if is_onnx(config.model):
        if config.width != 1:
            raise ConfigError(f"--width {config.width:g} does not apply: {config.model} has its widths.")
        network = open_network(config.model, shape, reinit=config.reinit)
    else:
        network = build_model(config.model, data.num_classes, shape, config.width)
    size = "x".join(map(str, shape))
    try:
        with torch.no_grad():
            logits = network.eval()(torch.zeros(2, *shape))
    except (RuntimeError, ModelError) as error:
        raise ConfigError(
            f"network {config.model!r} cannot take the {size} images of {data.name!r}: {error}"
        ) from error
    if tuple(logits.shape) != (2, data.num_classes):
        raise ConfigError(
            f"network {config.model!r} gives outputs of shape {tuple(logits.shape)} for 2 images, "
            f"but {data.name!r} needs (2, {data.num_classes})."
        )
    return network


def _batches(
    data: Dataset, chosen: np.ndarray, held: np.ndarray, config: TrainConfig, device: torch.device
) -> tuple[Batches, Batches | None, Batches]:
    """Return training, validation and test images on the device; validation is ``None`` when none is held out."""
    from prune_onnx.trainers.batches import Batches

    options = {
        "mean": config.mean, "std": config.std, "seed": config.seed, "device": device, "workers": config.workers,
    }  # fmt: skip
    images, labels = data.train_images, data.train_labels
    return (
        Batches(images[chosen], labels[chosen], augment=config.augment, cutmix=config.cutmix, **options),
        Batches(images[held], labels[held], **options) if len(held) else None,
        Batches(data.test_images, data.test_labels, **options),
    )


def _open_run(run: Path, config: TrainConfig, environment: dict[str, Any]) -> None:
    """Take an older run away and write what describes the new one."""
    for name in (*ARTIFACTS.values(), COMPACT, BEST):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / BOARD, ignore_errors=True)
    write_text(run / ARTIFACTS["config"], config.to_toml())
    write_text(run / ARTIFACTS["environment"], json.dumps(environment, indent=2) + "\n")


def _measure(network: nn.Module, validation: Batches | None, test: Batches) -> Accuracy:
    from prune_onnx.trainers.loop import evaluate

    return Accuracy(
        validation=None if validation is None else evaluate(network, validation)[1],
        test=evaluate(network, test)[1],
    )


def _compare(before: Accuracy, after: Accuracy, method: str, progress: Progress) -> None:
    """Warn when setting dead channels' scales to zero cost accuracy."""
    kind = "test" if before.validation is None else "validation"
    old, new = getattr(before, kind), getattr(after, kind)
    if old - new > NOTABLE_DROP:
        progress.warn(
            f"{method}: setting the scales of dead channels to zero took {kind} accuracy from {old:.2%} to {new:.2%}. "
            "Train longer, or raise --penalty."
        )
