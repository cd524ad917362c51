"""Tiny-ImageNet in small, in its published folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.trainers.data import load_dataset
from prune_onnx.trainers.data.pictures import PictureFiles

CLASSES = ("n02", "n01", "n10")


def picture(path: Path, value: int, mode: str = "RGB", side: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side), value if mode == "L" else (value, 0, 255)).save(path, quality=95)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training pictures of three classes, one of them grey, and three validation pictures in mixed order."""
    root = tmp_path / "tiny-imagenet-200"
    for number, name in enumerate(CLASSES):
        for index in range(2):
            mode = "L" if number == index == 0 else "RGB"
            picture(root / "train" / name / "images" / f"{name}_{index}.JPEG", 40 * number, mode)
        (root / "train" / name / f"{name}_boxes.txt").touch()
    for index in range(3):
        picture(root / "val" / "images" / f"val_{index}.JPEG", 80 * index)
    (root / "val" / "val_annotations.txt").write_text(
        "val_2.JPEG\tn10\t0\t0\t62\t62\nval_0.JPEG\tn02\t1\t1\t5\t5\nval_1.JPEG\tn02\t1\t1\t5\t5\n"
    )
    (root / "words.txt").write_text("n00\tother\nn01\tgoldfish, Carassius auratus\nn10\tbus\n")
    return root


@pytest.mark.parametrize("deep", [False, True])
def test_folders_are_read(folder, deep):
    found = load_dataset("tiny-imagenet", folder if deep else folder.parent)
    assert found.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.test_labels.tolist() == [2, 1, 1]
    assert found.class_names == ("goldfish, Carassius auratus", "n02", "bus")
    assert isinstance(found.train_images, PictureFiles), "nothing is read before it is needed"
    train, test = found.train_images.read(), found.test_images.read()
    assert train.shape == found.train_images.shape == (6, 3, 64, 64)
    assert np.abs(test[:, 0, 5, 5].astype(int) - [160, 0, 80]).max() <= 3
    assert np.abs(train[:, 0, 5, 5].astype(int) - [40, 40, 0, 0, 80, 80]).max() <= 3


@pytest.mark.parametrize(("line", "said"), [
    ("val_0.JPEG\tn99\t0\t0\t1\t1", "line 1"), ("val_9.JPEG\tn01\t0\t0\t1\t1", "line 1"),
    ("../val_annotations.txt\tn01", "line 1"), ("", "is empty"),
])  # fmt: skip
def test_annotations_that_do_not_fit_are_refused(folder, line, said):
    path = folder / "val" / "val_annotations.txt"
    path.write_text(line)
    with pytest.raises(DataError, match=f"{path}.* {said}"):
        load_dataset("tiny-imagenet", folder)


def test_class_without_pictures_is_refused(folder):
    for path in (folder / "train" / "n01" / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no pictures of some classes"):
        load_dataset("tiny-imagenet", folder)


def test_picture_of_another_size_is_named(folder):
    path = folder / "train" / "n10" / "images" / "n10_1.JPEG"
    picture(path, 0, side=32)
    with pytest.raises(DataError, match=f"{path} is 32x32 pixels, expected 64x64"):
        load_dataset("tiny-imagenet", folder).train_images.read()
