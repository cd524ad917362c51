"""The ``slim`` stage: an ONNX file in, a smaller ONNX file and a report out.

load -> probe -> analyse -> find constants -> plan -> carry constants -> cut -> verify -> write
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass

import numpy as np
import onnx

from prune_onnx.graph_ops import cost, model_io, preprocessing
from prune_onnx.graph_ops import plan as planning
from prune_onnx.graph_ops.analysis import Analysis, analyse
from prune_onnx.graph_ops.branches import fold_constant_branches
from prune_onnx.graph_ops.constants import Constants
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.errors import ModelError, OutputError, PlanError
from prune_onnx.graph_ops.exact import Edits, carry, removable
from prune_onnx.graph_ops.files import check_output, write_text
from prune_onnx.graph_ops.fold import fold_batch_norm
from prune_onnx.graph_ops.graph import Graph, unmap
from prune_onnx.graph_ops.importance import CRITERIA, check_needs, importance
from prune_onnx.graph_ops.latency_model import LatencyModel
from prune_onnx.graph_ops.masked import masked_reference
from prune_onnx.graph_ops.memory import keep_small
from prune_onnx.graph_ops.probe import Probe
from prune_onnx.graph_ops.progress import SILENT, Progress
from prune_onnx.graph_ops.unshare import own_operands

from . import posttraining
from .calibration import Calibration, open_calibration
from .environment import capture
from .formats import counted
from .latency import LatencySearch, Plans, measured_steps
from .precision import convert
from .probing import Feeds, probe, random_feeds, shapes_at
from .slim_schema import LATENCY, Cost, Group, Removed, SlimConfig, SlimResult, Verification
from .verify import verify

DEFAULT_CRITERION = "l2"


@dataclass(frozen=True)
class _Decision:
    """Which units stay, why, and what becomes of the constants of those that go.

    ``planned`` is false where the calibration data has yet to decide.
    """

    keep: np.ndarray
    edits: Edits
    exact: bool
    criterion: str | None
    planned: bool = True


class _Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the time since the last lap."""
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 4)
        self._last = now


@np.errstate(all="ignore")  # weights may be infinite or not a number; the verification looks at what comes of it
def slim(config: SlimConfig, progress: Progress = SILENT) -> SlimResult:
    """Remove channels from an ONNX file.

    Args:
        config: what to remove and where to write.
        progress: told what is being done.

    Returns:
        The report; the files are written by then.

    Raises:
        ConfigError: an option that does not fit the model.
        ModelError: the file cannot be read, is invalid or does not run.
        PlanError: the budget cannot be reached, or the plan is another model's.
        VerificationError: the result differs from its reference; nothing is written.
        OutputError: an output exists or cannot be written.
    """
    try:
        return _slim(config, progress)
    except MemoryError as error:
        raise ModelError(f"{config.input} needs more memory than there is.") from error


def _slim(config: SlimConfig, progress: Progress) -> SlimResult:
    clock = _Clock()
    keep_small()
    _check_paths(config)
    if config.criterion is not None:
        check_needs(CRITERIA.get(config.criterion), calibration=config.calibration is not None, labels=True)
    original = model_io.load(config.input)
    graph = Graph(original)
    clock.lap("load")
    progress.note(f"{config.input}: {len(graph.nodes)} nodes, opset {graph.opset}")
    found, feeds, other_feeds = probe(graph, config.input_shape, config.seed)
    before = Cost(
        params=cost.params(graph), macs=cost.macs(graph, found.shapes), bytes=model_io.bytes_on_disk(config.input)
    )
    every = [feeds, random_feeds(graph, {name: value.shape for name, value in feeds.items()}, config.seed + 1)]
    every += [other_feeds] if other_feeds is not None else []
    data = open_calibration(config, original, graph, found, progress) if config.calibration is not None else None
    if config.criterion is not None and data is not None:
        check_needs(CRITERIA.get(config.criterion), calibration=True, labels=data.labels is not None)
    unmap()
    clock.lap("probe")
    analysis, known, simpler = _understand(config, graph, found)
    clock.lap("analyse")
    notes: list[str] = []
    search = LatencySearch(config, original, feeds, progress) if config.budget[0] in LATENCY else None
    decision = _decide(config, analysis, known, search, progress)
    del known
    unmap()
    clock.lap("plan")
    whole = analysis
    if data is not None and not decision.planned:
        analysis, decision = _calibrated(config, original, analysis, decision, data, every, notes, progress, search)
        clock.lap("calibrate")
    computed = cost.CostModel(analysis).computed() if config.keep_params is not None else ()
    result = cut(analysis, decision.keep, decision.edits, computed=computed)
    if config.fold_bn:
        result, folded = fold_batch_norm(result)
        if folded:
            notes.append(f"folded {folded} BatchNormalization nodes")
    _stamp(result, config)
    if data is not None and data.recipe is not None and preprocessing.read(original) is None:
        preprocessing.write(result, data.recipe)
    unmap()
    clock.lap("cut")
    model_io.check(result, original)
    if simpler is not None:
        notes.append("replaced branches that are constant")
        verify(original, simpler, every, "original")
    verification = _verify(original, analysis, decision, result, every)
    smaller = Graph(result)
    after = Cost(
        params=cost.params(smaller),
        macs=cost.macs(smaller, shapes_at(smaller, feeds)),
        bytes=model_io.total_bytes(result),
    )
    clock.lap("verify")
    if search is not None:
        search.confirm(result)
        notes += search.notes
        clock.lap("time")
    precision = None
    if config.fp16 or config.int8:
        kind = "float16" if config.fp16 else "int8"
        result, precision = convert(result, kind, data.chunks if data is not None else every, progress)
        after.bytes = model_io.total_bytes(result)
        clock.lap("convert")
    external = bool(model_io.data_files(config.input))
    if not config.dry_run and config.output is not None:
        model_io.save(result, config.output, external=external)
        after.bytes = model_io.bytes_on_disk(config.output)
    elif config.plan is not None:
        write_text(config.plan, planning.to_json(analysis, decision.keep, _plan_facts(config, decision)) + "\n")
    clock.lap("write")
    report = _report(config, whole, analysis, decision, before, after, verification, notes, clock)
    report.precision = precision
    report.latency = search.found if search is not None else None
    if config.report is not None:
        report.write(config.report)
    return report


def _understand(config: SlimConfig, graph: Graph, found: Probe) -> tuple[Analysis, Constants, onnx.ModelProto | None]:
    """Analyse the graph; where branches turn out to be constant, replace them and look again.

    Returns:
        The analysis, its constants, and the model without the constant branches (``None`` when there was none).
    """
    simpler = None
    while True:
        analysis = analyse(
            graph,
            found,
            release_norms=config.norms == "release",
            select_inputs=config.select_inputs,
            ignore=config.ignore,
        )
        known = Constants(analysis)
        folded = fold_constant_branches(analysis, known)
        if folded is None:
            return analysis, known, simpler
        simpler, graph = folded, Graph(folded)
        found = probe(graph, config.input_shape, config.seed)[0]


def _check_paths(config: SlimConfig) -> None:
    if config.output is not None and not config.dry_run:
        if config.output.resolve() == config.input.resolve():
            raise OutputError(f"{config.output} is the input; an input file is never changed. Give another output.")
        check_output(config.output, force=config.force)
    if config.plan is not None and config.dry_run:
        check_output(config.plan, force=config.force)
    if config.report is not None:
        check_output(config.report, force=config.force)


def _decide(
    config: SlimConfig, analysis: Analysis, known: Constants, search: LatencySearch | None, progress: Progress
) -> _Decision:
    """Choose the units that stay: a replayed plan, exact removal, or exact removal and then a budget."""
    base = ~removable(analysis, known)
    fraction = config.budget[1]
    if config.calibration is not None and fraction is not None:
        base = _filled_up(config, analysis, base)
        return _Decision(base, carry(analysis, known, base), True, None, planned=False)
    if config.plan is not None and not config.dry_run:
        try:
            text = config.plan.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan {config.plan} cannot be read: {error}.") from error
        keep = planning.from_json(analysis, text, str(config.plan))
        exact = not (base & ~keep).any()
        return _Decision(keep, carry(analysis, known, keep), exact, None)
    if fraction is None and config.align in ("auto", 1):
        return _Decision(base, carry(analysis, known, base), True, None)
    if fraction is None:
        base = _filled_up(config, analysis, base)
        return _Decision(base, carry(analysis, known, base), True, None)
    criterion = config.criterion or DEFAULT_CRITERION
    scores = importance(analysis, criterion, scope=config.scope, seed=config.seed)
    if search is not None:
        latency = search.prepare(analysis)
        plans = Plans(
            lambda share: _planner(config, analysis, scores, base, share, latency).solve(),
            lambda: _planner(config, analysis, scores, base, 1.0, latency).smallest(),
            lambda keep: cut(analysis, keep, carry(analysis, known, keep)),
        )
        keep = search.find(plans)
    else:
        steps = config.align == "auto" and config.cost_cache is not None
        latency = measured_steps(config, analysis, progress) if steps else None
        keep = _planner(config, analysis, scores, base, fraction, latency).solve()
    exact = not (base & ~keep).any()
    return _Decision(keep, carry(analysis, known, keep), exact, criterion)


def _filled_up(config: SlimConfig, analysis: Analysis, base: np.ndarray) -> np.ndarray:
    """Take dead channels back where they make a width a multiple of its step."""
    budget = planning.Budget("keep_channels", 1.0, align=config.align)
    return planning.Planner(analysis, np.zeros(analysis.units), base, budget).solve()


def _planner(
    config: SlimConfig,
    analysis: Analysis,
    scores: np.ndarray,
    base: np.ndarray,
    fraction: float,
    latency: LatencyModel | None,
) -> planning.Planner:
    name = config.budget[0].replace("latency_ms", "keep_latency")
    budget = planning.Budget(name, fraction, config.scope, config.align, config.min_keep)
    return planning.Planner(analysis, scores, base, budget, latency)


def _calibrated(
    config: SlimConfig,
    original: onnx.ModelProto,
    analysis: Analysis,
    exact: _Decision,
    data: Calibration,
    feeds: list[Feeds],
    notes: list[str],
    progress: Progress,
    search: LatencySearch | None,
) -> tuple[Analysis, _Decision]:
    """Take out what is dead, fold the BatchNorms, and prune the rest with calibration inputs.

    Returns:
        The analysis of the folded graph, and what was decided for it.
    """
    dense, folded = cut(analysis, exact.keep, exact.edits), 0
    if config.compensate != "bn":  # which estimates the statistics of the BatchNorms again
        dense, folded = fold_batch_norm(dense)
    graph = Graph(dense)
    found = probe(graph, config.input_shape, config.seed)[0]
    if config.compensate in (None, "least-squares"):
        graph = Graph(own_operands(dense, found.shapes))
        found = probe(graph, config.input_shape, config.seed)[0]
    verify(original, graph.model, feeds, "original")
    inner = analyse(graph, found, release_norms=config.norms == "release", ignore=config.ignore)
    name, fraction = config.budget
    assert fraction is not None
    if search is None:
        kind = name.removeprefix("keep_")
        costs = [cost.CostModel(a).full(kind) for a in (analysis, inner)]
        fraction *= costs[0] / costs[1]
    done = posttraining.prune(config, inner, data, fraction, progress, search)
    notes += [f"folded {folded} BatchNormalization nodes"] if folded else []
    notes += done.notes
    return inner, _Decision(done.keep, done.edits, False, done.criterion)


def _verify(
    original: onnx.ModelProto, analysis: Analysis, decision: _Decision, result: onnx.ModelProto, feeds: list[Feeds]
) -> Verification:
    """Exact removal is held against the original itself, a lossy cut against the masked original."""
    if decision.exact:
        return verify(original, result, feeds, "original")
    return verify(masked_reference(analysis, decision.keep, decision.edits), result, feeds, "masked")


def _stamp(result: onnx.ModelProto, config: SlimConfig) -> None:
    """Leave a line of provenance in the model: what was done, and to which file."""
    with config.input.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name, fraction = config.budget
    entry = {
        "from_sha256": digest,
        "budget": name,
        "fraction": fraction,
        "criterion": config.criterion,
        "seed": config.seed,
    }
    for prop in result.metadata_props:
        if prop.key == "prune_onnx.slim":
            prop.value = json.dumps([*_history(prop.value), entry])
            return
    result.metadata_props.add(key="prune_onnx.slim", value=json.dumps([entry]))


def _history(text: str) -> list[object]:
    """What earlier calls noted; nothing when somebody else wrote under that key."""
    try:
        noted = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return noted if isinstance(noted, list) else []


def _odd_widths(analysis: Analysis, keep: np.ndarray) -> list[str]:
    """Convolutions whose output was cut to a width that leaves the runtime's fast path, as ``name 64 -> 33``."""
    odd = []
    for producer in analysis.producers:
        before, after = len(producer.labels), int(keep[producer.labels].sum())
        if producer.node.op_type == "Conv" and after < before and after % 4 and not before % 4:
            odd.append(f"{producer.node.name} {before} to {after}")
    return odd


def _plan_facts(config: SlimConfig, decision: _Decision) -> dict[str, object]:
    return {
        "budget": config.budget[0],
        "fraction": config.budget[1],
        "criterion": decision.criterion,
        "norms": config.norms,
        "ignore": list(config.ignore),
    }


def _report(
    config: SlimConfig,
    whole: Analysis,
    analysis: Analysis,
    decision: _Decision,
    before: Cost,
    after: Cost,
    verification: Verification,
    notes: list[str],
    clock: _Clock,
) -> SlimResult:
    keep = decision.keep
    left = {g.name: int(keep[g.units].sum()) for g in analysis.groups}
    groups = [
        Group(
            name=g.name,
            nodes=list(g.nodes),
            channels=len(g.units),
            kept=left.get(g.name, 0),
            pinned_by=list(g.pinned_by),
        )
        for g in whole.groups
    ]
    channels = sum(len(p.labels) for p in whole.producers if p.weight is not None)
    channels -= sum(int(keep[p.labels].sum()) for p in analysis.producers if p.weight is not None)
    edits = decision.edits
    odd = _odd_widths(analysis, keep)
    if odd:
        notes.append(
            f"{counted(len(odd), 'convolution')} {'is' if len(odd) == 1 else 'are'} left with a width that is no "
            f"multiple of 4 ({', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}); ONNX Runtime may run them slower "
            "than wider ones. A budget, or --align 4, keeps widths aligned"
        )
    if not any(g.channels > g.kept for g in groups):
        notes.append("nothing was removed: no channel can go under these options")
    return SlimResult(
        seconds=round(sum(clock.laps.values()), 3),
        environment=capture(),
        input=str(config.input),
        output=None if config.dry_run else str(config.output),
        dry_run=config.dry_run,
        budget=config.budget[0] if config.plan is None or config.dry_run else "plan",
        criterion=decision.criterion,
        before=before,
        after=after,
        removed=Removed(channels=channels, groups=sum(g.channels > g.kept for g in groups)),
        constants={"dropped": edits.dropped, "absorbed": edits.absorbed, "merged": edits.merged},
        groups=groups,
        timings=clock.laps,
        verification=verification,
        notes=notes,
    )
