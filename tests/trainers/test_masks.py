"""Masks: weights stay at zero with every optimiser, whatever its state; exact counts; nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_onnx.trainers.masks import Masks, bit_mask, lowest, prunable, weight_facts, zero_where_dead

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks | None) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
    if masks:
        masks.mask_gradients()
    optimizer.step()
    if masks:
        masks.apply()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_stay_zero_and_leave_no_momentum(name: str) -> None:
    model = linear()
    optimizer, masks = OPTIMIZERS[name](model.parameters()), Masks()
    masks.add(model)
    for _ in range(3):
        step(model, optimizer, masks)
    dead = torch.arange(24).view(4, 6) % 3 == 0
    masks.set(model, "weight", ~dead)
    masks.clear(optimizer)
    masks.apply()
    for _ in range(5):
        step(model, optimizer, masks)
        assert (model.weight[dead] == 0).all()
        assert (model.weight[~dead] != 0).all()
        for value in optimizer.state[model.weight].values():
            if value.shape == model.weight.shape:
                assert (value[dead] == 0).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_clearing_the_past_weights_stay_zero_too(name: str) -> None:
    model = linear()
    optimizer, masks = OPTIMIZERS[name](model.parameters()), Masks()
    masks.add(model)
    for _ in range(3):
        step(model, optimizer, masks)
    dead = torch.arange(24).view(4, 6) % 3 == 0
    masks.set(model, "weight", ~dead)
    for _ in range(5):
        step(model, optimizer, masks)
        assert (model.weight[dead] == 0).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("units", [False, True])
def test_whatever_is_masked_becomes_a_plain_zero_and_the_rest_keeps_its_bits(kind: torch.dtype, units: bool) -> None:
    values = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(kind)
    values[:2, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, -1.0]).to(kind)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = values.clone(memory_format=layout)
        alive = torch.arange(6).view(6, 1, 1, 1) % 2 == 1
        alive = alive if units else alive.expand(values.shape).clone(memory_format=layout)
        zero_where_dead(found, bit_mask(alive, found))
        assert torch.equal(found[::2].abs(), torch.zeros_like(found[::2]))
        assert not torch.signbit(found[::2]).any()
        assert torch.equal(found[1::2].nan_to_num(7), values[1::2].nan_to_num(7))


def test_a_mask_that_lets_all_live_changes_nothing() -> None:
    plain, masked = linear(), linear()
    optimizers = [OPTIMIZERS["sgd"](model.parameters()) for model in (plain, masked)]
    masks = Masks()
    masks.add(masked)
    masks.add(masked, "bias")
    for _ in range(4):
        step(plain, optimizers[0], None)
        step(masked, optimizers[1], masks)
    assert torch.equal(plain.weight, masked.weight)
    assert torch.equal(plain.bias, masked.bias)


def test_unit_masks_take_whole_filters_and_narrow_only_takes_away() -> None:
    conv, masks = nn.Conv2d(2, 4, 3), Masks()
    masks.add(conv, units=True)
    masks.add(conv, "bias")
    assert conv.weight_mask.shape == (4, 1, 1, 1)
    masks.set(conv, "weight", torch.tensor([True, False, True, True]))
    masks.narrow(conv, "weight", torch.tensor([False, True, True, True]))
    masks.apply()
    assert (conv.weight[:2] == 0).all()
    assert (conv.weight[2:] != 0).all()
    masks.set(conv, "weight", torch.tensor([True, True, True, False]))  # what lives again starts from zero
    masks.apply()
    assert (conv.weight[3] == 0).all()


def test_masks_are_in_the_state_of_the_network_and_come_back_with_it() -> None:
    model, masks = linear(), Masks()
    masks.add(model)
    masks.set(model, "weight", torch.arange(24).view(4, 6) > 5)
    kept = copy.deepcopy(model.state_dict())
    other, again = linear(), Masks()
    again.add(other)
    other.load_state_dict(kept)
    again.apply()
    assert (other.weight[0] == 0).all()
    again.remove()
    assert other.state_dict().keys() == linear().state_dict().keys()


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_lowest_takes_exactly_so_many_and_nothing_above_what_stays(
    values: list[list[int]], data: st.DataObject
) -> None:
    scores = [torch.tensor(value, dtype=torch.float32) for value in values]
    count = data.draw(st.integers(0, sum(map(len, values))))
    chosen = lowest(scores, count)
    gone = torch.cat([score[mask] for score, mask in zip(scores, chosen, strict=True)])
    stay = torch.cat([score[~mask] for score, mask in zip(scores, chosen, strict=True)])
    assert len(gone) == count
    if len(gone) and len(stay):
        assert gone.max() <= stay.min()


def test_facts_count_kernels_of_convolutions_and_linear_layers_only() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    )
    assert len(prunable(model)) == 2
    with torch.no_grad():
        model[4].weight[0] = 0
        model[1].weight.zero_()
    assert weight_facts(model) == {"weights": 18 + 24, "zero_weights": 8}
