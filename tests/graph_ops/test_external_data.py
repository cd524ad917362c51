"""Models whose weights lie in a file of their own stay that way, and what is not cut stays bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import checker, numpy_helper

from prune_onnx.graph_ops import model_io
from prune_onnx.pipeline.sessions import create_session
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig, SlimResult

from .net import Net

PAGE = 4096


def net() -> onnx.ModelProto:
    """A few layers; the tests let the second convolution lose channels and nothing else."""
    net = Net(seed=7)
    x = net.input(1, 16, 6, 6)
    y = net.relu(net.conv(x, 32, name="first"))
    y = net.relu(net.conv(y, 24, 1, name="second"))
    y = net.gemm(net.op("Flatten", net.op("GlobalAveragePool", y)), 40, name="hidden")
    fixed = net.matmul(net.op("Flatten", net.op("GlobalMaxPool", x)), 40, name="beside")
    return net.model(net.gemm(net.op("Add", y, fixed), 40, name="head"))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The model with its weights outside, under a name and at offsets that are not ours."""
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save(
        net(), path, save_as_external_data=True, all_tensors_to_one_file=True, location="weights.bin", size_threshold=0
    )
    return path


def cut(path: Path, **options: object) -> tuple[Path, SlimResult]:
    output = path.parent.parent / "out" / "small.onnx"
    half = {"keep_channels": 0.5, "scope": "layer", "align": 1, "min_keep": 0.0}
    config = {**half, "ignore": ("first", "hidden"), **options}
    return output, slim(SlimConfig(input=path, output=output, **config))


def entries(path: Path) -> dict[str, dict[str, str]]:
    """Where each external tensor of a file says that it lies."""
    model = onnx.load(path, load_external_data=False)
    return {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}


def raw(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and bytes of every weight."""
    return {t.name: (tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in onnx.load(path).graph.initializer}


def test_the_layout_is_kept(stored: Path) -> None:
    output, result = cut(stored)
    assert sorted(p.name for p in output.parent.iterdir()) == ["small.onnx", "small.onnx.data"]
    assert result.after.macs < result.before.macs
    found = entries(output)
    assert found, "weights should be outside"
    assert {e["location"] for e in found.values()} == {"small.onnx.data"}
    assert all(int(e["offset"]) % PAGE == 0 for e in found.values())
    size = (output.parent / "small.onnx.data").stat().st_size
    ends = sorted((int(e["offset"]), int(e["offset"]) + int(e["length"])) for e in found.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    assert ends[-1][1] == size
    assert output.stat().st_size < 10_000, "the large weights should not be inside"
    checker.check_model(str(output), full_check=True)


def test_the_result_can_be_moved_and_run(stored: Path, tmp_path: Path) -> None:
    output, _ = cut(stored)
    elsewhere = tmp_path / "elsewhere"
    output.parent.rename(elsewhere)
    image = np.random.default_rng(0).standard_normal((1, 16, 6, 6)).astype(np.float32)
    moved = create_session(elsewhere / "small.onnx").run(None, {"x": image})
    inside = elsewhere / "inside.onnx"
    onnx.save(onnx.load(elsewhere / "small.onnx"), inside)
    np.testing.assert_array_equal(create_session(inside).run(None, {"x": image})[0], moved[0])


def test_untouched_weights_are_the_same_bytes(stored: Path) -> None:
    before, (output, _) = raw(stored), cut(stored)
    after = raw(output)
    same = {name for name in before if before[name] == after.get(name)}
    smaller = {name for name in before if name in after and np.prod(after[name][0]) < np.prod(before[name][0])}
    assert same | smaller == set(before)
    assert len(smaller) == 3  # weight and bias of the second convolution, weight of the layer behind it
    assert len(same) == len(before) - 3


def test_the_input_is_not_touched(stored: Path) -> None:
    files = {p: p.read_bytes() for p in stored.parent.iterdir()}
    cut(stored)
    assert {p: p.read_bytes() for p in stored.parent.iterdir()} == files


def test_outside_and_inside_give_the_same_model(stored: Path, tmp_path: Path) -> None:
    inside = tmp_path / "in" / "inside.onnx"
    onnx.save(net(), inside)
    output, one = cut(stored)
    weights = raw(output)
    other, two = cut(inside, force=True)
    assert raw(other) == weights
    assert not entries(other), "weights that came in stay in"
    assert one.verification == two.verification
    assert (one.before.macs, one.after.macs, one.after.params) == (two.before.macs, two.after.macs, two.after.params)


def test_exact_removal_of_nothing_copies_every_byte(stored: Path) -> None:
    output, result = cut(stored, keep_channels=None, exact=True, ignore=())
    assert result.removed.channels == 0
    assert raw(output) == raw(stored)


def test_a_failure_leaves_no_data_behind(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_io.os, "replace", full)
    with pytest.raises(model_io.OutputError, match="No space left"):
        cut(stored)
    assert list((stored.parent.parent / "out").iterdir()) == []


def test_a_result_above_the_limit_goes_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into one protobuf message is stored outside, wherever it came from."""
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save(net(), path)
    monkeypatch.setattr(model_io, "PROTOBUF_LIMIT", 10_000)
    output, result = cut(path)
    assert entries(output)
    assert result.after.bytes == sum(p.stat().st_size for p in output.parent.iterdir())
    checker.check_model(str(output), full_check=True)
