"""Samples and recipes: where samples come from, how they become input, and what does not fit a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from prune_onnx.graph_ops import preprocessing
from prune_onnx.graph_ops.errors import ConfigError, DataError, ModelError
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.pipeline.data import Samples, image_input, open_samples, recipe_for

SHIPPED = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def model(*dims: int | str | None, recipe: Preprocessing | None = None, inputs: int = 1) -> onnx.ModelProto:
    """Return an identity network with inputs of shape ``dims``, and a weight that is listed as an input too."""
    values = [helper.make_tensor_value_info(f"in{i}", TensorProto.FLOAT, dims or None) for i in range(inputs)]
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1], [0.0])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["in0"], ["out"])], "graph",
        [helper.make_tensor_value_info("weight", TensorProto.FLOAT, [1]), *values],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)], [weight],
    )  # fmt: skip
    made = helper.make_model(graph)
    if recipe:
        preprocessing.write(made, recipe)
    return made


@pytest.fixture
def npz(tmp_path):
    def save(**content):
        np.savez(tmp_path / "file.npz", **content)
        return tmp_path / "file.npz"

    return save


# --- open_samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "count"), [("train", 1347), ("test", 450)])
def test_data_set_brings_its_mean_and_std(split, count):
    samples = open_samples(dataset="digits", split=split)
    assert (len(samples), samples.images.shape, samples.name) == (count, (count, 1, 8, 8), "digits")
    assert samples.labels.shape == (count,)
    assert len(samples.mean) == len(samples.std) == 1


def test_data_may_name_a_data_set_unless_such_a_path_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(open_samples(data="digits").images, open_samples(dataset="digits").images)
    (tmp_path / "digits").mkdir()
    with pytest.raises(DataError, match="digits holds no pictures"):
        open_samples(data="digits")


def test_limit_is_a_seeded_subset_with_its_labels(npz):
    path = npz(x=np.arange(50, dtype=np.uint8).repeat(64).reshape(50, 1, 8, 8), y=np.arange(50))
    whole = open_samples(data=path)
    for limit in (1, 20, 49):
        part = open_samples(data=path, limit=limit, seed=3)
        assert len(part) == limit
        assert np.array_equal(part.images[:, 0, 0, 0], part.labels)
        assert (np.diff(part.labels) > 0).all()
        assert np.array_equal(part.labels, open_samples(data=path, limit=limit, seed=3).labels)
    drawn = {tuple(open_samples(data=path, limit=20, seed=seed).labels) for seed in range(5)}
    assert len(drawn) == 5
    for limit in (50, 51, None):
        assert np.array_equal(open_samples(data=path, limit=limit).images, whole.images)


def test_limit_of_a_data_set_keeps_mean_and_std():
    part, whole = open_samples(dataset="digits", limit=7), open_samples(dataset="digits")
    assert (len(part), part.mean, part.std, part.name) == (7, whole.mean, whole.std, "digits")


def test_arrays_are_scaled_to_the_size_asked_for(npz):
    path = npz(x=images(5, 3, 8, 8))
    assert open_samples(data=path, size=(8, 8)).images.tobytes() == images(5, 3, 8, 8).tobytes()
    assert open_samples(data=path, size=(4, 6), limit=2).images.shape == (2, 3, 4, 6)


def test_float_arrays_are_inputs_and_never_scaled(npz):
    x = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    samples = open_samples(data=npz(x=x, y=np.arange(5)), size=(4, 4), limit=3)
    assert samples.images is None
    assert np.array_equal(samples.inputs, x[samples.labels])


def test_folder_is_read_at_the_size_and_colour_asked_for(tmp_path):
    for label in (0, 1):
        (tmp_path / str(label)).mkdir()
        Image.fromarray(images(9, 7 + label, 3)).save(tmp_path / str(label) / "a.png")
    samples = open_samples(data=tmp_path, size=(4, 5), channels=1, num_classes=2)
    assert samples.images.shape == (2, 1, 4, 5)
    assert samples.labels.tolist() == [0, 1]
    assert open_samples(data=str(tmp_path), size=(4, 5), limit=1).images.shape == (1, 3, 4, 5)


@pytest.mark.parametrize(("options", "said"), [
    ({}, "--dataset NAME"),
    ({"dataset": "digits", "data": "x.npz"}, "--dataset NAME"),
    ({"dataset": "digit"}, "Did you mean 'digits'"),
    ({"dataset": "digits", "split": "validation"}, "'train' and 'test'"),
    ({"dataset": "digits", "limit": 0}, "at least 1"),
])  # fmt: skip
def test_wrong_options_are_config_errors(options, said):
    with pytest.raises(ConfigError, match=said):
        open_samples(**options)


def test_path_that_is_no_data_is_a_clear_error(tmp_path):
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(DataError, match=r"file\.txt is neither a folder nor"):
        open_samples(data=tmp_path / "file.txt")
    with pytest.raises(DataError, match=r"absent\.npz does not exist"):
        open_samples(data=tmp_path / "absent.npz")
    with pytest.raises(DataError, match="Did you mean 'fashion-mnist'"):
        open_samples(data="fashion_mnist")


def test_labels_beyond_the_classes_are_refused(npz):
    path = npz(x=images(2, 1, 8, 8), y=np.array([0, 10]))
    assert open_samples(data=path).labels.tolist() == [0, 10]
    with pytest.raises(DataError, match="label 10 at position 1, expected 0 to 9"):
        open_samples(data=path, num_classes=10)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_batches_are_all_samples_in_order(batch_size):
    samples = Samples("made", images(7, 3, 4, 4), labels=np.arange(7))
    got = list(samples.batches(SHIPPED, batch_size))
    full, rest = divmod(7, batch_size)
    assert [len(inputs) for inputs, _ in got] == [batch_size] * full + [rest] * (rest > 0)
    inputs = np.concatenate([inputs for inputs, _ in got])
    assert inputs.dtype == np.float32
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (SHIPPED.mean, SHIPPED.std))
    np.testing.assert_allclose(inputs, (samples.images / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    assert np.concatenate([labels for _, labels in got]).tolist() == list(range(7))


def test_batches_of_inputs_pass_unchanged():
    inputs = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    got = list(Samples("made", inputs=inputs).batches(SHIPPED, 2))
    assert np.array_equal(np.concatenate([part for part, _ in got]), inputs)
    assert [labels for _, labels in got] == [None] * 3


# --- recipe_for -------------------------------------------------------------------------------------------------------

OWN = Samples("made", images(2, 3, 8, 8))
LISTED = Samples("listed", images(2, 3, 8, 8), mean=(0.7, 0.7, 0.7), std=(0.8, 0.8, 0.8))


def test_given_mean_and_std_come_first_then_the_models_then_the_data_sets():
    carrying, bare = model("n", 3, 8, 8, recipe=SHIPPED), model("n", 3, 8, 8)
    given = {"mean": (0.5,), "std": (0.25,)}
    assert recipe_for(carrying, LISTED, **given) == Preprocessing((0.5,), (0.25,), size=(8, 8))
    assert recipe_for(carrying, LISTED) == Preprocessing(SHIPPED.mean, SHIPPED.std, size=(8, 8))
    assert recipe_for(bare, LISTED) == Preprocessing(LISTED.mean, LISTED.std, size=(8, 8))
    with pytest.raises(DataError, match="--mean and --std"):
        recipe_for(bare, OWN)


def test_models_scale_and_layout_are_kept_but_given_values_are_of_pixels_over_255():
    raw = Preprocessing((0.0,), (1.0,), layout="NHWC", scale=1.0)
    assert recipe_for(model(1, 8, 8, 3, recipe=raw), OWN).scale == 1.0
    given = recipe_for(model(1, 8, 8, 3, recipe=raw), OWN, (0.5,), (0.5,))
    assert (given.scale, given.layout) == (255.0, "NHWC")


@pytest.mark.parametrize(("dims", "layout"), [
    ((1, 3, 8, 8), "NCHW"), (("n", 3, "h", "w"), "NCHW"), (("n", None, None, None), "NCHW"), ((), "NCHW"),
    ((1, 8, 8, 3), "NHWC"), (("n", "h", "w", 3), "NHWC"),
])  # fmt: skip
def test_layout_is_found_and_applied(dims, layout):
    recipe = recipe_for(model(*dims), LISTED)
    assert recipe.layout == layout
    inputs, _ = next(LISTED.batches(recipe, 2))
    assert inputs.shape == ((2, 3, 8, 8) if layout == "NCHW" else (2, 8, 8, 3))


@pytest.mark.parametrize("dims", [(1, 3, 9, 8), ("n", 1, 8, 8), (1, 8, 8, 1), ("n", 192), (1, 3, 8)])
def test_images_of_another_shape_are_refused(dims):
    with pytest.raises(DataError, match=r"listed: a sample is (3x8x8|8x8x3), but the model takes"):
        recipe_for(model(*dims), LISTED)


def test_inputs_must_have_the_models_shape():
    samples = Samples("made", inputs=np.zeros((4, 6), np.float32))
    recipe = recipe_for(model("n", 6), samples)
    assert np.array_equal(next(samples.batches(recipe, 4))[0], samples.inputs)
    recipe_for(model(), samples)
    for dims in (("n", 7), ("n", 6, 1), (1, 3, 8, 8)):
        with pytest.raises(DataError, match="made: a sample is 6, but the model takes"):
            recipe_for(model(*dims), samples)


@pytest.mark.parametrize(("given", "said"), [
    ({"mean": (0.5,)}, "go together"),
    ({"std": (0.5,)}, "go together"),
    ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "mean has 2 values, but the images of made have 3 channels"),
    ({"mean": (0.5,), "std": (0.5, 0.5)}, "std has 2 values"),
    ({"mean": (0.5,), "std": (0.0,)}, "positive"),
    ({"mean": (0.5,), "std": (float("nan"),)}, "positive"),
])  # fmt: skip
def test_wrong_mean_and_std_are_config_errors(given, said):
    with pytest.raises(ConfigError, match=said):
        recipe_for(model("n", 3, 8, 8), OWN, **given)


def test_models_with_several_inputs_are_refused():
    with pytest.raises(DataError, match=r"2 inputs \(in0, in1\)"):
        recipe_for(model(1, 3, 8, 8, inputs=2), LISTED)


def test_broken_recipe_is_the_models_error():
    broken = model(1, 3, 8, 8, recipe=SHIPPED)
    broken.metadata_props[0].value = "{"
    with pytest.raises(ModelError):
        recipe_for(broken, LISTED)


# --- image_input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "expected"), [
    (model(1, 3, 8, 9), (3, (8, 9))),
    (model("n", 1, "h", "w"), (1, None)),
    (model("n", 8, 9, 3), (3, (8, 9))),
    (model("n", 3, 4, 4, recipe=Preprocessing((0,), (1,), layout="NHWC")), (4, (3, 4))),
    (model("n", 3, "h", "w", recipe=Preprocessing((0,), (1,), size=(5, 6))), (3, (5, 6))),
    (model("n", 784), (None, None)),
    (model(), (None, None)),
    (model("n", 13, 8, 8), (None, (8, 8))),
])  # fmt: skip
def test_image_input_is_what_open_samples_needs(made, expected):
    assert image_input(made) == expected


def test_pictures_of_any_size_reach_the_model(tmp_path):
    for index, shape in enumerate(((9, 7), (20, 30), (6, 5))):
        Image.fromarray(images(*shape, 3)).save(tmp_path / f"{index}.png")
    network = model("n", 1, 8, 8, recipe=Preprocessing((0.5,), (0.5,)))
    channels, size = image_input(network)
    samples = open_samples(data=tmp_path, size=size, channels=channels)
    inputs, labels = next(samples.batches(recipe_for(network, samples), 3))
    assert inputs.shape == (3, 1, 8, 8)
    assert labels is None


def test_neither_torch_nor_pillow_is_imported():
    code = ("import sys; from prune_onnx.pipeline.data import open_samples; open_samples(dataset='digits');"
            "print('torch' in sys.modules, 'onnxruntime' in sys.modules, 'PIL' in sys.modules)")
    path = str(Path(__file__).parents[2] / ".typing")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": path, "PATH": ""})
    assert done.stdout.split() == ["False"] * 3
