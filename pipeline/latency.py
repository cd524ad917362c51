"""Budgets in measured latency: plan with measured times of layers, cut, measure the result, correct, again.

Predicted times say which channels are worth removing; what a model takes in the end, only the model itself tells. So
every plan is cut (its weights do not matter yet) and timed beside the original, in turns in one process, and the next
plan asks for as much less or more as the last one was off. A result that is not faster than the original is never
chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx

from prune_onnx.graph_ops import model_io
from prune_onnx.graph_ops.analysis import Analysis
from prune_onnx.graph_ops.errors import ConfigError, PlanError
from prune_onnx.graph_ops.graph import Graph
from prune_onnx.graph_ops.latency_model import LatencyModel, places, traffic_layer
from prune_onnx.graph_ops.progress import Progress

from .bench import measure
from .execution import Execution
from .latency_tables import ProviderTimer, TableStore, Timer, tables
from .probing import Feeds
from .slim_schema import Latency, SlimConfig

# A result may be off the latency that was asked for by this much; plans are corrected until they are closer than CLOSE.
TOLERANCE = 0.05
CLOSE = 0.025
# So many plans are timed at most; plans that repeat are not timed again.
ROUNDS = 8
PLANS = 24
# Every model is timed for this long, and between these numbers of times (and rounds).
SECONDS = 0.8
RUNS = (6, 20)
# Of the finished model, what is this much slower than the original is not noise.
SLOWER = 1.02


class Stopwatch(Protocol):
    """Times two models."""

    def pair(self, original: onnx.ModelProto, model: onnx.ModelProto, feeds: Feeds) -> tuple[float, float]:
        """Return both models' latencies in ms, measured in turns."""


class ProviderStopwatch:
    """Times models in ONNX Runtime: see :mod:`.bench`.

    Args:
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: of the CPU provider; ``None`` is ONNX Runtime's choice.
    """

    def __init__(self, provider: str, threads: int | None) -> None:
        self.provider, self.threads = provider, threads

    def pair(self, original: onnx.ModelProto, model: onnx.ModelProto, feeds: Feeds) -> tuple[float, float]:
        """Return both models' latencies in ms, measured in turns."""
        before, after = self.together([original, model], feeds)
        return before, after

    def together(self, models: Sequence[onnx.ModelProto], feeds: Feeds) -> list[float]:
        """Return the latencies in ms of models measured in turns: the first one's median, times what the rounds say.

        What a round says of a model is the ratio of its median to the first model's; the median over the rounds counts.

        Raises:
            ConfigError: a model is too large to be handed over in memory.
        """

        execution = Execution(provider=self.provider, threads=self.threads)

        def maker(source: bytes) -> Callable[[], Callable[[], float]]:
            return lambda: execution.runner(source, feeds)

        if max(map(model_io.total_bytes, models)) >= model_io.PROTOBUF_LIMIT:
            raise ConfigError("budgets in latency are for models below 2 GB; give --keep-macs instead.")
        makers = [maker(model_io.to_bytes(model)) for model in models]
        first = makers[0]()
        took = min(first() for _ in range(2))
        runs = int(np.clip(SECONDS / took, *RUNS))
        found = measure(makers, min_time=SECONDS, min_runs=runs)
        medians = np.asarray([[np.median(samples) for samples in series.rounds] for series in found])
        return (np.median(medians[0]) * np.median(medians / medians[0], axis=1)).tolist()


@dataclass(frozen=True)
class Plans:
    """How cuts of one analysis are planned and made.

    Attributes:
        choose: units that stay, when the predicted latency may be this fraction of the analysed model's; raises
            PlanError when no plan is that small.
        smallest: units of the smallest model that can be planned.
        make: the cut model of the units that stay.
    """

    choose: Callable[[float], np.ndarray]
    smallest: Callable[[], np.ndarray]
    make: Callable[[np.ndarray], onnx.ModelProto]


@dataclass(frozen=True)
class _Trial:
    """A plan that was timed; ``off`` is its latency over the one asked for."""

    keep: np.ndarray
    original_ms: float
    ms: float
    asked_ms: float

    @property
    def off(self) -> float:
        return self.ms / self.asked_ms

    @property
    def faster(self) -> bool:
        return self.ms < self.original_ms


class LatencySearch:
    """Finds the plan whose measured latency is what was asked for.

    Args:
        config: the budget, and what is measured.
        original: the model that results are compared with.
        feeds: inputs of one run of the probe.
        progress: told of every step.
        timer: of layers; ``None`` is ONNX Runtime on the provider.
        stopwatch: of models; likewise.
    """

    def __init__(
        self,
        config: SlimConfig,
        original: onnx.ModelProto,
        feeds: Feeds,
        progress: Progress,
        timer: Timer | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.config, self.original, self.progress = config, original, progress
        self.timer = timer or ProviderTimer(config.provider, config.threads)
        self.stopwatch = stopwatch or ProviderStopwatch(config.provider, config.threads)
        self.feeds = batched(Graph(original), feeds, config.batch_size)
        sizes = [len(v) / max(len(feeds[name]), 1) for name, v in self.feeds.items() if v.ndim]
        self.batch = round(max(sizes, default=1))
        self.model: LatencyModel | None = None
        self._original_ms = self._full_ms = 1.0
        self._share, self._rounds = 1.0, 0  # predicted, of the original
        self.found: Latency | None = None
        self.notes: list[str] = []

    def prepare(self, analysis: Analysis) -> LatencyModel:
        """Measure the layers of a graph, as far as they are not known, and the graph itself."""
        layers = [traffic_layer(self.batch), *(p.layer for p in places(analysis, self.batch)[0])]
        known = tables(layers, store_of(self.config), self.timer, self.progress)
        self.progress.note("timing the model")
        self._original_ms, self._full_ms = self.stopwatch.pair(self.original, analysis.graph.model, self.feeds)
        self.model = LatencyModel(analysis, known, self.batch, self._full_ms / 1e3)
        return self.model

    def predicted(self) -> float:
        """Return the latency that is asked for, as a fraction of the analysed model's."""
        name, value = self.config.budget
        assert value is not None
        return min(1.0, (value * self._original_ms if name == "keep_latency" else value) / self._full_ms)

    def find(self, plans: Plans) -> np.ndarray:
        """Return the units that stay.

        Raises:
            PlanError: the smallest plan is slower than what was asked for; the message has its latency.
        """
        assert self.model is not None, "prepare() comes first"
        units = self.model.analysis.units
        name, value = self.config.budget
        assert value is not None
        target = (value * self._original_ms if name == "keep_latency" else value) / self._full_ms
        low, high = 0.0, np.inf  # targets that were too fast and too slow
        trials: dict[bytes, _Trial] = {}
        with self.progress.task("fitting the latency", ROUNDS) as advance:
            for _ in range(PLANS):
                lowest = False
                try:
                    keep = plans.choose(min(target, 1.0))
                except PlanError:
                    keep, lowest = plans.smallest(), True
                trial = trials.get(keep.tobytes())
                if trial is None:
                    if len(trials) == ROUNDS:
                        break
                    trial = trials[keep.tobytes()] = self._trial(plans, keep)
                    self.progress.note(f"{trial.ms:.4g} ms, asked for {trial.asked_ms:.4g} ms")
                    advance(1)
                if abs(trial.off - 1) <= CLOSE and trial.faster:
                    break
                if trial.off > 1 and lowest:
                    if all(t.off > 1 + TOLERANCE for t in trials.values()):
                        raise PlanError(self._unreachable(trial))
                    break
                if trial.off > 1:
                    high = min(high, target)
                else:
                    low = max(low, target)
                    if target >= 1:
                        break
                following = target / trial.off
                if not low < following < high:
                    following = np.sqrt(low * high) if low and high < np.inf else min(1.0, target / trial.off)
                if abs(following / target - 1) < 1e-3:
                    break
                target = float(following)
        best = _best([t for t in trials.values() if t.faster])
        if best is None and all(t.off > 1 + TOLERANCE for t in trials.values()):
            best = self._trial(plans, plans.smallest())  # the corrections never got there
            if best.off > 1 + TOLERANCE:
                raise PlanError(self._unreachable(best))
        if best is None:
            self.notes.append("no smaller model that was tried is faster than the original, so its structure is kept")
            best_keep = np.ones(units, bool)
        else:
            best_keep = best.keep
            if abs(best.off - 1) > TOLERANCE and best.asked_ms < best.original_ms:
                self.notes.append(
                    f"the widths that can be had are coarse here: {best.ms:.4g} ms is the closest to the "
                    f"{best.asked_ms:.4g} ms asked for"
                )
        self._rounds = len(trials)
        cost = self.model.cost.latency
        self._share = cost(best_keep) / cost(np.ones(units, bool)) * self._full_ms / self._original_ms
        return best_keep

    def confirm(self, result: onnx.ModelProto) -> Latency:
        """Time the finished model.

        Raises:
            PlanError: it is slower than the original.
        """
        trial = self._timed(result, np.zeros(0, bool))
        if abs(trial.off - 1) > TOLERANCE:  # a disturbance of the machine, perhaps
            trials = [trial, *(self._timed(result, np.zeros(0, bool)) for _ in range(2))]
            trial = sorted(trials, key=lambda t: t.off)[1]
        if trial.ms > SLOWER * trial.original_ms:
            raise PlanError(
                f"the result takes {trial.ms:.4g} ms and the original {trial.original_ms:.4g} ms: nothing is gained "
                f"at {self._asked()}. Ask for less latency, or give --align 8."
            )
        self.found = Latency(
            provider=self.config.provider,
            threads=self.config.threads,
            batch_size=self.batch,
            original_ms=trial.original_ms,
            asked_ms=trial.asked_ms,
            predicted_ms=self._share * trial.original_ms,
            measured_ms=trial.ms,
            rounds=self._rounds,
        )
        return self.found

    def _trial(self, plans: Plans, keep: np.ndarray) -> _Trial:
        return self._timed(plans.make(keep), keep)

    def _timed(self, model: onnx.ModelProto, keep: np.ndarray) -> _Trial:
        before, after = self.stopwatch.pair(self.original, model, self.feeds)
        name, value = self.config.budget
        assert value is not None
        return _Trial(keep, before, after, value * before if name == "keep_latency" else value)

    def _asked(self) -> str:
        name, value = self.config.budget
        return f"--{name.replace('_', '-')} {value:g}"

    def _unreachable(self, trial: _Trial) -> str:
        return (
            f"{self._asked()} cannot be reached: the smallest model that --min-keep {self.config.min_keep:g} and the "
            f"pinned channels allow takes {trial.ms:.4g} ms, {trial.ms / trial.original_ms:.3g} of the original's "
            f"{trial.original_ms:.4g} ms."
        )


def measured_steps(
    config: SlimConfig, analysis: Analysis, progress: Progress, timer: Timer | None = None
) -> LatencyModel:
    """Return the steps of a graph's widths on a provider, for budgets of another kind."""
    found = places(analysis, config.batch_size)[0]
    layers = [traffic_layer(config.batch_size), *(p.layer for p in found)]
    timer = timer or ProviderTimer(config.provider, config.threads)
    known = tables(layers, store_of(config), timer, progress)
    return LatencyModel(analysis, known, config.batch_size, sum(known[p.layer.key].full for p in found))


def store_of(config: SlimConfig) -> TableStore:
    """Where the times of layers are kept."""
    return TableStore(config.provider, config.threads, config.cost_cache)


def batched(graph: Graph, feeds: Feeds, batch: int) -> Feeds:
    """Return inputs of ``batch`` samples.

    Raises:
        ConfigError: the model has another fixed batch size.
    """
    result = {}
    for value in graph.inputs:
        array = feeds[value.name]
        dims = value.type.tensor_type.shape.dim
        fixed = dims[0].dim_value if len(dims) and dims[0].HasField("dim_value") else 0
        if fixed and batch not in (1, fixed):
            raise ConfigError(f"--batch-size {batch}: the model's input {value.name!r} holds {fixed} samples, always.")
        result[value.name] = array if fixed or not array.ndim else np.repeat(array, batch, 0)
    return result


def _best(trials: Sequence[_Trial]) -> _Trial | None:
    """The trial closest to what was asked for; among those that are not within the tolerance, the slowest fast one."""
    close = [t for t in trials if abs(t.off - 1) <= TOLERANCE]
    if close:
        return min(close, key=lambda t: abs(t.off - 1))
    return max((t for t in trials if t.off <= 1), key=lambda t: t.off, default=None)
