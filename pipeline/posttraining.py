"""Pruning with calibration inputs: no labels, no gradients, and the accuracy kept as far as that goes.

The budget is shared out by what each group costs at the output, the channels are chosen by what their readers lose, and
the readers are refitted (:mod:`.reconstruct`). A tenth of the inputs is held out; compensation that does not help there
is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx

from prune_onnx.graph_ops.allocate import Curve, FractionalCost, allocate, uniform
from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.cost import CostModel
from prune_onnx.graph_ops.errors import ConfigError, DataError
from prune_onnx.graph_ops.exact import Edits
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.importance import importance
from prune_onnx.graph_ops.masked import masked_reference
from prune_onnx.graph_ops.plan import Budget, Planner, alignment_step
from prune_onnx.graph_ops.progress import Progress

from .data import open_samples, recipe_for
from .probing import Feeds
from .reconstruct import Reconstruction, divergence
from .runner import Runner
from .slim_schema import SlimConfig

OBS = "obs"
BATCH = 128
HELD_OUT = 0.1


@dataclass
class Calibrated:
    """What calibration decided.

    Attributes:
        keep: units that stay.
        edits: refitted weights of the layers that read them.
        criterion: how the units were chosen.
        notes: for the report.
    """

    keep: np.ndarray
    edits: Edits
    criterion: str
    notes: list[str] = field(default_factory=list)


def calibration_inputs(config: SlimConfig, model: onnx.ModelProto, graph: Graph, progress: Progress) -> list[Feeds]:
    """Open the calibration data and make network inputs of it, in batches.

    Raises:
        ConfigError: the model has several inputs.
        DataError: the data cannot be read or does not fit the model.
    """
    if len(graph.inputs) != 1:
        raise ConfigError(f"--calibration needs a model with one input; this one has {len(graph.inputs)}.")
    samples = open_samples(
        data=config.calibration, data_dir=config.data_dir, download=config.download, split="train",
        limit=config.calibration_size, seed=config.seed, progress=progress,
    )  # fmt: skip
    recipe = recipe_for(model, samples, config.mean, config.std)
    size = graph.inputs[0].type.tensor_type.shape.dim[0]
    fixed = size.dim_value if size.HasField("dim_value") else 0
    name = graph.inputs[0].name
    chunks = [{name: np.ascontiguousarray(x)} for x, _ in samples.batches(recipe, fixed or BATCH)]
    if fixed:
        chunks = [chunk for chunk in chunks if len(chunk[name]) == fixed]
    if not chunks:
        raise DataError(f"--calibration {config.calibration}: not one batch of {fixed} samples.")
    return chunks


def prune(
    config: SlimConfig, analysis: Analysis, chunks: list[Feeds], fraction: float, progress: Progress
) -> Calibrated:
    """Choose the units that stay and refit the layers that read them.

    Args:
        config: budget, criterion and options.
        analysis: of a graph whose BatchNorms are folded and whose dead channels are gone.
        chunks: calibration inputs.
        fraction: of this graph's cost that may stay.
        progress: told how far it is.

    Raises:
        PlanError: the budget cannot be reached.
    """
    held = max(1, round(HELD_OUT * len(chunks))) if len(chunks) > 1 else 0
    fit, check = (chunks[:-held], chunks[-held:]) if held else (chunks, chunks)
    criterion = config.criterion or OBS
    if fraction >= 1:  # what was dead is all that had to go
        return Calibrated(np.ones(analysis.units, bool), Edits(), criterion)
    if criterion == OBS:
        work = Reconstruction(analysis, fit, seed=config.seed, progress=progress)
        found = work.statistics()
        counts = _counts(config, analysis, found.curves, fraction)
        if config.compensate == "none":
            for g, count in counts.items():
                units = analysis.groups[g].units
                work.keep[units[found.paths[g].order[: len(units) - count]]] = False
        else:
            work.run(counts, found.paths)
    else:
        name = config.budget[0]
        scores = importance(analysis, criterion, scope=config.scope, seed=config.seed)
        budget = Budget(name, fraction, config.scope, config.align, config.min_keep)
        keep = Planner(analysis, scores, np.ones(analysis.units, bool), budget).solve()
        work = Reconstruction(analysis, fit, keep=keep, seed=config.seed, progress=progress)
        if config.compensate != "none":
            work.run({}, {})
    result = Calibrated(work.keep, Edits(operands=dict(work.weights)), criterion)
    if work.weights:
        _guard(result, analysis, check)
    return result


def _counts(config: SlimConfig, analysis: Analysis, curves: dict[int, Curve], fraction: float) -> dict[int, int]:
    name = config.budget[0]
    cost = FractionalCost(analysis, name.removeprefix("keep_"))
    sizes = {g: len(analysis.groups[g].units) for g in curves}
    steps = {g: alignment_step(n, config.align) for g, n in sizes.items()}
    floors = {g: max(1, int(np.ceil(config.min_keep * n))) for g, n in sizes.items()}
    full = getattr(CostModel(analysis), name.removeprefix("keep_"))(np.ones(analysis.units, bool))
    if config.scope == "layer":
        return uniform(sizes, cost, fraction * full, steps, floors)
    return allocate(curves, cost, fraction * full, steps, floors)


def _guard(result: Calibrated, analysis: Analysis, check: list[Feeds]) -> None:
    """Leave the compensation out when held-out outputs are closer to the dense network's without it."""
    dense = _outputs(analysis.graph.model, check)
    without = divergence(dense, _outputs(masked_reference(analysis, result.keep), check))
    compensated = divergence(dense, _outputs(masked_reference(analysis, result.keep, result.edits), check))
    result.notes.append(
        f"output divergence on held-out inputs: {without:.4g} without compensation, {compensated:.4g} with it"
    )
    if compensated > without:
        result.edits = Edits()
        result.notes.append("compensation did not help there and was left out")


def _outputs(model: onnx.ModelProto, chunks: list[Feeds]) -> np.ndarray:
    runner = Runner(model)
    runs = [runner.run(None, chunk) for chunk in chunks]
    return np.concatenate([np.concatenate([o.reshape(len(o), -1) for o in run], 1) for run in runs]).astype(np.float64)
