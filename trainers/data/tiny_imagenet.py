"""Tiny-ImageNet (Stanford, CS231n): 200 classes of ImageNet at 64x64, in the folders in which it is published.

    tiny-imagenet-200/train/<class>/images/*.JPEG     500 pictures a class
    tiny-imagenet-200/val/images/*.JPEG               10,000 pictures; val_annotations.txt: "file<tab>class..." lines
    tiny-imagenet-200/words.txt                       "class<tab>names" lines, of all of WordNet

Its own test pictures have no labels, so the validation part is the test part here, as in the papers; what is held out
for choices comes from the training part. Classes are numbered in the alphabetical order of their WordNet numbers.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.errors import DataError, OutputError
from prune_onnx.graph_ops.progress import Progress

from .base import Dataset, read_file
from .download import download
from .pictures import PictureFiles, list_pictures

FOLDER = "tiny-imagenet-200"
ARCHIVE = f"{FOLDER}.zip"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
SHA256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"
SIZE = 248_100_043
SIDES = (64, 64)
PARTS = ("train", "val", "words.txt")


class TinyImageNet:
    """The reader."""

    summary = "Tiny-ImageNet: 110,000 colour pictures of 64x64 in 200 classes (Stanford CS231n 2015)."

    def __call__(self, data_dir: Path, fetch: bool, progress: Progress) -> Dataset:
        """Read the data set; see :func:`.load_dataset`. The pictures stay in their files until they are needed."""
        places = [data_dir / parent / FOLDER for parent in (".", "tiny-imagenet")] + [data_dir]
        folder = next((place for place in places if (place / "val" / "val_annotations.txt").is_file()), None)
        if folder is None and fetch:
            _download(data_dir, progress)
            folder = places[0]
        if folder is None:
            raise DataError(
                f"data set 'tiny-imagenet' not found; looked for val/val_annotations.txt in "
                f"{', '.join(map(str, places))}. Pass --data-dir DIR, or --download to fetch it "
                f"({round(SIZE / 1e6)} MB)."
            )
        classes = sorted(path.name for path in (folder / "train").glob("*") if path.is_dir())
        train = [list_pictures(folder / "train" / name / "images") for name in classes]
        if not classes or not all(train):
            raise DataError(f"{folder / 'train'} has no pictures of {'any class' if not classes else 'some classes'}; "
                            "expected train/<class>/images/*.JPEG.")
        names = _annotations(folder / "val" / "val_annotations.txt", classes)
        files = [path for found in train for path in found]
        return Dataset(
            name="tiny-imagenet",
            train_images=PictureFiles(files, 3, SIDES),
            train_labels=np.repeat(np.arange(len(classes)), [len(found) for found in train]),
            test_images=PictureFiles([folder / "val" / "images" / name for name in names], 3, SIDES),
            test_labels=np.array([classes.index(name) for name in names.values()], np.int64),
            num_classes=len(classes),
            mean=(0.4802, 0.4481, 0.3975),
            std=(0.2770, 0.2691, 0.2821),
            class_names=_words(folder / "words.txt", classes),
            augment="flip-crop",
        )


def _annotations(path: Path, classes: list[str]) -> dict[str, str]:
    """Return the class of every validation picture, by file name.

    Raises:
        DataError: a line of another form, a class without training pictures, or a picture that is not there.
    """
    found = {}
    for number, line in enumerate(read_file(path).decode("utf-8", "replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        found[name] = rest.partition("\t")[0]
        if found[name] not in classes or not (path.parent / "images" / Path(name).name).is_file():
            raise DataError(f"{path}, line {number}: expected a picture of val/images and a class of train, "
                            f"found {line[:60]!r}.")
    if not found:
        raise DataError(f"{path} is empty. Fetch the data set again.")
    return found


def _words(path: Path, classes: list[str]) -> tuple[str, ...]:
    """Return what the classes are called; their numbers where the file does not say."""
    words = {}
    if path.is_file():
        for line in read_file(path).decode("utf-8", "replace").splitlines():
            number, _, name = line.partition("\t")
            words[number] = name.strip()
    return tuple(words.get(name) or name for name in classes)


def _download(data_dir: Path, progress: Progress) -> None:
    """Fetch the archive and unpack what is needed; the folder appears when it is whole.

    Raises:
        DataError: it cannot be fetched.
        OutputError: it cannot be unpacked here.
    """
    archive = data_dir / ARCHIVE
    download([URL], archive, sha256=SHA256, size=SIZE, progress=progress)
    try:
        with tempfile.TemporaryDirectory(dir=data_dir) as unpacked, zipfile.ZipFile(archive) as content:
            members = [name for name in content.namelist() if name.split("/")[1:2] and name.split("/")[1] in PARTS]
            with progress.task(f"unpacking {archive}", len(members)) as advance:
                for name in members:
                    content.extract(name, unpacked)
                    advance(1)
            shutil.move(Path(unpacked) / FOLDER, data_dir / FOLDER)
    except OSError as error:
        raise OutputError(f"cannot unpack {archive}: {error.strerror or error}.") from error
    archive.unlink()


TINY_IMAGENET = TinyImageNet()
