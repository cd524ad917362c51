"""MNIST (LeCun, Cortes, Burges 1998) and Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): four idx files each.

They share file names and shapes, so a folder can hold the wrong one of the two; the test labels tell them apart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.progress import Progress

from .base import Dataset, Place, check_labels, locate, missing
from .download import download
from .idx import read_idx

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SIDE = 28


@dataclass(frozen=True)
class IdxSet:
    """One data set of this form.

    Attributes:
        name: its name in the registry.
        summary: one line about it.
        folders: where it may lie below the data folder; downloads go to the first.
        mirrors: addresses that a file's name is appended to.
        archives: (sha256, bytes) of each of ``FILES`` as published, gzip.
        test_labels: md5 of the published test labels, one byte each.
        mean: of pixel/255 over the training images.
        std: likewise.
        class_names: in the order of the labels.
    """

    name: str
    summary: str
    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    archives: tuple[tuple[str, int], ...]
    test_labels: str
    mean: float
    std: float
    class_names: tuple[str, ...]

    def __call__(self, data_dir: Path, fetch: bool, progress: Progress) -> Dataset:
        """Read the data set; see :func:`.load_dataset`."""
        places = self._places(data_dir)
        files = locate(places)
        if files is None and fetch:
            self._download(places[0], progress)
            files = locate(places)
        if files is None:
            raise missing(self.name, places, round(sum(size for _, size in self.archives) / 1e6))
        train_images, test_images = _images(files[0]), _images(files[2])
        train_labels, test_labels = read_idx(files[1], 1), read_idx(files[3], 1)
        self._refuse_other_sets(test_labels, files[3])
        return Dataset(
            name=self.name,
            train_images=train_images,
            train_labels=check_labels(train_labels, len(train_images), 10, files[1]),
            test_images=test_images,
            test_labels=check_labels(test_labels, len(test_images), 10, files[3]),
            num_classes=10,
            mean=(self.mean,),
            std=(self.std,),
            class_names=self.class_names,
            augment="shift",
        )

    def _places(self, data_dir: Path) -> list[Place]:
        # Some archives write the last hyphen as a dot: train-images.idx3-ubyte.
        return [
            [
                [folder / f"{form}{suffix}" for form in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
                for name in FILES
            ]
            for folder in (data_dir / part for part in (*self.folders, "."))
        ]

    def _download(self, place: Place, progress: Progress) -> None:
        for name, paths, (sha256, size) in zip(FILES, place, self.archives, strict=True):
            if not any(path.is_file() for path in paths):
                urls = [f"{mirror}{name}.gz" for mirror in self.mirrors]
                download(urls, paths[0].parent / f"{name}.gz", sha256=sha256, size=size, progress=progress)

    def _refuse_other_sets(self, test_labels: np.ndarray, path: Path) -> None:
        digest = hashlib.md5(test_labels.tobytes(), usedforsecurity=False).hexdigest()
        for other in SETS:
            if other is not self and digest == other.test_labels:
                raise DataError(f"{path} belongs to {other.name}, not to {self.name}. "
                                f"Pass --dataset {other.name}, or another --data-dir.")


def _images(path: Path) -> np.ndarray:
    """Return the images of a file as (N, 1, 28, 28).

    Raises:
        DataError: see :func:`.read_idx`; or no images, or images of another size.
    """
    images = read_idx(path, 3)
    if not len(images) or images.shape[1:] != (SIDE, SIDE):
        raise DataError(f"{path}: expected images of {SIDE}x{SIDE} pixels, found {len(images)} of "
                        f"{images.shape[1]}x{images.shape[2]}. Is it another file under this name?")
    return images[:, None]


MNIST = IdxSet(
    name="mnist",
    summary="MNIST: 70,000 handwritten digits of 28x28, grey (LeCun et al. 1998).",
    folders=("MNIST/raw", "mnist", "MNIST", "mnist/raw"),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    archives=(
        ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", 9_912_422),
        ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", 28_881),
        ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", 1_648_877),
        ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", 4_542),
    ),
    test_labels="073c3904dfbd3e141ff8aa01cfde6b15",
    mean=0.1307,
    std=0.3081,
    class_names=tuple("0123456789"),
)

FASHION_MNIST = IdxSet(
    name="fashion-mnist",
    summary="Fashion-MNIST: 70,000 pieces of clothing of 28x28, grey, in 10 classes (Xiao et al. 2017).",
    folders=("FashionMNIST/raw", "fashion-mnist", "FashionMNIST", "fashion-mnist/raw", "fashion_mnist"),
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    archives=(
        ("3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26_421_880),
        ("a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29_515),
        ("346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4_422_102),
        ("67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5_148),
    ),
    test_labels="8dea97a4e78c1bd1b5a6e8efbb870b6e",
    mean=0.2860,
    std=0.3530,
    class_names=(
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
)

SETS = (MNIST, FASHION_MNIST)
