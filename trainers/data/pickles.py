"""Arrays out of pickle files without running what a pickle may ask for.

A pickle is a program: loading one from a stranger runs his code. The python version of CIFAR-10 needs four names only,
and here even those are not numpy's own: they are inert stand-ins that keep what the file says. The array is then built
from its bytes, by us.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from prune_onnx.graph_ops.errors import DataError

from .base import read_file


class _Inert:
    """Stands in for ``ndarray`` and ``dtype``: keeps its arguments and its state, and computes nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: Any, encoding: Any) -> bytes:
    """Do what ``_codecs.encode`` does in pickles of bytes that Python 3 writes in Python 2's format."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("unexpected text encoding")
    return text.encode("latin1")


ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Inert,
    ("numpy._core.multiarray", "_reconstruct"): _Inert,
    ("numpy", "ndarray"): _Inert,
    ("numpy", "dtype"): _Inert,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which array data does not need") from None


def read_batch(path: Path) -> dict[str, Any]:
    """Return the dictionary in a pickle file of plain values and uint8 arrays.

    Args:
        path: a file as Python 2 or 3 wrote it.

    Returns:
        Its entries under str keys; uint8 arrays as such, text of Python 2 as bytes.

    Raises:
        DataError: unreadable, not a pickle, truncated, no dictionary, or it asks for anything but array data.
    """
    data = read_file(path)
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"expected a dictionary, found {type(content).__name__}")
        return {_text(key): _array(value) if isinstance(value, _Inert) else value for key, value in content.items()}
    except Exception as error:  # a damaged pickle fails in any way that its opcodes allow
        reason = error if str(error) else type(error).__name__
        raise DataError(f"{path} is not a CIFAR batch file: {reason}. Fetch it again.") from error


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _array(pickled: _Inert) -> np.ndarray:
    """Build the array from the state of a pickled ``ndarray``: (version, shape, dtype, Fortran order, bytes)."""
    _, shape, dtype, fortran, data = pickled.state
    code = dtype.args[0]
    if code not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"expected an array of uint8, found {code!r}")
    return np.frombuffer(bytearray(data), np.uint8).reshape(shape, order="F" if fortran else "C")
