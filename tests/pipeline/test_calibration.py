"""Calibration data that fits, and data that does not: one clear error or warning, and nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from prune_onnx.graph_ops import preprocessing
from prune_onnx.graph_ops.errors import ConfigError, DataError, PruneOnnxError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline import calibration
from prune_onnx.pipeline.calibration import open_calibration, within
from prune_onnx.pipeline.probing import probe
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.pipeline.streams import alive

from ..graph_ops.builder import Net
from .test_posttraining import images, residual_net

RECIPE = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Heard(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def opened(tmp_path: Path, model: onnx.ModelProto, data: np.ndarray | str, **options):
    """Open calibration data for a model; returns it and what was said."""
    if isinstance(data, np.ndarray):
        np.save(tmp_path / "data.npy", data)
        data = str(tmp_path / "data.npy")
    config = SlimConfig(
        input=tmp_path / "in.onnx", output=tmp_path / "out.onnx", keep_macs=0.5, calibration=data, **options
    )
    graph, heard = Graph(model), Heard()
    return open_calibration(config, model, graph, probe(graph)[0], heard), heard


def files(tmp_path: Path) -> dict[str, object]:
    """Options of a run on a stored model and stored data."""
    return {
        "input": tmp_path / "in.onnx",
        "output": tmp_path / "out.onnx",
        "calibration": str(tmp_path / "data.npy"),
    }


def with_recipe(recipe: Preprocessing = RECIPE) -> onnx.ModelProto:
    model = residual_net()
    preprocessing.write(model, recipe)
    return model


# -- what is refused --------------------------------------------------------------------------------------------------
def test_nothing_is_written_when_the_data_is_bad(tmp_path) -> None:
    onnx.save(residual_net(), tmp_path / "in.onnx")
    (tmp_path / "empty").mkdir()
    bad = {
        "shape.npy": (np.zeros((8, 3, 9, 9), np.float32), "a sample is 3x9x9, but the model takes 3x8x8"),
        "rank.npy": (np.ones((8, 192), np.float32), "a sample is 192"),
        "ints.npy": (np.ones((8, 3, 8, 8), np.int64), "samples are int64; expected uint8 images, or floats"),
        "nan.npy": (np.full((8, 3, 8, 8), np.nan, np.float32), "8 of 8 samples.*hold NaN"),
        "inf.npy": (np.where(np.arange(8).reshape(8, 1, 1, 1) == 3, np.inf, images(8)), "the first at position 3"),
        "flat.npy": (np.full((8, 3, 8, 8), 0.5, np.float32), "every value of the calibration data is 0.5"),
        "none.npy": (np.zeros((0, 3, 8, 8), np.float32), "expected samples along its first axis"),
        "pixels.npy": (np.zeros((8, 3, 8, 8), np.uint8), "no mean and std"),
        "empty": (None, "holds no pictures"),
        "missing": (None, "does not exist"),
    }
    for name, (array, message) in bad.items():
        if array is not None:
            np.save(tmp_path / name, array)
        config = SlimConfig(
            input=tmp_path / "in.onnx", output=tmp_path / "out.onnx", keep_macs=0.5, calibration=str(tmp_path / name)
        )
        with pytest.raises(PruneOnnxError, match=message) as caught:
            slim(config)
        assert len(str(caught.value).splitlines()) <= 2
        assert not (tmp_path / "out.onnx").exists()


def test_models_of_two_inputs_or_of_integers_are_refused(tmp_path) -> None:
    net = Net()
    y = net.op("Add", net.input("n", 3, 8, 8), net.input("n", 3, 8, 8, name="other"))
    with pytest.raises(ConfigError, match="one input; this one has 2"):
        opened(tmp_path, net.model(net.head(net.conv(y, 4))), images(8))
    net = Net()
    y = net.op("Cast", net.input("n", 3, 8, 8, dtype=np.uint8), to=TensorProto.FLOAT)
    with pytest.raises(ConfigError, match="takes uint8"):
        opened(tmp_path, net.model(net.head(net.conv(y, 4))), images(8))


def test_fewer_samples_than_a_fixed_batch_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="3 samples, but the model takes batches of 4"):
        opened(tmp_path, residual_net(dynamic=False), images(3))


# -- what is said -----------------------------------------------------------------------------------------------------
def test_samples_that_fill_no_batch_are_left_out_with_a_warning(tmp_path) -> None:
    found, heard = opened(tmp_path, residual_net(dynamic=False), images(10))
    assert [chunk["x"].shape[0] for chunk in found.chunks] == [4, 4]
    assert heard.warnings == ["2 calibration samples are left out: the model takes batches of 4."]


def test_raw_pixels_as_floats_are_noticed(tmp_path) -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (8, 3, 8, 8)).astype(np.float32)
    _, heard = opened(tmp_path, with_recipe(), pixels)
    assert len(heard.warnings) == 1
    assert "lie between -2 and 2" in heard.warnings[0]
    _, heard = opened(tmp_path, residual_net(), pixels)
    assert "look like raw pixels" in heard.warnings[0]


def test_input_within_the_recipes_range_is_taken_as_it_is(tmp_path) -> None:
    x = np.random.default_rng(0).uniform(-2, 2, (8, 3, 8, 8)).astype(np.float32)
    found, heard = opened(tmp_path, with_recipe(), x)
    assert not heard.warnings
    np.testing.assert_array_equal(found.chunks[0]["x"], x)
    assert found.recipe is None


def test_the_memory_is_said_before_and_kept_to(tmp_path, monkeypatch) -> None:
    model = residual_net()
    graph = Graph(model)
    probed = probe(graph)[0]
    _, heard = opened(tmp_path, model, images(32))
    assert any("32 samples" in note and "activations in memory" in note for note in heard.notes)
    each = max(alive(graph, probed))
    monkeypatch.setattr(calibration, "CHUNK", 4 * each)
    monkeypatch.setattr(calibration, "MEMORY", 10 * calibration.STREAMS * each)
    found, _ = opened(tmp_path, model, images(32))
    assert [calibration.size_of(chunk) for chunk in found.chunks] == [4] * 8
    heard = Heard()
    assert len(within(found.chunks, graph, probed, heard)) == 2
    assert "the first 8 are used" in heard.warnings[0]


def test_activation_bytes_are_those_alive_at_every_node() -> None:
    """Behind the second layer: the first's output is still wanted by the sum, the second's has just been made."""
    net = Net()
    a = net.conv(net.input("n", 2, 4, 4), 8, 1)
    b = net.conv(a, 8, 1)
    graph = Graph(net.model(net.head(net.op("Add", a, b))))
    assert alive(graph, probe(graph)[0])[:3] == [4 * 16 * (2 + 8), 4 * 16 * (8 + 8), 4 * 16 * (8 + 8 + 8)]


def test_few_samples_are_warned_of_and_the_ridge_takes_over(tmp_path) -> None:
    net = Net()
    y = net.relu(net.gemm(net.op("Flatten", net.relu(net.conv(net.input("n", 3, 8, 8), 8))), 64))
    onnx.save(net.model(net.gemm(y, 5)), tmp_path / "in.onnx")
    np.save(tmp_path / "data.npy", images(12))
    heard = Heard()
    options = {
        "input": tmp_path / "in.onnx",
        "output": tmp_path / "out.onnx",
        "calibration": str(tmp_path / "data.npy"),
    }
    result = slim(SlimConfig(**options, keep_macs=0.5, align=1), heard)
    assert result.after.macs <= 0.5 * result.before.macs
    assert any("fewer calibration values than inputs" in warning for warning in heard.warnings)


# -- preprocessing ----------------------------------------------------------------------------------------------------
def test_pictures_are_scaled_to_the_model_and_normalised_by_its_recipe(tmp_path) -> None:
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i, side in enumerate((8, 16, 20)):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    found, _ = opened(tmp_path, with_recipe(), str(tmp_path / "pictures"))
    x = found.chunks[0]["x"]
    assert x.shape == (3, 3, 8, 8)
    exact = np.asarray(Image.open(tmp_path / "pictures" / "0.png")).transpose(2, 0, 1)
    np.testing.assert_allclose(x[0], (exact / 255 - 0.5) / 0.25, atol=1e-6)
    assert found.recipe == Preprocessing(RECIPE.mean, RECIPE.std, size=(8, 8))


def test_size_settles_what_the_model_leaves_open(tmp_path) -> None:
    net = Net()
    y = net.conv(net.input("n", 3, "h", "w"), 4)
    net.types[y] = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 4, "oh", "ow"])
    model = net.model(net.head(y))
    (tmp_path / "pictures").mkdir()
    for i, side in enumerate((12, 16)):
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    options = {"mean": (0.0,), "std": (1.0,)}
    with pytest.raises(DataError, match="Bring the pictures to one size"):
        opened(tmp_path, model, str(tmp_path / "pictures"), **options)
    found, _ = opened(tmp_path, model, str(tmp_path / "pictures"), size=(10, 14), **options)
    assert found.chunks[0]["x"].shape == (2, 3, 10, 14)


def nhwc_net() -> onnx.ModelProto:
    net = Net()
    y = net.op("Transpose", net.input("n", 8, 8, 3), perm=[0, 3, 1, 2])
    return net.model(net.head(net.relu(net.conv(net.relu(net.conv(y, 12)), 8))))


@pytest.mark.parametrize("layout", [None, "NHWC"])
def test_channels_last_inputs(tmp_path, layout) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 3, 8, 8), np.uint8)
    found, _ = opened(tmp_path, nhwc_net(), pixels, mean=(0.5,), std=(0.25,), layout=layout)
    expected = (pixels.transpose(0, 2, 3, 1).astype(np.float32) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(found.chunks[0]["x"], expected, atol=1e-6)
    assert found.recipe.layout == "NHWC"


def test_layout_that_does_not_fit_is_an_error(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 3, 8, 8), np.uint8)
    with pytest.raises(DataError, match="a sample is 3x8x8, but the model takes 8x8x3"):
        opened(tmp_path, nhwc_net(), pixels, mean=(0.5,), std=(0.25,), layout="NCHW", size=(8, 8))


def test_the_recipe_that_was_given_stays_in_the_model(tmp_path) -> None:
    onnx.save(nhwc_net(), tmp_path / "in.onnx")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(0, 255, (32, 3, 8, 8), np.uint8))
    options = {
        "input": tmp_path / "in.onnx",
        "output": tmp_path / "out.onnx",
        "calibration": str(tmp_path / "data.npy"),
    }
    slim(
        SlimConfig(
            **options,
            keep_macs=0.6,
            align=1,
            criterion="l2",
            compensate="none",
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.2, 0.3),
        )
    )
    expected = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.2, 0.3), size=(8, 8), layout="NHWC")
    assert preprocessing.read(onnx.load(tmp_path / "out.onnx")) == expected


def test_the_models_own_recipe_is_not_replaced(tmp_path) -> None:
    onnx.save(with_recipe(), tmp_path / "in.onnx")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(0, 255, (32, 3, 8, 8), np.uint8))
    options = {
        "input": tmp_path / "in.onnx",
        "output": tmp_path / "out.onnx",
        "calibration": str(tmp_path / "data.npy"),
    }
    slim(SlimConfig(**options, keep_macs=0.6, align=1, criterion="l2", compensate="none", mean=(0.0,), std=(1.0,)))
    assert preprocessing.read(onnx.load(tmp_path / "out.onnx")) == RECIPE


def test_a_float16_model_is_fed_float16(tmp_path) -> None:
    net = Net(dtype=np.float16)
    model = net.model(net.head(net.relu(net.conv(net.input("n", 3, 8, 8), 8))))
    found, _ = opened(tmp_path, model, images(8))
    assert found.chunks[0]["x"].dtype == np.float16


def test_labels_come_along_in_the_same_batches(tmp_path) -> None:
    np.savez(tmp_path / "data.npz", x=images(150), y=np.arange(150) % 5)
    found, _ = opened(tmp_path, residual_net(), str(tmp_path / "data.npz"), calibration_size=140)
    assert [len(labels) for labels in found.labels] == [len(chunk["x"]) for chunk in found.chunks] == [128, 12]
