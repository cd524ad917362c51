"""Batches: what an epoch shows, in which order, how it is changed, and how a training set is split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.trainers.batches import Batches, generator, split
from prune_onnx.trainers.config import steps_per_epoch
from prune_onnx.trainers.data.pictures import PictureFiles, open_folder

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


@pytest.mark.parametrize("cutmix", [0.0, 0.5])
@pytest.mark.parametrize("augment", ["none", "shift", "flip-crop"])
def test_epoch_can_be_entered_at_any_step(augment: str, cutmix: float) -> None:
    images, labels = numbered(30)
    batches = Batches(images, labels, mean=MEAN, std=STD, augment=augment, cutmix=cutmix)
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


def test_a_patch_is_a_box_of_the_image_before_at_the_same_place() -> None:
    images, batches = raw(400, 16, cutmix=0.5)
    areas = []
    for inputs, labels in batches.shuffled(0, 100, 4):
        own = images[labels.numpy()]
        for image, mine, other in zip(pixels(inputs), own, np.roll(own, 1, 0), strict=True):
            pasted = (image != mine).any(0)
            areas.append(pasted.mean())
            if areas[-1]:
                rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
                box = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                assert np.array_equal(image[box], other[box])
                image[box] = mine[box]
            assert np.array_equal(image, mine)
    assert np.mean(np.array(areas) > 0) == pytest.approx(0.5, abs=0.08)
    assert np.mean([area for area in areas if area]) == pytest.approx(0.5, abs=0.08)


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


@pytest.fixture
def folder(tmp_path: Path) -> tuple[PictureFiles, np.ndarray]:
    """Eleven pictures of noise in files, and their pixels."""
    images, _ = numbered(11, channels=3)
    for index, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{index:02}.png")
    return open_folder(tmp_path)[0], images


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_in_files_give_the_batches_of_pictures_in_memory(folder, workers: int) -> None:
    files, images = folder
    options = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "augment": "flip-crop", "seed": 3}
    state = torch.get_rng_state()
    lazy = Batches(files, np.arange(11), **options, workers=workers)
    held = Batches(images, np.arange(11), **options)
    for draw in (lambda b: b.shuffled(1, 4, 3, start=1), lambda b: b.in_order(5), lambda b: b.at(torch.tensor([3]), 1)):
        for found, expected in zip(draw(lazy), draw(held), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "dropout depends on torch's own generator"


@pytest.mark.parametrize("workers", [0, 1])
def test_picture_that_a_worker_cannot_read_is_one_clear_error(folder, workers: int) -> None:
    files, _ = folder
    files.files[7].write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cannot read picture .*07\.png") as caught:
        list(Batches(files, np.arange(11), mean=(0,) * 3, std=(1,) * 3, workers=workers).in_order(4))
    assert "\n" not in str(caught.value)
