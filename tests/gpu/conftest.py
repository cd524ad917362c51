"""Every test here needs a CUDA device that ONNX Runtime can use; without one all are skipped, and say why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from prune_onnx.graph_ops.errors import PruneOnnxError
from prune_onnx.pipeline.sessions import create_session

Save = Callable[..., Path]


@functools.cache
def missing(provider: str) -> str:
    """Return what keeps a provider from working here, empty where it works."""
    model = parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) { y = Relu(x) }'
    )
    try:
        create_session(model, provider).run(None, {"x": np.zeros(4, np.float32)})
    except PruneOnnxError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> None:
    """Skip where there is no device; a test of TensorRT asks for the fixture ``tensorrt``."""
    if reason := missing("tensorrt" if "tensorrt" in request.fixturenames else "cuda"):
        pytest.skip(reason)


@pytest.fixture
def tensorrt() -> None:
    """Mark a test as one of TensorRT."""


@pytest.fixture
def save_net(tmp_path: Path) -> Save:
    """Return a function that writes a small convolutional net with seeded weights to a file."""

    def save(name: str = "net.onnx", width: int = 32, layers: int = 6, kind: int = onnx.TensorProto.FLOAT) -> Path:
        rng = np.random.default_rng(0)
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        nodes, weights, source, channels = [], [], "x", 3
        for layer in range(layers):
            weight = rng.standard_normal((width, channels, 3, 3)) * (2 / (9 * channels)) ** 0.5
            weights.append(numpy_helper.from_array(weight.astype(dtype), f"w{layer}"))
            nodes.append(helper.make_node("Conv", [source, f"w{layer}"], [f"c{layer}"], f"conv{layer}", pads=[1] * 4))
            nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"], f"relu{layer}"))
            source, channels = f"r{layer}", width
        head = rng.standard_normal((width, 10)) * width**-0.5
        weights.append(numpy_helper.from_array(head.astype(dtype), "head"))
        nodes += [
            helper.make_node("GlobalAveragePool", [source], ["p"], "pool"),
            helper.make_node("Flatten", ["p"], ["f"], "flatten"),
            helper.make_node("MatMul", ["f", "head"], ["y"], "head"),
        ]
        inputs = [helper.make_tensor_value_info("x", kind, ["N", 3, 32, 32])]
        outputs = [helper.make_tensor_value_info("y", kind, ["N", 10])]
        graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
        path = tmp_path / name
        onnx.save(helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), path)
        return path

    return save
