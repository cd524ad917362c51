"""CIFAR-10 (Krizhevsky 2009), from its binary or its python version; six files of 10,000 images.

    binary   a record an image: label byte, then 3072 bytes, planes R, G, B of 32x32
    python   a pickled dictionary: data (uint8, N x 3072, the same planes), labels (list of N)
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.files import write_bytes
from prune_onnx.graph_ops.progress import Progress

from .base import Dataset, Place, check_labels, locate, missing, read_file
from .download import download
from .pickles import read_batch

NAME = "cifar10"
STEMS = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
ARCHIVE = "cifar-10-binary.tar.gz"
MIRRORS = (f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",)
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
SIZE = 170_052_171

Batch = tuple[np.ndarray, np.ndarray]


def load(data_dir: Path, fetch: bool, progress: Progress) -> Dataset:
    """Read the data set; see :func:`.load_dataset`."""
    places = _places(data_dir)
    files = locate(places)
    if files is None and fetch:
        _download(data_dir, progress)
        files = locate(places)
    if files is None:
        raise missing(NAME, places, round(SIZE / 1e6))
    batches = [_binary(path) if path.suffix == ".bin" else _python(path) for path in files]
    for path, (images, _) in zip(files, batches, strict=True):
        # All six are of one size, so this also finds a file that was cut off between two records.
        if len(images) != len(batches[0][0]):
            raise DataError(f"{path} holds {len(images)} images, but {files[0].name} holds {len(batches[0][0])}. "
                            "Fetch the files again.")
    return Dataset(
        name=NAME,
        train_images=np.concatenate([images for images, _ in batches[:-1]]),
        train_labels=np.concatenate([labels for _, labels in batches[:-1]]),
        test_images=batches[-1][0],
        test_labels=batches[-1][1],
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        augment="flip-crop",
    )


def _places(data_dir: Path) -> list[Place]:
    folders = [(data_dir / parent / version, suffix)
               for parent in (".", NAME) for version, suffix in ((BINARY, ".bin"), (PYTHON, ""))]
    return [[[folder / f"{stem}{suffix}"] for stem in STEMS]
            for folder, suffix in (*folders, (data_dir, ".bin"), (data_dir, ""))]


def _binary(path: Path) -> Batch:
    """Return images (N, 3, 32, 32) and labels (N,) of a file of the binary version."""
    data = np.frombuffer(read_file(path), np.uint8)
    if not len(data) or len(data) % RECORD:
        raise DataError(f"{path} holds {len(data)} bytes, expected a multiple of {RECORD} (an image and its label). "
                        "Fetch it again.")
    records = data.reshape(-1, RECORD)
    labels = check_labels(records[:, 0], len(records), 10, path)
    return np.ascontiguousarray(records[:, 1:]).reshape(-1, *SHAPE), labels


def _python(path: Path) -> Batch:
    """Return images (N, 3, 32, 32) and labels (N,) of a file of the python version."""
    batch = read_batch(path)
    images, labels = batch.get("data"), batch.get("labels")
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != RECORD - 1 or not len(images):
        found = "x".join(map(str, images.shape)) if isinstance(images, np.ndarray) else "no array"
        raise DataError(f"{path}: expected 'data' of N x {RECORD - 1}, found {found}. Fetch it again.")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 10 for label in labels):
        raise DataError(f"{path}: expected 'labels', a list of integers from 0 to 9. Fetch it again.")
    return np.ascontiguousarray(images).reshape(-1, *SHAPE), check_labels(np.array(labels), len(images), 10, path)


def _download(data_dir: Path, progress: Progress) -> None:
    """Fetch the archive of the binary version and unpack its six data files, no others."""
    archive = data_dir / ARCHIVE
    download(MIRRORS, archive, sha256=SHA256, size=SIZE, progress=progress)
    with tarfile.open(archive) as tar:
        for stem in STEMS:
            name = f"{BINARY}/{stem}.bin"
            member = tar.extractfile(name)
            assert member is not None  # the checksum says what is in the archive
            write_bytes(data_dir / name, member.read())
    archive.unlink()
