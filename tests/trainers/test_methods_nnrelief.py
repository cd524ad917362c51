"""NNrelief: scores by vectors and by definition, selection rule, error bound, clean-up, rewinding, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.config import Schedule, TrainConfig
from prune_onnx.trainers.masks import prunable
from prune_onnx.trainers.methods.nnrelief import NNrelief, contributions, essential
from prune_onnx.trainers.methods.residual import weak_channels
from prune_onnx.trainers.trace import trace

from .pruning_runs import attached, images, network, resumed_equals_uninterrupted, train


def normalised(kernels: torch.Tensor, bias: torch.Tensor) -> list[float]:
    together = torch.cat([kernels, bias], 1)
    return (together / together.sum(1, keepdim=True)).flatten().tolist()


# Scores


def test_scores_of_the_hand_checked_neuron() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -1.0]]))
        layer.bias.fill_(0.5)
    inputs = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    kernels, bias = contributions(layer, inputs, layer(inputs))
    assert normalised(kernels, bias) == pytest.approx([0.53333, 0.40000, 0.06667], abs=1e-5)
    together = torch.cat([kernels, bias], 1)
    assert essential(together, 0.9).tolist() == [[True, True, False]]
    assert essential(together, 0.95).tolist() == [[True, True, True]]  # the reference program prunes the bias


def test_scores_of_the_hand_checked_filter() -> None:
    layer = nn.Conv2d(2, 1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[[1.0, -1], [0, 2]], [[0, 0], [0, -3]]]]))
        layer.bias.fill_(0.5)
    maps = [[[1, 0, -1], [2, 1, 0], [0, -2, 1]], [[0, 1, 0], [1, 0, 1], [-1, 0, 2]]]
    inputs = torch.tensor([maps], dtype=torch.float32)
    kernels, bias = contributions(layer, inputs, layer(inputs))
    assert kernels.tolist() == [[pytest.approx(68**0.5), pytest.approx(45**0.5)]]
    assert bias.item() == pytest.approx(1.0)
    assert normalised(kernels, bias) == pytest.approx([0.516861, 0.420461, 0.062679], abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"kernel_size": (3, 1), "stride": (1, 3), "padding": (2, 0), "dilation": (2, 1), "bias": False},
        {"groups": 2},
        {"groups": 4, "padding": "same", "dilation": 2, "kernel_size": (2, 3)},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_scores_of_a_convolution_are_the_definition(options: dict) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, **{"kernel_size": 3, **options})
    inputs = torch.randn(5, 4, 7, 8)
    output = layer(inputs)
    kernels, bias = contributions(layer, inputs, output)
    per_group, outputs = 4 // layer.groups, 8 // layer.groups
    expected = torch.zeros(8, per_group)
    for i in range(8):
        for j in range(per_group):
            alone = nn.Conv2d(1, 1, **{"kernel_size": 3, **options, "groups": 1, "bias": False})
            with torch.no_grad():
                alone.weight.copy_(layer.weight[i, j].abs())
            channel = (i // outputs) * per_group + j
            for image in inputs:
                expected[i, j] += alone(image[None, channel : channel + 1].abs()).norm().item()
    torch.testing.assert_close(kernels.detach(), expected, rtol=1e-5, atol=1e-5)
    if layer.bias is None:
        assert bias.shape == (8, 0)
    else:
        size = output.shape[2] * output.shape[3]
        torch.testing.assert_close(bias[:, 0], 5 * layer.bias.abs() * size**0.5)


# Selection


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from([0.3, 0.5, 0.9, 0.95, 1.0]),
)
def test_what_stays_is_the_least_that_reaches_alpha_and_its_ties(values: list[list[int]], alpha: float) -> None:
    keep = essential(torch.tensor(values), alpha)
    for row, kept in zip(values, keep.tolist(), strict=True):
        if not sum(row):
            assert not any(kept)
            continue
        ranked, total, bound = sorted(row, reverse=True), 0, None
        for value in ranked:
            total += value
            bound = value
            if total >= alpha * sum(row) - 1e-12:
                break
        assert kept == [value >= bound and value > 0 for value in row]


@pytest.mark.parametrize("alpha", [0.5, 0.8, 0.95])
def test_error_bound_holds_on_the_samples(alpha: float) -> None:
    """Equations 5 to 11: in the mean over the samples neuron j changes by S_j (1 - alpha) at most."""
    torch.manual_seed(0)
    for layer, inputs in (
        (nn.Conv2d(4, 8, 3, padding=1, stride=2), torch.randn(40, 4, 9, 9)),
        (nn.Linear(30, 8), torch.randn(40, 30)),
    ):
        before = layer(inputs)
        kernels, bias = contributions(layer, inputs, before)
        together = torch.cat([kernels, bias], 1) / len(inputs)
        keep = essential(together, alpha)
        assert not keep.all()
        with torch.no_grad():
            kept = keep[:, :-1].view(*keep[:, :-1].shape, *[1] * (layer.weight.dim() - 2))
            layer.weight.mul_(kept)
            layer.bias.mul_(keep[:, -1])
        change = (
            (F.relu(layer(inputs)) - F.relu(before)).flatten(2).norm(dim=2)
            if before.dim() > 2
            else (F.relu(layer(inputs)) - F.relu(before)).abs()
        )
        bound = together.sum(1) * (1 - alpha)
        assert (change.mean(0) <= bound * (1 + 1e-5)).all()
        pruned = (together * ~keep).sum(1)
        assert (pruned <= bound * (1 + 1e-5)).all()


# The method


def test_scores_are_of_the_unpruned_network_in_evaluation_mode() -> None:
    model, shown = network(), images()
    inputs, _ = next(shown.in_order(60))
    model.eval()
    seen: list[torch.Tensor] = []

    def score(layer: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.append(essential(torch.cat(contributions(layer, args[0], output), 1), 0.9))

    for layer in prunable(model):
        layer.register_forward_hook(score)
    model(inputs)
    model = network()
    with torch.no_grad():
        method = attached(NNrelief(alpha=0.9, conv_alpha=0.9, samples=60), model, shown)
    method.after_epoch(0.1, 1)
    for layer, keep in zip(prunable(model), seen, strict=True):
        columns = keep[:, :-1].view(*keep[:, :-1].shape, *[1] * (layer.weight.dim() - 2))
        left = layer.weight_mask.flatten(1).any(1)  # clean-up takes whole units, nothing else
        assert left.any()
        assert torch.equal(layer.weight_mask[left], columns.expand_as(layer.weight)[left])
    assert all(module.training for module in model.modules())


def test_silent_units_lose_inputs_bias_and_norm() -> None:
    model = network()
    with torch.no_grad():
        model[1].bias[2] = -1e3  # BatchNorm after the first convolution
        model[7].bias[4] = -1e3
    method = attached(NNrelief(alpha=1.0, conv_alpha=1.0), model)
    method.after_epoch(0.1, 1)
    for values in (
        model[0].weight[2],
        model[0].bias[2],
        model[1].weight[2],
        model[1].bias[2],
        model[7].weight[4],
        model[7].bias[4],
    ):
        assert (values == 0).all()
    assert (model[1].weight[[0, 1, 3, 4, 5]] != 0).all()


def test_units_without_a_way_on_lose_what_feeds_them_back_to_the_input() -> None:
    model = network()
    with torch.no_grad():
        model[9].weight[:, 3] = 0
        model[7].weight[:, 8:12] = 0  # channel 2 of the second convolution: four pixels
        for unit in range(8):
            model[4].weight[unit, 1] = 0 if unit != 2 else 1
        model[7].weight[3] = 1
    method = attached(NNrelief(alpha=1.0, conv_alpha=1.0), model)
    method.after_epoch(0.1, 1)
    assert (model[7].weight[3] == 0).all()
    assert model[7].bias[3] == 0
    assert (model[4].weight[2] == 0).all()
    assert (model[0].weight[1] == 0).all()
    assert model[1].weight[1] == model[1].bias[1] == 0


def test_rewinding_goes_back_to_the_initial_weights_under_the_mask(tmp_path: Path) -> None:
    start = network().state_dict()
    model = network()
    method = attached(NNrelief(alpha=0.8, conv_alpha=0.8, rewind=True), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
        model[1].running_mean.add_(1)
    method.after_epoch(0.1, 1)
    for layer in prunable(model):
        old = start[{id(m): n for n, m in model.named_modules()}[id(layer)] + ".weight"]
        assert torch.equal(layer.weight, torch.where(layer.weight_mask, old, 0))
        assert (layer.weight_mask.any(), layer.weight_mask.all()) == (True, False)
    assert torch.equal(model[1].running_mean, start["1.running_mean"])
    method.finish(model)
    assert model.state_dict().keys() == start.keys()


@pytest.mark.parametrize(("rewind", "stop_before"), [(True, 3), (True, 14), (False, 20)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, rewind: bool, stop_before: int) -> None:
    options = {"rounds": 2, "retrain_epochs": 1, "samples": 40, "rewind": rewind, "alpha": 0.9}
    model = resumed_equals_uninterrupted(tmp_path, "nnrelief", stop_before=stop_before, **options)
    assert model.state_dict().keys() == network().state_dict().keys()


def test_each_round_prunes_more(tmp_path: Path) -> None:
    _, _, history = train(
        tmp_path, "nnrelief", epochs=5, rounds=4, retrain_epochs=1, samples=60, alpha=0.9, conv_alpha=0.9
    )
    zeros = [entry["zero_weights"] for entry in history]
    assert zeros == sorted(zeros)
    assert 0 < zeros[0] < zeros[3]
    assert history[-1]["validation_accuracy"] > 0.6


def test_published_values_are_the_defaults() -> None:
    def found(model: str, epochs: int) -> tuple:
        config = TrainConfig(model=model, dataset="x", method="nnrelief", output="x", epochs=epochs)
        values = NNrelief.defaults(config, Schedule(0.1, 5, epochs))
        return tuple(values[key] for key in ("conv_alpha", "alpha", "rounds", "retrain_epochs", "rewind"))

    assert found("lenet300", 960) == (0.95, 0.95, 15, 60, True)
    assert found("lenet5", 1260) == (0.9, 0.95, 20, 60, True)
    assert found("vgg-like", 160) == (0.95, 0.95, 6, 22, False)
    assert found("resnet20", 160) == (0.95, 0.99, 10, 14, False)
    assert found("lenet300", 20) == (0.95, 0.95, 9, 2, True)


def test_other_convolutions_are_refused() -> None:
    with pytest.raises(ConfigError, match="two-dimensional"):
        NNrelief.check(nn.Sequential(nn.Conv1d(1, 2, 3)))


class Residual(nn.Module):
    """A block with a shortcut, an identity or a convolution of its own."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = shortcut
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.last(self.block(x)) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("identity", [True, False])
def test_channels_that_add_little_to_a_sum_go_on_either_side(identity: bool) -> None:
    torch.manual_seed(0)
    model = Residual(nn.Identity() if identity else nn.Conv2d(4, 4, 1)).eval()
    alpha = 0.9
    with torch.no_grad():
        model.last.weight[1] = model.last.bias[1] = 1e-3  # next to nothing beside the shortcut
        model.last.weight[2] = 500.0  # the shortcut is next to nothing beside it
    inputs, _ = next(images().in_order(60))
    x = torch.relu(model.norm(model.stem(inputs)))
    both = (model.last(model.block(x)), model.shortcut(x))
    sides = [side.detach().abs().mean(0).flatten(1).norm(dim=1) for side in both]
    found = weak_channels(model, trace(model, inputs), images().in_order(25), alpha)
    assert found.keys() == ({"block"} if identity else {"block", "shortcut"})
    assert torch.equal(found["block"], sides[0] / sides[1] < (1 - alpha) / alpha)
    assert found["block"].tolist()[1:3] == [True, False]
    if not identity:
        assert torch.equal(found["shortcut"], sides[1] / sides[0] < (1 - alpha) / alpha)
        assert found["shortcut"][2]
    method = attached(NNrelief(alpha=1.0, conv_alpha=alpha, samples=60, residual=True), model)
    method.after_epoch(0.1, epoch=1)
    assert not model.block.weight[1].any()
    assert (model.last.weight[1], model.last.bias[1]) == (0, 0)
    assert model.block.weight[2].any()
