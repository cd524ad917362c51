"""The idx format of MNIST and its kin: a big-endian header, then the array's bytes; plain or gzip.

    bytes 0-1   0
    byte  2     element type, 0x08 = uint8
    byte  3     number of dimensions
    4 bytes     each dimension
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.errors import DataError

from .base import read_file

UINT8 = 0x08
GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, dims: int) -> np.ndarray:
    """Return the array in an idx file.

    Args:
        path: the file; gzip is recognised by its content.
        dims: number of dimensions it must have.

    Returns:
        uint8, the array's shape.

    Raises:
        DataError: unreadable, truncated, not idx, another element type or rank, or another length than its header says.
    """
    data = read_file(path)
    if data.startswith(GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip file ({error}). Fetch it again.") from error
    header = 4 + 4 * dims
    if len(data) < header or data[:2] != b"\0\0":
        raise DataError(f"{path} is not an idx file: expected the magic number 0000{UINT8:02x}{dims:02x}, "
                        f"found {data[:4].hex() or 'an empty file'}. Fetch it again.")
    if data[2] != UINT8 or data[3] != dims:
        raise DataError(f"{path}: expected uint8 values in {dims} dimensions (magic number 0000{UINT8:02x}{dims:02x}), "
                        f"found {data[:4].hex()}. Is it another file under this name?")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dims, 4))
    values = np.frombuffer(data, np.uint8, offset=header)
    expected = int(np.prod(shape, dtype=object))
    if len(values) != expected:
        raise DataError(f"{path}: its header says {'x'.join(map(str, shape))} = {expected} bytes of data, "
                        f"but {len(values)} follow. Fetch it again.")
    return values.reshape(shape).copy()  # a view of bytes would be read-only
