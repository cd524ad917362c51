"""The user's own arrays, from .npz and .npy files; pickled objects in them are refused, not run."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from prune_onnx.graph_ops.errors import DataError

from .base import check_labels

SAMPLE_KEYS = ("x", "images")
LABEL_KEYS = ("y", "labels")
CHANNELS = (1, 3, 4)


def read_arrays(path: Path, num_classes: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the samples in a file, and their labels if it has any.

    Args:
        path: an .npz with ``x`` or ``images``, and perhaps ``y`` or ``labels``; or an .npy of samples.
        num_classes: labels must be smaller than this.

    Returns:
        Images, uint8 of shape (N, C, H, W), or network input, float32 of shape (N, ...); labels, int64 of shape (N,).

    Raises:
        DataError: unreadable, no samples, another type or shape, values that are not finite, labels that do not fit.
    """
    arrays = _load(path)
    key = next((key for key in SAMPLE_KEYS if key in arrays), None)
    if key is None:
        raise DataError(f"{path} has no array 'x' or 'images'; it has {', '.join(arrays) or 'none'}.")
    samples = arrays[key]
    if samples.ndim < 2 or not samples.size:
        raise DataError(f"{path}: array {key!r} has shape {samples.shape}; expected samples along its first axis.")
    labels = next((arrays[key] for key in LABEL_KEYS if key in arrays), None)
    if labels is not None:
        labels = check_labels(labels, len(samples), num_classes, path)
    return _images(samples, path) if samples.dtype == np.uint8 else _inputs(samples, path), labels


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {SAMPLE_KEYS[0]: loaded}
            return {key: loaded[key] for key in loaded.files}
    except (OSError, ValueError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}. "
                        "Expected numeric arrays, as numpy.savez and numpy.save write them.") from error


def _inputs(samples: np.ndarray, path: Path) -> np.ndarray:
    """Return floats as float32."""
    if samples.dtype.kind != "f":
        raise DataError(f"{path}: samples are {samples.dtype}; expected uint8 images, or floats (network input).")
    with np.errstate(over="ignore"):
        inputs = samples.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1))
    if len(bad):
        raise DataError(f"{path}: {len(bad)} of {len(inputs)} samples, the first at position {bad[0]}, hold NaN, "
                        "infinity or values beyond float32. Remove them.")
    return inputs


def _images(samples: np.ndarray, path: Path) -> np.ndarray:
    """Return uint8 images as (N, C, H, W); the channel axis is the one of size 1, 3 or 4."""
    if samples.ndim == 3 and samples.shape[2] not in CHANNELS:
        return samples[:, None]
    if samples.ndim == 4:
        second, last = samples.shape[1] in CHANNELS, samples.shape[3] in CHANNELS
        if second and not last:
            return samples
        if last and not second:
            return np.ascontiguousarray(samples.transpose(0, 3, 1, 2))
        why = "both axis 1 and axis 3 could be the channels" if second else "no axis can be the channels"
    else:
        why = "a single image needs a first axis of size 1" if samples.ndim == 3 else "3 or 4 axes are needed"
    raise DataError(f"{path}: uint8 images of shape {samples.shape}, but {why}. Expected (N, C, H, W), (N, H, W, C) or "
                    "(N, H, W), with 1, 3 or 4 channels; or give floats, which are taken as network input as they are.")
