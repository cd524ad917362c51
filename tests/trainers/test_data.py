"""The list of data sets, the digits, and the real files where they are at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prune_onnx.graph_ops.errors import ConfigError, DataError
from prune_onnx.trainers.data import DATASETS, Dataset, load_dataset

FILES = os.environ.get("PRUNE_ONNX_DATA", "")


def load_or_skip(name: str) -> Dataset:
    """Read a data set from where the environment says; skip where its files are not there at all."""
    markers = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "cifar-10-batches-bin",
               "cifar100": "cifar-100-binary", "tiny-imagenet": "tiny-imagenet-200"}
    if name in markers and not (FILES and (Path(FILES) / markers[name]).is_dir()):
        pytest.skip(f"no {markers[name]} in the folder that PRUNE_ONNX_DATA names")
    return load_dataset(name)


@pytest.mark.parametrize("name", DATASETS.names())
def test_data_set_is_what_it_says(name):
    found = load_or_skip(name)
    if name == "tiny-imagenet":
        found = replace(found, train_images=found.train_images.read(), test_images=found.test_images.read())
    assert found.name == name
    assert len(found.class_names) == found.num_classes
    sides = []
    for images, labels in ((found.train_images, found.train_labels), (found.test_images, found.test_labels)):
        assert images.dtype == np.uint8
        assert images.flags.c_contiguous
        assert images.flags.writeable  # torch warns when it takes a read-only array
        assert labels.dtype == np.int64
        assert labels.shape == (len(images),)
        assert set(labels) == set(range(found.num_classes))
        assert images.max() == 255
        sides.append(images.shape[1:])
    assert sides[0] == sides[1]
    values = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(found.mean, found.std, strict=True)):
        weights = np.bincount(found.train_images[:, channel].ravel(), minlength=256)
        exact = np.average(values, weights=weights)
        assert abs(exact - mean) <= 0.5e-4
        assert abs(np.average((values - exact) ** 2, weights=weights) ** 0.5 - std) <= 0.5e-4


@pytest.mark.parametrize(("name", "train", "test", "shape"), [
    ("digits", 1347, 450, (1, 8, 8)),
    ("mnist", 60000, 10000, (1, 28, 28)),
    ("fashion-mnist", 60000, 10000, (1, 28, 28)),
    ("cifar10", 50000, 10000, (3, 32, 32)),
    ("cifar100", 50000, 10000, (3, 32, 32)),
    ("tiny-imagenet", 100_000, 10000, (3, 64, 64)),
])  # fmt: skip
def test_real_sizes(name, train, test, shape):
    found = load_or_skip(name)
    assert (len(found.train_images), len(found.test_images), found.train_images.shape[1:]) == (train, test, shape)


def test_digits_are_split_once_and_for_all_with_every_class_in_proportion():
    from sklearn.datasets import load_digits

    found, again = load_dataset("digits"), load_dataset("digits")
    assert np.array_equal(found.test_images, again.test_images)
    whole = load_digits()
    expected = sorted(((image * 255 / 16).round().astype(np.uint8).tobytes(), int(label))
                      for image, label in zip(whole.images, whole.target, strict=True))
    parts = [(found.train_images, found.train_labels), (found.test_images, found.test_labels)]
    both = [(image.tobytes(), int(label)) for part in parts for image, label in zip(*part, strict=True)]
    assert sorted(both) == expected
    for label, total in enumerate(np.bincount(whole.target)):
        assert abs((found.test_labels == label).sum() - total / 4) <= 0.5


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'prune-onnx\[digits\]'"):
        load_dataset("digits")


def test_unknown_name_gives_close_matches():
    with pytest.raises(ConfigError, match="Did you mean 'fashion-mnist'"):
        load_dataset("fashion_mnist")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet"])
def test_missing_files_say_where_they_were_sought_and_what_helps(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNE_ONNX_DATA", str(tmp_path / "there"))
    for folder, where in ((None, tmp_path / "there"), (tmp_path / "here", tmp_path / "here")):
        with pytest.raises(DataError) as caught:
            load_dataset(name, folder)
        for part in (name, str(where), "--data-dir", "--download"):
            assert part in str(caught.value)


def test_default_folder_is_data_here(tmp_path, monkeypatch):
    monkeypatch.delenv("PRUNE_ONNX_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data/MNIST/raw"):
        load_dataset("mnist")


def test_listing_and_reading_imports_neither_torch_nor_what_it_does_not_need():
    code = ("import sys; from prune_onnx.trainers.data import DATASETS; a = 'sklearn' in sys.modules;"
            "DATASETS.get('digits'); from prune_onnx.trainers.data import load_dataset; load_dataset('digits');"
            "print(a, 'torch' in sys.modules, 'pooch' in sys.modules, 'PIL' in sys.modules)")
    path = str(Path(__file__).parents[2] / ".typing")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": path, "PATH": ""})
    assert done.stdout.split() == ["False"] * 4
