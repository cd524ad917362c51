"""Pruning with calibration inputs: no labels, no gradients, and the accuracy kept as far as that goes.

The budget is shared out by what each group costs at the output, the channels are chosen by what their readers lose, and
the readers are refitted (:mod:`.reconstruct`). A twentieth of the inputs is held out; compensation that does not help
there is left out.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from prune_onnx.graph_ops.allocate import Curve, FractionalCost, Steps, allocate, options, uniform
from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.cost import CostModel
from prune_onnx.graph_ops.criteria import LABELS
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.errors import PlanError
from prune_onnx.graph_ops.exact import Edits
from prune_onnx.graph_ops.importance import CRITERIA, importance
from prune_onnx.graph_ops.latency_model import LatencyModel
from prune_onnx.graph_ops.masked import masked_reference
from prune_onnx.graph_ops.plan import Budget, Planner
from prune_onnx.graph_ops.progress import Progress

from .calibration import Calibration, first, size_of, within
from .compensate import correct_means, match_statistics
from .divergence import divergence, outputs
from .latency import LatencySearch, Plans, measured_steps
from .masking import MaskedLoss
from .probing import Feeds, batch_of
from .reconstruct import Reconstruction
from .slim_schema import SlimConfig
from .survey import Statistics, Survey
from .taps import Taps

OBS = "obs"
LEAST_SQUARES = "least-squares"
CORRECTIONS = {"bias": correct_means, "bn": match_statistics}
BEYOND = 0.8
"""How much smaller than the budget a keep-set is made by a criterion that removes: alignment moves the counts."""
HELD_OUT = 0.05
TRIED, FEWEST, EFFORT = 256, 64, 1e12
"""Inputs that trial networks are fitted to, at most and at least, and the multiply-accumulates that this may take."""
USED = 0.98
"""Part of a budget in latency that is used even where using less would do less damage."""
PRICES = (3.0, 1.0, 10.0)
"""Factors on the damage of parts that several layers read; the first one where trials would take too long."""


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


def prune(
    config: SlimConfig,
    analysis: Analysis,
    data: Calibration,
    fraction: float,
    progress: Progress,
    search: LatencySearch | None = None,
) -> Calibrated:
    """Choose the units that stay and make up for the others.

    Args:
        config: budget, criterion and options.
        analysis: of a graph whose BatchNorms are folded and whose dead channels are gone.
        data: calibration inputs.
        fraction: of this graph's cost that may stay; a budget in latency goes by ``search`` instead.
        progress: told how far it is.
        search: for a budget in latency.

    Raises:
        ConfigError: the criterion needs labels, and there are none.
        PlanError: the budget cannot be reached.
    """
    fit, check = held_out(data.chunks, whole=batch_of(analysis.graph) > 0)
    criterion = config.criterion or OBS
    compensate = config.compensate or LEAST_SQUARES
    if fraction >= 1 and search is None:  # what was dead is all that had to go
        return Calibrated(np.ones(analysis.units, bool), Edits(), criterion)
    latency = None
    if search is not None:
        latency = search.prepare(analysis)
    elif config.align == "auto" and config.cost_cache is not None:
        latency = measured_steps(config, analysis, progress)
    if criterion == OBS:
        found = Survey(analysis, fit, seed=config.seed, progress=progress).statistics()
        work = Reconstruction(analysis, fit, seed=config.seed, progress=progress)
        if compensate == LEAST_SQUARES:
            share = fraction if search is None else search.predicted()
            with suppress(PlanError):  # what cannot be reached is said when it is planned
                _settle(config, work, found, share, latency, check)
        counts = _planned(config, work, found, fraction, latency, search)
        if compensate != LEAST_SQUARES:
            work.keep = _kept(work, found, counts)
        else:
            work.run(counts, found.paths)
    else:
        keep = _ranked(config, analysis, data.only(fit), fraction, latency, search, progress)
        work = Reconstruction(analysis, fit, keep=keep, seed=config.seed, progress=progress)
        if compensate == LEAST_SQUARES:
            work.run({}, {})
    edits = Edits(operands=dict(work.weights))
    if compensate in CORRECTIONS and not work.keep.all():
        some = within(fit, analysis.graph, analysis.probe, progress)
        edits = CORRECTIONS[compensate](analysis, work.keep, some, progress)
    result = Calibrated(work.keep, edits, criterion)
    if compensate == LEAST_SQUARES:
        _warn_of_few(work, len(data), progress)
    if edits.operands or edits.shifts:
        _guard(result, analysis, check)
    return result


def held_out(chunks: list[Feeds], *, whole: bool) -> tuple[list[Feeds], list[Feeds]]:
    """Split inputs into those that are fitted and the last twentieth, which is held out.

    Args:
        chunks: batches.
        whole: whether a batch may not be split; one batch alone then serves for both.
    """
    left = max(1, round(HELD_OUT * sum(size_of(chunk) for chunk in chunks)))
    fit, check = list(chunks), []
    while left > 0 and fit:
        last = fit.pop()
        size = size_of(last)
        if size > left and not whole:
            fit.append({name: value[:-left] for name, value in last.items()})
            last = {name: value[-left:] for name, value in last.items()}
        check.insert(0, last)
        left -= size_of(last)
    return (fit, check) if fit else (chunks, chunks)


def _ranked(
    config: SlimConfig,
    analysis: Analysis,
    data: Calibration,
    fraction: float,
    latency: LatencyModel | None,
    search: LatencySearch | None,
    progress: Progress,
) -> np.ndarray:
    """Units that stay by a criterion that gives scores."""
    taps = Taps(analysis.graph, analysis.probe, data.chunks, progress=progress)
    loss = None
    if data.labels is not None and CRITERIA.get(config.criterion).needs == LABELS:
        loss = MaskedLoss(analysis, data.chunks, data.labels)
    cost = getattr(CostModel(analysis), _kind(config)) if search is None else None
    target = BEYOND * fraction * cost(np.ones(analysis.units, bool)) if cost else 0.0
    scores = importance(
        analysis, config.criterion, scope=config.scope, seed=config.seed, taps=taps, loss=loss,
        enough=(lambda keep: cost(keep) <= target) if cost else None, progress=progress,
    )  # fmt: skip
    everything = np.ones(analysis.units, bool)

    def planner(share: float) -> Planner:
        budget = Budget(f"keep_{_kind(config)}", share, config.scope, config.align, config.min_keep)
        return Planner(analysis, scores, everything, budget, latency)

    if search is None:
        return planner(fraction).solve()
    return search.find(Plans(lambda f: planner(f).solve(), planner(1.0).smallest, lambda keep: cut(analysis, keep)))


def _kind(config: SlimConfig) -> str:
    """The cost that the budget limits."""
    return config.budget[0].replace("latency_ms", "keep_latency").removeprefix("keep_")


def _warn_of_few(work: Reconstruction, samples: int, progress: Progress) -> None:
    """Say where least squares has fewer equations than unknowns."""
    shapes = work.analysis.probe.shapes
    short = {}
    for site in work.sites:
        if site.contraction is not None and not work.keep[site.contraction.labels].all():
            positions = int(np.prod(shapes[site.y][2:])) if site.layer.is_conv else 1
            if samples * positions < site.layer.width:
                short[site.node.name] = samples * positions, site.layer.width
    if short:
        name, (rows, columns) = max(short.items(), key=lambda item: item[1][1] / item[1][0])
        progress.warn(
            f"{len(short)} layers have fewer calibration values than inputs, such as {name!r} ({rows} for {columns}): "
            "what the data does not tell stays as it was trained. Raise --calibration-size."
        )


def _planned(
    config: SlimConfig,
    work: Reconstruction,
    found: Statistics,
    fraction: float,
    latency: LatencyModel | None,
    search: LatencySearch | None,
) -> dict[int, int]:
    """Kept counts of the parts that have a curve."""
    shares = _Shares(config, work, found, latency)
    if search is None:
        return shares.counts(fraction)
    made: dict[bytes, dict[int, int]] = {}

    def keep_of(counts: dict[int, int]) -> np.ndarray:
        keep = _kept(work, found, counts)
        made[keep.tobytes()] = counts
        return keep

    keep_of(shares.sizes)  # what a search without success returns
    plans = Plans(
        lambda share: keep_of(shares.counts(share)),
        lambda: keep_of(shares.smallest()),
        lambda keep: cut(work.analysis, keep),
    )
    return made[search.find(plans).tobytes()]


def _settle(
    config: SlimConfig,
    work: Reconstruction,
    found: Statistics,
    share: float,
    latency: LatencyModel | None,
    check: list[Feeds],
) -> None:
    """Settle how dear the parts are that several layers read, by trial networks.

    The curves are of single parts of the dense network. Losses in many parts are more than their sum, and most so where
    a stream of sums loses channels: its readers' losses compound. Networks pruned with several prices for them, fitted
    to a few inputs, tell on inputs that they have not seen.
    """
    shared = work.shared() & found.curves.keys()
    if not shared or config.scope == "layer":
        return

    def priced(price: float) -> dict[int, Curve]:
        return {n: curve.times(price) if n in shared else curve for n, curve in found.curves.items()}

    inputs = int(EFFORT / (2 * len(PRICES) * max(CostModel(work.analysis).total_macs, 1)))
    if inputs < FEWEST:
        found.curves = priced(PRICES[0])
        return
    few = first(work.chunks, min(inputs, TRIED))
    unseen = [*work.chunks[len(few) :][: 2 * len(few)], *check]
    dense = outputs(work.graph.model, unseen)
    trials: dict[tuple[int, ...], tuple[float, dict[int, Curve]]] = {}
    for curves in map(priced, PRICES):
        counts = _Shares(config, work, replace(found, curves=curves), latency).counts(share)
        if tuple(counts.values()) not in trials:
            trial = Reconstruction(work.analysis, few, seed=config.seed, progress=work.progress)
            trial.run(counts, found.paths)
            reference = masked_reference(work.analysis, trial.keep, Edits(operands=trial.weights))
            trials[tuple(counts.values())] = divergence(dense, outputs(reference, unseen)), curves
    found.curves = min(trials.values(), key=lambda t: t[0])[1]


def _kept(work: Reconstruction, found: Statistics, counts: dict[int, int]) -> np.ndarray:
    """Units that stay when the parts are cut to ``counts`` along their removal paths."""
    keep = np.ones(work.analysis.units, bool)
    for number, count in counts.items():
        units = work.parts[number].units
        keep[units[found.paths[number].order[: len(units) - count]]] = False
    return keep


class _Shares:
    """Shares a budget out over the parts that have a curve.

    Attributes:
        sizes: units of each part.
    """

    def __init__(
        self, config: SlimConfig, work: Reconstruction, found: Statistics, latency: LatencyModel | None
    ) -> None:
        self.scope, self.curves = config.scope, found.curves
        self.sizes = {number: len(work.parts[number].units) for number in found.curves}
        units = [part.units for part in work.parts]
        if latency is not None and config.align == "auto":
            stops = latency.stops(units)
            self._steps: dict[int, Steps] = {number: stops[number] for number in self.sizes}
        else:
            self._steps = {number: work.parts[number].step(config.align) for number in self.sizes}
        self._floors = {number: max(1, int(np.ceil(config.min_keep * n))) for number, n in self.sizes.items()}
        kind = _kind(config)
        model = latency.cost if latency is not None else CostModel(work.analysis)
        self._cost = FractionalCost(work.analysis, kind, model, units)
        self._full = model.full(kind)
        self._use = USED if kind == "latency" else 0.0

    def counts(self, fraction: float) -> dict[int, int]:
        """Counts that cost at most this fraction.

        Raises:
            PlanError: the floors alone cost more.
        """
        target = fraction * self._full
        if self.scope == "layer":
            return uniform(self.sizes, self._cost, target, self._steps, self._floors)
        return allocate(self.curves, self._cost, target, self._steps, self._floors, self._use)

    def smallest(self) -> dict[int, int]:
        """The least counts."""
        return {n: int(options(size, self._steps[n], self._floors[n])[-1]) for n, size in self.sizes.items()}


def _guard(result: Calibrated, analysis: Analysis, check: list[Feeds]) -> None:
    """Leave the compensation out when held-out outputs are closer to the dense network's without it."""
    dense = outputs(analysis.graph.model, check)
    without = divergence(dense, outputs(masked_reference(analysis, result.keep), check))
    compensated = divergence(dense, outputs(masked_reference(analysis, result.keep, result.edits), check))
    result.notes.append(
        f"output divergence on held-out inputs: {without:.4g} without compensation, {compensated:.4g} with it"
    )
    if compensated > without:
        result.edits = Edits()
        result.notes.append("compensation did not help there and was left out")
