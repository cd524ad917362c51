"""What the ``eval`` stage takes and what it gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .gates import GATES, Verdict, limit_parser
from .results import Model, StageResult

EXIT_CODES: dict[Verdict, int] = {"passed": 0, "failed": 3, "inconclusive": 4}

Side = Annotated[int, Field(ge=1)]


class EvalConfig(BaseModel):
    """Options of ``prune-onnx eval``; field names are the flags' names with underscores.

    Attributes:
        model: the ONNX file to judge.
        baseline: the ONNX file it is compared with; it must have the same inputs and outputs.
        dataset: name of a data set, whose test split is used.
        data: instead, an ``.npz`` or ``.npy`` file or a folder of images.
        data_dir: where the files of data sets lie.
        download: whether missing files of a data set may be fetched.
        mean: per channel, of pixel / 255; default: the model's metadata, else the data set's own.
        std: per channel, of pixel / 255.
        size: height and width that pictures are scaled to, for models that take any size.
        layout: of the model's input; default: the model's metadata, else what its shape says.
        limit: how many samples are used at most.
        provider: what must run the model.
        batch_size: batch sizes that are timed; the first one counts for gates and tables.
        threads: of the CPU provider; ``None`` is ONNX Runtime's choice.
        input_shape: ``{input name: shape}`` for models whose open sizes cannot be guessed.
        min_time: seconds that each model is timed at least, for each batch size.
        min_runs: runs of each model that are timed at least.
        warmup: runs before timing; ``None`` warms up until the time is stable.
        min_speedup: gate, times faster at the median than the baseline, such as ``1.3x``.
        max_latency_ms: gate on the median latency.
        max_p99_ms: gate on the 99th percentile of the latency.
        max_accuracy_drop: gate on the loss of top-1 against the baseline, in percentage points, such as ``0.5pp``.
        min_agreement: gate on the fraction of samples for which model and baseline give the same class.
        max_size: gate on the file's size, such as ``2MB``.
        html: where the HTML report is written.
        markdown: where the Markdown report is written.
        report: where the JSON report is written.
        github_summary: append the Markdown report to ``$GITHUB_STEP_SUMMARY``.
        seed: of random inputs and of the bootstrap.
        force: overwrite existing outputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    baseline: Path | None = None
    dataset: str | None = None
    data: str | None = None
    data_dir: Path | None = None
    download: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[Side, Side] | None = None
    layout: Literal["NCHW", "NHWC"] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    batch_size: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1,)
    threads: Annotated[int, Field(ge=1)] | None = None
    input_shape: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    min_time: Annotated[float, Field(gt=0)] = 2.0
    min_runs: Annotated[int, Field(ge=2)] = 50
    warmup: Annotated[int, Field(ge=0)] | None = None
    min_speedup: Annotated[float | None, BeforeValidator(limit_parser("min-speedup"))] = None
    max_latency_ms: Annotated[float | None, BeforeValidator(limit_parser("max-latency-ms"))] = None
    max_p99_ms: Annotated[float | None, BeforeValidator(limit_parser("max-p99-ms"))] = None
    max_accuracy_drop: Annotated[float | None, BeforeValidator(limit_parser("max-accuracy-drop"))] = None
    min_agreement: Annotated[float | None, BeforeValidator(limit_parser("min-agreement"))] = None
    max_size: Annotated[float | None, BeforeValidator(limit_parser("max-size"))] = None
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
        given = [gate for gate in GATES if getattr(self, gate.field) is not None]
        for gate in given:
            if "baseline" in gate.needs and self.baseline is None:
                raise ValueError(f"{gate.field} compares with a baseline; give baseline")
            if {"data", "labels"} & set(gate.needs) and self.dataset is None and self.data is None:
                raise ValueError(f"{gate.field} needs data; give dataset or data")
        return self


class Latency(Model):
    """Latency of one run in ms.

    Attributes:
        cv: standard deviation divided by the mean.
        runs: how many were timed.
        p50_ci95: 95 % interval of the median.
    """

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    cv: float
    runs: int
    p50_ci95: tuple[float, float]


class Accuracy(Model):
    """Fractions of right answers, 0 to 1; ``top5``: the right answer is among the five highest."""

    top1: float
    top5: float
    samples: int


class AccuracyChange(Model):
    """Top-1 of the model minus top-1 of the baseline on the same samples, as a fraction, with its 95 % interval."""

    top1: float
    ci95: tuple[float, float]


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


class Measured(Model):
    """One model: what it costs and what it gives. ``latency_ms`` is that of the first batch size."""

    file: str
    params: int
    macs: int
    bytes: int
    latency_ms: Latency
    throughput_per_s: float
    accuracy: Accuracy | None


class TimingSamples(Model):
    """Every timed run in ms, one list for each round; the rounds of both models ran in turns."""

    model: list[list[float]]
    baseline: list[list[float]] | None


class Timing(Model):
    """One batch size.

    Attributes:
        batch_size: samples a run.
        model: latency of the model.
        baseline: latency of the baseline.
        speedup: of the model over the baseline.
        stable: whether the interval is narrow enough for the figures to mean something.
        samples_ms: every timed run.
    """

    batch_size: int
    model: Latency
    baseline: Latency | None
    speedup: Speedup | None
    stable: bool
    samples_ms: TimingSamples


class GateResult(Model):
    """One gate.

    Attributes:
        name: the flag without its dashes.
        limit: in ``unit``.
        value: what was measured, in ``unit``.
        ci95: its 95 % interval; both ends equal the value where nothing is uncertain.
        unit: ``x``, ``ms``, ``pp``, ``fraction`` or ``bytes``.
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


class EvalResult(StageResult):
    """Result of ``eval``.

    Attributes:
        model: the model that was judged.
        baseline: what it was compared with.
        provider: ONNX Runtime's name of the provider that ran every node.
        threads: of the CPU provider, ``None`` where ONNX Runtime chose.
        data: what the models ran on.
        speedup: at the first batch size.
        accuracy_change: from baseline to model.
        agreement: of model and baseline.
        timings: one for each batch size, with all samples.
        gates: in the order of the flags.
        verdict: of all gates; without gates, whether the measurement is stable.
        hints: what to do about an inconclusive measurement, and other things that the reader should know.
    """

    command: str = "eval"
    model: Measured
    baseline: Measured | None
    provider: str
    threads: int | None
    data: str
    speedup: Speedup | None
    accuracy_change: AccuracyChange | None
    agreement: Agreement | None
    timings: list[Timing]
    gates: list[GateResult]
    verdict: Verdict
    hints: list[str]

    @property
    def exit_code(self) -> int:
        """0 passed, 3 a gate failed, 4 inconclusive."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> str:
        """Return the result as one indented JSON object, each list of numbers on one line."""
        return re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), super().to_json())
