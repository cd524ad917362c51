"""``torchrun`` with two processes on the CPU: the network of one process, and one set of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from prune_onnx.pipeline.train import ARTIFACTS, train
from prune_onnx.trainers import checkpoint
from prune_onnx.trainers.config import TrainConfig

pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)

OPTIONS = {
    "model": "bn-cnn", "dataset": "digits", "method": "proximal-ns", "epochs": 2, "batch_size": 16, "lr": 0.02,
    "lambda": 0.02, "train_size": 211, "width": 0.5, "device": "cpu",
}  # fmt: skip


def weights(run: Path) -> dict[str, np.ndarray]:
    model = onnx.load(run / ARTIFACTS["model"])
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_two_processes_train_the_network_of_one(tmp_path: Path) -> None:
    flags = [part for key, value in OPTIONS.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD", "MASTER"))}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "prune_onnx.cli.main", "train", *flags, "--sync-bn", "--json", "-o", str(tmp_path / "two"),
        ],
        capture_output=True, text=True, env={**environment, **own},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one object: only the first process speaks
    assert {path.name for path in (tmp_path / "two").iterdir()} == set(ARTIFACTS.values())
    assert len(checkpoint.read(tmp_path / "two" / "checkpoint.pt")["rng"]) == 2

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = train(TrainConfig(**OPTIONS, output=tmp_path / "one"))
    finally:
        torch.set_num_threads(before)
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    histories = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    for one, two in zip(*histories, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-3)
    assert result["accuracy"]["test"] == pytest.approx(alone.accuracy.test, abs=0.005)
    assert result["sparsity"] == alone.sparsity.model_dump()
