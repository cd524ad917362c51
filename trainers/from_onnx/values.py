"""ONNX tensors as torch tensors."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from prune_onnx.graph_ops.graph import tensor_value

from .base import torch_dtype


def as_tensor(stored: onnx.TensorProto) -> torch.Tensor:
    """Return an ONNX tensor's value, as a tensor of its own.

    Raises:
        ModelError: unreadable, or of a type that torch lacks.
    """
    return from_array(tensor_value(stored), torch_dtype(stored.data_type))


def from_array(value: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a copy of an array; half floats become float32."""
    if dtype is None:
        dtype = torch_dtype(onnx.helper.np_dtype_to_tensor_dtype(value.dtype))
    return torch.from_numpy(np.array(value, dtype=str(dtype).removeprefix("torch."), order="C", copy=True))
