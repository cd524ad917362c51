"""Load, check and save models; every complaint about a file is made here."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import checker, external_data_helper, inliner, shape_inference

from .errors import ModelError, OutputError
from .files import atomic_write
from .graph import subgraphs

KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
PROTOBUF_LIMIT = 2**31 - 2**20


def load(source: str | Path | onnx.ModelProto | object) -> onnx.ModelProto:
    """Load a model, check it, and inline its local functions.

    Args:
        source: a path, a ModelProto, or an ``onnx_graphsurgeon.Graph``.

    Returns:
        A ModelProto of its own (the source is not changed), external data read in.

    Raises:
        ModelError: missing, truncated, not ONNX, invalid, or with operators of a domain that nobody defines.
    """
    if isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        where = "the model"
    elif isinstance(source, str | Path):
        where = str(source)
        model = _read(Path(source))
    else:
        from .surgeon import to_model

        where, model = "the graph", to_model(source)
    if not model.graph.node or not model.graph.output:
        raise ModelError(f"{where} is not an ONNX model, or an empty one (it has no nodes or no outputs).")
    foreign = _foreign_operators(model)
    if foreign:
        raise ModelError(f"{where} uses custom operators that ONNX Runtime does not know: {', '.join(foreign)}. "
                         "Replace them, or put them behind a model boundary.")
    try:
        if model.ByteSize() < PROTOBUF_LIMIT:
            checker.check_model(model)
    except (checker.ValidationError, ValueError) as error:
        raise ModelError(f"{where} is not a valid ONNX model: {first_line(error)}.") from error
    if model.functions:
        model = inliner.inline_local_functions(model)
    return model


def _read(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ModelError(f"{path} is a folder, not an ONNX file.")
        if size == 0:
            raise ModelError(f"{path} is empty.")
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (DecodeError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path} is not an ONNX file, or is truncated ({size} bytes).") from error
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, checker.ValidationError, RuntimeError) as error:
        raise ModelError(f"{path}: its external data cannot be read: {first_line(error)}.") from error
    return model


def uses_external_data(path: str | Path) -> bool:
    """Whether the file keeps some weights in other files."""
    model = onnx.load(path, load_external_data=False)
    return any(external_data_helper.uses_external_data(t) for t in model.graph.initializer)


def _foreign_operators(model: onnx.ModelProto) -> list[str]:
    """``domain::op`` of every operator that neither ONNX Runtime nor the model itself defines."""
    own = {(f.domain, f.name) for f in model.functions}
    found: dict[str, None] = {}

    def visit(nodes: object) -> None:
        for node in nodes:  # type: ignore[attr-defined]
            if node.domain not in KNOWN_DOMAINS and (node.domain, node.op_type) not in own:
                found[f"{node.domain}::{node.op_type}"] = None
            for body in subgraphs(node):
                visit(body.node)

    visit(model.graph.node)
    for function in model.functions:
        visit(function.node)
    return list(found)


def check(model: onnx.ModelProto, original: onnx.ModelProto | None = None) -> None:
    """Run onnx.checker and strict shape inference on a result.

    Args:
        model: the result.
        original: the model that it was made from. Where strict shape inference already complains about that one, it is
            not held against the result.

    Raises:
        ModelError: the result is invalid.
    """
    if model.ByteSize() >= PROTOBUF_LIMIT:
        return
    try:
        checker.check_model(model)
        shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (checker.ValidationError, shape_inference.InferenceError, ValueError) as error:
        if original is not None and isinstance(error, shape_inference.InferenceError) and not _infers(original):
            return
        raise ModelError(f"the result is not a valid ONNX model: {first_line(error)}.") from error


def _infers(model: onnx.ModelProto) -> bool:
    try:
        shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (shape_inference.InferenceError, ValueError):
        return False
    return True


def save(model: onnx.ModelProto, path: str | Path, *, external: bool = False) -> None:
    """Write a model; it appears complete or not at all.

    Args:
        model: what to write.
        path: where to.
        external: keep the weights in ``<name>.data`` beside it; always so above protobuf's 2 GB.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if not external and model.ByteSize() < PROTOBUF_LIMIT:
        with atomic_write(path) as temporary:
            temporary.write_bytes(model.SerializeToString())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        data = f"{path.name}.data"
        onnx.save_model(copy, folder / path.name, save_as_external_data=True, location=data, size_threshold=1024)
        if (folder / data).exists():
            os.replace(folder / data, path.parent / data)
        os.replace(folder / path.name, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def first_line(error: object) -> str:
    """First line of a library's message, without its final stop."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
