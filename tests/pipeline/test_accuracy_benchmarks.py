"""The scripts that measure accuracy: their pages, what they store, and what they make networks and data of."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from prune_onnx.pipeline.sessions import create_session, run_session

FOLDER = Path(__file__).parents[2] / "benchmarks"
RESULTS = FOLDER / "results"
PAGES = ("exact", "posttraining", "other_nets")
"""Results that the script of the same name writes."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script as ``python benchmarks/NAME.py`` finds it and its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("name", PAGES)
def test_pages_say_what_is_stored(script: Any, name: str) -> None:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"benchmarks/{name}.py has not been run")
    stored = json.loads(path.read_text())
    page = script(name).page(stored["rows"], script("stored").origin(stored["environment"]))
    assert page == path.with_suffix(".md").read_text()
    assert all("date" in row for row in stored["rows"])


def test_a_row_takes_the_place_of_its_older_self(script: Any, tmp_path: Path) -> None:
    def page(rows: list[dict[str, Any]], origin: str) -> str:
        return f"{origin}\n{[row['top1'] for row in rows]}\n"

    def store() -> Any:
        return script("stored").Store(tmp_path / "found", ["python", "x.py"], ("net", "ratio"), page).resume()

    first = store()
    for net, ratio, value in (("a", 1, 90), ("a", 2, 80), ("b", 1, 70), ("a", 2, 81)):
        first.add({"net": net, "ratio": ratio, "top1": value})
    text = (tmp_path / "found.md").read_text()
    assert text.startswith("`python x.py`")
    assert text.endswith("[90, 81, 70]\n")
    again = store()
    assert again.rows == first.rows
    assert again.get(net="a", ratio=2)["top1"] == 81
    assert again.get(net="c", ratio=2) is None
    # Rows of another form, which an older script left, are not taken for ours.
    (tmp_path / "found.json").write_text(json.dumps({"rows": [{"net": "a"}, *first.rows]}))
    assert store().rows == first.rows


def test_the_reference_way_zeroes_dead_channels_only(script: Any) -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[N, 3, 4, 4] x) => (float[N, 3, 4, 4] y)
        <float[3] scale = {0.0, 2.0, 0.0}, float[3] mean = {0.1, 0.2, 0.3}, float[3] var = {1.0, 2.0, 3.0}> {
        a = BatchNormalization(x, scale, shift, mean, var)  b = BatchNormalization(x, one, shift, mean, var)
        y = Add(a, b) }"""
    model = onnx.parser.parse_model(text)
    for name, values in (("shift", [0.5, -0.5, 0.0]), ("one", [1.0, 1.0, 1.0])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values, np.float32), name))
    before = model.SerializeToString()
    masked, shifted = script("exact").without_shift(model)
    assert model.SerializeToString() == before
    assert shifted == 1
    onnx.checker.check_model(masked)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)}
    (old,), (new,) = (run_session(create_session(each), feed) for each in (model, masked))
    # The other BatchNormalization, which reads the same shift, keeps it.
    np.testing.assert_allclose(old - new, np.broadcast_to([[[0.5]], [[0.0]], [[0.0]]], old.shape), atol=1e-6)


def test_the_peers_module_computes_what_the_file_does(script: Any, tmp_path: Path) -> None:
    import torch

    from prune_onnx.graph_ops.preprocessing import Preprocessing
    from prune_onnx.trainers.export import export_onnx
    from prune_onnx.trainers.models import build_model

    peers, path = script("trained_peers"), tmp_path / "net.onnx"
    torch.manual_seed(1)
    network = build_model("resnet20", peers.CLASSES, peers.SHAPE)
    export_onnx(network, peers.SHAPE, path, Preprocessing((0.5,), (0.5,)), {})
    module = peers.as_module("resnet20", path)
    for (name, old), new in zip(network.state_dict().items(), module.state_dict().values(), strict=True):
        assert name.endswith("num_batches_tracked") or torch.equal(old, new)
    assert peers.macs(module) == script("posttraining").size(path)[0]
    assert len(list(peers.streams(module))) == 10


def test_bars_stand_under_the_variant_that_they_are_for(script: Any, tmp_path: Path) -> None:
    posttraining = script("posttraining")
    common = {"net": "resnet56", "images": 1024, "latency_share": 0.5, "macs_ratio": 2.0, "params_ratio": 1.5}
    rows = [{**common, "ratio": 1.0, "variant": "dense", "top1": 93.39, "macs": 125e6, "params": 853e3}]
    for variant in ("l2", "distilled"):
        rows += [{**common, "ratio": ratio, "variant": variant, "top1": 80.0 + ratio, "seconds": 3.0}
                 for ratio in (2.11, 4.0)]  # fmt: skip
    lines = posttraining.page(rows, "origin").splitlines()
    below = lines[lines.index("| calibrated, then `train --teacher` | 82.11 | 84.00 | 3 |") + 1]
    assert below == "| bar | *92.5* | *87.0* |  |"
    assert sum(line.startswith("| bar") for line in lines) == 1
    posttraining.draw(rows, tmp_path / "p")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-latency.png", "p-macs.png"]


def test_pixels_are_of_the_garment_that_is_seen_last(script: Any) -> None:
    folder = Path(os.environ.get("PRUNE_ONNX_DATA", "data"))
    if not (folder / "FashionMNIST").exists():
        pytest.skip("Fashion-MNIST is not there (PRUNE_ONNX_DATA)")
    segmentation = script("segmentation")
    images, classes = segmentation.pictures(folder, "test", 20, seed=3)
    assert images.shape == (20, 3, segmentation.SIDE, segmentation.SIDE)
    assert classes.shape == (20, segmentation.SIDE, segmentation.SIDE)
    kinds = [set(np.unique(each)) - {segmentation.BACKGROUND} for each in classes]
    assert {len(each) for each in kinds} == {1, 2}
    assert all(np.array_equal(a, b) for a, b in zip(segmentation.pictures(folder, "test", 20, seed=3),
                                                    (images, classes), strict=True))  # fmt: skip


def test_the_detectors_error_is_zero_for_itself_and_one_for_its_mean(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for n in range(4):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(tmp_path / f"{n}.png")
    detector = script("other_nets").Detector(Path("dense"), tmp_path, tmp_path)
    assert detector.crop("test").shape == (2 * detector.crops, 3, *detector.size)
    n = 2 * detector.crops
    dense = [rng.random((n, 9)), rng.random((n, 9, 4))]
    mean = [np.broadcast_to(each.mean(0), each.shape) for each in dense]
    monkeypatch.setattr(detector, "run", lambda path: {"dense": dense, "mean": mean}[path.name])
    same, constant = detector.metrics(Path("dense")), detector.metrics(Path("mean"))
    assert same == {"scores": 0, "boxes": 0, "f1": 100, "count": int((dense[0] > 0.5).sum())}
    assert constant["scores"] == pytest.approx(1)
    assert constant["boxes"] == pytest.approx(1)
    assert constant["f1"] < 100
