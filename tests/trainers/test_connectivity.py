"""Origins of tensors and which units reach the output: over sums, concatenations, Flatten and reuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_onnx.trainers.connectivity import reaching
from prune_onnx.trainers.models import build_model
from prune_onnx.trainers.trace import INPUT, evaluating, trace


class Branches(nn.Module):
    """A sum, a concatenation, functional calls, an activation in place and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.right = nn.Conv2d(4, 3, 1)
        self.twice = nn.Conv2d(7, 7, 1)
        self.head = nn.Linear(7 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - 0.5) / 2
        x = F.relu_(self.norm(self.stem(x)))
        x = torch.cat([x + self.left(x), self.right(x)], 1)
        x = self.twice(torch.relu(self.twice(x)))
        return self.head(F.max_pool2d(x, 2).reshape(len(x), -1))


def test_layers_know_what_feeds_them() -> None:
    model = Branches()
    layers = {layer.name: layer for layer in trace(model, torch.zeros(2, 2, 4, 4))}
    assert list(layers) == ["stem", "left", "right", "twice", "head"]
    assert {name: layer.sources for name, layer in layers.items()} == {
        "stem": {INPUT}, "left": {"stem"}, "right": {"stem"}, "twice": {"stem", "left", "right", "twice"},
        "head": {"twice"},
    }  # fmt: skip
    assert [name for name, layer in layers.items() if layer.output] == ["head"]
    assert {name: layer.block for name, layer in layers.items()} == {**dict.fromkeys(layers, 1), "head": 4}
    assert {name for name, layer in layers.items() if layer.norm} == {"stem"}


@pytest.mark.parametrize(
    ("name", "shape", "block"),
    [("lenet5", (1, 28, 28), 16), ("vgg-like", (3, 64, 32), 2), ("lenet5-bn", (1, 20, 28), 8)],
)
def test_blocks_of_listed_networks(name: str, shape: tuple[int, int, int], block: int) -> None:
    model = build_model(name, 10, shape, 0.2)
    first = next(layer for layer in trace(model, torch.zeros(2, *shape)) if isinstance(layer.module, nn.Linear))
    assert first.block == block


def test_looking_leaves_modes_statistics_and_hooks_alone() -> None:
    model = Branches().train()
    model.left.eval()
    trace(model, torch.ones(2, 2, 4, 4))
    assert (model.training, model.left.training, model.norm.training) == (True, False, True)
    assert model.norm.num_batches_tracked == 0
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.norm.training


def found(model: nn.Module, shape: tuple[int, int, int] = (2, 4, 4)) -> dict[str, list[int]]:
    layers = trace(model, torch.zeros(2, *shape))
    return {name: live.nonzero().flatten().tolist() for name, live in reaching(model, layers, shape).items()}


def test_units_reach_the_output_through_any_path_that_is_left() -> None:
    model = Branches()
    assert found(model) == {
        "stem": [0, 1, 2, 3],
        "left": [0, 1, 2, 3],
        "right": [0, 1, 2],
        "twice": list(range(7)),
        "head": [0, 1, 2],
    }
    with torch.no_grad():
        model.twice.weight[:, 1] = 0  # stem 1 stays through left and right, left 1 has nothing else
        model.twice.weight[:, 5] = 0  # right 1
    # twice feeds itself, so its units stay through their second use
    assert found(model) == {
        "stem": [0, 1, 2, 3],
        "left": [0, 2, 3],
        "right": [0, 2],
        "twice": list(range(7)),
        "head": [0, 1, 2],
    }
    with torch.no_grad():
        model.left.weight[:, 1] = 0
        model.right.weight[:, 1] = 0
        model.norm.weight[3] = 0
    assert found(model)["stem"] == [0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_in_a_chain_it_is_what_the_masks_say(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.mul_(torch.rand(*layer.weight.shape[:2], 1, 1) < 0.25)
        for layer in (model[6], model[8]):
            layer.weight.mul_(torch.rand(layer.weight.shape) < 0.2)
    live = found(model)
    third = model[8].weight.ne(0).any(0)
    second = model[6].weight[third].ne(0).view(-1, 8, 4).any(2).any(0)
    first = model[3].weight[second].ne(0).flatten(2).any(2).any(0)
    masks = [mask.nonzero().flatten().tolist() for mask in (first, second, third)]
    assert [live["0"], live["3"], live["6"], live["8"]] == [*masks, [0, 1, 2]]


def test_what_does_not_reach_the_output_makes_no_difference_to_it() -> None:
    torch.manual_seed(1)
    model = build_model("resnet20-b", 10, (3, 16, 16), 0.5).eval()
    layers = trace(model, torch.zeros(2, 3, 16, 16))
    with torch.no_grad():
        for layer in layers[1:]:
            layer.module.weight.mul_(
                torch.rand(*layer.module.weight.shape[:2], *[1] * (layer.module.weight.dim() - 2)) < 0.1
            )
    inputs = torch.randn(4, 3, 16, 16)
    before = model(inputs)
    live = reaching(model, layers, (3, 16, 16))
    dead = {layer.name: ~live[layer.name] for layer in layers}
    assert 20 < sum(int(mask.sum()) for mask in dead.values()) < sum(mask.numel() for mask in dead.values()) - 20
    with torch.no_grad():
        for layer in layers:
            layer.module.weight[dead[layer.name]] = 7.0
    assert torch.equal(model(inputs), before)
