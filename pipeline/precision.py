"""Hand-off to deployment: the finished float32 model in another number format, checked beside it.

float16 is the converter of :mod:`prune_onnx.graph_ops.half`; int8 is ONNX Runtime's static quantizer: QDQ, weights per
channel and symmetric, activations by their smallest and largest value over the calibration data.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import version_converter

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.errors import ConfigError, DataError, ModelError, VerificationError
from prune_onnx.graph_ops.fold import fold_batch_norm
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.half import to_float16
from prune_onnx.graph_ops.progress import Progress

from .accuracy import compare_outputs
from .probing import Feeds, batch_of
from .rounding import is_quantised
from .sessions import create_session, one_line, run_session
from .slim_schema import Precision

AT_ONCE = 16
"""Inputs a run of the quantizer; it holds one run's activations."""

PER_CHANNEL = 13
"""Operator set from which on DequantizeLinear takes one scale a channel."""

FAR = {"float16": 0.1, "int8": 1.0}
"""Largest difference, relative to the largest value of an output, that a number format may explain."""

LEAST_AGREEMENT = {"float16": 0.95, "int8": 0.5}
"""Share of the same answers below which the converted model is another model."""

FEW = 20
"""Samples from which on the share of the same answers says something."""


def convert(
    model: onnx.ModelProto, kind: str, feeds: Sequence[Feeds], progress: Progress
) -> tuple[onnx.ModelProto, Precision]:
    """Return a model in another number format, and how far its outputs are from the model's own.

    Args:
        model: float32; is left as it is.
        kind: ``float16`` or ``int8``.
        feeds: inputs that both run on, and that int8 takes its ranges from.
        progress: told what is done.

    Raises:
        ConfigError: the model computes with quantised numbers already.
        ModelError: the conversion fails, or ONNX Runtime does not take what comes of it.
        VerificationError: the outputs are not finite, or too far off for rounding to explain.
    """
    if is_quantised(model):
        raise ConfigError(f"the model is quantised already, so it cannot be written as {kind}.")
    progress.note(f"converting to {kind}")
    result = to_float16(model) if kind == "float16" else _to_int8(model, feeds)
    model_io.check(result)
    return result, _compared(model, result, kind, feeds)


def _to_int8(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> onnx.ModelProto:
    try:
        with _quiet():
            from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise ModelError(f"onnxruntime's quantizer cannot be imported: {one_line(error)}.") from error
    whole = _for_quantizer(model_io.with_weights(fold_batch_norm(model)[0]))
    with tempfile.TemporaryDirectory(prefix="prune-onnx-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(whole, source)
        try:
            with _quiet():
                quantize_static(
                    str(source),
                    str(target),
                    _Reader(feeds, batch_of(Graph(model))),
                    quant_format=QuantFormat.QDQ,
                    per_channel=Graph(whole).opset >= PER_CHANNEL,
                    activation_type=QuantType.QInt8,
                    weight_type=QuantType.QInt8,
                )
        except Exception as error:  # the quantizer raises whatever its parts raise
            raise ModelError(f"onnxruntime's quantizer fails on this model: {one_line(error)}.") from error
        result = onnx.load(target)
    _carry_metadata(model, result)
    return result


def _for_quantizer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take weights off the list of inputs, and raise the operator set to the first that quantizes per channel."""
    weights = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    if len(inputs) < len(model.graph.input):
        copies = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in inputs]
        del model.graph.input[:]
        model.graph.input.extend(copies)
        model.ir_version = max(model.ir_version, 4)
    if Graph(model).opset < PER_CHANNEL:
        try:
            model = version_converter.convert_version(model, PER_CHANNEL)
        except (RuntimeError, ValueError):  # an operator without a way up: one scale a tensor then
            return model
        model.ir_version = max(model.ir_version, 7)
    return model


class _Reader:
    """The calibration inputs as the quantizer asks for them: a few at a time where the batch is open, then ``None``."""

    def __init__(self, feeds: Sequence[Feeds], fixed: int) -> None:
        self._parts = (part for feed in feeds for part in ([feed] if fixed else _split(feed)))

    def get_next(self) -> Feeds | None:
        return next(self._parts, None)


def _split(feed: Feeds) -> Iterator[Feeds]:
    for first in range(0, len(next(iter(feed.values()))), AT_ONCE):
        yield {name: value[first : first + AT_ONCE] for name, value in feed.items()}


def _carry_metadata(model: onnx.ModelProto, result: onnx.ModelProto) -> None:
    """The quantizer drops some of what the model says about itself."""
    have = {prop.key for prop in result.metadata_props}
    result.metadata_props.extend(prop for prop in model.metadata_props if prop.key not in have)
    result.producer_name, result.producer_version = model.producer_name, model.producer_version


def _compared(model: onnx.ModelProto, result: onnx.ModelProto, kind: str, feeds: Sequence[Feeds]) -> Precision:
    """Run both on the same inputs, with all optimisations of the CPU provider."""
    sessions = [create_session(model_io.to_bytes(m), "cpu") for m in (result, model)]
    try:
        count = compare_outputs(*sessions, feeds)
    except DataError as error:  # a detector that finds another number of boxes
        text = f"the {kind} model's outputs cannot be compared: {error} Nothing was written."
        raise VerificationError(text) from error
    if count.not_finite:
        raise VerificationError(
            f"the {kind} model's output is not finite for {count.not_finite} of {count.samples} inputs. "
            "Nothing was written."
        )
    largest = max(_largest(run_session(sessions[1], feed)) for feed in feeds)
    if largest and count.max_abs_diff > FAR[kind] * largest:
        raise VerificationError(
            f"the {kind} model's output differs by {count.max_abs_diff:.3g} where the float32 model's is at most "
            f"{largest:.3g}. Nothing was written."
        )
    agreement = None if count.same is None else count.same / count.samples
    if agreement is not None and count.samples >= FEW and agreement < LEAST_AGREEMENT[kind]:
        raise VerificationError(
            f"the {kind} model gives the same class as the float32 model for {agreement:.0%} of {count.samples} "
            "inputs only. Nothing was written."
        )
    return Precision(type=kind, samples=count.samples, max_abs_diff=count.max_abs_diff, agreement=agreement)


def _largest(outputs: list[np.ndarray]) -> float:
    return max((float(np.abs(o.astype(np.float64)).max(initial=0.0)) for o in outputs), default=0.0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizer's advice, which goes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
