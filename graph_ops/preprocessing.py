"""The preprocessing recipe that a model carries in its ``metadata_props``.

A deployed file is useless without the mean and std it was trained with, so ``train`` writes them into the
model and ``eval`` and the calibration read them from there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import onnx

from .errors import ModelError

KEY = "prune_onnx.preprocessing"


@dataclass(frozen=True)
class Preprocessing:
    """Turn uint8 images into network input: ``(pixel / scale - mean) / std``.

    Attributes:
        mean: per channel, in units of ``pixel / scale``.
        std: per channel, in units of ``pixel / scale``.
        size: (height, width) of the network input; ``None`` means as the images are.
        layout: ``"NCHW"`` or ``"NHWC"``, the layout of the network input.
        scale: what pixels are divided by, 255 unless the network wants raw pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
    layout: str = "NCHW"
    scale: float = 255.0

    def apply(self, images: np.ndarray) -> np.ndarray:
        """Return float32 network input.

        Args:
            images: uint8, shape (N, C, H, W).

        Returns:
            float32, (N, C, H, W) or (N, H, W, C) by ``layout``.
        """
        shape = (1, -1, 1, 1)
        mean = np.asarray(self.mean, np.float32).reshape(shape)
        std = np.asarray(self.std, np.float32).reshape(shape)
        x = (images.astype(np.float32) / np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if self.layout == "NHWC" else x

    def ends(self) -> tuple[float, float]:
        """Return the smallest and the largest network input that an image can give."""
        mean, std = (np.asarray(numbers, np.float64) for numbers in (self.mean, self.std))
        return float((-mean / std).min()), float(((255 / self.scale - mean) / std).max())


def write(model: onnx.ModelProto, recipe: Preprocessing) -> None:
    """Store ``recipe`` in the model's metadata, replacing an older one."""
    text = json.dumps(asdict(recipe), separators=(",", ":"))
    for prop in model.metadata_props:
        if prop.key == KEY:
            prop.value = text
            return
    model.metadata_props.add(key=KEY, value=text)


def read(model: onnx.ModelProto) -> Preprocessing | None:
    """Return the recipe that the model carries, or ``None``.

    Raises:
        ModelError: the entry is there but cannot be read.
    """
    for prop in model.metadata_props:
        if prop.key == KEY:
            try:
                raw = json.loads(prop.value)
                size = raw.get("size")
                return Preprocessing(
                    mean=tuple(float(v) for v in raw["mean"]),
                    std=tuple(float(v) for v in raw["std"]),
                    size=(int(size[0]), int(size[1])) if size else None,
                    layout=str(raw.get("layout", "NCHW")),
                    scale=float(raw.get("scale", 255.0)),
                )
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise ModelError(f"metadata entry {KEY!r} cannot be read: {error}.") from error
    return None
