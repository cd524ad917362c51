"""Reads an ONNX file without reading its weights, and writes one without a second copy of them.

A model file is a protobuf message whose bulk is the ``raw_data`` of its initializers. Here the message is walked
field by field, the bulk is left where it lies, and the initializers come out as if their data were stored externally:
in the model file itself, at the position where the bytes are. They are mapped into memory only when somebody looks at
them. Writing goes the same way back: the message around the weights is put together, the weights are passed through
one by one.

Wire format (protobuf encoding): a field is a varint ``number << 3 | type``; type 0 is a varint, 1 eight bytes, 2 a
length and that many bytes, 5 four bytes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import Message

from .graph import external_position, raw_bytes

LARGE = 1024  # bytes; smaller tensors are read at once
# Types of which one byte holds several values.
PACKED_TYPES = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    if hasattr(onnx.TensorProto, name)
)

_MODEL_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_GRAPH_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_TENSOR_RAW_DATA = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


class WireError(ValueError):
    """The bytes are not a well-formed message."""


def read_model(path: Path) -> onnx.ModelProto:
    """Return the model in a file, large weights left in it.

    Raises:
        WireError: truncated, or not a protobuf message.
        google.protobuf.message.DecodeError: the rest is not an ONNX model.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        rest, initializers = [], []
        own = str(path.resolve())
        for number, start, inner, end in _fields(data, 0, len(data)):
            if number != _MODEL_GRAPH:
                rest.append(data[start:end])
                continue
            graph = []
            for part, first, body, last in _fields(data, inner, end):
                if part == _GRAPH_INITIALIZER:
                    initializers.append(_tensor(data, body, last, own))
                else:
                    graph.append(data[first:last])
            content = b"".join(graph)
            rest.append(_head(_MODEL_GRAPH, len(content)) + content)
        model = onnx.ModelProto.FromString(b"".join(rest))
    model.graph.initializer.extend(initializers)
    return model


def _tensor(data: mmap.mmap, start: int, end: int, path: str) -> onnx.TensorProto:
    """Read one initializer; a large raw_data becomes a reference to its position in the file."""
    small, large = [], None
    for number, first, body, last in _fields(data, start, end):
        if number == _TENSOR_RAW_DATA and last - body >= LARGE:
            large = (body, last - body)
        else:
            small.append(data[first:last])
    tensor = onnx.TensorProto.FromString(b"".join(small))
    if any(entry.value == path for entry in tensor.external_data):
        raise WireError(f"tensor {tensor.name!r} pretends to be a part of the file")
    if large is not None:
        refer(tensor, path, *large)
    return tensor


def refer(tensor: onnx.TensorProto, file: str, offset: int, length: int) -> None:
    """Let a tensor's data lie in a file."""
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, start of the field, start of its content, end) of every field in a message."""
    while position < end:
        start = position
        tag, position = _varint(data, position, end)
        kind = tag & 7
        body = position
        if kind == 0:
            _, position = _varint(data, position, end)
        elif kind == 1:
            position += 8
        elif kind == 2:
            length, body = _varint(data, position, end)
            position = body + length
        elif kind == 5:
            position += 4
        else:
            raise WireError(f"no protobuf field at byte {start}")
        if position > end or tag >> 3 == 0:
            raise WireError(f"the field at byte {start} ends after its message")
        yield tag >> 3, start, body, position


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """Return a variable-length integer and the position after it."""
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise WireError(f"an integer at byte {position} does not end")


def _varint_bytes(value: int) -> bytes:
    """Return an integer in variable length."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _head(number: int, length: int) -> bytes:
    """Return what stands in front of a field of ``length`` bytes."""
    return _varint_bytes(number << 3 | 2) + _varint_bytes(length)


def write_model(model: onnx.ModelProto) -> tuple[int, Iterator[bytes | np.ndarray]]:
    """Serialise a model with all its weights inside.

    Returns:
        The number of bytes, and the bytes piece by piece. The weights are looked at only while the pieces are taken.

    Raises:
        WireError: (while taking the pieces) a tensor's data does not fill its shape.
    """
    front, around = onnx.ModelProto(), onnx.GraphProto()
    copy_fields(model, front, leave_out=("graph",))
    copy_fields(model.graph, around, leave_out=("initializer",))
    pieces: list[tuple[bytes, onnx.TensorProto | None, int]] = [(around.SerializeToString(), None, 0)]
    for tensor in model.graph.initializer:
        length = _raw_length(tensor)
        if length is None:
            body = tensor.SerializeToString()
            pieces.append((_head(_GRAPH_INITIALIZER, len(body)) + body, None, 0))
            continue
        rest = onnx.TensorProto()
        copy_fields(tensor, rest, leave_out=("raw_data", "external_data", "data_location"))
        body = rest.SerializeToString() + _head(_TENSOR_RAW_DATA, length)
        pieces.append((_head(_GRAPH_INITIALIZER, len(body) + length) + body, tensor, length))
    inside = sum(len(head) + length for head, _, length in pieces)
    start = front.SerializeToString() + _head(_MODEL_GRAPH, inside)
    return len(start) + inside, _pieces(start, pieces)


def _pieces(start: bytes, pieces: list[tuple[bytes, onnx.TensorProto | None, int]]) -> Iterator[bytes | np.ndarray]:
    yield start
    for head, tensor, length in pieces:
        yield head
        if tensor is not None:
            data = raw_bytes(tensor)
            if len(data) != length:
                raise WireError(f"tensor {tensor.name!r} has {len(data)} bytes instead of {length}")
            yield data


def _raw_length(tensor: onnx.TensorProto) -> int | None:
    """Bytes of a tensor's raw data; ``None`` for one that keeps its values in another field."""
    position = external_position(tensor)
    if position is not None:
        return position[2]
    if not tensor.HasField("raw_data"):
        return None
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return None
    # Asking protobuf for the bytes copies them, so their number follows from the shape; below it would not pay.
    size = math.prod(tensor.dims) * itemsize
    return size if size >= LARGE and tensor.data_type not in PACKED_TYPES else None


def copy_fields(source: Message, target: Message, leave_out: tuple[str, ...] = ()) -> None:
    """Copy the fields of a protobuf message but for some, which are not even looked at."""
    for descriptor in source.DESCRIPTOR.fields:
        name = descriptor.name
        if name in leave_out:
            continue
        if descriptor.is_repeated:
            getattr(target, name).extend(getattr(source, name))
        elif not source.HasField(name):
            continue
        elif descriptor.message_type is not None:
            getattr(target, name).CopyFrom(getattr(source, name))
        else:
            setattr(target, name, getattr(source, name))
