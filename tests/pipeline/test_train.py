"""The train stage on real images: its files, its checks, resuming, and that the file computes what was measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from prune_onnx.graph_ops import preprocessing
from prune_onnx.graph_ops.errors import ConfigError, DataError, ModelError, OutputError, ProviderError, TrainingError
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline.train import ARTIFACTS, Accuracy, TrainResult, _compare, train
from prune_onnx.trainers import checkpoint, loop
from prune_onnx.trainers.config import TrainConfig
from prune_onnx.trainers.data import load_dataset
from prune_onnx.trainers.methods.proximal_ns import ProximalNS

pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("one_thread")


class Listener(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def config(run: Path, **options: object) -> TrainConfig:
    values = {"model": "bn-cnn", "dataset": "digits", "method": "proximal-ns", "output": run, "epochs": 3}
    return TrainConfig(**{**values, "width": 0.5, "batch_size": 16, "lambda": 0.2, "device": "cpu", **options})


def contents(run: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    run = tmp_path_factory.mktemp("runs") / "digits"
    return run, train(config(run))


# The files


def test_run_folder_holds_exactly_what_the_result_names(finished: tuple[Path, TrainResult]) -> None:
    run, result = finished
    assert {path.name for path in run.iterdir()} == set(ARTIFACTS.values())
    assert result.artifacts == {kind: str(run / name) for kind, name in ARTIFACTS.items()}
    assert TrainResult.model_validate_json((run / "result.json").read_text()) == result
    assert (result.command, result.model, result.dataset) == ("train", "bn-cnn", "digits")
    assert (result.method, result.epochs) == ("proximal-ns", 3)
    assert result.environment == json.loads((run / "environment.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["validation_accuracy"] == result.accuracy_before_finish.validation
    assert lines[-1]["dead_channels"] == result.sparsity.dead_channels
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(("finish", "measured"), [("changes", 2), ("leaves", 1)])
def test_network_is_measured_again_only_when_its_method_changed_it(
    finish: str, measured: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def finished(method: ProximalNS, model: torch.nn.Module) -> dict[str, int]:
        if finish == "changes":
            with torch.no_grad():
                next(model.parameters()).zero_()
        return method.sparsity(model)

    def measure(*arguments: object) -> Accuracy:
        calls.append(arguments)
        return Accuracy(validation=0.5, test=0.5)

    monkeypatch.setattr(ProximalNS, "finish", finished)
    monkeypatch.setattr("prune_onnx.pipeline.train._measure", measure)
    train(config(tmp_path / "run", epochs=1))
    assert len(calls) == measured


def test_file_computes_in_onnxruntime_what_torch_measured(finished: tuple[Path, TrainResult]) -> None:
    run, result = finished
    model = onnx.load(run / "model.onnx")
    data = load_dataset("digits")
    inputs = preprocessing.read(model).apply(data.test_images)
    session = onnxruntime.InferenceSession(str(run / "model.onnx"), providers=["CPUExecutionProvider"])
    right = session.run(["logits"], {"input": inputs})[0].argmax(1) == data.test_labels
    assert right.mean() == pytest.approx(result.accuracy.test, abs=1e-12)
    assert result.accuracy.test > 0.5  # chance is 0.1


def test_file_has_the_dead_scales_at_zero_and_its_provenance(finished: tuple[Path, TrainResult]) -> None:
    run, result = finished
    model = onnx.load(run / "model.onnx")
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scales = [weights[node.input[1]] for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert sum(scale.size for scale in scales) == result.sparsity.channels == 112
    assert sum(int((scale == 0).sum()) for scale in scales) == result.sparsity.dead_channels > 0
    told = {prop.key.removeprefix("prune_onnx."): prop.value for prop in model.metadata_props}
    assert {key: told[key] for key in ("model", "dataset", "method", "seed")} == {
        "model": "bn-cnn", "dataset": "digits", "method": "proximal-ns", "seed": "0",
    }  # fmt: skip


def test_config_that_was_written_gives_the_same_run_again(finished: tuple[Path, TrainResult], tmp_path: Path) -> None:
    run, result = finished
    options = tomllib.loads((run / "config.toml").read_text())
    assert options["lambda"] > 0 and options["augment"] == "shift"  # noqa: PT018 (both were open)
    again = train(TrainConfig(**{**options, "output": tmp_path / "again"}))
    assert again.accuracy == result.accuracy
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (run / "model.onnx").read_bytes()


def test_run_without_validation_images_trains_on_all(tmp_path: Path) -> None:
    result = train(config(tmp_path, epochs=1, validation=0, method="plain", **{"lambda": None}))
    assert result.accuracy.validation is None
    assert result.sparsity.dead_channels == 0


def test_importing_the_stage_does_not_import_torch() -> None:
    code = "import sys, prune_onnx.pipeline.train; assert 'torch' not in sys.modules"
    typing = Path(__file__).parents[2] / ".typing"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(typing)})


# Taken folders, resuming


def test_finished_run_is_not_overwritten_unasked(finished: tuple[Path, TrainResult]) -> None:
    run, _ = finished
    before = contents(run)
    with pytest.raises(OutputError, match=r"holds a training run already.*--resume.*--force"):
        train(config(run))
    assert contents(run) == before


def test_resuming_a_finished_run_changes_nothing(finished: tuple[Path, TrainResult]) -> None:
    run, result = finished
    before, told = contents(run), Listener()
    # Only what the command line needs is given: the rest is as the run has it.
    bare = TrainConfig(model="bn-cnn", dataset="digits", method="proximal-ns", output=run, resume=True)
    assert train(bare, told) == result
    assert contents(run) == before
    assert told.notes == [f"{run} is finished already"]


@pytest.mark.parametrize("options", [{"lr": 0.5}, {"epochs": 4}, {"method": "plain"}, {"seed": 7}], ids=str)
def test_resuming_with_other_options_says_which_differ(
    finished: tuple[Path, TrainResult], options: dict[str, object]
) -> None:
    run, _ = finished
    before = contents(run)
    (name,) = options
    with pytest.raises(ConfigError, match=f"cannot resume .*: {name} was .*, now {options[name]!r}"):
        train(config(run, resume=True, **options))
    assert contents(run) == before


def interrupt_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM in the step of that number."""
    original, count = loop._Loop.step, 0

    def step(self: loop._Loop, *args: object) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(loop._Loop, "step", step)


def test_interrupted_run_resumes_to_the_same_file(
    finished: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, result = finished
    with monkeypatch.context() as patch:
        interrupt_at(50, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "cut"))
    assert checkpoint.read(tmp_path / "cut" / "checkpoint.pt")["position"]["step"] > 0
    assert not (tmp_path / "cut" / "model.onnx").exists()
    resumed = train(config(tmp_path / "cut", resume=True))
    assert resumed.accuracy == result.accuracy
    assert (tmp_path / "cut" / "model.onnx").read_bytes() == (run / "model.onnx").read_bytes()


def test_run_that_lost_its_file_is_finished_again_from_the_checkpoint(
    finished: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, result = finished
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("checkpoint.pt", "config.toml"):
        (copy / name).write_bytes((run / name).read_bytes())
    monkeypatch.setattr(loop._Loop, "step", lambda *args: pytest.fail("trained again"))
    assert train(config(copy, resume=True)).accuracy == result.accuracy
    assert (copy / "model.onnx").read_bytes() == (run / "model.onnx").read_bytes()


def test_resuming_where_nothing_is_starts_at_the_beginning(tmp_path: Path) -> None:
    told = Listener()
    train(config(tmp_path / "new", epochs=1, resume=True), told)
    assert "starts at the beginning" in told.notes[0]
    assert (tmp_path / "new" / "model.onnx").exists()


def test_force_replaces_all_of_a_run_and_leaves_other_files(tmp_path: Path) -> None:
    for name in (*ARTIFACTS.values(), "notes.txt"):
        (tmp_path / name).write_text("old")
    train(config(tmp_path, epochs=1, force=True))
    assert [path.name for path in tmp_path.iterdir() if path.read_bytes() == b"old"] == ["notes.txt"]


def test_damaged_checkpoint_is_an_error_and_stays(finished: tuple[Path, TrainResult], tmp_path: Path) -> None:
    data = (finished[0] / "checkpoint.pt").read_bytes()[:-100]
    (tmp_path / "checkpoint.pt").write_bytes(data)
    with pytest.raises(TrainingError, match="truncated, corrupt"):
        train(config(tmp_path, resume=True))
    assert (tmp_path / "checkpoint.pt").read_bytes() == data


# Mistakes: one error, before any training, nothing written

FACTORIES = """
import torch
from PIL import Image
from torch import nn

def flat(num_classes, in_shape, width=1.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(7, num_classes))

def two(num_classes, in_shape, width=1.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

class Undecided(nn.Module):
    def __init__(self, num_classes, in_shape, width=1.0):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.sum() > 0 else -self.head(x.flatten(1))
"""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "bn-cn"}, ConfigError, "unknown model 'bn-cn'.*'bn-cnn'"),
        ({"dataset": "digit"}, ConfigError, "unknown data set 'digit'.*'digits'"),
        ({"method": "proximal"}, ConfigError, "unknown method 'proximal'.*'proximal-ns'"),
        ({"dataset": "mnist", "data_dir": "absent"}, DataError, "mnist"),
        ({"model": "lenet300"}, ConfigError, "'proximal-ns' works on the scales of BatchNorm"),
        ({"model": "vgg19"}, ConfigError, "vgg19"),
        ({"method": "plain"}, ConfigError, "'plain' takes no option 'lambda'"),
        ({"mean": (0, 0, 0), "std": (1, 1, 1)}, ConfigError, "mean has 3 values"),
        ({"device": "cuda"}, ProviderError, "--device cpu"),
        ({"model": "own_networks:flat"}, ConfigError, "cannot take the 1x8x8 images of 'digits'"),
        ({"model": "own_networks:two"}, ConfigError, r"shape \(2, 2\) .* needs \(2, 10\)"),
        ({"model": "own_networks:Undecided", "method": "plain", "lambda": None}, ModelError, "cannot export"),
    ],
    ids=str,
)
def test_mistake_is_named_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loop._Loop, "step", lambda *args: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_networks", None)
    (tmp_path / "own_networks.py").write_text(FACTORIES)
    with pytest.raises(error, match=message):
        train(config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match="is not a folder"):
        train(config(tmp_path / "run"))


# Finishing


def progress_of(compare: Callable[[Progress], None]) -> list[str]:
    told = Listener()
    compare(told)
    return told.warnings


def test_loss_of_accuracy_in_finishing_is_warned_about() -> None:
    def compare(old: Accuracy, new: Accuracy) -> list[str]:
        return progress_of(lambda told: _compare(old, new, "proximal-ns", told))

    good, bad = Accuracy(validation=0.99, test=0.98), Accuracy(validation=0.92, test=0.98)
    assert compare(good, good) == compare(bad, good) == []
    assert len(compare(good, bad)) == 1
    assert "from 99.00% to 92.00%" in compare(good, bad)[0]
    assert compare(Accuracy(validation=None, test=0.9), Accuracy(validation=None, test=0.8)) != []
    assert np.isclose(good.test, bad.test)


# Pictures in folders


def test_pictures_that_do_not_fit_into_memory_train_the_same_network(tmp_path: Path) -> None:
    images = load_dataset("digits").train_images[:60, 0]
    for index, image in enumerate(images):
        path = tmp_path / "pictures" / f"class{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    files, heard = [], Listener()
    for name, options in (("held", {}), ("read", {"memory": 0, "workers": 0})):
        own = {"dataset": None, "data": tmp_path / "pictures", "mean": (0.3,), "std": (0.4,), "augment": "shift"}
        made = config(tmp_path / name, method="plain", epochs=2, **{"lambda": None}, **own, **options)
        result = train(made, heard)
        assert result.sparsity.channels == 112
        files.append((tmp_path / name / "model.onnx").read_bytes())
    assert files[0] == files[1]
    assert [note for note in heard.notes if "stay in their files" in note]


def test_methods_on_weights_finish_with_the_graph_pass(tmp_path: Path) -> None:
    """What the zeros made dead is gone from compact.onnx, which computes what model.onnx does."""
    options = {"method": "nnrelief", "lambda": None, "epochs": 4, "rounds": 2, "conv_alpha": 0.6, "alpha": 0.6}
    result = train(config(tmp_path / "run", **options))
    assert result.artifacts == {
        **{kind: str(tmp_path / "run" / name) for kind, name in ARTIFACTS.items()},
        "compact": str(tmp_path / "run" / "compact.onnx"),
    }
    x = np.random.default_rng(0).standard_normal((16, 1, 8, 8), np.float32)
    before, after = (onnxruntime.InferenceSession(result.artifacts[kind]) for kind in ("model", "compact"))
    wide, narrow = (session.run(None, {session.get_inputs()[0].name: x})[0] for session in (before, after))
    np.testing.assert_allclose(narrow, wide, rtol=1e-4, atol=1e-4 * np.abs(wide).max())
    large, small = (onnx.load(result.artifacts[kind]).graph.initializer for kind in ("model", "compact"))
    assert sum(np.prod(t.dims) for t in small) < sum(np.prod(t.dims) for t in large)
    again = train(config(tmp_path / "run", method="plain", epochs=1, force=True, **{"lambda": None}))
    assert "compact" not in again.artifacts
    assert not (tmp_path / "run" / "compact.onnx").exists()
