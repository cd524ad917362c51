"""Downloads, from a server on this machine: what is kept, what is refused, and what is said."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.progress import SILENT, Progress
from prune_onnx.trainers.data import cifar, load_dataset, mnist, tiny_imagenet
from prune_onnx.trainers.data.download import download


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        self.server.seen.append(self.path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server; files lie in ``server.folder``, requests are noted in ``server.seen``."""
    monkeypatch.setenv("NO_PROXY", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as running:
        running.folder, running.seen = folder, []
        running.url = f"http://127.0.0.1:{running.server_port}/"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


class Heard(Progress):
    """Remembers tasks as [description, total, steps]."""

    def __init__(self):
        self.tasks = []

    @contextmanager
    def task(self, description, total):
        record = [description, total, 0]
        self.tasks.append(record)

        def advance(steps):
            record[2] += steps

        yield advance


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def served_mnist(server):
    """MNIST in small on the server: the loader that fetches it, and the archives by name."""
    archives = {}
    for name in mnist.FILES:
        shape = (10, 28, 28) if "images" in name else (10,)
        archives[f"{name}.gz"] = gzip.compress(idx((np.arange(np.prod(shape)) % 10).astype(np.uint8).reshape(shape)))
    for name, content in archives.items():
        (server.folder / name).write_bytes(content)
    known = tuple((sha256(content), len(content)) for content in archives.values())
    return replace(mnist.MNIST, mirrors=(server.url,), archives=known), archives


def test_nothing_is_fetched_unless_asked(served_mnist, server, tmp_path):
    load, _ = served_mnist
    with pytest.raises(DataError, match="--download"):
        load(tmp_path / "data", False, SILENT)
    assert server.seen == []
    assert not (tmp_path / "data").exists()


def test_mnist_is_fetched_once_into_the_standard_place(served_mnist, server, tmp_path):
    load, archives = served_mnist
    heard = Heard()
    found = load(tmp_path / "data", True, heard)
    assert found.train_labels.tolist() == list(range(10))
    folder = tmp_path / "data" / "MNIST" / "raw"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == archives
    assert [(total, steps) for _, total, steps in heard.tasks] == [(len(a), len(a)) for a in archives.values()]
    load(tmp_path / "data", True, SILENT)
    load(tmp_path / "data", False, SILENT)
    assert len(server.seen) == 4


def test_only_what_is_missing_is_fetched(served_mnist, server, tmp_path):
    load, archives = served_mnist
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    kept = "train-labels-idx1-ubyte"
    (folder / kept).write_bytes(gzip.decompress(archives[f"{kept}.gz"]))
    load(tmp_path, True, SILENT)
    assert len(server.seen) == 3
    assert not (folder / f"{kept}.gz").exists()


def test_wrong_bytes_are_not_kept(served_mnist, server, tmp_path):
    load, _ = served_mnist
    path = server.folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"cannot download t10k-images-idx3-ubyte\.gz: .*hash"):
        load(tmp_path, True, SILENT)
    assert sorted(p.name for p in (tmp_path / "MNIST" / "raw").iterdir()) == [
        "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
    ]  # fmt: skip


def test_next_mirror_is_tried(server, tmp_path, capfd):
    (server.folder / "file").write_bytes(b"right")
    (server.folder / "wrong").write_bytes(b"wrong")
    urls = [f"{server.url}absent", f"{server.url}wrong", f"{server.url}file"]
    download(urls, tmp_path / "new" / "target", sha256=sha256(b"right"), size=5, progress=SILENT)
    assert (tmp_path / "new" / "target").read_bytes() == b"right"
    assert len(server.seen) == 3 + 1  # a status other than 200 is logged twice
    assert capfd.readouterr() == ("", "")


def test_failure_names_every_mirror_and_the_way_out(server, tmp_path):
    closed = "http://127.0.0.1:1/file"
    with pytest.raises(DataError) as caught:
        download([f"{server.url}absent", closed], tmp_path / "target", sha256=sha256(b""), size=5, progress=SILENT)
    for part in (f"{server.url}absent: ", "404", closed, f"Put the file into {tmp_path} by hand"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == [server.folder]


def test_folder_that_cannot_be_made_is_a_clear_error(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (server.folder / "x").write_bytes(b"")
    with pytest.raises(DataError, match="cannot download x"):
        download([f"{server.url}x"], tmp_path / "file" / "x", sha256=sha256(b""), size=0, progress=SILENT)


@pytest.fixture
def served_cifar(server, monkeypatch):
    """CIFAR-10 in small on the server, beside a member that nobody asked for: the loader that fetches it."""
    file, kind = io.BytesIO(), cifar.CIFAR10
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name in (*(f"{kind.binary}/{stem}.bin" for stem in kind.stems), f"{kind.binary}/readme.html", "../evil"):
            content = b"".join(bytes([label]) + bytes([label * 20]) * 3072 for label in range(10))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    name = kind.archive[0]
    (server.folder / name).write_bytes(file.getvalue())
    monkeypatch.setattr(cifar, "HOME", server.url)
    return replace(kind, archive=(name, sha256(file.getvalue()), len(file.getvalue())))


def test_cifar_is_fetched_and_its_six_files_unpacked(served_cifar, server, tmp_path):
    data_dir = tmp_path / "in" / "data"
    found = served_cifar(data_dir, True, SILENT)
    assert found.train_labels.tolist() == list(range(10)) * 5
    assert found.test_images[:, 2, 31, 31].tolist() == [20 * label for label in range(10)]
    files = {path.relative_to(tmp_path / "in").as_posix() for path in (tmp_path / "in").rglob("*") if path.is_file()}
    assert files == {f"data/{served_cifar.binary}/{stem}.bin" for stem in served_cifar.stems}
    served_cifar(data_dir, True, SILENT)
    assert len(server.seen) == 1


def test_tiny_imagenet_is_fetched_and_what_is_needed_unpacked(server, tmp_path, monkeypatch):
    file, picture = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64), (9, 99, 200)).save(picture, "JPEG")
    contents = {"train/n1/images/n1_0.JPEG": picture.getvalue(), "train/n1/n1_boxes.txt": b"", "words.txt": b"n1\tant",
                "val/images/val_0.JPEG": picture.getvalue(), "val/val_annotations.txt": b"val_0.JPEG\tn1\t0\t0\t9\t9\n",
                "test/images/test_0.JPEG": b"not wanted"}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"{tiny_imagenet.FOLDER}/{name}", content)
    (server.folder / tiny_imagenet.ARCHIVE).write_bytes(file.getvalue())
    monkeypatch.setattr(tiny_imagenet, "URL", f"{server.url}{tiny_imagenet.ARCHIVE}")
    monkeypatch.setattr(tiny_imagenet, "SHA256", sha256(file.getvalue()))
    monkeypatch.setattr(tiny_imagenet, "SIZE", len(file.getvalue()))
    found = load_dataset("tiny-imagenet", tmp_path / "data", download=True)
    assert found.class_names == ("ant",)
    assert found.test_images.read().shape == (1, 3, 64, 64)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [tiny_imagenet.FOLDER]
    assert not (tmp_path / "data" / tiny_imagenet.FOLDER / "test").exists()


def test_published_checksums_are_whole():
    sums = [digest for each in mnist.SETS for digest, _ in each.archives]
    sums += [cifar.CIFAR10.archive[1], cifar.CIFAR100.archive[1], tiny_imagenet.SHA256]
    assert len(set(sums)) == 11
    assert all(len(bytes.fromhex(digest)) == 32 for digest in sums)
