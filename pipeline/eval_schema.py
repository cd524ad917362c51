"""What the ``eval`` stage takes and what it gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .gates import GATES, Verdict, limit_parser
from .results import Model, StageResult

Provider = Literal["cpu", "cuda", "tensorrt"]
Layout = Literal["nchw", "nhwc"]
Search = Literal["exhaustive", "heuristic", "default"]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]

# Options that only some providers have.
PROVIDERS_OF: dict[str, tuple[Provider, ...]] = {
    "pin": ("cpu",),
    "cuda_layout": ("cuda",),
    "tf32": ("cuda",),
    "conv_search": ("cuda",),
    "cuda_graph": ("cuda", "tensorrt"),
    "fp16": ("tensorrt",),
    "engine_cache": ("tensorrt",),
}

EXIT_CODES: dict[Verdict, int] = {"passed": 0, "failed": 3, "inconclusive": 4}

Side = Annotated[int, Field(ge=1)]


def as_list(value: object) -> object:
    """Let a configuration file give one number where several are possible."""
    return [value] if isinstance(value, int) else value


class EvalConfig(BaseModel):
    """Options of ``prune-onnx eval``; field names are the flags' names with underscores.

    Attributes:
        model: the ONNX file to judge.
        more: further files to judge, each against the same baseline; gates hold for every one.
        baseline: the ONNX file they are compared with; it must have the same inputs and outputs.
        compare: instead, the JSON report of an earlier ``eval``: what it says of its model stands for the baseline. One
            from other hardware, another provider or number of threads is refused.
        compare_anyway: compare with it all the same.
        dataset: name of a data set, whose test split is used.
        data: instead, an ``.npz`` or ``.npy`` file or a folder of images.
        data_dir: where the files of data sets lie.
        download: whether missing files of a data set may be fetched.
        mean: per channel, of pixel / 255; default: the model's metadata, else the data set's own.
        std: per channel, of pixel / 255.
        size: height and width that pictures are scaled to, for models that take any size.
        layout: of the model's input; default: the model's metadata, else what its shape says.
        limit: how many samples are used at most.
        metric: ``package.module:function`` of your own, called with all outputs (a list of arrays) and labels; it
            returns a number of which more is better.
        provider: what must run the model.
        batch_size: batch sizes that are timed; the first one counts for gates and tables.
        threads: numbers of threads with which the CPU provider is timed; the first one counts for gates and tables;
            ``None`` is ONNX Runtime's choice, one a physical core.
        pin: bind each thread of the CPU provider to a core of its own (Linux).
        cuda_layout: in which the CUDA provider keeps images; NHWC is what tensor cores want.
        tf32: let the CUDA provider compute float32 on tensor cores, with factors rounded to 10 bits of mantissa.
        conv_search: how the CUDA provider chooses the algorithm of a convolution.
        cuda_graph: record the kernels of a run once and launch them together (CUDA, TensorRT).
        fp16: let TensorRT compute in float16. For CUDA convert the model, which then is timed as it is.
        engine_cache: folder of the engines that TensorRT has built, which takes minutes; ``None`` is
            prune-onnx/tensorrt in the user's cache folder.
        input_shape: ``{input name: shape}`` for models whose open sizes cannot be guessed.
        min_time: seconds that each model is timed at least, for each batch size and number of threads.
        min_runs: runs of each model that are timed at least.
        warmup: runs before timing; ``None`` warms up until the time is stable.
        min_speedup: gate, times faster at the median than the baseline, such as ``1.3x``.
        max_latency_ms: gate on the median latency.
        max_p99_ms: gate on the 99th percentile of the latency.
        max_accuracy_drop: gate on the loss of top-1 against the baseline, in percentage points, such as ``0.5pp``.
        max_metric_drop: gate on the loss of the metric against the baseline, in its own unit.
        min_agreement: gate on the fraction of samples for which model and baseline give the same class.
        max_size: gate on the file's size, such as ``2MB``.
        max_memory: gate on the peak memory of a run, on the device where there is one, such as ``200MB``.
        profile: time every node before and after; ``None`` does when a report for people is written.
        slim_report: the JSON report of ``slim``, for the groups that it pinned and why in the report.
        html: where the HTML report is written.
        markdown: where the Markdown report is written.
        report: where the JSON report is written.
        github_summary: append the Markdown report to ``$GITHUB_STEP_SUMMARY``.
        seed: of random inputs and of the bootstrap.
        force: overwrite existing outputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    more: tuple[Path, ...] = ()
    baseline: Path | None = None
    compare: Path | None = None
    compare_anyway: bool = False
    dataset: str | None = None
    data: str | None = None
    data_dir: Path | None = None
    download: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[Side, Side] | None = None
    layout: Literal["NCHW", "NHWC"] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    metric: str | None = None
    provider: Provider = "cpu"
    batch_size: Annotated[Sizes, BeforeValidator(as_list)] = (1,)
    threads: Annotated[Sizes | None, BeforeValidator(as_list)] = None
    pin: bool = False
    cuda_layout: Layout = "nchw"
    tf32: bool = True
    conv_search: Search = "exhaustive"
    cuda_graph: bool = False
    fp16: bool = False
    engine_cache: Path | None = None
    input_shape: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    min_time: Annotated[float, Field(gt=0)] = 2.0
    min_runs: Annotated[int, Field(ge=2)] = 50
    warmup: Annotated[int, Field(ge=0)] | None = None
    min_speedup: Annotated[float | None, BeforeValidator(limit_parser("min-speedup"))] = None
    max_latency_ms: Annotated[float | None, BeforeValidator(limit_parser("max-latency-ms"))] = None
    max_p99_ms: Annotated[float | None, BeforeValidator(limit_parser("max-p99-ms"))] = None
    max_accuracy_drop: Annotated[float | None, BeforeValidator(limit_parser("max-accuracy-drop"))] = None
    max_metric_drop: Annotated[float | None, BeforeValidator(limit_parser("max-metric-drop"))] = None
    min_agreement: Annotated[float | None, BeforeValidator(limit_parser("min-agreement"))] = None
    max_size: Annotated[float | None, BeforeValidator(limit_parser("max-size"))] = None
    max_memory: Annotated[float | None, BeforeValidator(limit_parser("max-memory"))] = None
    profile: bool | None = None
    slim_report: Path | None = None
    html: Path | None = None
    markdown: Path | None = None
    report: Path | None = None
    github_summary: bool = False
    seed: int = 0
    force: bool = False

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.dataset is not None and self.data is not None:
            raise ValueError("dataset and data exclude each other; give one")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together; give both or none")
        for field, providers in PROVIDERS_OF.items():
            if self.provider not in providers and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field} is an option of provider {' and '.join(providers)}, not of {self.provider}")
        given = [gate for gate in GATES if getattr(self, gate.field) is not None]
        for gate in given:
            if "baseline" in gate.needs and self.baseline is None:
                raise ValueError(f"{gate.field} compares with a baseline; give baseline")
            if "reference" in gate.needs and self.baseline is None and self.compare is None:
                raise ValueError(f"{gate.field} compares with a baseline; give baseline or compare")
            if "metric" in gate.needs and self.metric is None:
                raise ValueError(f"{gate.field} needs a metric; give metric")
            if {"data", "labels"} & set(gate.needs) and not self.has_data:
                raise ValueError(f"{gate.field} needs data; give dataset or data")
        if self.baseline is not None and self.compare is not None:
            raise ValueError("baseline and compare exclude each other; give one")
        if self.compare_anyway and self.compare is None:
            raise ValueError("compare_anyway needs compare, the result to compare with")
        if self.metric is not None and not self.has_data:
            raise ValueError("metric needs data; give dataset or data")
        return self

    @property
    def has_data(self) -> bool:
        """Whether the models run on data, and not on random inputs."""
        return self.dataset is not None or self.data is not None

    @property
    def models(self) -> tuple[Path, ...]:
        """All files to judge."""
        return (self.model, *self.more)

    @property
    def for_people(self) -> bool:
        """Whether a report for people is written."""
        return self.html is not None or self.markdown is not None or self.github_summary


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


class Candidate(Model):
    """One of several models; every field means what it does in :class:`EvalResult`.

    Attributes:
        on_front: whether no other model (nor the baseline) is at least as fast and as good, and better in one of both.
        timings: without the samples of the baseline, which are the same as in the result's own ``timings``.
    """

    model: Measured
    speedup: Speedup | None
    accuracy_change: AccuracyChange | None
    metric_change: MetricChange | None
    agreement: Agreement | None
    timings: list[Timing]
    gates: list[GateResult]
    verdict: Verdict
    on_front: bool


class EvalResult(StageResult):
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
    model: Measured
    baseline: Measured | None
    compared_with: Stored | None = None
    provider: str
    threads: int | None
    data: str
    speedup: Speedup | None
    accuracy_change: AccuracyChange | None
    metric_change: MetricChange | None = None
    agreement: Agreement | None
    timings: list[Timing]
    gates: list[GateResult]
    verdict: Verdict
    hints: list[str]
    execution: Execution | None = None
    candidates: list[Candidate] = Field(default_factory=list)
    layers: list[Layer] = Field(default_factory=list)
    profile: Profile | None = None

    @property
    def judged(self) -> list[Candidate]:
        """Every model that was judged, also where it is only one."""
        return self.candidates or [
            Candidate(
                model=self.model,
                speedup=self.speedup,
                accuracy_change=self.accuracy_change,
                metric_change=self.metric_change,
                agreement=self.agreement,
                timings=self.timings,
                gates=self.gates,
                verdict=self.verdict,
                on_front=True,
            )
        ]

    @property
    def exit_code(self) -> int:
        """0 passed, 3 a gate failed, 4 inconclusive."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> str:
        """Return the result as one indented JSON object, each list of numbers on one line."""
        return re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), super().to_json())
