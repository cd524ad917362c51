"""What one run of the original graph tells: every shape, every static value, one sample of every channel.

The run itself needs a runtime, so it is handed in (``prune_onnx.pipeline.probing`` makes it with ONNX Runtime);
``graph_ops`` only reads the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """Result of running a model with every tensor exposed.

    Attributes:
        shapes: shape of every tensor at the probed input sizes (dynamic batch probed at 1).
        values: value of every tensor that does not depend on input data.
        lines: ``lines[tensor][axis]`` is the tensor along one axis at index 0 of all others: one sample a channel.
        varying: names of static tensors whose value changed when the dynamic sizes changed.
        other_shapes: shapes at a second choice of the dynamic sizes; empty for a model without any.
        other_values: value of the varying integer tensors there.
    """

    shapes: dict[str, Shape]
    values: dict[str, np.ndarray]
    lines: dict[str, list[np.ndarray]] = field(default_factory=dict)
    varying: frozenset[str] = frozenset()
    other_shapes: dict[str, Shape] = field(default_factory=dict)
    other_values: dict[str, np.ndarray] = field(default_factory=dict)

    def moving_axes(self, name: str) -> list[bool]:
        """For each axis of a tensor, whether its size follows a dynamic input size."""
        shape = self.shapes[name]
        other = self.other_shapes.get(name, shape)
        if len(other) != len(shape):
            return [True] * len(shape)
        return [a != b for a, b in zip(shape, other, strict=True)]
