"""Reads an ONNX file without reading its weights.

A model file is a protobuf message whose bulk is the ``raw_data`` of its initializers. Here the message is walked field by
field, the bulk is left where it lies, and the initializers come out as if their data were stored externally: in the model
file itself, at the position where the bytes are. They are mapped into memory only when somebody looks at them.

Wire format (protobuf encoding): a field is a varint ``number << 3 | type``; type 0 is a varint, 1 eight bytes, 2 a length
and that many bytes, 5 four bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx

LARGE = 1024  # bytes; smaller tensors are read at once

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
        for number, start, inner, end in _fields(data, 0, len(data)):
            if number != _MODEL_GRAPH:
                rest.append(data[start:end])
                continue
            graph = []
            for part, first, body, last in _fields(data, inner, end):
                if part == _GRAPH_INITIALIZER:
                    initializers.append(_tensor(data, body, last, str(path.resolve())))
                else:
                    graph.append(data[first:last])
            content = b"".join(graph)
            rest.append(_varint_bytes(_MODEL_GRAPH << 3 | 2) + _varint_bytes(len(content)) + content)
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
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
