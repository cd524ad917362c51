"""Any ONNX file as a network to train: one translation an operator, one family a file.

The modules that hold translations are listed here once; importing one of them fills
:data:`~prune_onnx.trainers.from_onnx.base.OPERATORS`.
"""

from __future__ import annotations

from . import elementwise, linear, movement, normalization, pooling, quantized, recurrent, reduction, sampling, shaping
from .module import OnnxModule
from .scratch import draw_weights
from .write_back import trained_model

__all__ = ["OnnxModule", "draw_weights", "trained_model"]

FAMILIES = (linear, elementwise, normalization, pooling, sampling, reduction, movement, shaping, recurrent, quantized)
