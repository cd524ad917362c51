"""What the ``eval`` stage gives."""

from __future__ import annotations

import re

from pydantic import Field

from .eval_schema import Layout, Search
from .gates import Verdict
from .results import Model, StageResult

EXIT_CODES: dict[Verdict, int] = {"passed": 0, "failed": 3, "inconclusive": 4}


class Latency(Model):
    """Latency of one run in ms.

    Attributes:
        cv: standard deviation divided by the mean.
        runs: how many were timed.
        p50_ci95: 95 % interval of the median.
        cpu_ms: CPU time that the process used in a run, all threads together, those included that wait spinning.
    """

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    cv: float
    runs: int
    p50_ci95: tuple[float, float]
    cpu_ms: float | None = None


class Accuracy(Model):
    """Fractions of right answers, 0 to 1; ``top5``: the right answer is among the five highest."""

    top1: float
    top5: float
    samples: int


class AccuracyChange(Model):
    """Accuracy of the model minus that of the baseline, as fractions.

    Attributes:
        top1: change of top-1.
        ci95: its 95 % interval, paired on the same samples (against a stored result: of two independent draws).
        p_value: McNemar's exact test of top-1; ``None`` against a stored result.
        top5: change of top-5.
        top5_ci95: its interval.
    """

    top1: float
    ci95: tuple[float, float]
    p_value: float | None = None
    top5: float | None = None
    top5_ci95: tuple[float, float] | None = None


class MetricChange(Model):
    """The user's metric of the model minus that of the baseline.

    Attributes:
        name: ``package.module:function``.
        value: the change.
        ci95: its 95 % interval, bootstrapped over the samples; ``None`` where the function is too slow for that, fails
            on a resample, or where the other side is a stored result.
    """

    name: str
    value: float
    ci95: tuple[float, float] | None


class Agreement(Model):
    """How far model and baseline agree on the same samples.

    Attributes:
        top1: fraction for which both give the same class; ``None`` when the outputs hold no classes.
        max_abs_diff: largest absolute difference over all outputs; ``None`` (infinite) when one holds NaN.
        samples: how many were compared.
    """

    top1: float | None
    max_abs_diff: float | None
    samples: int


class Speedup(Model):
    """Baseline's median latency divided by the model's, with its 95 % interval."""

    p50: float
    ci95: tuple[float, float]


class PeakMemory(Model):
    """By how much opening and running the model raised the memory of a process of its own, in bytes.

    Attributes:
        host_bytes: resident memory.
        device_bytes: memory of the GPU, CUDA's own included; ``None`` on the CPU and without nvidia-ml-py.
    """

    host_bytes: int
    device_bytes: int | None


class Copies(Model):
    """Medians in ms of the copies that ``latency_ms`` leaves out: all inputs to the device, all outputs back."""

    to_device: float
    to_host: float


class Measured(Model):
    """One model: what it costs and what it gives, in time and memory with the first batch size and threads.

    Attributes:
        metric: the user's own.
        creation_ms: median time of opening a session.
        peak_memory: ``None`` where the system does not tell.
        copies_ms: ``None`` on the CPU.
    """

    file: str
    params: int
    macs: int
    bytes: int
    latency_ms: Latency
    throughput_per_s: float
    accuracy: Accuracy | None
    metric: float | None = None
    creation_ms: float | None = None
    peak_memory: PeakMemory | None = None
    copies_ms: Copies | None = None


class TimingSamples(Model):
    """Every timed run in ms, one list for each round; the rounds of both models ran in turns."""

    model: list[list[float]]
    baseline: list[list[float]] | None


class Execution(Model):
    """How the models ran.

    Attributes:
        timed: from where to where a run went: ``host to host`` or ``device to device``.
        precision: type of the model's weights.
        tf32: whether float32 products may have been rounded to TF32, on a GPU that has it; ``None`` on the CPU.
        fp16: whether float32 may have been computed in float16 (TensorRT).
        layout: of images in the CUDA provider.
        conv_search: how the CUDA provider chose its convolution algorithms.
        cuda_graph: whether runs were launched as one CUDA graph.
        pinned: the processors to which the threads were bound, with the first number of threads.
        options: that were given to the provider, by ONNX Runtime's names.
    """

    timed: str
    precision: str
    tf32: bool | None
    fp16: bool
    layout: Layout | None
    conv_search: Search | None
    cuda_graph: bool
    pinned: list[int] | None
    options: dict[str, str]


class Timing(Model):
    """One batch size and number of threads.

    Attributes:
        batch_size: samples a run.
        model: latency of the model.
        baseline: latency of the baseline.
        speedup: of the model over the baseline.
        stable: whether the interval is narrow enough for the figures to mean something.
        samples_ms: every timed run.
        threads: of the CPU provider, ``None`` where ONNX Runtime chose.
    """

    batch_size: int
    model: Latency
    baseline: Latency | None
    speedup: Speedup | None
    stable: bool
    samples_ms: TimingSamples
    threads: int | None = None


class GateResult(Model):
    """One gate.

    Attributes:
        name: the flag without its dashes.
        limit: in ``unit``.
        value: what was measured, in ``unit``.
        ci95: its 95 % interval; both ends equal the value where nothing is uncertain.
        unit: ``x``, ``ms``, ``pp``, ``metric``, ``fraction`` or ``bytes``.
        passed: whether the verdict is ``passed``.
        verdict: ``inconclusive`` when the measurement cannot tell.
    """

    name: str
    limit: float
    value: float
    ci95: tuple[float, float]
    unit: str
    passed: bool
    verdict: Verdict


class Layer(Model):
    """Output channels of one convolution or linear layer, in the order of the baseline's graph.

    Attributes:
        name: of the node.
        op_type: its operator.
        before: channels in the baseline.
        after: channels in the model; 0 where the layer is gone.
    """

    name: str
    op_type: str
    before: int
    after: int


class NodeTime(Model):
    """Time of one node of the graph that ONNX Runtime made of the file, in ms a run."""

    name: str
    op_type: str
    ms: float


class Profile(Model):
    """Where a run's time goes, from ONNX Runtime's profiler; profiling itself makes a run slower.

    Attributes:
        runs: how many were profiled, after the timing.
        model: the model's nodes, in the order in which they run.
        baseline: the baseline's.
    """

    runs: int
    model: list[NodeTime]
    baseline: list[NodeTime] | None


class Stored(Model):
    """The stored result that stands for the baseline.

    Attributes:
        file: where it was read from.
        date: when it was measured.
        differences: what was not the same then, where ``compare_anyway`` allowed it.
    """

    file: str
    date: str | None
    differences: list[str]


class Judged(Model):
    """What is said of every model; each field means what it does in :class:`EvalResult`."""

    model: Measured
    speedup: Speedup | None
    accuracy_change: AccuracyChange | None
    metric_change: MetricChange | None = None
    agreement: Agreement | None
    timings: list[Timing]
    gates: list[GateResult]
    verdict: Verdict


class Candidate(Judged):
    """One of several models.

    Attributes:
        on_front: whether no other model (nor the baseline) is at least as fast and as good, and better in one of both.
        timings: without the samples of the baseline, which are the same as in the result's own ``timings``.
    """

    on_front: bool


class EvalResult(StageResult, Judged):
    """Result of ``eval``.

    Attributes:
        model: the model that was judged; of several, the first.
        baseline: what it was compared with.
        compared_with: the stored result, where that is the baseline.
        provider: ONNX Runtime's name of the provider that ran every node.
        threads: of the CPU provider, ``None`` where ONNX Runtime chose; the first of several.
        data: what the models ran on.
        speedup: at the first batch size and number of threads.
        accuracy_change: from baseline to model.
        metric_change: of the user's metric, from baseline to model.
        agreement: of model and baseline.
        timings: one for each number of threads and batch size, with all samples.
        gates: in the order of the flags; of the first model.
        verdict: of all gates of all models; without gates, whether the measurement is stable.
        hints: what to do about an inconclusive measurement, and other things that the reader should know.
        execution: how the models ran.
        candidates: of several models every one, the first included, in the order given; empty for one model.
        layers: channels of every layer before and after; empty without a baseline's file.
        profile: time of every node, when it was asked for.
    """

    command: str = "eval"
    baseline: Measured | None
    compared_with: Stored | None = None
    provider: str
    threads: int | None
    data: str
    hints: list[str]
    execution: Execution | None = None
    candidates: list[Candidate] = Field(default_factory=list)
    layers: list[Layer] = Field(default_factory=list)
    profile: Profile | None = None

    @property
    def judged(self) -> list[Candidate]:
        """Every model that was judged, also where it is only one."""
        return self.candidates or [
            Candidate(on_front=True, **{name: getattr(self, name) for name in Judged.model_fields})
        ]

    @property
    def exit_code(self) -> int:
        """0 passed, 3 a gate failed, 4 inconclusive."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> str:
        """Return the result as one indented JSON object, each list of numbers on one line."""
        return re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), super().to_json())
