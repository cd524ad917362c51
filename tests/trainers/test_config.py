"""Options of a run: what is refused, what is filled in, the learning rate, and that TOML gives them back."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.config import (
    ADAM_L2_RATE,
    ADAM_RATE,
    CUTMIX,
    DISTILLING_RATE,
    INCIDENTAL,
    METHOD_OPTIONS,
    SHOWN,
    WARMUP,
    Schedule,
    TrainConfig,
    resolve,
    steps_per_epoch,
)
from prune_onnx.trainers.methods import METHODS, method_class

NEEDED = {"model": "bn-cnn", "dataset": "digits", "method": "plain", "output": "run"}
NORMED = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def config(**options: object) -> TrainConfig:
    return TrainConfig(**{**NEEDED, **options})


def resolved(model: nn.Module = NORMED, images: int = 1000, **options: object) -> TrainConfig:
    return resolve(config(**options), model, images=images, augment="shift", mean=(0.3,), std=(0.4,))


def test_reading_the_options_does_not_import_torch() -> None:
    code = "import sys, prune_onnx.trainers.config, prune_onnx.trainers.methods; assert 'torch' not in sys.modules"
    typing = Path(__file__).parents[2] / ".typing"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(typing)})


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0},
        {"lr": math.inf},
        {"momentum": 1.0},
        {"lambda": -1},
        {"validation": 0.9},
        {"milestones": (0.7, 0.5)},
        {"milestones": (1.5,)},
        {"mean": (0.5,)},
        {"mean": (0.5,), "std": (0.1, 0.2)},
        {"std": (0.0,), "mean": (0.0,)},
        {"resume": True, "force": True},
        {"learning_rate": 0.1},
        {"schedule": "linear"},
        {"data": "images"},
        {"dataset": None},
        {"reinit": True},
        {"budget_of": "dense.onnx", "model": "a.onnx"},
        {"stretch": 0},
        {"temperature": 2.0},
        {"cutmix": 0.5},
        {"cutmix": 1.5, "teacher": "b.onnx"},
        {"train_size": 1},
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config(**options)


def test_lambda_has_its_own_name_outside_python() -> None:
    assert config(**{"lambda": 0.1}) == config(lambda_=0.1)
    assert config(lambda_=0.1).essence()["lambda"] == 0.1


@given(st.text(min_size=1), st.floats(1e-9, 1e3), st.booleans())
def test_toml_gives_the_options_back(name: str, lr: float, nesterov: bool) -> None:
    given = config(
        model=name, lr=lr, nesterov=nesterov, data_dir=Path("a b/c"), mean=(0.1, 0.2), std=(1e-5, 2.0), lambda_=lr
    )
    assert TrainConfig(**tomllib.loads(given.to_toml())) == given


def test_toml_never_says_resume_or_force() -> None:
    assert not {"resume", "force"} & tomllib.loads(config(force=True).to_toml()).keys()


def test_what_only_says_where_and_how_is_not_essence() -> None:
    moved = config(output="other", device="cpu", checkpoint_every=3, download=True, data_dir="x", resume=True)
    assert moved.essence() == config().essence()
    assert set(INCIDENTAL) <= set(TrainConfig.model_fields)


@pytest.mark.parametrize("name", METHODS.names())
def test_resolving_leaves_nothing_open_and_twice_is_once(name: str) -> None:
    once = resolved(method=name, init="run" if name == "fine-tune" else None)
    for option in ("epochs", "lr", "augment", "mean", "std", *method_class(name).options()):
        assert getattr(once, option) is not None or (name, option) == ("plain", "init_gamma")
    again = resolve(once, NORMED, images=1000, augment="none", mean=(0.9,), std=(0.9,))
    assert again == once


def test_defaults_follow_the_network() -> None:
    assert resolved(model=NORMED).lr == 0.1
    assert resolved(model=nn.Linear(2, 2)).lr == 0.01
    assert resolved(model=NORMED).epochs == 20
    assert resolve(config(model="vgg16"), NORMED, images=99, augment="none", mean=(0,), std=(1,)).epochs == 160


def of_file(images: int = 1000, **options: object) -> TrainConfig:
    return resolve(config(**{"model": "a.ONNX", **options}), NORMED, images=images, augment="none", mean=(0,), std=(1,))


def test_defaults_of_an_onnx_file_go_on_where_its_training_ended() -> None:
    tuned, fresh = of_file(), of_file(model="resnet20.onnx", reinit=True)
    assert (tuned.optimizer, tuned.schedule, tuned.epochs, tuned.lr) == ("adam", "cosine", 20, ADAM_RATE)
    assert (fresh.optimizer, fresh.schedule, fresh.epochs, fresh.lr) == ("sgd", "step", 20, 0.1)
    assert of_file(optimizer="sgd").lr == 0.01
    assert tuned.validation == 0.1


def test_adam_as_published_has_its_own_rate() -> None:
    assert resolved(optimizer="adam-l2").lr == of_file(optimizer="adam-l2").lr == ADAM_L2_RATE


def test_a_stretched_run_has_that_many_epochs_and_prunes_as_late() -> None:
    scratch = of_file(model="a.onnx", reinit=True, epochs=10, stretch=2.26)
    assert (scratch.epochs, scratch.length, Schedule.of(scratch, 1000).epochs) == (10, 23, 23)
    pruned = of_file(model="a.onnx", reinit=True, epochs=10, stretch=2.26, method="magnitude")
    assert (pruned.retrain_epochs, Schedule.of(pruned, 1000).restarts) == (11, (12,))
    assert of_file(epochs=1, stretch=0.1).length == 1
    assert of_file(epochs=3).length == 3


def test_a_teacher_needs_no_validation_images_and_shows_a_fixed_number() -> None:
    few, many = (of_file(images, teacher=Path("b.onnx")) for images in (1000, 10**6))
    assert few.validation == 0
    assert few.epochs * 1000 == SHOWN
    assert many.epochs == 20
    assert few.temperature is not None
    assert few.cutmix == CUTMIX
    assert of_file(1000).cutmix == 0
    assert few.lr == DISTILLING_RATE
    assert few.warmup_epochs == WARMUP * few.epochs


def test_what_is_given_is_taken_as_it_is() -> None:
    given = {
        "method": "proximal-ns", "lambda": 1e-9, "penalty": 3.0, "every": "epoch", "init_gamma": 0.7, "lr": 0.3,
        "epochs": 2, "augment": "none", "mean": (0.0,), "std": (1.0,), "optimizer": "adam", "schedule": "constant",
        "validation": 0.2, "warmup_epochs": 0.5, "cutmix": 0.0,
    }  # fmt: skip
    assert resolved(**given) == config(**given)


@pytest.mark.parametrize("name", METHODS.names())
def test_an_option_of_another_method_is_refused(name: str) -> None:
    values = {
        "lambda_": 0.1, "penalty": 1.0, "every": "step", "init_gamma": 0.5, "direction": "neuron", "layers": "all",
        "prox": True, "prune_ratio": 0.6, "prune_ratio_start": 0.1, "scope": "layer", "rounds": 2, "retrain_epochs": 3,
        "rewind": False, "samples": 77, "alpha": 0.7, "conv_alpha": 0.8, "rho": 0.3, "fw_steps": 4, "norm_share": 0.3,
        "coupled": True, "residual": True,
        "variant": getattr(method_class(name), "VARIANTS", ("x",))[-1],
    }  # fmt: skip
    assert values.keys() == set(METHOD_OPTIONS)
    for option, value in values.items():
        if option in method_class(name).options():
            assert getattr(resolved(method=name, **{option: value}), option) == value
        else:
            with pytest.raises(ConfigError, match=f"takes no option '{option.rstrip('_')}'"):
                resolved(method=name, **{option: value})


def test_statistics_for_other_channels_and_too_few_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="mean has 3 values, but the images have 1"):
        resolved(mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(ConfigError, match="1 training images are too few"):
        resolved(images=1)


# The schedule


def test_step_schedule_is_the_papers() -> None:
    schedule = Schedule.of(config(model="vgg19", epochs=160, lr=0.1), 50_000)
    assert schedule.steps_per_epoch == 782
    rates = [schedule.at(epoch * 782) for epoch in range(160)]
    assert rates == [0.1] * 80 + [pytest.approx(0.01)] * 40 + [pytest.approx(0.001)] * 40
    assert schedule.at(80 * 782 - 1) == 0.1


def test_cosine_falls_from_lr_towards_zero_and_stays_above() -> None:
    schedule = Schedule(lr=0.2, steps_per_epoch=7, epochs=3, kind="cosine")
    rates = [schedule.at(step) for step in range(schedule.steps)]
    assert rates[0] == 0.2
    assert all(a > b > 0 for a, b in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(0.2 * 0.5 * (1 + math.cos(math.pi * 20 / 21)))


def test_warmup_rises_linearly_into_the_schedule() -> None:
    bare = Schedule(lr=0.1, steps_per_epoch=10, epochs=4)
    warm = Schedule(lr=0.1, steps_per_epoch=10, epochs=4, warmup_epochs=0.5)
    assert [warm.at(step) for step in range(5)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert all(warm.at(step) == bare.at(step) for step in range(4, 40))


@given(st.integers(2, 500), st.integers(2, 64))
def test_an_epoch_leaves_out_at_most_one_image_and_never_trains_on_one_alone(images: int, batch_size: int) -> None:
    steps = steps_per_epoch(images, batch_size)
    used = min(images, steps * batch_size)
    assert images - used <= 1
    assert used - (steps - 1) * batch_size >= 2
