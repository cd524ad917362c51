"""The layers of a network that can be fitted anew, and where their outputs go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.graph import Node
from prune_onnx.graph_ops.patches import ChannelLayer, Layer
from prune_onnx.graph_ops.records import Contraction


@dataclass
class Site:
    """A layer that can be refitted, and how its output goes on.

    Attributes:
        layer: its matrix form.
        contraction: of its input; ``None`` when its input cannot be cut.
        labels: the unit of each input channel of one group, as the matrix form has them.
        x, y: input tensor, and the tensor that is fitted: the output, of a :class:`ChannelLayer` the input.
        other: the other operand of the addition that its output alone feeds, when that is known before.
        total: that addition's output.
        bounds: of the Relu or Clip that alone reads ``total`` (or ``y``): values outside are all the same to it.
    """

    node: Node
    layer: Layer
    contraction: Contraction | None
    labels: np.ndarray
    x: str
    y: str
    other: str | None = None
    total: str | None = None
    bounds: tuple[float, float] | None = None


def find_sites(analysis: Analysis, widest: int) -> list[Site]:
    """Return the layers that can be refitted, in order: those with a readable weight of their own.

    Args:
        analysis: of the graph.
        widest: layers of more columns (a Gemm after Flatten) are taken channel by channel, for the Gram matrix alone
            would take gigabytes; those that cannot be are left out.
    """
    graph = analysis.graph
    contractions = {c.node.index: c for c in analysis.contractions}
    sites = []
    for node in graph.nodes:
        if (
            node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul")
            or node.domain
            or node.outputs[0] not in graph.dynamic
        ):
            continue
        weight = analysis.value(node.inputs[1])
        bias = analysis.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
        plain = weight is not None and weight.dtype.kind == "f" and node.inputs[0] in graph.dynamic
        plain &= len(node.inputs) < 3 or not node.inputs[2] or bias is not None
        if node.op_type == "Gemm":
            plain &= not node.attribute("transA", 0) and node.attribute("alpha", 1.0) == 1.0 == node.attribute(
                "beta", 1.0
            )
        if node.op_type == "MatMul":
            plain &= weight is not None and weight.ndim == 2
        if plain and (site := _site(analysis, node, weight, bias, contractions.get(node.index), widest)) is not None:
            sites.append(site)
    return sites


def _site(
    analysis: Analysis,
    node: Node,
    weight: np.ndarray,
    bias: np.ndarray | None,
    contraction: Contraction | None,
    widest: int,
) -> Site | None:
    layer = Layer(node, weight, bias)
    every = layer.channels * layer.groups
    labels = np.full(every, -1) if contraction is None else contraction.labels
    x, y = node.inputs[0], node.outputs[0]
    if layer.width <= widest:
        site = Site(node, layer, contraction, labels[: layer.channels], x, y)
        _follow(analysis, site)
        return site
    runs = np.flatnonzero(np.diff(labels)) + 1
    repeats = int(np.gcd.reduce(np.append(runs, every))) if contraction is not None else 1
    if layer.groups > 1 or every // repeats >= widest or (layer.is_conv and repeats > 1):
        return None
    layer = ChannelLayer(node, weight, bias, repeats)
    return Site(node, layer, contraction, labels[::repeats], x, x)


def _follow(analysis: Analysis, site: Site) -> None:
    """Find the addition and the Relu or Clip that the layer's output goes into."""
    graph = analysis.graph
    readers = graph.readers.get(site.y, [])
    end = site.y
    if len(readers) == 1 and readers[0][0].op_type == "Add" and site.y not in graph.outputs:
        add = readers[0][0]
        other = add.inputs[1 - readers[0][1]]
        maker = graph.producer.get(other)
        known = other in graph.dynamic and (maker is None or maker.index < site.node.index)
        if known and analysis.probe.shapes[other] == analysis.probe.shapes[site.y]:
            site.other, site.total, end = other, add.outputs[0], add.outputs[0]
    after = graph.readers.get(end, [])
    if len(after) == 1 and after[0][1] == 0 and end not in graph.outputs:
        site.bounds = _bounds(analysis, after[0][0])


def _bounds(analysis: Analysis, node: Node) -> tuple[float, float] | None:
    """Between which values a node passes its input on, where that is all it does."""
    if node.domain or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, np.inf
    found = [node.attribute("min", -np.inf), node.attribute("max", np.inf)]
    for i, name in enumerate(node.inputs[1:3]):
        if name:
            value = analysis.value(name)
            if value is None:
                return None
            found[i] = value.item()
    return float(found[0]), float(found[1])
