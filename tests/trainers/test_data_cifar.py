"""CIFAR-10 and CIFAR-100: both versions give the same images, and pickles cannot run code."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.trainers.data import load_dataset
from prune_onnx.trainers.data.cifar import CIFAR10, CIFAR100, CifarSet
from prune_onnx.trainers.data.pickles import read_batch

IMAGES = 4
BINARY, PYTHON = CIFAR10.binary, CIFAR10.python
both = pytest.mark.parametrize("kind", [CIFAR10, CIFAR100], ids=lambda kind: kind.name)


def batches(kind: CifarSet = CIFAR10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of every file."""
    draws, classes = np.random.default_rng(0), len(kind.class_names)
    return {
        stem: (draws.integers(0, 256, (n, 3072), np.uint8), draws.integers(classes - 10, classes, n, np.uint8))
        for stem, n in zip(kind.stems, [IMAGES * share for share in kind.shares], strict=True)
    }


class _Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: str as bytes, numpy's old module path."""

    dispatch = pickle._Pickler.dispatch.copy()

    def _bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    def _str(self, value: str) -> None:
        self._bytes(value.encode("latin1"))

    dispatch[bytes] = _bytes
    dispatch[str] = _str

    def save_global(self, obj, name=None):
        if getattr(obj, "__name__", "") == "_reconstruct":
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch[type(np.ndarray)] = save_global
    dispatch[type(batches)] = save_global


def python2(value: object) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, 2).dump(value)
    return file.getvalue()


def python3(value: object) -> bytes:
    return pickle.dumps(value, 2)


def write_binary(folder: Path, kind: CifarSet = CIFAR10) -> None:
    folder.mkdir(parents=True)
    for stem, (images, labels) in batches(kind).items():
        coarse = [labels[:, None] // 5] * (kind.label_bytes - 1)
        (folder / f"{stem}.bin").write_bytes(np.concatenate([*coarse, labels[:, None], images], 1).tobytes())


def write_python(folder: Path, dump=python2, keys=None, kind: CifarSet = CIFAR10) -> None:
    folder.mkdir(parents=True)
    keys = keys or (b"data", kind.label_key.encode(), b"batch_label")
    for stem, (images, labels) in batches(kind).items():
        content = dict(zip(keys, (images, labels.tolist(), b"a batch"), strict=True))
        (folder / stem).write_bytes(dump(content))


def check(found, kind: CifarSet = CIFAR10) -> None:
    *train, test = batches(kind).values()
    assert np.array_equal(found.train_images.reshape(-1, 3072), np.concatenate([images for images, _ in train]))
    assert found.train_labels.tolist() == np.concatenate([labels for _, labels in train]).tolist()
    assert np.array_equal(found.test_images.reshape(-1, 3072), test[0])
    assert found.test_labels.tolist() == test[1].tolist()
    assert found.test_images.shape == (IMAGES, 3, 32, 32)
    assert found.test_images.flags.writeable
    assert found.train_images.flags.writeable
    assert found.num_classes == len(set(found.class_names)) == len(kind.class_names)


@both
@pytest.mark.parametrize("nested", [False, True])
def test_binary_version(tmp_path, nested, kind):
    folder = tmp_path / (kind.name if nested else "") / kind.binary
    write_binary(folder, kind)
    check(load_dataset(kind.name, tmp_path), kind)
    check(load_dataset(kind.name, folder), kind)


@both
@pytest.mark.parametrize("dump", [python2, python3])
def test_python_version(tmp_path, dump, kind):
    write_python(tmp_path / kind.python, dump, kind=kind)
    check(load_dataset(kind.name, tmp_path), kind)
    check(load_dataset(kind.name, tmp_path / kind.python), kind)


def test_cifar100_has_a_hundred_classes_in_alphabetical_order():
    assert len(CIFAR100.class_names) == 100
    assert list(CIFAR100.class_names) == sorted(CIFAR100.class_names)


def test_cifar100_cut_off_between_two_records_is_refused(tmp_path):
    write_binary(tmp_path / CIFAR100.binary, CIFAR100)
    path = tmp_path / CIFAR100.binary / "test.bin"
    path.write_bytes(path.read_bytes()[:-3074])
    with pytest.raises(DataError, match=f"{path} holds 3 images, but train.bin holds 20"):
        load_dataset("cifar100", tmp_path)


def test_python_version_with_text_keys(tmp_path):
    write_python(tmp_path / PYTHON, python3, ("data", "labels", "batch_label"))
    check(load_dataset("cifar10", tmp_path))


def test_complete_version_is_taken_when_the_other_is_not(tmp_path):
    write_python(tmp_path / PYTHON)
    write_binary(tmp_path / BINARY)
    (tmp_path / BINARY / "test_batch.bin").unlink()
    check(load_dataset("cifar10", tmp_path))


def test_fortran_order_is_honoured(tmp_path):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (tmp_path / "file").write_bytes(python3({"data": np.asfortranarray(array)}))
    assert np.array_equal(read_batch(tmp_path / "file")["data"], array)


def test_missing_file_is_named(tmp_path):
    write_binary(tmp_path / BINARY)
    (tmp_path / BINARY / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"has no data_batch_3\.bin"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("cut", "said"), [(1, "multiple of 3073"), (3073, "holds 3 images"), (4 * 3073, "holds 0 bytes")]
)
def test_truncated_binary_file_is_refused(tmp_path, cut, said):
    write_binary(tmp_path / BINARY)
    path = tmp_path / BINARY / "data_batch_5.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=f"{path}.*{said}"):
        load_dataset("cifar10", tmp_path)


def test_label_out_of_range_is_refused(tmp_path):
    write_binary(tmp_path / BINARY)
    path = tmp_path / BINARY / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=f"{path}: label 10 at position 0"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(("content", "said"), [
    ({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, "found 2x3071"),
    ({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, "array of uint8"),
    ({"data": [[0] * 3072], "labels": [0]}, "found no array"),
    ({"labels": [0]}, "found no array"),
    ({"data": np.zeros((2, 3072), np.uint8)}, "'labels'"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, "integers from 0 to 9"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, True]}, "integers from 0 to 9"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "2 samples"),
    ([1, 2], "expected a dictionary, found list"),
])  # fmt: skip
def test_python_file_of_other_content_is_refused(tmp_path, content, said):
    write_python(tmp_path / PYTHON)
    path = tmp_path / PYTHON / "data_batch_1"
    path.write_bytes(python3(content))
    with pytest.raises(DataError, match=f"{path}.*{said}"):
        load_dataset("cifar10", tmp_path)


def test_every_truncation_of_a_pickle_is_refused(tmp_path):
    whole = python2({b"data": np.zeros((1, 8), np.uint8), b"labels": [3]})
    path = tmp_path / "file"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=str(path)):
            read_batch(path)


class _Evil:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_that_call_anything_are_refused_and_nothing_runs(tmp_path, protocol):
    victim, path = tmp_path / "victim", tmp_path / "file"
    attacks = [
        _Evil(open, str(victim), "w"),
        _Evil(eval, f"open({str(victim)!r}, 'w')"),
        _Evil(exec, f"open({str(victim)!r}, 'w')"),
        _Evil(np.save, str(victim), 3),
        _Evil(getattr, "text", "upper"),
    ]
    for attack in attacks:
        path.write_bytes(pickle.dumps({"labels": attack}, protocol))
        with pytest.raises(DataError, match="asks for"):
            read_batch(path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_stand_ins_cannot_be_made_to_call_anything(tmp_path):
    # A pickle may also call what the stand-ins return, or encode text by a codec of its choice.
    for attack in (b"cnumpy\nndarray\n(tR(tR.", b"c_codecs\nencode\n(Vabc\nVrot13\ntR."):
        (tmp_path / "file").write_bytes(attack)
        with pytest.raises(DataError):
            read_batch(tmp_path / "file")
