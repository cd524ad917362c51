"""The other tools of the coverage benchmark, each run as its documentation shows it.

Torch-Pruning 1.6 prunes the torch module that the ONNX file was exported from, onnxsim 0.8 the file itself. Both remove
half of every group's channels by L2 norm. What they make is exported, run, and counted like our own results.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnx
import zoo

from prune_onnx.graph_ops import cost
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.pipeline.probing import probe
from prune_onnx.pipeline.sessions import create_session, run_session

CLASSES = 1000


class StageError(Exception):
    """A tool failed; the message says at which step and how."""

    def __init__(self, step: str, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        super().__init__(f"{step}: {type(error).__name__}: {lines[0] if lines else ''}"[:200])


def count(model: onnx.ModelProto) -> tuple[int, int]:
    """Return MACs and parameters of a model by this project's own count; it must run in ONNX Runtime."""
    graph = Graph(model)
    found, feeds, _ = probe(graph)
    run_session(create_session(model, "cpu"), feeds)
    return cost.macs(graph, found.shapes), cost.params(graph)


def torch_pruning(name: str, file: Path) -> dict[str, Any]:
    """Prune an architecture with Torch-Pruning.

    ``BasePruner`` with L2 group magnitude and local pruning of 50 %; only the 1000-way outputs are ignored. Head counts
    are given for fused ``qkv`` layers and for ``nn.MultiheadAttention``. The library's default group dictionaries are
    shared between calls, so fresh ones are passed. Nothing is repaired by hand for single models.
    """
    zoo.declare_torchvision_operators()
    import torch
    import torch_pruning as tp

    module = zoo.build(name)
    side = zoo.image_size(name, module)
    image = torch.randn(1, 3, side, side)
    ignored = [m for m in module.modules() if CLASSES in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    heads = {}
    for m in module.modules():
        if isinstance(m, torch.nn.MultiheadAttention):
            heads[m] = m.num_heads
        elif isinstance(getattr(m, "qkv", None), torch.nn.Linear) and isinstance(getattr(m, "num_heads", None), int):
            heads[m.qkv] = m.num_heads
    started = time.perf_counter()
    try:
        pruner = tp.pruner.BasePruner(
            module, image, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
            ignored_layers=ignored, in_channel_groups={}, out_channel_groups={}, num_heads=heads)
    except Exception as error:
        raise StageError("building the graph", error) from error
    built = time.perf_counter()
    try:
        pruner.step()
    except Exception as error:
        raise StageError("pruning", error) from error
    pruned = time.perf_counter()
    try:
        with torch.no_grad():
            module(image)
    except Exception as error:
        raise StageError("running the result", error) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        _export(torch, module, image, path)
        macs, params = count(onnx.load(path))
    before = count(onnx.load(file))
    return {"macs": macs / before[0], "params": params / before[1], "seconds": pruned - started,
            "graph_seconds": built - started, "prune_seconds": pruned - built}


def _export(torch: Any, module: Any, image: Any, path: Path) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (image,), str(path), dynamo=False, opset_version=17)
    except Exception as error:
        raise StageError("exporting the result", error) from error


def onnxsim(name: str, file: Path) -> dict[str, Any]:
    """Prune a file with onnxsim: ``simplify``, then ``apply_structured_pruning`` at sparsity 0.5 by L2 norm."""
    import onnxsim as package

    model = onnx.load(file)
    started = time.perf_counter()
    try:
        simple = package.simplify(model)
    except Exception as error:
        raise StageError("simplifying", error) from error
    simple = simple[0] if isinstance(simple, tuple) else simple
    simplified = time.perf_counter()
    try:
        result = package.apply_structured_pruning(simple, sparsity=0.5, importance_norm="l2")
    except Exception as error:
        raise StageError("pruning", error) from error
    pruned = time.perf_counter()
    before = count(onnx.load(file))
    try:
        macs, params = count(result)
    except Exception as error:
        raise StageError("running the result", error) from error
    return {"macs": macs / before[0], "params": params / before[1], "seconds": pruned - started,
            "simplify_seconds": simplified - started, "prune_seconds": pruned - simplified}


TOOLS = {"torch-pruning": torch_pruning, "onnxsim": onnxsim}
