"""What the ``eval`` stage takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .gates import GATES, limit_parser

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
