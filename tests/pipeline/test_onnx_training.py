"""``train`` on ONNX files: fine-tuning, training from scratch, distillation, resuming, images without labels."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import numpy_helper

from prune_onnx.cli.main import program
from prune_onnx.graph_ops import preprocessing
from prune_onnx.graph_ops.errors import ConfigError, DataError, ModelError, OutputError
from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.pipeline.count import count
from prune_onnx.pipeline.data import open_samples
from prune_onnx.pipeline.onnx_training import open_images
from prune_onnx.pipeline.sessions import create_session
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.pipeline.train import TrainResult, train
from prune_onnx.trainers import loop
from prune_onnx.trainers.config import TrainConfig
from prune_onnx.trainers.data import load_dataset
from prune_onnx.trainers.from_onnx import OnnxModule

pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network."""
    run = tmp_path_factory.mktemp("runs") / "dense"
    train(TrainConfig(model="bn-cnn", dataset="digits", output=run, epochs=4, width=0.5, batch_size=16, device="cpu"))
    return run / "model.onnx"


@pytest.fixture(scope="module")
def small(dense: Path) -> Path:
    """A third of its channels removed, without compensation: nearly nothing of its accuracy is left."""
    path = dense.parent / "small.onnx"
    slim(SlimConfig(input=dense, output=path, keep_channels=0.6, criterion="l2"))
    return path


def config(model: Path, run: Path, **options: object) -> TrainConfig:
    values = {"model": str(model), "dataset": "digits", "output": run, "epochs": 3, "device": "cpu", **options}
    return TrainConfig(**{key: value for key, value in values.items() if value is not None})


def accuracy(path: Path) -> float:
    """Of the file in ONNX Runtime, on the test images, by its own recipe."""
    model, data = onnx.load(path), load_dataset("digits")
    session = create_session(path)
    inputs = preprocessing.read(model).apply(data.test_images)
    (logits,) = session.run(None, {session.get_inputs()[0].name: inputs})
    return float((logits.argmax(1) == data.test_labels).mean())


def shape_of(model: onnx.ModelProto) -> str:
    """A model without the values of its weights, in text."""
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    return str(model)


def test_fine_tuning_brings_accuracy_back_and_leaves_the_graph_alone(small: Path, tmp_path: Path) -> None:
    before = accuracy(small)
    result = train(config(small, tmp_path / "run"))
    written = tmp_path / "run" / "model.onnx"
    assert accuracy(written) == pytest.approx(result.accuracy.test, abs=1e-6)
    assert result.accuracy.test > before + 0.2
    assert (result.model, result.teacher) == (str(small), None)
    assert shape_of(onnx.load(written)) == shape_of(onnx.load(small))


def test_a_network_learns_from_a_teacher_without_labels(small: Path, dense: Path, tmp_path: Path) -> None:
    before = accuracy(small)
    result = train(config(small, tmp_path / "run", teacher=dense, train_size=400, epochs=8))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert losses[-1] < 0.6 * losses[0]
    assert result.accuracy.test > before + 0.2
    assert result.accuracy.validation is None
    assert result.teacher == str(dense)


def test_labels_play_no_part_with_a_teacher(
    small: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(small, tmp_path / "a", teacher=dense, train_size=200, epochs=1))
    original = loop._Loop.step
    monkeypatch.setattr(loop._Loop, "step", lambda self, x, labels, lr: original(self, x, 0 * labels, lr))
    train(config(small, tmp_path / "b", teacher=dense, train_size=200, epochs=1))
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_training_images_are_those_that_calibration_takes(small: Path, tmp_path: Path) -> None:
    data = open_images(config(small, tmp_path, train_size=100, seed=3), None)
    calibration = open_samples(data="digits", split="train", limit=100, seed=3)
    np.testing.assert_array_equal(data.train_images, calibration.images)


def test_own_images_without_labels_are_measured_by_agreement(small: Path, dense: Path, tmp_path: Path) -> None:
    data = load_dataset("digits")
    np.savez(tmp_path / "images.npz", x=data.train_images[:300])
    result = train(config(small, tmp_path / "run", dataset=None, data=tmp_path / "images.npz", teacher=dense))
    assert result.dataset == str(tmp_path / "images.npz")
    model, session = onnx.load(dense), create_session(dense)
    kept = open_images(config(small, tmp_path, dataset=None, data=tmp_path / "images.npz", teacher=dense), None)
    inputs = preprocessing.read(model).apply(kept.test_images)
    answers = [
        run.run(None, {"input": inputs})[0].argmax(1)
        for run in (session, create_session(tmp_path / "run" / "model.onnx"))
    ]
    assert result.accuracy.test == pytest.approx(float((answers[0] == answers[1]).mean()))
    assert len(kept.test_images) == 30


def test_fresh_weights_are_trained_from_scratch(small: Path, tmp_path: Path) -> None:
    result = train(config(small, tmp_path / "run", reinit=True, epochs=1, lr=1e-9))
    assert result.accuracy.test < 0.5
    before, after = OnnxModule(small), OnnxModule(tmp_path / "run" / "model.onnx")
    for name, weight in before.weights.items():
        if weight.role == "kernel":
            pair = [module.parameters_by_name[name].detach().flatten() for module in (before, after)]
            assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.5


def test_a_dense_nets_budget_lengthens_the_run_by_the_quotient_of_the_macs(
    small: Path, dense: Path, tmp_path: Path
) -> None:
    options = {"reinit": True, "budget_of": dense, "epochs": 2}
    result = train(config(small, tmp_path / "run", **options))
    counted = [count(onnx.load(path)).macs for path in (dense, small)]
    assert result.epochs == round(2 * counted[0] / counted[1]) > 3
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates.count(0.1) == result.epochs // 2  # the schedule is stretched too
    written = TrainConfig(**tomllib.loads((tmp_path / "run" / "config.toml").read_text()))
    assert (written.epochs, written.stretch) == (2, counted[0] / counted[1])
    again = train(config(small, tmp_path / "run", resume=True, **options))
    assert again.epochs == result.epochs
    with pytest.raises(ConfigError, match="MACs are fewer than"):
        train(config(dense, tmp_path / "other", reinit=True, budget_of=small))


@pytest.mark.parametrize(
    "method", ["proximal-ns", "magnitude", "taylor", "fpgm", "hsq-gl12", "nnrelief", "backward-selection"]
)
def test_methods_work_on_files(dense: Path, tmp_path: Path, method: str) -> None:
    result = train(config(dense, tmp_path / "run", method=method, epochs=2, train_size=300))
    assert result.sparsity.channels > 0
    assert accuracy(tmp_path / "run" / "model.onnx") == pytest.approx(result.accuracy.test, abs=1e-6)


@pytest.mark.parametrize("teacher", [False, True], ids=["labels", "teacher"])
def test_interrupted_run_resumes_to_the_same_file(
    small: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: bool
) -> None:
    options = {"teacher": dense if teacher else None, "train_size": 400, "epochs": 2}
    whole = train(config(small, tmp_path / "whole", **options))
    original, count = loop._Loop.step, 0

    def step(self: loop._Loop, *args: object) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(config(small, tmp_path / "cut", **options))
    assert not (tmp_path / "cut" / "model.onnx").exists()
    resumed = train(config(small, tmp_path / "cut", resume=True, **options))
    assert resumed.accuracy == whole.accuracy
    assert (tmp_path / "cut" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()


def test_recipe_of_the_file_is_used_and_one_is_added_where_it_has_none(dense: Path, tmp_path: Path) -> None:
    model = onnx.load(dense)
    preprocessing.write(model, Preprocessing(mean=(1.0,), std=(2.0,), scale=16.0))
    onnx.save(model, tmp_path / "scaled.onnx")
    train(config(tmp_path / "scaled.onnx", tmp_path / "a", epochs=1))
    written = json.loads(json.dumps((tmp_path / "a" / "config.toml").read_text()))
    assert f"mean = [{16 / 255}]" in written
    assert preprocessing.read(onnx.load(tmp_path / "a" / "model.onnx")) == preprocessing.read(model)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    train(config(tmp_path / "bare.onnx", tmp_path / "b", epochs=1))
    data = load_dataset("digits")
    assert preprocessing.read(onnx.load(tmp_path / "b" / "model.onnx")).mean == pytest.approx(data.mean)


def test_channels_last_files_take_the_same_images(dense: Path, tmp_path: Path) -> None:
    model = onnx.load(dense)
    model.graph.node.insert(
        0, onnx.helper.make_node("Transpose", ["nhwc"], [model.graph.input[0].name], perm=[0, 3, 1, 2])
    )
    dims = model.graph.input[0].type.tensor_type.shape.dim
    sizes = [dims[0].dim_param, *(dims[axis].dim_value for axis in (2, 3, 1))]
    del model.graph.input[0]
    model.graph.input.insert(0, onnx.helper.make_tensor_value_info("nhwc", onnx.TensorProto.FLOAT, sizes))
    carried = preprocessing.read(model)
    preprocessing.write(model, Preprocessing(mean=carried.mean, std=carried.std, layout="NHWC"))
    onnx.save(model, tmp_path / "nhwc.onnx")
    result = train(config(tmp_path / "nhwc.onnx", tmp_path / "run", epochs=1))
    assert accuracy(tmp_path / "run" / "model.onnx") == pytest.approx(result.accuracy.test, abs=1e-6)


def fixed_batch(dense: Path, path: Path, shape: list[int]) -> Path:
    """The network for one image at a time, with a Reshape on its way that only looks right for one."""
    model = onnx.load(dense)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    last = model.graph.output[0].name
    model.graph.node[-1].output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.array(shape), "shape"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 10]), "back"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["before", "shape"], ["between"]))
    model.graph.node.append(onnx.helper.make_node("Softmax", ["between"], ["soft"], axis=0))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["soft", "back"], [last]))
    onnx.save(model, path)
    return path


def test_files_for_single_images_are_trained_in_batches_where_that_is_the_same(dense: Path, tmp_path: Path) -> None:
    model = onnx.load(dense)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "one.onnx")
    result = train(config(tmp_path / "one.onnx", tmp_path / "run", epochs=1, train_size=100))
    assert result.accuracy.test > 0.8
    wrong = fixed_batch(dense, tmp_path / "wrong.onnx", [10, 1])
    with pytest.raises(ModelError, match="made for batches of 1 and works with no other size"):
        train(config(wrong, tmp_path / "wrong"))


# Mistakes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "absent.onnx"}, ModelError, "absent.onnx does not exist"),
        ({"teacher": Path("absent.onnx")}, ModelError, "absent.onnx does not exist"),
        ({"dataset": "mnist", "data_dir": Path("absent")}, DataError, "mnist"),
        ({"width": 0.5}, ConfigError, "--width 0.5 does not apply"),
        ({"dataset": None, "data": Path("images.npz")}, ConfigError, "have no labels. Give a --teacher"),
        ({"dataset": None, "data": Path("floats.npz")}, DataError, "holds floats"),
        ({"dataset": None, "data": Path("few.npz"), "teacher": Path("dense.onnx")}, DataError, "too few"),
        ({"method": "network-slimming", "model": "folded.onnx"}, ConfigError, "this network has none"),
        ({"model": "two.onnx"}, ModelError, "has 2 outputs"),
        ({"teacher": Path("other.onnx")}, ConfigError, "normalise their input differently"),
        ({"model": "run/model.onnx"}, OutputError, "where this run would write"),
    ],
    ids=str,
)
def test_mistake_is_named_and_nothing_is_written(
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = onnx.load(dense)
    onnx.save(model, "dense.onnx")
    slim(SlimConfig(input="dense.onnx", output="folded.onnx", fold_bn=True))
    two = onnx.load("dense.onnx")
    hidden = onnx.helper.make_tensor_value_info(two.graph.node[0].output[0], 1, ["N", 16, 8, 8])
    two.graph.output.append(hidden)
    onnx.save(two, "two.onnx")
    preprocessing.write(model, Preprocessing(mean=(0.1,), std=(2.0,)))
    onnx.save(model, "other.onnx")
    images = np.zeros((100, 8, 8), np.uint8)
    np.savez("images.npz", x=images)
    np.savez("few.npz", x=images[:3])
    np.savez("floats.npz", x=images.astype(np.float32)[:, None])
    with pytest.raises(error, match=message):
        train(config(**{"model": Path("dense.onnx"), "run": Path("run"), **options}))
    assert not Path("run").exists()


def test_command_line(small: Path, dense: Path, tmp_path: Path) -> None:
    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(program, [str(argument) for argument in arguments])

    given = ("train", "--model", small, "--teacher", dense, "--dataset", "digits", "--train-size", 300, "--epochs", 1)
    done = invoke(*given, "-o", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.stderr
    assert TrainResult.model_validate_json(done.stdout).teacher == str(dense)
    both = invoke(*given, "--data", "x", "-o", tmp_path / "other")
    assert both.exit_code == 2
    assert "data" in both.stderr
