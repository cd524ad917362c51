"""Time grows with the number of nodes, not with its square, and no depth is too deep."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.analysis import Analysis, analyse
from prune_onnx.graph_ops.branches import fold_constant_branches
from prune_onnx.graph_ops.constants import Constants
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.exact import carry, removable
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.importance import importance
from prune_onnx.graph_ops.plan import Budget, Planner
from prune_onnx.graph_ops.probe import Probe
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig

SIZES = {1_000: 3, 5_000: 3, 20_000: 1}
"""Number of nodes: how often it is timed."""
CHANNELS = 8
# Per node, a large graph may cost this much more than a small one; squared time would make it 4 and 20.
SLACK = 1.9


class Chain:
    """A long graph of residual blocks, written as nodes and initializers directly: building it must be cheap, too."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def node(self, op: str, *inputs: str) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name))
        return name

    def weight(self, *dims: int, positive: bool = False) -> str:
        name = f"w{len(self.initializers)}"
        array = self.rng.uniform(0.5, 1.5, dims) if positive else self.rng.standard_normal(dims) * dims[-1] ** -0.5
        self.initializers.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def conv(self, x: str, cin: int = CHANNELS) -> str:
        return self.node("Conv", x, self.weight(CHANNELS, cin, 1, 1), self.weight(CHANNELS))

    def bn(self, x: str) -> str:
        scale, variance = (self.weight(CHANNELS, positive=True) for _ in range(2))
        return self.node("BatchNormalization", x, scale, self.weight(CHANNELS), self.weight(CHANNELS), variance)

    def model(self, x: str) -> onnx.ModelProto:
        y = self.node("Gemm", self.node("Flatten", self.node("GlobalAveragePool", x)), self.weight(CHANNELS, 5))
        graph = helper.make_graph(
            self.nodes,
            "chain",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 2, 2])],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 5])],
            self.initializers,
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def residual(nodes: int) -> onnx.ModelProto:
    """Two convolutions a block."""
    net = Chain()
    x = net.conv("x", 3)
    while len(net.nodes) < nodes - 4:
        x = net.node("Relu", net.node("Add", net.conv(net.node("Relu", net.conv(x))), x))
    return net.model(x)


def preactivation(nodes: int) -> onnx.ModelProto:
    """Every block normalises a stream that all later ones read as well."""
    net = Chain()
    x = net.conv("x", 3)
    while len(net.nodes) < nodes - 4:
        y = net.conv(net.node("Relu", net.bn(x)))
        x = net.node("Add", net.conv(net.node("Relu", net.bn(y))), x)
    return net.model(net.node("Relu", net.bn(x)))


def plain(nodes: int) -> onnx.ModelProto:
    """As many groups as convolutions."""
    net = Chain()
    x = net.conv("x", 3)
    while len(net.nodes) < nodes - 4:
        x = net.node("Relu", net.conv(x))
    return net.model(x)


def probe_of(graph: Graph) -> Probe:
    """What a run would find, without one: shapes by inference, no channel constant."""
    rng = np.random.default_rng(0)
    inferred = onnx.shape_inference.infer_shapes(graph.model).graph
    shapes = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in [*inferred.input, *inferred.output, *inferred.value_info]
    }
    lines = {name: [rng.standard_normal(n) for n in shape] for name, shape in shapes.items()}
    shapes |= {t.name: tuple(t.dims) for t in graph.model.graph.initializer}
    return Probe(shapes, {}, lines)


def engine_seconds(path: Path, budget: Budget, *, select: bool) -> float:
    """CPU seconds from the file to the smaller file, without any run of the network."""
    started = time.process_time()
    graph = Graph(model_io.load(path))
    loaded = time.process_time() - started
    found = probe_of(graph)
    started = time.process_time()
    analysis = analyse(graph, found, select_inputs=select)
    known = Constants(analysis)
    assert fold_constant_branches(analysis, known) is None
    keep = planned(analysis, known, budget)
    result = cut(analysis, keep, carry(analysis, known, keep))
    model_io.save(result, path.with_suffix(".out"))
    return loaded + time.process_time() - started


def planned(analysis: Analysis, known: Constants, budget: Budget) -> np.ndarray:
    base = ~removable(analysis, known)
    assert base.all()
    keep = Planner(analysis, importance(analysis, "l2", scope=budget.scope), base, budget).solve()
    assert not keep.all()
    return keep


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "sizes", "budget", "select"),
    [
        (residual, (1_000, 5_000, 20_000), Budget("keep_channels", 0.5, "layer", 1, 0.0), False),
        (plain, (1_000, 5_000), Budget("keep_macs", 0.5, "global", "auto", 0.1), False),
        (preactivation, (1_000, 5_000), Budget("keep_params", 0.6, "global", 1, 0.1), True),
    ],
    ids=["residual", "plain", "preactivation"],
)
def test_time_is_linear_in_nodes(
    build: Callable[[int], onnx.ModelProto], sizes: tuple[int, ...], budget: Budget, select: bool, tmp_path: Path
) -> None:
    per_node = []
    for nodes in sizes:
        path = tmp_path / f"{nodes}.onnx"
        onnx.save(build(nodes), path)
        seconds = [engine_seconds(path, budget, select=select) for _ in range(SIZES[nodes])]
        per_node.append(statistics.median(seconds) / nodes)
    for small, large in itertools.pairwise(per_node):
        assert large < SLACK * small, per_node


def test_a_deep_graph_is_cut_and_verified(tmp_path: Path) -> None:
    """Deeper than Python's recursion limit."""
    path = tmp_path / "deep.onnx"
    onnx.save(residual(2_000), path)
    result = slim(SlimConfig(input=path, output=tmp_path / "out.onnx", keep_channels=0.5, scope="layer", align=1))
    assert result.verification is not None
    assert result.verification.max_rel_diff < 1e-5
    assert result.after.macs < 0.3 * result.before.macs
