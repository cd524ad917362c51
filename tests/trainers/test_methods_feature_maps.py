"""Filters by their maps: Taylor's criterion in three forms, ranks, and what is dropped by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.methods.feature_maps import HRank, Taylor, normalised, ranks, taylor

from .pruning_runs import attached, images, network, resumed_equals_uninterrupted

MAPS = torch.tensor([[[1.0, 2], [0, 3]], [[-1, 1], [2, 2]]]).unsqueeze(3)  # example, channel, pixel
SLOPES = torch.tensor([[[0.1, -0.2], [0.5, 0.1]], [[-0.3, -0.1], [-0.1, 0.2]]]).unsqueeze(3)


def dropped(model: nn.Sequential) -> list[list[int]]:
    return [(model[index].weight == 0).flatten(1).all(1).nonzero().flatten().tolist() for index in (0, 4)]


@pytest.mark.parametrize(
    ("variant", "first", "second"), [("paper", 0.125, 0.125), ("signed", 0.025, 0.125), ("inside", 0.225, 0.225)]
)
def test_taylor_of_the_hand_checked_maps(variant: str, first: float, second: float) -> None:
    found = taylor(MAPS, SLOPES, variant).abs() / 2
    assert found.tolist() == pytest.approx([first, second], abs=1e-6)


def test_layers_are_normalised_and_one_of_zeros_stays_zero() -> None:
    assert normalised(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert normalised(torch.zeros(3)).tolist() == [0, 0, 0]


def test_ranks_of_known_maps() -> None:
    maps = torch.stack([torch.eye(4), torch.ones(4, 4), torch.zeros(4, 4)]).unsqueeze(0)
    assert ranks(maps).tolist() == [4, 1, 0]
    assert ranks(torch.cat([maps, maps])).tolist() == [8, 2, 0]


def taylor_by_definition(model: nn.Sequential, variant: str) -> list[torch.Tensor]:
    """One example at a time, through the layers by hand."""
    model.eval()
    shown = images()
    inputs, labels = next(shown.in_order(60))
    totals = [torch.zeros(6), torch.zeros(8)]
    for image, label in zip(inputs, labels, strict=True):
        first = F.relu(model[1](model[0](image[None])))
        second = F.relu(model[4](model[3](first)))
        loss = F.cross_entropy(model[7:](model[6](second)), label[None])
        for total, z, g in zip(totals, (first, second), torch.autograd.grad(loss, (first, second)), strict=True):
            each = (z * g)[0].detach().flatten(1)
            total += (
                each.abs().mean(1)
                if variant == "inside"
                else each.mean(1).abs()
                if variant == "paper"
                else each.mean(1)
            )
    model.train()
    return [(total.abs() / total.norm()) for total in totals]


@pytest.mark.parametrize("variant", Taylor.VARIANTS)
@pytest.mark.parametrize("in_place", [False, True])
def test_scores_are_the_definition(variant: str, in_place: bool) -> None:
    model = network()
    expected = taylor_by_definition(model, variant)
    if in_place:
        model[2] = nn.ReLU(inplace=True)
        model[5] = nn.ReLU(inplace=True)
    method = attached(Taylor(variant=variant, samples=60), model)
    statistics = model[1].running_mean.clone()
    for found, score in zip(method.scores(), expected, strict=True):
        torch.testing.assert_close(found, score, rtol=1e-4, atol=1e-6)
    assert torch.equal(model[1].running_mean, statistics)
    assert model[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_lowest_of_the_whole_network_go_and_every_layer_keeps_one() -> None:
    model = network()
    scores = taylor_by_definition(model, "paper")
    attached(Taylor(prune_ratio=0.5, samples=60), model).after_epoch(0.1, 1)
    limit = torch.cat(scores).sort().values[7]
    assert dropped(model) == [(score < limit).nonzero().flatten().tolist() for score in scores]
    model = network()
    attached(Taylor(prune_ratio=0.99, samples=60), model).after_epoch(0.1, 1)
    assert [len(part) for part in dropped(model)] == [5, 7]


def test_filters_of_low_rank_go_layer_by_layer() -> None:
    model = network()
    with torch.no_grad():
        model[1].bias[4] = -1e3  # rank 0
        model[0].weight[2] = 0  # a constant map: rank 1
        model[0].bias[2] = 3
        model[1].bias[2] = 3
    attached(HRank(prune_ratio=0.34, samples=30), model).after_epoch(0.1, 1)
    first, second = dropped(model)
    assert first == [2, 4]
    assert len(second) == 2
    assert model[1].weight[4] == model[1].bias[4] == model[1].bias[2] == 0


@pytest.mark.parametrize("name", ["taylor", "hrank"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    options = {"rounds": 2, "retrain_epochs": 1, "prune_ratio": 0.5, "samples": 30}
    model = resumed_equals_uninterrupted(tmp_path, name, stop_before=14, **options)
    assert sum(map(len, dropped(model))) == 7
    assert model.state_dict().keys() == network().state_dict().keys()


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="it has paper, signed, inside"):
        attached(Taylor(variant="second-order"), network())
