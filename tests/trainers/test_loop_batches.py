"""Batches: what an epoch shows, in which order, how it is changed, and how a training set is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.trainers.batches import Batches, generator, split
from prune_onnx.trainers.config import steps_per_epoch

MEAN, STD = (0.3, 0.5), (0.2, 0.4)


def numbered(count: int, size: int = 8, channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise without zeros, so that padding shows, labelled by their number."""
    draws = np.random.default_rng(0)
    return draws.integers(1, 256, (count, channels, size, size), dtype=np.uint8), np.arange(count)


def raw(count: int, size: int = 8, **options: object) -> tuple[np.ndarray, Batches]:
    """Batches whose input is the pixel values themselves."""
    images, labels = numbered(count, size)
    return images, Batches(images, labels, mean=(0, 0), std=(1 / 255, 1 / 255), **options)


def pixels(inputs: torch.Tensor) -> np.ndarray:
    return inputs.numpy().round().astype(np.uint8)


def test_in_order_is_everything_once_normalised_like_the_deployed_recipe() -> None:
    images, labels = numbered(10)
    batches = list(Batches(images, labels, mean=MEAN, std=STD, augment="flip-crop").in_order(4))
    assert [len(batch[1]) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch[1] for batch in batches]).tolist() == labels.tolist()
    inputs = torch.cat([batch[0] for batch in batches]).numpy()
    assert inputs.dtype == np.float32
    # Bit for bit: what is trained on is what eval feeds.
    assert np.array_equal(inputs, Preprocessing(MEAN, STD).apply(images))


@given(st.integers(2, 40), st.integers(2, 12), st.integers(0, 5))
@settings(deadline=None)
def test_epoch_shows_each_image_at_most_once_and_leaves_out_at_most_one(count: int, batch: int, epoch: int) -> None:
    images, labels = numbered(count, size=4)
    batches = Batches(images, labels, mean=MEAN, std=STD)
    seen = torch.cat([label for _, label in batches.shuffled(epoch, batch, steps_per_epoch(count, batch))]).tolist()
    assert len(seen) == len(set(seen)) >= count - 1


def test_order_and_augmentation_depend_on_seed_and_epoch_alone() -> None:
    def epoch(seed: int, number: int, noise: int) -> list[torch.Tensor]:
        torch.manual_seed(noise)
        images, labels = numbered(50)
        batches = Batches(images, labels, mean=MEAN, std=STD, augment="flip-crop", seed=seed)
        return [inputs for inputs, _ in batches.shuffled(number, 8, 6)]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(epoch(0, 3, noise=1), epoch(0, 3, noise=2))
    assert not same(epoch(0, 3, 1), epoch(1, 3, 1))
    assert not same(epoch(0, 3, 1), epoch(0, 4, 1))


@pytest.mark.parametrize("augment", ["none", "shift", "flip-crop"])
def test_epoch_can_be_entered_at_any_step(augment: str) -> None:
    images, labels = numbered(30)
    batches = Batches(images, labels, mean=MEAN, std=STD, augment=augment)
    whole = list(batches.shuffled(2, 8, 4))
    for start in range(5):
        rest = list(batches.shuffled(2, 8, 4, start=start))
        assert len(rest) == 4 - start
        for (x, y), (other_x, other_y) in zip(whole[start:], rest, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)


def shifted(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The image moved up by ``rows`` and left by ``columns``, filled with 0."""
    margin = 8
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)))
    _, height, width = image.shape
    return padded[:, margin + rows : margin + rows + height, margin + columns : margin + columns + width]


@pytest.mark.parametrize(("size", "augment", "margin"), [(8, "shift", 1), (16, "shift", 2), (12, "flip-crop", 4)])
def test_each_augmented_image_is_its_original_moved_and_all_moves_occur(size: int, augment: str, margin: int) -> None:
    images, batches = raw(400, size, augment=augment)
    moves, flips = set(), set()
    for inputs, labels in batches.shuffled(0, 100, 4):
        for image, label in zip(pixels(inputs), labels.tolist(), strict=True):
            found = [
                (rows, columns, flip)
                for rows in range(-margin, margin + 1)
                for columns in range(-margin, margin + 1)
                for flip in (False, True)
                if np.array_equal(image[:, :, ::-1] if flip else image, shifted(images[label], rows, columns))
            ]
            assert len(found) == 1
            moves.add(found[0][:2])
            flips.add(found[0][2])
    assert len(moves) == (2 * margin + 1) ** 2
    assert flips == ({True, False} if augment == "flip-crop" else {False})


def test_without_augmentation_images_come_as_they_are() -> None:
    images, batches = raw(20)
    for inputs, labels in batches.shuffled(0, 5, 4):
        assert np.array_equal(pixels(inputs), images[labels.numpy()])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0, 0.5), st.integers(0, 3))
def test_split_is_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    train, held = split(np.array(labels), fraction, seed)
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held) > 0).all()
    for label in set(labels):
        members = labels.count(label)
        mine = sum(labels[index] == label for index in held)
        assert mine <= members - 1
        assert abs(mine - fraction * members) <= 1


def test_split_depends_on_the_seed() -> None:
    labels = np.arange(100) % 3
    first, again, other = (split(labels, 0.2, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_streams_of_a_seed_are_different() -> None:
    draws = {torch.rand(1, generator=generator(seed, stream)).item() for seed in (0, 1) for stream in ("xi", "a", 3)}
    assert len(draws) == 6
