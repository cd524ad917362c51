"""Several processes: shares of a batch, and statistics over all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_onnx.trainers import distributed, placement
from prune_onnx.trainers.batches import Batches
from prune_onnx.trainers.distributed import Ranks, is_first, joined, processes


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 8))
def test_shares_are_the_batch_and_weigh_as_much(start: int, count: int, size: int) -> None:
    ranks = [Ranks(rank, size) for rank in range(size)]
    whole = range(start, start + count)
    shares = [list(range(100))[each.share(start, start + count)] for each in ranks]
    if count >= 2 * size:
        assert sorted(index for share in shares for index in share) == list(whole)
        assert min(map(len, shares)) >= 2, "BatchNorm cannot normalise one image"
    else:
        assert all(share == list(whole) for share in shares)
    weights = [each.weight(len(share), count) for each, share in zip(ranks, shares, strict=True)]
    assert sum(weights) == pytest.approx(count)


def test_processes_show_the_one_processs_images_with_its_augmentation() -> None:
    images = np.random.default_rng(0).integers(1, 256, (22, 1, 8, 8), dtype=np.uint8)
    batches = Batches(images, np.arange(22), mean=(0.5,), std=(0.2,), augment="flip-crop", seed=1)
    shares = [list(batches.shuffled(2, 8, 3, ranks=Ranks(rank, 3))) for rank in range(3)]
    for step, (inputs, labels) in enumerate(batches.shuffled(2, 8, 3)):
        for rank in range(3):
            expected = slice(rank, None, 3)  # the last batch, of 6, is just large enough
            assert torch.equal(shares[rank][step][0], inputs[expected])
            assert torch.equal(shares[rank][step][1], labels[expected])
    parts = [labels for rank in range(3) for _, labels in batches.in_order(4, Ranks(rank, 3))]
    assert sorted(torch.cat(parts).tolist()) == list(range(22))


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 3)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_over_all_processes_are_batch_norms(shape, momentum, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a single process, so that sums over processes change nothing: values, gradients and running statistics."""
    monkeypatch.setattr(placement.dist, "all_reduce", lambda value: None)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    expected, found = (kind(3, momentum=momentum) for _ in range(2))
    for norm in (expected, found):
        nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
        nn.init.uniform_(norm.bias, generator=torch.Generator().manual_seed(2))
    outputs, gradients = [], []
    for forward in (expected, lambda x: placement.normalise_together(found, x)):
        for seed in (3, 4):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).add(5).requires_grad_()
            y = forward(x)
            y.square().mul(torch.linspace(0, 1, y.numel()).view(y.shape)).sum().backward()
            outputs.append(y)
            gradients.append(x.grad)
    for a, b in ((outputs[0], outputs[2]), (outputs[1], outputs[3]), (gradients[1], gradients[3])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected.weight.grad, found.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected.bias.grad, found.bias.grad, rtol=1e-4, atol=1e-4)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)
    found.eval()
    assert torch.equal(placement.normalise_together(found, x), found(x))


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # some batch systems set it alone
    assert (processes(), is_first()) == (1, True)
    with joined("cpu") as ranks:
        assert ranks == Ranks()
        assert ranks.gather(3) == [3]
        assert ranks.highest(2, torch.device("cpu")) == 2


def test_only_the_first_of_several_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert (distributed.processes(), is_first()) == (4, False)
