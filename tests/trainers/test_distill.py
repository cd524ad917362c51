"""Distillation: what is compared, and that learning takes the network to its teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.trainers.distill import LAST_WEIGHT, OTHER_WEIGHT, Distillation, common_maps
from prune_onnx.trainers.from_onnx import OnnxModule

from ..graph_ops.builder import Net

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(hidden: int, seed: int = 0, last: int = 6) -> OnnxModule:
    """Three convolutions, of 4, ``hidden`` and ``last`` channels."""
    net = Net(seed=seed)
    y = net.input("N", 3, 8, 8)
    for channels in (4, hidden, last):
        y = net.relu(net.conv(y, channels, pads=[1, 1, 1, 1]))
    return OnnxModule(net.model(net.head(y)))


def test_equal_networks_have_no_loss_and_a_network_learns_towards_its_teacher() -> None:
    teacher, student = network(8), network(3, seed=1)
    same = Distillation(teacher, copy.deepcopy(teacher), 4.0, IMAGES)
    assert same(IMAGES, same.network(IMAGES), torch.zeros(16)).item() == pytest.approx(0, abs=1e-6)
    loss = Distillation(teacher, student, 4.0, IMAGES)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    values = []
    for _ in range(60):
        value = loss(IMAGES, student(IMAGES), torch.zeros(16))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_loss_is_the_softened_divergence_and_the_relative_errors_of_the_maps() -> None:
    teacher, student, heat = network(8), network(3, seed=1), 3.0
    loss = Distillation(teacher, student, heat, IMAGES)
    with torch.no_grad():
        found = loss(IMAGES, student(IMAGES), torch.zeros(16)).item()
        teacher.observe(loss.features)
        student.observe(loss.features)
        p, q = (F.softmax(graph(IMAGES).double() / heat, 1) for graph in (teacher, student))
    divergence = heat**2 * (p * (p / q).log()).sum(1).mean().item()
    errors = []
    for name in ("relu0_out", "relu2_out"):
        f, g = (graph.observed[name].double() for graph in (student, teacher))
        errors.append(((f - g).square().mean() / (g - g.mean()).square().mean()).item())
    assert list(loss.features) == ["relu0_out", "relu2_out"]
    assert found == pytest.approx(divergence + OTHER_WEIGHT * errors[0] + LAST_WEIGHT * errors[1], rel=1e-3)


def test_teacher_in_mixed_precision_says_the_same_but_for_its_rounding() -> None:
    teacher, student = network(8), network(3, seed=1)
    values = [
        Distillation(teacher, student, 4.0, IMAGES, bf16=bf16)(IMAGES, student(IMAGES), torch.zeros(16)).item()
        for bf16 in (False, True)
    ]
    assert values[0] != values[1]
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_common_maps_are_the_last_of_each_shape_that_both_have() -> None:
    assert common_maps(network(8), network(3), IMAGES) == ["relu0_out", "relu2_out"]
    assert common_maps(network(8), network(3, last=5), IMAGES) == ["relu0_out"]
    assert common_maps(network(8), network(8), IMAGES) == ["relu0_out", "relu1_out", "relu2_out"]


def test_networks_with_nothing_in_common_learn_from_the_answers_alone() -> None:
    teacher = network(8)
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    loss = Distillation(teacher, student, 1.0, IMAGES)
    assert loss.features == {}
    with torch.no_grad():
        p, q = F.softmax(teacher(IMAGES), 1), F.softmax(student(IMAGES), 1)
        assert loss(IMAGES, student(IMAGES), torch.zeros(16)).item() == pytest.approx((p * (p / q).log()).sum(1).mean())
