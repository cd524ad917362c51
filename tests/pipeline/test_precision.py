"""Hand-off: float16 and int8 files, checked, run and compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from pydantic import ValidationError

from prune_onnx.graph_ops.errors import ConfigError, ModelError, VerificationError
from prune_onnx.graph_ops.progress import SILENT
from prune_onnx.pipeline.precision import convert
from prune_onnx.pipeline.sessions import create_session, run_session
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig, SlimResult

from ..graph_ops.builder import Net
from .test_posttraining import images, residual_net


def run(tmp_path: Path, **options) -> SlimResult:
    onnx.save(residual_net(bn=True, dynamic=options.pop("dynamic", True)), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=images(48))
    given = {
        "input": tmp_path / "in.onnx",
        "output": tmp_path / "out.onnx",
        "calibration": str(tmp_path / "data.npz"),
        "keep_macs": 0.7,
        "align": 1,
        "criterion": "l2",
        "compensate": "none",
        "report": tmp_path / "r.json",
        **options,
    }
    return slim(SlimConfig(**given))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_the_file_is_smaller_runs_and_is_compared(tmp_path, kind, dynamic) -> None:
    single = run(tmp_path, dynamic=dynamic)
    expected = run_session(create_session(tmp_path / "out.onnx"), {"x": images(4, seed=3)})[0]
    result = run(tmp_path, **{kind: True}, dynamic=dynamic, force=True)
    model = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert result.after.bytes == (tmp_path / "out.onnx").stat().st_size
    assert result.after.macs == single.after.macs
    assert result.after.params == single.after.params
    assert result.verification.passed
    found = json.loads((tmp_path / "r.json").read_text())["precision"]
    assert found["type"] == {"fp16": "float16", "int8": "int8"}[kind]
    assert found["samples"] == 48
    assert 0 < found["max_abs_diff"] < 0.1 * np.abs(expected).max() if kind == "fp16" else found["max_abs_diff"] > 0
    assert found["agreement"] > 0.8
    if kind == "fp16":
        assert result.after.bytes < 0.9 * single.after.bytes
    outputs = run_session(create_session(tmp_path / "out.onnx"), {"x": images(4, seed=3)})
    assert outputs[0].dtype == np.float32
    assert np.abs(outputs[0] - expected).max() < {"fp16": 0.02, "int8": 0.3}[kind] * np.abs(expected).max()


def test_int8_is_per_channel_qdq(tmp_path) -> None:
    run(tmp_path, int8=True)
    model = onnx.load(tmp_path / "out.onnx")
    weights = {t.name: t for t in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    makers = {n.output[0]: n for n in model.graph.node}
    assert convolutions
    for node in convolutions:
        quantised = makers[node.input[1]]
        assert quantised.op_type == "DequantizeLinear"
        assert weights[quantised.input[0]].data_type == TensorProto.INT8
        assert weights[quantised.input[1]].dims == [weights[quantised.input[0]].dims[0]]
        assert makers[node.input[0]].op_type == "DequantizeLinear"
    assert any(p.key == "prune_onnx.slim" for p in model.metadata_props)


def test_float16_needs_no_calibration(tmp_path) -> None:
    result = run(tmp_path, calibration=None, keep_macs=None, fp16=True)
    assert result.budget == "exact"
    assert result.precision.type == "float16"
    assert result.precision.samples > 0


def test_int8_without_a_budget_quantises_the_exact_result(tmp_path) -> None:
    result = run(tmp_path, keep_macs=None, int8=True)
    assert result.budget == "exact"
    assert result.precision.samples == 48
    assert result.after.macs == result.before.macs


def test_a_dry_run_reports_and_writes_nothing(tmp_path) -> None:
    result = run(tmp_path, fp16=True, dry_run=True, report=None)
    assert result.precision.agreement is not None
    assert not (tmp_path / "out.onnx").exists()


def overflowing() -> onnx.ModelProto:
    net = Net()
    y = net.conv(net.input("n", 3, 8, 8), 4, 1)
    y = net.op("Mul", net.op("Mul", y, np.asarray(6e4, np.float32)), np.asarray(6e4, np.float32))
    return net.model(net.head(y))


def test_what_overflows_is_refused_and_nothing_is_written(tmp_path) -> None:
    onnx.save(overflowing(), tmp_path / "in.onnx")
    with pytest.raises(VerificationError, match=r"not finite.*Nothing was written"):
        slim(SlimConfig(input=tmp_path / "in.onnx", output=tmp_path / "out.onnx", fp16=True))
    assert not (tmp_path / "out.onnx").exists()


def test_what_int8_cannot_hold_is_refused() -> None:
    """One input in a thousand sets the range; all others round to the same value."""
    net = Net()
    y = net.op("Pow", net.input("n", 4), np.asarray(9.0, np.float32))
    weight = np.eye(4, dtype=np.float32)
    model = net.model(net.op("MatMul", net.op("MatMul", y, weight), weight))
    x = np.random.default_rng(0).uniform(0.1, 1, (200, 4)).astype(np.float32)
    x[0] = 30
    with pytest.raises(VerificationError, match="same class"):
        convert(model, "int8", [{"x": x}], SILENT)


def test_a_quantised_model_is_not_converted_again(tmp_path) -> None:
    run(tmp_path, int8=True)
    with pytest.raises(ConfigError, match="quantised already"):
        convert(onnx.load(tmp_path / "out.onnx"), "float16", [{"x": images(2)}], SILENT)


def test_without_the_quantizer_it_is_one_clear_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(ModelError, match="quantizer cannot be imported"):
        run(tmp_path, int8=True)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True, "int8": True, "calibration": "x.npz"}, "exclude"),
        ({"int8": True}, "int8 needs calibration"),
        ({"calibration": "x.npz"}, "budget or for int8"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message) -> None:
    with pytest.raises(ValidationError, match=message):
        SlimConfig(input=tmp_path / "in.onnx", output=tmp_path / "out.onnx", **options)
