"""``--init``: starting from trained weights, and fine-tuning that keeps their zeros."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prune_onnx.graph_ops.errors import ConfigError, OutputError, TrainingError
from prune_onnx.pipeline.train import TrainResult, train
from prune_onnx.trainers.config import TrainConfig
from prune_onnx.trainers.models import build_model
from prune_onnx.trainers.pretrained import load_weights

pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder: Path, **options: object) -> TrainResult:
    values = {"model": "bn-cnn", "dataset": "digits", "width": 0.5, "epochs": 2, "batch_size": 32, "device": "cpu"}
    return train(TrainConfig(**{**values, "output": folder, **options}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """A run that leaves dead channels and zero weights."""
    folder = tmp_path_factory.mktemp("runs") / "magnitude"
    return folder, run(folder, method="magnitude", prune_ratio=0.6, epochs=4, lr=0.05)


def fresh(**options: object) -> nn.Module:
    torch.manual_seed(5)
    return build_model("bn-cnn", 10, (1, 8, 8), **{"width": 0.5, **options})


def first_record(folder: Path) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def test_run_folder_checkpoint_and_state_dict_give_the_same_weights(trained, tmp_path: Path) -> None:
    folder, _ = trained
    networks = [fresh() for _ in range(4)]
    load_weights(networks[0], folder)
    load_weights(networks[1], folder / "checkpoint.pt")
    state = {f"module.{key}": value for key, value in networks[0].state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "theirs.pth")
    load_weights(networks[2], tmp_path / "theirs.pth")
    torch.save(networks[0].state_dict(), tmp_path / "plain.pt")
    load_weights(networks[3], tmp_path / "plain.pt")
    for other in networks[1:]:
        for (name, a), b in zip(networks[0].state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b) or name.endswith("num_batches_tracked")
    assert (networks[0].features[4].weight == 0).any()


def test_fine_tuning_goes_on_and_keeps_the_zeros(trained, tmp_path: Path) -> None:
    folder, before = trained
    after = run(tmp_path / "tuned", init=folder, method="fine-tune")
    assert after.sparsity == before.sparsity
    assert after.accuracy.test > 0.8
    old, new = fresh(), fresh()
    load_weights(old, folder)
    load_weights(new, tmp_path / "tuned")
    assert torch.equal(old.features[4].weight == 0, new.features[4].weight == 0)
    assert not torch.equal(old.features[4].weight, new.features[4].weight)


@pytest.mark.parametrize("method", ["magnitude", "taylor", "nnrelief"])
def test_pruning_a_trained_network_begins_with_the_pruning(trained, tmp_path: Path, method: str) -> None:
    result = run(tmp_path / "pruned", init=trained[0], method=method, rounds=1)
    assert "epochs = 2" in (tmp_path / "pruned" / "config.toml").read_text()
    assert "retrain_epochs = 2" in (tmp_path / "pruned" / "config.toml").read_text()
    assert first_record(tmp_path / "pruned")["zero_weights"] > 0
    assert result.accuracy.test > 0.5


def test_sparse_training_keeps_trained_scales(trained, tmp_path: Path) -> None:
    for method in ("proximal-ns", "network-slimming"):
        run(tmp_path / method, init=trained[0], method=method, epochs=1, lr=1e-6, optimizer="sgd", **{"lambda": 1e-6})
        old, new = fresh(), fresh()
        load_weights(old, trained[0])
        load_weights(new, tmp_path / method)
        torch.testing.assert_close(new.features[1].weight, old.features[1].weight, rtol=1e-3, atol=1e-3)


def test_resumed_run_does_not_need_the_weights_again(trained, tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "start.pt"
    network = fresh()
    load_weights(network, trained[0])
    torch.save(network.state_dict(), source)
    from prune_onnx.trainers import loop

    step, count = loop._Loop.step, 0

    def interrupted(self, *args):
        nonlocal count
        count += 1
        if count == 45:
            raise KeyboardInterrupt
        return step(self, *args)

    options = {"init": source, "method": "magnitude", "checkpoint_every": 20}
    run(tmp_path / "whole", **options)
    monkeypatch.setattr(loop._Loop, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", **options)
    source.unlink()
    run(tmp_path / "halves", **options, resume=True)
    models = [(tmp_path / name / "model.onnx").read_bytes() for name in ("whole", "halves")]
    assert models[0] == models[1]


@pytest.mark.parametrize(("options", "said"), [
    ({"init": "nowhere"}, "nowhere does not exist"),
    ({"method": "fine-tune"}, "--init"),
])  # fmt: skip
def test_what_cannot_start_is_a_clear_error(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "run", **options)


def test_weights_of_another_network_are_refused(trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'features\.0\.weight' is 16x1x3x3 in .*, but 32x1x3x3 in this network"):
        load_weights(fresh(width=1.0), trained[0])
    with pytest.raises(ConfigError, match="of another network"):
        load_weights(nn.Linear(2, 2), trained[0])
    (tmp_path / "broken.pt").write_bytes(b"broken")
    with pytest.raises(TrainingError, match=r"broken\.pt cannot be read"):
        load_weights(fresh(), tmp_path / "broken.pt")


def test_run_that_would_overwrite_its_own_start_is_refused(trained) -> None:
    with pytest.raises(OutputError, match="another run folder"):
        run(trained[0], init=trained[0], force=True)


def test_onnx_files_bring_their_own_weights(trained) -> None:
    with pytest.raises(ValueError, match="has its weights"):
        TrainConfig(model="a.onnx", dataset="digits", output="x", init=trained[0])
