"""Simple pruning in rounds: exact counts, which weights go and stay away, resuming, and what slim makes of it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.pipeline.train import train as train_stage
from prune_onnx.trainers.config import Schedule, TrainConfig
from prune_onnx.trainers.masks import prunable
from prune_onnx.trainers.methods.magnitude import Magnitude, prune_lowest

from .pruning_runs import attached, network, resumed_equals_uninterrupted, train


def config(**options: object) -> TrainConfig:
    return TrainConfig(**{"model": "x", "dataset": "x", "method": "magnitude", "output": "x", "epochs": 20, **options})


@given(st.floats(0.01, 0.99), st.sampled_from(["global", "layer"]), st.integers(0, 99))
def test_exactly_so_many_of_the_smallest_go(ratio: float, scope: str, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 4, (size,), generator=draws).float() for size in (7, 12, 30)]
    dead = prune_lowest(scores, ratio, scope)
    if scope == "global":
        assert sum(int(mask.sum()) for mask in dead) == round(ratio * 49)
        gone, stay = torch.cat(scores)[torch.cat(dead)], torch.cat(scores)[~torch.cat(dead)]
        assert not len(gone) or not len(stay) or gone.max() <= stay.min()
    else:
        assert [int(mask.sum()) for mask in dead] == [round(ratio * size) for size in (7, 12, 30)]


def test_the_pruning_takes_the_smallest_weights_and_only_kernels() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = attached(Magnitude(prune_ratio=0.75), model)
    method.after_epoch(0.1, 1)
    magnitudes = torch.cat([before[f"{index}.weight"].abs().flatten() for index in (0, 4, 7, 9)])
    limit = magnitudes.sort().values[round(0.75 * len(magnitudes))]
    for index in (0, 4, 7, 9):
        old = before[f"{index}.weight"]
        assert torch.equal(model[index].weight, torch.where(old.abs() < limit, 0, old))
        assert torch.equal(model[index].bias, before[f"{index}.bias"])
    assert torch.equal(model[1].weight, before["1.weight"])


def test_nothing_is_pruned_but_after_the_epochs_of_the_schedule() -> None:
    model = network()
    method = attached(Magnitude(prune_ratio=0.75), model)
    method.after_epoch(0.1, 2)
    assert method.sparsity(model)["zero_weights"] == 0


def test_ratio_rises_with_the_rounds_and_no_weight_comes_back(tmp_path: Path) -> None:
    _, method, history = train(tmp_path, "magnitude", prune_ratio=0.9, rounds=3, retrain_epochs=1)
    total = method.sparsity(method._model)["weights"]
    assert [entry["zero_weights"] for entry in history] == [round(r * total) for r in (0.3, 0.6, 0.9, 0.9)]


@pytest.mark.parametrize("stop_before", [3, 8, 14, 20])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, stop_before: int) -> None:
    options = {"prune_ratio": 0.8, "rounds": 2, "retrain_epochs": 1, "scope": "layer"}
    model = resumed_equals_uninterrupted(tmp_path, "magnitude", stop_before=stop_before, **options)
    for layer in prunable(model):
        assert int((layer.weight == 0).sum()) == round(0.8 * layer.weight.numel())
    assert model.state_dict().keys() == network().state_dict().keys()


# The division of a run


@pytest.mark.parametrize(
    ("given_", "parts"),
    [({}, (1, 10)), ({"rounds": 3}, (3, 5)), ({"retrain_epochs": 4}, (1, 4)), ({"epochs": 2}, (1, 1))],
)
def test_rounds_and_retraining_divide_the_run(given_: dict, parts: tuple[int, int]) -> None:
    found = Magnitude.defaults(config(**given_), Schedule(0.1, 5, 20))
    assert (found["rounds"], found["retrain_epochs"]) == parts


@pytest.mark.parametrize("options", [{"epochs": 1}, {"rounds": 20}, {"rounds": 4, "retrain_epochs": 5}])
def test_a_run_without_time_before_the_first_pruning_is_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="leave nothing of"):
        Magnitude.defaults(config(**options), Schedule(0.1, 5, 20))


def test_each_part_of_the_run_has_the_schedule_from_its_beginning() -> None:
    whole = Schedule.of(config(lr=0.1, rounds=2, retrain_epochs=4, batch_size=10, warmup_epochs=0.5), 100)
    assert whole.restarts == (12, 16)
    rates = [whole.at(step) for step in range(whole.steps)]
    first, part = (Schedule(0.1, 10, epochs, warmup_epochs=0.5) for epochs in (12, 4))
    again = [part.at(step) for step in range(40)]
    assert rates == [first.at(step) for step in range(120)] + again + again


# From training to a smaller file


def test_zeros_reach_the_file_and_slim_removes_what_became_dead(tmp_path: Path) -> None:
    trained = train_stage(
        TrainConfig(
            model="lenet300",
            dataset="digits",
            method="magnitude",
            output=tmp_path / "run",
            epochs=6,
            prune_ratio=0.93,
            rounds=2,
            retrain_epochs=2,
            lr=0.2,
            augment="none",
            device="cpu",
        )
    )
    assert trained.sparsity.zero_weights == round(0.93 * trained.sparsity.weights)
    assert trained.accuracy == trained.accuracy_before_finish
    assert trained.accuracy.test > 0.5
    path = Path(trained.artifacts["model"])
    tensors = onnx.load(path).graph.initializer
    first, second, third = (
        next(onnx.numpy_helper.to_array(t) for t in tensors if t.name == f"{index}.weight") != 0 for index in (1, 3, 5)
    )  # (out, in) each
    assert sum(int((~live).sum()) for live in (first, second, third)) == trained.sparsity.zero_weights

    result = slim(SlimConfig(input=path, output=tmp_path / "slim.onnx"))
    assert result.verification.passed
    assert result.verification.reference == "original"
    # A unit lives when an input reaches it and it reaches an output; what nothing reaches is a constant.
    reached_first = first.any(1)
    reached_second = second[:, reached_first].any(1)
    live_second = reached_second & third.any(0)
    live_first = reached_first & second[live_second].any(0)
    kept = {group.channels: group.kept for group in result.groups}
    assert kept == {300: live_first.sum(), 100: live_second.sum(), 10: 10}
    assert live_first.sum() < 300


def test_network_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="'magnitude' works on convolutions"):
        Magnitude.check(nn.BatchNorm2d(2))
