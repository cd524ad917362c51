"""idx files: what is read back, where they are looked for, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.trainers.data import load_dataset, mnist
from prune_onnx.trainers.data.idx import read_idx

NAMES = mnist.FILES


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def contents(train: int = 20, test: int = 10) -> dict[str, bytes]:
    """Return the four files of a small set, by name."""
    draws = np.random.default_rng(0)
    made = {}
    for part, n in (("train", train), ("t10k", test)):
        made[f"{part}-images-idx3-ubyte"] = idx(draws.integers(0, 256, (n, 28, 28), np.uint8))
        made[f"{part}-labels-idx1-ubyte"] = idx((np.arange(n) % 10).astype(np.uint8))
    return made


def write(folder: Path, files: dict[str, bytes], suffix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix == ".gz" else content)


@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)), st.booleans())
def test_read_idx_gives_back_what_was_written(tmp_path_factory, array, packed):
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    found = read_idx(path, array.ndim)
    assert found.dtype == np.uint8
    assert np.array_equal(found, array)
    assert found.shape == array.shape


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_every_truncation_is_refused(tmp_path, packed):
    whole = idx(np.arange(12, dtype=np.uint8).reshape(3, 2, 2))
    whole = gzip.compress(whole) if packed else whole
    path = tmp_path / "file"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=str(path)):
            read_idx(path, 3)


def test_extra_bytes_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(idx(np.zeros((2, 3), np.uint8)) + b"\0")
    with pytest.raises(DataError, match="2x3 = 6 bytes of data, but 7 follow"):
        read_idx(tmp_path / "file", 2)


def test_header_that_promises_more_than_memory_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"abc")
    with pytest.raises(DataError, match=f"= {(2**32 - 1) ** 3} bytes"):
        read_idx(tmp_path / "file", 3)


@pytest.mark.parametrize(("start", "said"), [
    (b"\0\0\x0d\1", "expected uint8 values"),  # float32
    (b"\0\0\x08\2", "in 1 dimensions"),
    (b"\1\0\x08\1", "not an idx file"),
    (b"<htm", "not an idx file"),
])  # fmt: skip
def test_wrong_magic_number_is_refused(tmp_path, start, said):
    (tmp_path / "file").write_bytes(start + b"\0\0\0\1" + b"\0" * 8)
    with pytest.raises(DataError, match=said):
        read_idx(tmp_path / "file", 1)


def test_damaged_gzip_is_refused(tmp_path):
    packed = bytearray(gzip.compress(idx(np.zeros(1000, np.uint8))))
    packed[12] ^= 0xFF
    (tmp_path / "file").write_bytes(packed)
    with pytest.raises(DataError, match="damaged gzip"):
        read_idx(tmp_path / "file", 1)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("name", "folder"), [
    ("mnist", "MNIST/raw"), ("mnist", "mnist"), ("mnist", "."),
    ("fashion-mnist", "FashionMNIST/raw"), ("fashion-mnist", "fashion-mnist"), ("fashion-mnist", "."),
])  # fmt: skip
def test_every_layout_is_found(tmp_path, name, folder, suffix):
    files = contents()
    write(tmp_path / folder, files, suffix)
    found = load_dataset(name, tmp_path)
    assert found.train_images.tobytes() == files["train-images-idx3-ubyte"][16:]
    assert found.test_images.tobytes() == files["t10k-images-idx3-ubyte"][16:]
    assert found.train_labels.tolist() == list(range(10)) * 2
    assert found.test_labels.tolist() == list(range(10))
    assert found.train_images.shape == (20, 1, 28, 28)


def test_dotted_names_are_found(tmp_path):
    write(tmp_path, {name.replace("-idx", ".idx"): content for name, content in contents().items()})
    assert len(load_dataset("mnist", tmp_path).train_images) == 20


@pytest.mark.parametrize("name", NAMES)
def test_incomplete_set_names_the_missing_file(tmp_path, name):
    write(tmp_path / "mnist", {key: value for key, value in contents().items() if key != name})
    with pytest.raises(DataError, match=rf"{tmp_path / 'mnist'} has no {name}\. Pass .*--download"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(("file", "content", "said"), [
    ("train-labels-idx1-ubyte", idx(np.zeros(19, np.uint8)), "20 samples"),
    ("t10k-labels-idx1-ubyte", idx(np.array([0] * 7 + [10] + [0] * 2, np.uint8)), "label 10 at position 7"),
    ("train-images-idx3-ubyte", idx(np.zeros((20, 28, 27), np.uint8)), "28x28 pixels, found 20 of 28x27"),
    ("t10k-images-idx3-ubyte", idx(np.zeros((0, 28, 28), np.uint8)), "found 0"),
    ("train-images-idx3-ubyte", idx(np.zeros(20, np.uint8)), "3 dimensions"),
])  # fmt: skip
def test_files_that_do_not_fit_are_refused(tmp_path, file, content, said):
    write(tmp_path, contents() | {file: content})
    with pytest.raises(DataError, match=said) as caught:
        load_dataset("mnist", tmp_path)
    assert file in str(caught.value)


def test_files_of_the_sister_set_are_refused(tmp_path, monkeypatch):
    write(tmp_path, contents())
    digest = hashlib.md5(contents()["t10k-labels-idx1-ubyte"][8:]).hexdigest()
    fashion = replace(mnist.FASHION_MNIST, test_labels=digest)
    monkeypatch.setattr(mnist, "SETS", (mnist.MNIST, fashion))
    with pytest.raises(DataError, match=r"belongs to fashion-mnist, not to mnist\. Pass --dataset fashion-mnist"):
        load_dataset("mnist", tmp_path)


def test_unreadable_file_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="Is a directory"):
        read_idx(tmp_path, 1)
