"""Small models whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

Linear = Callable[..., Path]


def linear_model(
    weight: np.ndarray, *, batch: int | str = "N", source: str = "x", target: str = "y"
) -> onnx.ModelProto:
    """``y = x @ weight`` for flat samples."""
    rows, columns = weight.shape
    model = parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 17]> g (float[{batch}, {rows}] {source}) => '
        f"(float[{batch}, {columns}] {target}) {{ {target} = MatMul({source}, w) }}"
    )
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    return model


@pytest.fixture
def save_linear(tmp_path: Path) -> Linear:
    """Return a function that writes :func:`linear_model` to a file."""

    def save(name: str, weight: np.ndarray, **options: int | str) -> Path:
        path = tmp_path / name
        onnx.save(linear_model(weight, **options), path)
        return path

    return save
