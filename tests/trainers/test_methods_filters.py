"""Filters by their weights: scores by vectors, which layers and how many, what comes back and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.trainers.methods import method_class
from prune_onnx.trainers.methods.filters import (
    GeometricMedian,
    L1Filters,
    MixedMedian,
    SoftFilters,
    alone,
    by_distance,
    by_l2,
    in_turn,
    share_of,
)
from prune_onnx.trainers.models import build_model
from prune_onnx.trainers.trace import trace

from .pruning_runs import attached, network, resumed_equals_uninterrupted, train

FILTERS = torch.tensor([[0, 0], [1, 0], [0, 1], [4, 4], [0.1, 0]])


def zero_filters(layer: nn.Module) -> list[int]:
    return (layer.weight == 0).flatten(1).all(1).nonzero().flatten().tolist()


def test_distances_of_the_hand_checked_filters() -> None:
    assert by_distance(FILTERS).tolist() == pytest.approx([7.756854, 8.314214, 8.419201, 21.243446, 7.591579], abs=1e-5)
    assert by_distance(FILTERS).argsort().tolist() == [4, 0, 1, 2, 3]
    assert by_l2(FILTERS).argsort().tolist()[:2] == [0, 4]


def test_mix_takes_distances_among_those_that_the_norm_left() -> None:
    left = FILTERS[1:]
    assert by_distance(left).tolist() == pytest.approx([7.314214, 7.419201, 15.586592, 7.491579], abs=1e-5)
    for norm, distance, gone in ((0.2, 0.2, [0, 1]), (0.0, 0.2, [4]), (0.4, 0.0, [0, 4])):
        rules = MixedMedian(prune_ratio=norm + distance, norm_share=norm / (norm + distance)).rules()
        assert in_turn(FILTERS, rules).nonzero().flatten().tolist() == gone


@given(st.integers(1, 600), st.integers(0, 100))
def test_share_is_the_whole_part_without_rounding_errors(count: int, percent: int) -> None:
    assert share_of(count, percent / 100) == count * percent // 100


def test_near_filters_have_exact_distances() -> None:
    filters = 1000 + torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.25, 0.0]])
    assert by_distance(filters).tolist() == pytest.approx([0.75, 0.5 + 0.3125**0.5, 0.25 + 0.3125**0.5], rel=1e-6)


# Which layers


def test_channels_that_meet_others_are_left_out() -> None:
    def names(model: str, shape: tuple[int, int, int]) -> list[str]:
        return [layer.name for layer in alone(trace(build_model(model, 10, shape, 0.25), torch.zeros(2, *shape)))]

    assert names("lenet5", (1, 28, 28)) == ["0", "3"]
    found = names("resnet20-b", (3, 32, 32))
    assert len(found) == 9
    assert all(name.endswith("conv1") and "." in name for name in found)


@pytest.mark.parametrize("name", ["l1-filters", "sfp", "fpgm", "fpgm-mix", "taylor", "hrank"])
def test_network_without_convolutions_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' works on the filters of convolutions"):
        method_class(name).check(nn.Linear(3, 2))


# The methods


def test_l1_drops_the_smallest_filters_with_bias_and_norm() -> None:
    model = network()
    orders = [model[index].weight.detach().abs().sum((1, 2, 3)).argsort() for index in (0, 4)]
    attached(L1Filters(prune_ratio=0.35), model).after_epoch(0.1, 1)
    # 6 and 8 filters: int(6 * .65) = 3 and int(8 * .65) = 5 stay
    assert zero_filters(model[0]) == sorted(orders[0][:3].tolist())
    assert zero_filters(model[4]) == sorted(orders[1][:3].tolist())
    for values in (model[0].bias, model[1].weight, model[1].bias):
        assert (values[orders[0][:3]] == 0).all()
    assert (model[1].weight[orders[0][3:]] != 0).all()
    assert (model[7].weight != 0).all()


def test_soft_filters_come_back_and_hard_ones_do_not() -> None:
    soft, hard = network(), network()
    methods = [attached(SoftFilters(prune_ratio=0.5), soft), attached(GeometricMedian(prune_ratio=0.5), hard)]
    for model, method in zip((soft, hard), methods, strict=True):
        method.after_epoch(0.1, 1)
        assert len(zero_filters(model[0])) == 3
        assert len(zero_filters(model[4])) == 4
        model[0].weight.grad = torch.ones_like(model[0].weight)
        method.before_step()
        with torch.no_grad():
            model[0].weight -= 0.1 * model[0].weight.grad
        method.after_step(0.1)
        assert len(zero_filters(model[0])) == (0 if model is soft else 3)
        assert (model[1].weight == 1).all()  # BatchNorm is theirs to keep


def test_masks_of_the_median_are_chosen_anew() -> None:
    model = network()
    method = attached(GeometricMedian(prune_ratio=0.5), model)
    method.after_epoch(0.1, 1)
    first = zero_filters(model[0])
    with torch.no_grad():  # what was left now lies close together, and what is zero far away
        for index in range(6):
            model[0].weight[index] = 0 if index in first else 5 + index / 100
        for filter_, value in zip(first, (-30.0, 300.0, -3000.0), strict=True):
            model[0].weight[filter_] = value
    method.after_epoch(0.1, 2)
    assert zero_filters(model[0]) == sorted(set(range(6)) - set(first))


@pytest.mark.parametrize("name", ["sfp", "fpgm", "fpgm-mix", "l1-filters"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = resumed_equals_uninterrupted(tmp_path, name, stop_before=15, prune_ratio=0.5, epochs=3)
    assert len(zero_filters(model[0])) == 3 if name != "fpgm-mix" else len(zero_filters(model[0])) == 2
    assert model.state_dict().keys() == network().state_dict().keys()


def test_mix_divides_the_ratio() -> None:
    model = network()
    rules = [(by_l2, 0.3), (by_distance, 0.2)]
    expected = [in_turn(model[index].weight.detach(), rules).nonzero().flatten().tolist() for index in (0, 4)]
    attached(MixedMedian(prune_ratio=0.5, norm_share=0.6), model).after_epoch(0.1, 1)
    assert [zero_filters(model[0]), zero_filters(model[4])] == expected


def test_filters_that_are_zeroed_leave_the_network_working(tmp_path: Path) -> None:
    _, _, history = train(tmp_path, "fpgm", prune_ratio=0.5, epochs=4)
    assert history[-1]["validation_accuracy"] > 0.6
