"""The user's own array files: what is recognised, and what is refused with its name."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.trainers.data.arrays import read_arrays


@pytest.fixture
def saved(tmp_path):
    def save(**content):
        np.savez(tmp_path / "file.npz", **content)
        return tmp_path / "file.npz"

    return save


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels"), ("x", "labels")])
def test_npz_gives_samples_and_labels(saved, keys):
    x = images(5, 3, 8, 9)
    values, labels = read_arrays(saved(**dict(zip(keys, (x, np.arange(5, dtype=np.uint8)), strict=True)), other=x))
    assert np.array_equal(values, x)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert labels.dtype == np.int64


def test_npz_without_labels(saved):
    assert read_arrays(saved(x=images(5, 1, 8, 8)))[1] is None


def test_npy_gives_samples(tmp_path):
    np.save(tmp_path / "file.npy", images(5, 1, 8, 8))
    values, labels = read_arrays(tmp_path / "file.npy")
    assert np.array_equal(values, images(5, 1, 8, 8))
    assert labels is None


@given(
    n=st.integers(1, 4), channels=st.sampled_from([1, 3, 4]), height=st.integers(5, 9), width=st.integers(5, 9),
    last=st.booleans(),
)  # fmt: skip
def test_channel_axis_is_found_on_either_side(tmp_path_factory, n, channels, height, width, last):
    x = images(n, channels, height, width)
    path = tmp_path_factory.mktemp("arrays") / "file.npy"
    np.save(path, x.transpose(0, 2, 3, 1) if last else x)
    values, _ = read_arrays(path)
    assert values.dtype == np.uint8
    assert np.array_equal(values, x)


def test_three_axes_are_grey_images(saved):
    assert np.array_equal(read_arrays(saved(x=images(5, 28, 28)))[0], images(5, 28, 28)[:, None])


@pytest.mark.parametrize(("shape", "said"), [
    ((5, 3, 8, 3), "both axis 1 and axis 3"),
    ((5, 1, 8, 4), "both axis 1 and axis 3"),
    ((5, 8, 8, 2), "no axis can be the channels"),
    ((224, 224, 3), "first axis of size 1"),
    ((5, 784), "3 or 4 axes"),
    ((5, 1, 3, 8, 8), "3 or 4 axes"),
    ((0, 3, 8, 8), "shape"),
    ((5,), "shape"),
    ((), "shape"),
])  # fmt: skip
def test_image_shapes_that_cannot_be_told_are_refused(saved, shape, said):
    path = saved(x=images(*shape))
    with pytest.raises(DataError, match=said) as caught:
        read_arrays(path)
    assert str(path) in str(caught.value)
    assert str(shape) in str(caught.value)


@given(arrays.arrays(
    st.sampled_from([np.float16, np.float32, np.float64]), arrays.array_shapes(min_dims=2, max_dims=5, max_side=4),
    elements={"min_value": -1000, "max_value": 1000, "allow_nan": False},
))  # fmt: skip
def test_floats_are_network_input_of_any_shape(tmp_path_factory, x):
    path = tmp_path_factory.mktemp("arrays") / "file.npy"
    np.save(path, x)
    values, _ = read_arrays(path)
    assert values.dtype == np.float32
    assert np.array_equal(values, x.astype(np.float32))
    assert values.shape == x.shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_floats_that_are_not_finite_are_refused(saved, bad):
    x = np.zeros((4, 3, 8, 8))
    x[2, 1, 0, 0] = bad
    with pytest.raises(DataError, match=r"file\.npz: 1 of 4 samples, the first at position 2"):
        read_arrays(saved(x=x))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, bool, np.complex64, "U3"])
def test_other_types_are_refused(saved, dtype):
    with pytest.raises(DataError, match=f"samples are {np.dtype(dtype)}; expected uint8"):
        read_arrays(saved(x=np.zeros((2, 3, 8, 8), dtype)))


@pytest.mark.parametrize(("labels", "classes", "said"), [
    (np.zeros(4, int), None, "5 samples"),
    (np.zeros((5, 1), int), None, "5 samples"),
    (np.zeros(5), None, "float64"),
    (np.array([0, 1, -1, 2, 0]), None, "label -1 at position 2, expected 0 or more"),
    (np.array([0, 1, 9, 10, 0]), 10, "label 10 at position 3, expected 0 to 9"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(saved, labels, classes, said):
    with pytest.raises(DataError, match=f"file.npz.*{said}"):
        read_arrays(saved(x=images(5, 1, 8, 8), y=labels), classes)


def test_file_without_samples_lists_what_it_has(saved):
    with pytest.raises(DataError, match=r"no array 'x' or 'images'; it has train, y"):
        read_arrays(saved(train=images(5, 1, 8, 8), y=np.zeros(5, int)))


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "victim"),)

    np.save(tmp_path / "file.npy", np.array([Evil()], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"cannot read .*file\.npy"):
        read_arrays(tmp_path / "file.npy")
    assert not (tmp_path / "victim").exists()


def test_every_truncation_of_npy_is_refused(tmp_path):
    path = tmp_path / "file.npy"
    np.save(path, images(2, 1, 5, 5))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=str(path)):
            read_arrays(path)


def test_damaged_npz_is_refused(saved):
    path = saved(x=images(2, 1, 8, 8), y=np.zeros(2, int))
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:-30], whole[:200] + b"\xff" * 50 + whole[250:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=str(path)):
            read_arrays(path)


def test_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match=r"readme\.txt"):
        read_arrays(tmp_path / "file.npz")
