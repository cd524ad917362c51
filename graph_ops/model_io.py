"""Load, check and save models; every complaint about a file is made here."""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import checker, external_data_helper, shape_inference

from . import wire
from .errors import ModelError, OutputError
from .files import atomic_write, uninterrupted
from .functions import inlined
from .graph import external_position, raw_bytes, subgraphs
from .wire import PACKED_TYPES, copy_fields

_T = onnx.TensorProto
FEEDABLE_TYPES = frozenset({_T.FLOAT, _T.DOUBLE, _T.FLOAT16, _T.INT8, _T.UINT8, _T.INT32})
KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
PROTOBUF_LIMIT = 2**31 - 2**20


def load(source: str | Path | onnx.ModelProto | object) -> onnx.ModelProto:
    """Load a model, check it, and inline its local functions.

    Args:
        source: a path, a ModelProto, or an ``onnx_graphsurgeon.Graph``.

    Returns:
        A ModelProto of its own (the source is not changed). External weights stay in their file, noted by full path.

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
        raise ModelError(
            f"{where} uses custom operators that ONNX Runtime does not know: {', '.join(foreign)}. "
            "Replace them, or put them behind a model boundary."
        )
    for tensor in model.graph.initializer:
        _check_tensor(tensor, where)
    try:
        checker.check_model(split_weights(model)[0])
    except (checker.ValidationError, ValueError) as error:
        raise ModelError(f"{where} is not a valid ONNX model: {first_line(error)}.") from error
    try:
        return inlined(model)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


def _read(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ModelError(f"{path} is a folder, not an ONNX file.")
        if size == 0:
            raise ModelError(f"{path} is empty.")
        model = wire.read_model(path)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path} is not an ONNX file, or is truncated ({size} bytes).") from error
    _locate_external_data(model, path)
    return model


def _locate_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Check where external weights lie and note the full path; they are mapped into memory only when they are read."""
    in_model = str(path.resolve())
    for tensor in model.graph.initializer:
        if tensor.data_location == _T.EXTERNAL and not any(e.value == in_model for e in tensor.external_data):
            wire.refer(tensor, *_external_file(tensor, path))
    for tensor in _inner_tensors(model):
        if tensor.data_location == _T.EXTERNAL:  # few and small
            file, offset, length = _external_file(tensor, path)
            with open(file, "rb") as data:
                data.seek(offset)
                tensor.raw_data = data.read(length)
            tensor.ClearField("data_location")
            del tensor.external_data[:]


def _external_file(tensor: onnx.TensorProto, path: Path) -> tuple[str, int, int]:
    """Where an external tensor lies: full path, offset and length.

    Raises:
        ModelError: outside the model's folder, missing, too short, or no position at all.
    """
    entry = {e.key: e.value for e in tensor.external_data}
    location = Path(entry.get("location", ""))
    folder = path.parent.resolve()
    try:
        file = (folder / location).resolve()
        there = file.is_file()
        size = file.stat().st_size if there else 0
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no file can have
        raise ModelError(
            f"{path}: tensor {tensor.name!r} is stored in {str(location)!r}, which cannot be read: {error}."
        ) from error
    if location.is_absolute() or ".." in location.parts or not file.is_relative_to(folder) or not location.parts:
        raise ModelError(f"{path}: tensor {tensor.name!r} points outside the model's folder ({location}).")
    if not there:
        raise ModelError(f"{path}: tensor {tensor.name!r} is stored in {location}, which does not exist.")
    try:
        offset = int(entry.get("offset", 0))
        length = int(entry.get("length", size - offset))
    except ValueError:
        raise ModelError(f"{path}: tensor {tensor.name!r} has an external position that is no number.") from None
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(
            f"{path}: tensor {tensor.name!r} needs bytes {offset} to {offset + length} of {location}, which has {size}."
        )
    return str(file), offset, length


def _inner_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes and in bodies, those of functions included."""

    def inside(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
            for body in subgraphs(node):
                yield from body.initializer
                yield from inside(body.node)

    yield from inside(model.graph.node)
    for function in model.functions:
        yield from inside(function.node)


def _check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    """Refuse a tensor whose data does not fill its shape, before anything is allocated for it."""
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{where}: initializer {tensor.name!r} has a negative size.")
    if tensor.data_type in PACKED_TYPES or tensor.data_type == onnx.TensorProto.STRING:
        return
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        raise ModelError(f"{where}: initializer {tensor.name!r} has an unknown type ({tensor.data_type}).") from None
    if external_data_helper.uses_external_data(tensor):
        if any(len(getattr(tensor, field)) for field in TYPED_FIELDS):
            raise ModelError(f"{where}: initializer {tensor.name!r} holds its values twice.")
        have = next((int(e.value) for e in tensor.external_data if e.key == "length"), 0)
    elif tensor.HasField("raw_data"):
        have = len(tensor.raw_data)
    else:
        return
    need = math.prod(tensor.dims) * itemsize
    if have != need:
        raise ModelError(
            f"{where}: initializer {tensor.name!r} of shape {list(tensor.dims)} needs {need} bytes and has {have}."
        )


def split_weights(model: onnx.ModelProto, limit: int = 1024) -> tuple[onnx.ModelProto, list[onnx.TensorProto]]:
    """Return the model with its larger initializers turned into inputs, and those initializers.

    Checking, shape inference and test runs do not need the weights inside the protobuf; without them they cost little
    time and memory, and the 2 GB limit of protobuf messages plays no part.

    Args:
        model: not changed.
        limit: initializers of at most this many elements stay (sizes, scales: shape inference looks at their values).
    """
    skeleton = onnx.ModelProto()
    copy_fields(model, skeleton, leave_out=("graph",))
    copy_fields(model.graph, skeleton.graph, leave_out=("initializer",))
    weights = []
    inputs = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        small = math.prod(tensor.dims) <= limit or tensor.data_type not in FEEDABLE_TYPES
        if small and not external_data_helper.uses_external_data(tensor):
            skeleton.graph.initializer.append(tensor)
            continue
        weights.append(tensor)
        if tensor.name not in inputs:
            skeleton.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return skeleton, weights


def data_files(path: str | Path) -> set[Path]:
    """The other files in which a model keeps its weights."""
    path = Path(path)
    stored = map(external_position, wire.read_model(path).graph.initializer)
    return {path.parent / p[0] for p in stored if p is not None} - {path.resolve()}


def bytes_on_disk(path: str | Path) -> int:
    """Size of a model's file and of the files that hold its weights."""
    return sum(file.stat().st_size for file in {Path(path), *data_files(path)})


def _foreign_operators(model: onnx.ModelProto) -> list[str]:
    """``domain::op`` of every operator that neither ONNX Runtime nor the model itself defines."""
    own = {(f.domain, f.name) for f in model.functions}
    found: dict[str, None] = {}

    def visit(nodes: object) -> None:
        for node in nodes:  # type: ignore[attr-defined]
            for text in (node.name, node.op_type, node.domain, *node.input, *node.output):
                if not isinstance(text, str):  # protobuf hands out bytes that are not UTF-8 as they are
                    raise ModelError(f"the name {text!r} of a node or tensor is not valid text.")
            parts = next((a.i for a in node.attribute if a.name == "num_outputs"), None)
            if node.op_type == "Split" and parts not in (None, len(node.output)):  # shape inference would allocate them
                raise ModelError(f"Split node {node.name!r} has {len(node.output)} outputs and wants {parts}.")
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
    try:
        skeleton = split_weights(model)[0]
        checker.check_model(skeleton)
        shape_inference.infer_shapes(skeleton, check_type=True, strict_mode=True)
    except (checker.ValidationError, shape_inference.InferenceError, ValueError) as error:
        if original is not None and isinstance(error, shape_inference.InferenceError) and not _infers(original):
            return
        raise ModelError(f"the result is not a valid ONNX model: {first_line(error)}.") from error


def _infers(model: onnx.ModelProto) -> bool:
    try:
        shape_inference.infer_shapes(split_weights(model)[0], check_type=True, strict_mode=True)
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
    total, pieces = wire.write_model(model)
    if not external and total < PROTOBUF_LIMIT:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        return
    # Named before it is made: an interrupt in between must find it to remove it.
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        folder.mkdir(mode=0o700, parents=True)
        data = f"{path.name}.data"
        stub = _write_external(model, folder / data, data)
        (folder / path.name).write_bytes(stub.SerializeToString())
        with uninterrupted():  # a model without its data, or with another's, would be half an output
            os.replace(folder / data, path.parent / data)
            os.replace(folder / path.name, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def total_bytes(model: onnx.ModelProto) -> int:
    """Size of the model with all its weights."""
    return wire.write_model(model)[0]


def to_bytes(model: onnx.ModelProto) -> bytes:
    """Serialise a model with all its weights inside.

    Raises:
        ModelError: it is larger than protobuf's 2 GB.
    """
    total, pieces = wire.write_model(model)
    if total >= PROTOBUF_LIMIT:
        raise ModelError("the model is larger than 2 GB and needs external data.")
    return b"".join(pieces)


def with_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model with all its weights inside.

    Raises:
        ModelError: it is larger than protobuf's 2 GB.
    """
    return onnx.ModelProto.FromString(to_bytes(model))


def _write_external(model: onnx.ModelProto, file: Path, location: str) -> onnx.ModelProto:
    """Write all larger initializers to ``file``, one after the other; return the model that refers to them."""
    stub = onnx.ModelProto()
    copy_fields(model, stub, leave_out=("graph",))
    copy_fields(model.graph, stub.graph, leave_out=("initializer",))
    with file.open("wb") as out:
        for tensor in model.graph.initializer:
            if not external_data_helper.uses_external_data(tensor) and len(tensor.raw_data) < 1024:
                stub.graph.initializer.append(tensor)
                continue
            out.write(b"\0" * (-out.tell() % 4096))  # page-aligned, so that runtimes can map it
            entry = stub.graph.initializer.add()
            copy_fields(tensor, entry, leave_out=("raw_data", "external_data"))
            entry.data_location = onnx.TensorProto.EXTERNAL
            offset = out.tell()
            out.write(raw_bytes(tensor))
            for key, value in (("location", location), ("offset", offset), ("length", out.tell() - offset)):
                entry.external_data.add(key=key, value=str(value))
        out.flush()
        os.fsync(out.fileno())
    return stub


def first_line(error: object) -> str:
    """First line of a library's message, without its final stop."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
