"""Folders of pictures: labels, sizes, colours, and pictures that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.trainers.data.pictures import open_folder, read_folder, scaled


def save(path, height=6, width=6, mode="RGB", value=None):
    """Write a picture, of one grey value or of noise, and return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if bands == 1 else (height, width, bands)
    seed = int.from_bytes(path.name.encode(), "little") % 2**32
    draws = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    pixels = draws if value is None else np.full(shape, value, np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_pictures_are_read_in_order_of_their_names(tmp_path):
    expected = [save(tmp_path / name) for name in ("a.png", "b.PNG", "c.png")]
    (tmp_path / "notes.csv").write_text("not a picture")
    (tmp_path / ".hidden.png").write_text("not a picture")
    images, labels = read_folder(tmp_path)
    assert labels is None
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.stack(expected).transpose(0, 3, 1, 2))


def test_jpeg_is_read(tmp_path):
    save(tmp_path / "a.jpg", value=100)
    save(tmp_path / "b.JPEG", value=200)
    images, _ = read_folder(tmp_path)
    assert images.shape == (2, 3, 6, 6)
    assert np.abs(images[0].astype(int) - 100).max() <= 2
    assert np.abs(images[1].astype(int) - 200).max() <= 2


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path):
    for index, name in enumerate(("dog/2.png", "cat/deep/1.png", "dog/1.png", "ant/x.png")):
        save(tmp_path / name, value=index)
    images, labels = read_folder(tmp_path)
    assert images[:, 0, 0, 0].tolist() == [3, 1, 2, 0]
    assert labels.tolist() == [0, 1, 2, 2]
    assert labels.dtype == np.int64


def test_sub_folders_with_numbers_are_those_labels(tmp_path):
    for label in (0, 2, 10):
        save(tmp_path / str(label) / "a.png", value=label)
    images, labels = read_folder(tmp_path)
    assert images[:, 0, 0, 0].tolist() == labels.tolist()
    assert sorted(labels) == [0, 2, 10]


def test_labels_beyond_the_classes_are_refused(tmp_path):
    save(tmp_path / "10" / "a.png")
    with pytest.raises(DataError, match="label 10 at position 0, expected 0 to 9"):
        read_folder(tmp_path, num_classes=10)


def test_limit_takes_some_with_their_labels_and_opens_no_others(tmp_path):
    for label in range(10):
        save(tmp_path / str(label) / "a.png", value=label)
        (tmp_path / str(label) / "b.png").write_bytes(b"broken")
    taken = set()
    for seed in range(40):
        try:
            images, labels = read_folder(tmp_path, limit=2, seed=seed)
        except DataError:
            continue  # a broken one was among them
        assert images[:, 0, 0, 0].tolist() == labels.tolist()
        assert len(set(labels)) == 2
        taken.add(tuple(labels))
    assert len(taken) > 3


@pytest.mark.parametrize(("mode", "channels", "shape"), [
    ("L", None, 1), ("RGB", None, 3), ("RGBA", None, 3), ("L", 3, 3), ("RGB", 1, 1), ("RGBA", 4, 4), ("RGB", 4, 4),
])  # fmt: skip
def test_channels(tmp_path, mode, channels, shape):
    save(tmp_path / "a.png", mode=mode)
    assert read_folder(tmp_path, channels=channels)[0].shape == (1, shape, 6, 6)


def test_grey_among_coloured_becomes_coloured(tmp_path):
    grey, colour = save(tmp_path / "a.png", mode="L"), save(tmp_path / "b.png")
    images, _ = read_folder(tmp_path)
    assert np.array_equal(images[0], np.stack([grey] * 3))
    assert np.array_equal(images[1], colour.transpose(2, 0, 1))


def test_palette_is_coloured(tmp_path):
    Image.new("RGB", (6, 6), (255, 0, 10)).quantize().save(tmp_path / "a.png")
    assert read_folder(tmp_path)[0][0, :, 3, 3].tolist() == [255, 0, 10]


def test_pictures_are_scaled_to_cover_and_cut_in_the_middle(tmp_path):
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 200  # the middle third stays
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    images, _ = read_folder(tmp_path, size=(4, 4))
    assert images.shape == (2, 3, 4, 4)
    assert (images == 200).all()


def test_size_is_height_then_width(tmp_path):
    save(tmp_path / "a.png")
    assert read_folder(tmp_path, size=(4, 10))[0].shape == (1, 3, 4, 10)


def test_scaled_treats_arrays_as_pictures(tmp_path):
    pixels = save(tmp_path / "a.png", 9, 14)
    images, _ = read_folder(tmp_path, size=(5, 4))
    assert np.array_equal(scaled(pixels.transpose(2, 0, 1)[None], (5, 4)), images)


def test_different_sizes_are_refused_without_a_size(tmp_path):
    save(tmp_path / "a.png", 6, 6)
    save(tmp_path / "b.png", 6, 7)
    with pytest.raises(DataError, match=r"b\.png is 6x7 pixels, but a\.png is 6x6"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, size=(6, 6))[0].shape == (2, 3, 6, 6)


@pytest.mark.parametrize("inside", ["", "a"])
def test_empty_folder_is_refused(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=f"{tmp_path} holds no pictures"):
        read_folder(tmp_path)


def test_empty_class_is_refused(tmp_path):
    save(tmp_path / "a" / "a.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path / 'b'} holds no pictures"):
        read_folder(tmp_path)


def test_pictures_beside_sub_folders_are_refused(tmp_path):
    save(tmp_path / "a" / "a.png")
    save(tmp_path / "b.png")
    with pytest.raises(DataError, match="both directly and in sub-folders"):
        read_folder(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_broken_picture_is_named(tmp_path, suffix):
    save(tmp_path / f"a{suffix}", 40, 40)
    path = tmp_path / f"b{suffix}"
    save(path, 40, 40)
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - len(whole) // 4):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"cannot read picture {path}"):
            read_folder(tmp_path)


def test_more_than_eight_bits_are_refused(tmp_path):
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png has more than 8 bits"):
        read_folder(tmp_path)


@pytest.mark.parametrize("options", [{}, {"size": (4, 5)}, {"channels": 1}, {"size": (4, 5), "channels": 3}], ids=str)
def test_pictures_left_in_their_files_are_the_same(tmp_path, options):
    for name in ("b/1.png", "a/2.png", "a/1.png"):
        save(tmp_path / name, mode="L" if name == "a/2.png" else "RGB")
    images, labels = read_folder(tmp_path, **options)
    files, found = open_folder(tmp_path, **options)
    assert found.tolist() == labels.tolist()
    assert (files.shape, files.nbytes, len(files)) == (images.shape, images.nbytes, 3)
    assert np.array_equal(files.read(), images)
    assert np.array_equal(files[np.array([2, 0])].read(), images[[2, 0]])
    assert np.array_equal(files[1:].read(), images[1:])


def test_headers_of_unread_pictures_are_looked_at(tmp_path):
    save(tmp_path / "a.png", 6, 6)
    save(tmp_path / "b.png", 6, 7)
    with pytest.raises(DataError, match=r"b\.png is 6x7 pixels, but a\.png is 6x6"):
        open_folder(tmp_path)
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cannot read picture .*b\.png"):
        open_folder(tmp_path)
