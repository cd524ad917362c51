"""A machine whose layers take times that are known: blocks of channels, and a slow path for odd widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from prune_onnx.graph_ops.analysis import Analysis, analyse
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.latency_model import Layer, Point, places, traffic_layer
from prune_onnx.pipeline.probing import Feeds, probe


def step_time(layer: Layer, point: Point, block: int = 16, odd: float = 1.5) -> float:
    """Seconds of a layer: a start, and its blocks of input times its blocks of output channels."""
    inputs, outputs = point
    if layer.op == "Add":
        return 1e-6
    group = layer.groups(outputs)
    if layer.group > 1 and "groups" in layer.cuts:
        work, widths = -(-outputs // block), (outputs,)
    else:
        work = -(-inputs // group // block) * -(-outputs // group // block) * group
        widths = (inputs // group, outputs // group)
    cut = [w for w, whole in zip(widths, (layer.inputs, layer.outputs), strict=False) if w * group < whole]
    slow = odd if any(w % 4 for w in cut) else 1.0
    area = float(np.prod([*layer.spatial, *layer.kernel])) if layer.spatial else 1.0
    return (1e-6 + 1e-7 * area * layer.batch * work) * slow


@dataclass
class StepTimer:
    """Knows the layers' times, and counts how often it was asked."""

    block: int = 16
    noise: float = 0.0
    calls: list[str] = field(default_factory=list)

    def times(self, layer: Layer, points: Sequence[Point]) -> list[float]:
        rng = np.random.default_rng(len(self.calls))
        self.calls.append(layer.key)
        exact = np.asarray([step_time(layer, point, self.block) for point in points])
        return (exact * np.exp(self.noise * rng.standard_normal(len(points)))).tolist()


def total_time(analysis: Analysis, block: int = 16) -> float:
    """Seconds of all layers of a model as it is."""
    return sum(step_time(p.layer, p.layer.whole, block) for p in places(analysis)[0])


@dataclass
class StepStopwatch:
    """Models take the sum of their layers' times, and what ``bends`` it away from the prediction.

    Attributes:
        start: ms that every run takes.
        power: of the layers' share of the original's.
        slower: factor of every model that is not the original.
    """

    start: float = 0.0
    power: float = 1.0
    slower: float = 1.0
    pairs: int = 0

    def pair(self, original: onnx.ModelProto, model: onnx.ModelProto, feeds: Feeds) -> tuple[float, float]:
        self.pairs += 1
        before, after = (1e3 * total_time(_analysis(m)) for m in (original, model))
        same = before == after
        bent = before * (after / before) ** self.power * (1.0 if same else self.slower)
        return before + self.start, bent + self.start


def _analysis(model: onnx.ModelProto) -> Analysis:
    graph = Graph(model)
    return analyse(graph, probe(graph)[0])


__all__ = ["StepStopwatch", "StepTimer", "step_time", "total_time", "traffic_layer"]
