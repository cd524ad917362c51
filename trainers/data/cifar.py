"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from their binary or their python version.

    binary   a record an image: label byte (CIFAR-100: coarse, then fine), then 3072 bytes, planes R, G, B of 32x32
    python   a pickled dictionary: data (uint8, N x 3072, the same planes), labels or fine_labels (list of N)
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.files import write_bytes
from prune_onnx.graph_ops.progress import Progress

from .base import Dataset, Place, check_labels, locate, missing, read_file
from .download import download
from .pickles import read_batch

HOME = "https://www.cs.toronto.edu/~kriz/"
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class CifarSet:
    """One data set of this form.

    Attributes:
        name: its name in the registry.
        summary: one line about it.
        stems: its files without suffix, the test file last.
        shares: their sizes relative to one another.
        binary: folder of the binary version.
        python: folder of the python version.
        label_bytes: label bytes before each image; the last of them is the label.
        label_key: the labels' name in the python version.
        archive: file of the binary version as published, with sha256 and bytes.
        mean: per channel, of pixel/255 over the training images.
        std: likewise.
        class_names: in the order of the labels.
    """

    name: str
    summary: str
    stems: tuple[str, ...]
    shares: tuple[int, ...]
    binary: str
    python: str
    label_bytes: int
    label_key: str
    archive: tuple[str, str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def __call__(self, data_dir: Path, fetch: bool, progress: Progress) -> Dataset:
        """Read the data set; see :func:`.load_dataset`."""
        places = self._places(data_dir)
        files = locate(places)
        if files is None and fetch:
            self._download(data_dir, progress)
            files = locate(places)
        if files is None:
            raise missing(self.name, places, round(self.archive[2] / 1e6))
        batches = [self._binary(path) if path.suffix == ".bin" else self._python(path) for path in files]
        unit = len(batches[0][0]) / self.shares[0]
        for path, share, (images, _) in zip(files, self.shares, batches, strict=True):
            if len(images) != share * unit:  # this also finds a file that was cut off between two records
                raise DataError(f"{path} holds {len(images)} images, but {files[0].name} holds {len(batches[0][0])}. "
                                "Fetch the files again.")
        return Dataset(
            name=self.name,
            train_images=np.concatenate([images for images, _ in batches[:-1]]),
            train_labels=np.concatenate([labels for _, labels in batches[:-1]]),
            test_images=batches[-1][0],
            test_labels=batches[-1][1],
            num_classes=len(self.class_names),
            mean=self.mean,
            std=self.std,
            class_names=self.class_names,
            augment="flip-crop",
        )

    def _places(self, data_dir: Path) -> list[Place]:
        folders = [(data_dir / parent / version, suffix)
                   for parent in (".", self.name) for version, suffix in ((self.binary, ".bin"), (self.python, ""))]
        return [[[folder / f"{stem}{suffix}"] for stem in self.stems]
                for folder, suffix in (*folders, (data_dir, ".bin"), (data_dir, ""))]

    def _binary(self, path: Path) -> Batch:
        """Return images (N, 3, 32, 32) and labels (N,) of a file of the binary version."""
        data = np.frombuffer(read_file(path), np.uint8)
        record = self.label_bytes + PIXELS
        if not len(data) or len(data) % record:
            raise DataError(f"{path} holds {len(data)} bytes, expected a multiple of {record} (an image and its "
                            "label). Fetch it again.")
        records = data.reshape(-1, record)
        labels = check_labels(records[:, self.label_bytes - 1], len(records), len(self.class_names), path)
        return np.ascontiguousarray(records[:, self.label_bytes :]).reshape(-1, *SHAPE), labels

    def _python(self, path: Path) -> Batch:
        """Return images (N, 3, 32, 32) and labels (N,) of a file of the python version."""
        batch, classes = read_batch(path), len(self.class_names)
        images, labels = batch.get("data"), batch.get(self.label_key)
        if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != PIXELS or not len(images):
            found = "x".join(map(str, images.shape)) if isinstance(images, np.ndarray) else "no array"
            raise DataError(f"{path}: expected 'data' of N x {PIXELS}, found {found}. Fetch it again.")
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < classes for label in labels):
            raise DataError(f"{path}: expected {self.label_key!r}, a list of integers from 0 to {classes - 1}. "
                            "Fetch it again.")
        return (
            np.ascontiguousarray(images).reshape(-1, *SHAPE),
            check_labels(np.array(labels), len(images), classes, path),
        )

    def _download(self, data_dir: Path, progress: Progress) -> None:
        """Fetch the archive of the binary version and unpack its data files, no others."""
        name, sha256, size = self.archive
        archive = data_dir / name
        download([f"{HOME}{name}"], archive, sha256=sha256, size=size, progress=progress)
        with tarfile.open(archive) as tar:
            for stem in self.stems:
                inside = f"{self.binary}/{stem}.bin"
                member = tar.extractfile(inside)
                assert member is not None  # the checksum says what is in the archive
                write_bytes(data_dir / inside, member.read())
        archive.unlink()


CIFAR10 = CifarSet(
    name="cifar10",
    summary="CIFAR-10: 60,000 colour pictures of 32x32 in 10 classes (Krizhevsky 2009).",
    stems=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    shares=(1,) * 6,
    binary="cifar-10-batches-bin",
    python="cifar-10-batches-py",
    label_bytes=1,
    label_key="labels",
    archive=(
        "cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd", 170_052_171,
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)  # fmt: skip

CIFAR100 = CifarSet(
    name="cifar100",
    summary="CIFAR-100: 60,000 colour pictures of 32x32 in 100 classes (Krizhevsky 2009).",
    stems=("train", "test"),
    shares=(5, 1),
    binary="cifar-100-binary",
    python="cifar-100-python",
    label_bytes=2,
    label_key="fine_labels",
    archive=(
        "cifar-100-binary.tar.gz", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec", 168_513_733,
    ),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    class_names=(
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee",
        "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant",
        "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower",
        "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
        "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate",
        "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark",
        "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower",
        "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout", "tulip",
        "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    ),
)  # fmt: skip
