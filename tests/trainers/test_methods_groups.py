"""The group regularisers: values and gradients by hand-checked vectors and autograd, which weights form a group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.batches import Batches
from prune_onnx.trainers.config import Schedule
from prune_onnx.trainers.methods import method_class
from prune_onnx.trainers.methods.groups import SMALL, GroupLasso, GroupRegulariser, grouped, soft_threshold, ungrouped

NAMES = ["group-lasso", "exclusive-sparsity", "group-l12", "hsq-gl", "hsq-es", "hsq-gl12"]
SCHEDULE = Schedule(lr=0.1, steps_per_epoch=5, epochs=2)

VECTOR = torch.tensor([[[[3, 4]], [[0, 0]]], [[[0, 1]], [[1, -1]]]], dtype=torch.float64)
"""2 outputs, 2 inputs, kernels of 1x2; the second kernel of the first output is zero."""


def attached(name: str, model: nn.Module, shape: tuple[int, int, int] = (2, 8, 8), **options: object):
    method = method_class(name)(**{"lambda_": 0.1, **options})
    method.prepare(model, SCHEDULE)
    images = Batches(np.zeros((4, *shape), np.uint8), np.zeros(4, int), mean=(0.0,) * shape[0], std=(1.0,) * shape[0])
    method.attach(torch.optim.SGD(model.parameters(), lr=0.1), images)
    return method


def term(method: GroupRegulariser, weight: nn.Parameter) -> torch.Tensor:
    """What the method adds to a gradient, over lambda."""
    weight.grad = torch.zeros_like(weight)
    method.before_step()
    return weight.grad / method.lambda_


@pytest.mark.parametrize(
    ("direction", "name", "value"),
    [
        ("feature", "group-lasso", 6.513233),
        ("feature", "exclusive-sparsity", 68),
        ("feature", "group-l12", 4.242641),
        ("feature", "hsq-gl", 38),
        ("feature", "hsq-es", 2516),
        ("feature", "hsq-gl12", 15.291502),
        ("neuron", "group-lasso", 6.732051),
        ("neuron", "exclusive-sparsity", 58),
        ("neuron", "group-l12", 4.377802),
        ("neuron", "hsq-gl", 30.828427),
        ("neuron", "hsq-es", 2426),
        ("neuron", "hsq-gl12", 12.828427),
    ],
)
def test_values_and_gradients_of_the_hand_checked_kernels(direction: str, name: str, value: float) -> None:
    weight = VECTOR.clone().requires_grad_()
    cls = method_class(name)
    kernels = grouped(weight, direction)
    assert cls.value(kernels).item() == pytest.approx(value, abs=1e-6)
    found = ungrouped(cls.gradient(kernels.detach()), direction, weight.shape)
    assert torch.isfinite(found).all()
    assert (found[0, 1] == 0).all()  # the zero kernel
    # autograd has no answer at the zero kernel, and elsewhere the same one
    live = VECTOR != 0
    shifted = weight + torch.where(live, 0.0, 1e-30)
    (slope,) = torch.autograd.grad(cls.value(grouped(shifted, direction)), weight)
    torch.testing.assert_close(found[live], slope[live], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000))
def test_gradient_is_autograds_wherever_there_is_one(name: str, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    kernels = torch.randn(2, 3, 4, 5, generator=draws, dtype=torch.float64)
    kernels += kernels.sign() * SMALL
    kernels.requires_grad_()
    cls = method_class(name)
    (slope,) = torch.autograd.grad(cls.value(kernels), kernels)
    torch.testing.assert_close(cls.gradient(kernels.detach()), slope)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_bounded_at_and_near_zero(name: str) -> None:
    cls = method_class(name)
    assert (cls.gradient(torch.zeros(1, 3, 4, 5)) == 0).all()
    assert cls.value(torch.zeros(1, 3, 4, 5)) == 0
    kernels = torch.ones(1, 3, 4, 5)
    usual = cls.gradient(kernels).abs().max()
    kernels[0, 0, 0] = 1e-38
    kernels[0, 1] = torch.finfo(torch.float32).tiny
    assert cls.gradient(kernels).abs().max() < 50 * usual


# Which weights form a group


def brute_force_lasso(weight: torch.Tensor, direction: str, groups: int) -> float:
    """Sum of the norms of the weights that one output channel, or one input channel, has in each conv group."""
    outputs, total = len(weight) // groups, 0.0
    for group in range(groups):
        part = weight[group * outputs : (group + 1) * outputs]
        slices = part if direction == "neuron" else part.transpose(0, 1)
        total += sum(one.norm().item() for one in slices)
    return total


@pytest.mark.parametrize("direction", ["neuron", "feature"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_of_a_convolution_lie_within_its_own_groups(direction: str, groups: int) -> None:
    weight = nn.Conv2d(6, 12, 3, groups=groups).weight.detach()
    kernels = grouped(weight, direction, groups=groups)
    assert GroupLasso.value(kernels).item() == pytest.approx(brute_force_lasso(weight, direction, groups), rel=1e-6)
    assert torch.equal(ungrouped(kernels, direction, weight.shape), weight)
    if groups == 6 and direction == "feature":  # depthwise, two filters an input
        assert kernels.shape == (6, 1, 2, 9)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("direction", "layers", "taken"),
    [("feature", "conv", "2"), ("feature", "all", "2 7 9"), ("neuron", "conv", "0 2"), ("neuron", "all", "0 2 7")],
)
def test_first_inputs_and_last_outputs_are_left_out(direction: str, layers: str, taken: str) -> None:
    model = small()
    method = attached("hsq-gl12", model, direction=direction, layers=layers)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    method.before_step()
    moved = [name for name, parameter in model.named_parameters() if (parameter.grad != 0).any()]
    assert moved == [f"{index}.weight" for index in taken.split()]


def test_linear_layer_behind_flatten_has_a_channels_pixels_for_a_kernel() -> None:
    model = small()
    method = attached("group-lasso", model, layers="all")
    weight = model[7].weight
    found = term(method, weight)
    blocks = weight.detach().view(5, 4, 4)  # out, channel, pixel
    expected = blocks / blocks.norm(dim=(0, 2), keepdim=True)
    torch.testing.assert_close(found, expected.reshape(5, 16))
    alone = model[9].weight.detach()
    torch.testing.assert_close(term(method, model[9].weight), alone / alone.norm(dim=0))


def test_pixels_of_the_image_are_inputs_of_their_own() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.ReLU(), nn.Linear(4, 2))
    method = attached("hsq-es", model, (2, 3, 3), direction="neuron", layers="all")
    weight = model[1].weight.detach()
    expected = 4 * weight.square().sum(1, keepdim=True) * weight
    torch.testing.assert_close(term(method, model[1].weight), expected)


def test_network_without_a_layer_to_work_on_is_refused() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(128, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="--layers all"):
        attached("hsq-gl12", linear)
    with pytest.raises(ConfigError, match="this network has none"):
        GroupLasso.check(nn.BatchNorm2d(3))


# The proximal step


@given(st.integers(0, 1000), st.floats(0.01, 3))
def test_soft_threshold_minimises_its_objective(seed: int, threshold: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    kernels = torch.randn(1, 4, 2, 2, generator=draws, dtype=torch.float64)
    kernels[0, 0] *= 0.01
    found = soft_threshold(kernels, threshold)

    def objective(weights: torch.Tensor) -> torch.Tensor:
        return threshold * GroupLasso.value(weights) + (weights - kernels).square().sum() / 2

    # Optimality: W - V in threshold times the sub-differential of the norm at V.
    for before, after in zip(kernels[0], found[0], strict=True):
        if (after == 0).all():
            assert before.norm() <= threshold * (1 + 1e-12)
        else:
            torch.testing.assert_close(before - after, threshold * after / after.norm())
    for _ in range(20):
        near = found + 0.05 * torch.randn(found.shape, generator=draws, dtype=torch.float64)
        assert objective(found) <= objective(near)


def test_prox_makes_whole_groups_exactly_zero_and_adds_nothing_to_gradients() -> None:
    model = small()
    method = attached("group-lasso", model, prox=True, lambda_=1.0)
    with torch.no_grad():
        model[2].weight[:2, 1] *= 1e-3  # input 1 of the first group
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = model[2].weight
    assert (term(method, weight) == 0).all()
    method.after_step(0.1)
    assert (weight[:2, 1] == 0).all()
    norm = before["2.weight"][2:, 0].norm()
    torch.testing.assert_close(weight[2:, 0], before["2.weight"][2:, 0] * (1 - 0.1 / norm))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name != "2.weight")
    assert method.sparsity(model)["zero_weights"] == 18


@pytest.mark.parametrize("name", NAMES)
def test_training_on_the_term_alone_shrinks_it(name: str) -> None:
    model = small()
    method = attached(name, model, lambda_=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = method.penalty().item()
    for _ in range(50):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.before_step()
        optimizer.step()
    assert method.penalty().item() < before
