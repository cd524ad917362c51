"""Shows activations of a network over the calibration inputs, a few inputs at a time, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from prune_onnx.graph_ops.errors import ModelError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.probe import Probe
from prune_onnx.graph_ops.progress import SILENT, Progress

from .probing import Feeds, batch_of
from .runner import RunError, Runner

LIMIT = 2**28
"""Bytes of activations that are held at a time."""


class Taps:
    """Runs a network and shows tensors of it; each call is one pass over the inputs."""

    def __init__(
        self,
        graph: Graph,
        probe: Probe,
        chunks: Sequence[Feeds],
        *,
        limit: int = LIMIT,
        progress: Progress = SILENT,
    ) -> None:
        """Prepare.

        Args:
            graph: the network.
            probe: its shapes at a batch of one, or at its fixed batch.
            chunks: calibration inputs, in batches that the graph takes.
            limit: bytes of activations that a run may give; a single input may give more.
            progress: told how many inputs have passed.
        """
        self.graph, self.probe, self.chunks = graph, probe, list(chunks)
        self.limit, self.progress = limit, progress

    def __call__(self, names: Sequence[str], images: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, value) of every tensor for every batch of inputs.

        Args:
            names: tensors that depend on the inputs.
            images: how many inputs are enough; ``None`` takes all.

        Raises:
            ModelError: the network does not run on the inputs.
        """
        runner = Runner(self.graph.model, expose=[n for n in names if n not in {i.name for i in self.graph.inputs}])
        parts = list(self._parts(self._bytes(names), images))
        with self.progress.task("activations", len(parts)) as advance:
            for feeds in parts:
                yield from ((name, feeds[name]) for name in names if name in feeds)
                for some in self._few([name for name in names if name not in feeds], len(next(iter(feeds.values())))):
                    try:
                        yield from zip(some, runner.run(some, feeds), strict=True)
                    except RunError as error:
                        raise ModelError(f"the model fails on the calibration data: {error}.") from error
                advance(1)

    def _bytes(self, names: Sequence[str]) -> int:
        return max(1, sum(self._size(name) for name in names))

    def _size(self, name: str) -> int:
        """Bytes of a tensor for one input."""
        shape = self.probe.shapes[name]
        lines = self.probe.lines.get(name)
        item = lines[0].dtype.itemsize if lines else 4
        return item * math.prod(shape) // max(1, batch_of(self.graph) or 1)

    def _parts(self, each: int, images: int | None) -> Iterator[Feeds]:
        """Yield batches of inputs that give no more than the limit, where the graph lets its batch be chosen."""
        seen = 0
        for chunk in self.chunks:
            size = len(next(iter(chunk.values())))
            step = size if batch_of(self.graph) else max(1, min(size, self.limit // each))
            for first in range(0, size, step):
                if images is not None and seen >= images:
                    return
                yield {name: value[first : first + step] for name, value in chunk.items()}
                seen += step

    def _few(self, names: Sequence[str], inputs: int) -> Iterator[list[str]]:
        """Yield parts of the tensors that fit into the limit together, one at least."""
        part: list[str] = []
        held = 0
        for name in names:
            size = inputs * self._size(name)
            if part and held + size > self.limit:
                yield part
                part, held = [], 0
            part.append(name)
            held += size
        if part:
            yield part
