"""What the ``slim`` stage takes and what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .results import Model, StageResult

Fraction = Annotated[float, Field(gt=0, le=1)]
Side = Annotated[int, Field(ge=1)]
BUDGETS = ("exact", "keep_channels", "keep_macs", "keep_params", "keep_latency", "latency_ms")
LATENCY = ("keep_latency", "latency_ms")


class SlimConfig(BaseModel):
    """Options of ``prune-onnx slim``; field names are the flags' names with underscores.

    Attributes:
        input: the ONNX file to make smaller; never changed.
        output: the ONNX file to write; not needed for a dry run.
        exact: remove only channels whose removal leaves the output as it is (the default when no budget is given).
        keep_channels: fraction of prunable channels that stays.
        keep_macs: fraction of multiply-accumulates that stays.
        keep_params: fraction of parameters that stays.
        keep_latency: fraction of the original's measured latency that stays: the result is timed and corrected until
            it is within 5 %.
        latency_ms: the same, as milliseconds.
        provider: what latency is measured on.
        threads: of the CPU provider; ``None`` is ONNX Runtime's choice.
        batch_size: samples a run, of models that take any number.
        cost_cache: folder where times of layers are kept, which are measured once for each provider and machine;
            ``None`` is the user's cache folder. When it is given, the steps of every budget come from these times.
        scope: ``global`` ranks the channels of all groups together; ``layer`` takes the same fraction of every group.
        criterion: importance criterion, see ``--list-criteria``; ``None`` means obs with calibration data, else l2.
        calibration: unlabelled inputs: the name of a data set, an .npz or .npy file, or a folder of images. With them a
            budget keeps most of the accuracy: channels are chosen by what their readers lose, and these are refitted.
        calibration_size: how many inputs are used.
        compensate: what makes up for the removed channels, with calibration: ``least-squares`` refits the layers that
            read them, ``bias`` keeps every layer's mean output, ``bn`` estimates the BatchNorm statistics again (or
            what takes their place after folding); ``none`` leaves the weights. ``None`` means least-squares.
        data_dir: folder of the data files.
        download: fetch missing data files.
        mean: per channel, of pixel/255; ``None`` means the model's recipe, else the data set's own.
        std: likewise.
        size: height and width that calibration pictures are scaled to, for models that take any size.
        layout: of the model's input; ``None`` means the model's recipe, else what its shape says.
        fp16: write the weights and compute the activations as 16-bit floats; inputs and outputs stay as they are.
        int8: write the result quantised to 8 bits (QDQ), with the calibration data.
        align: keep multiples of this many channels in every group; ``auto`` chooses by the group's width, or by
            measured times (a budget in latency, or ``cost_cache``); 1 is off.
            Exact removal takes every dead channel under ``auto``; with a number, some stay to fill up the steps.
        min_keep: fraction of its channels that every group keeps at least.
        norms: ``pin`` keeps an axis whole when a LayerNorm, GroupNorm or reduction runs across it; ``release`` cuts it.
        select_inputs: prune pre-activation and dense nets per consumer, through a Gather before the BatchNormalization.
        ignore: globs of node names whose channels stay.
        fold_bn: fold BatchNormalization into the Conv, ConvTranspose or Gemm before it.
        input_shape: ``{input name: shape}`` for models whose dynamic sizes cannot be guessed.
        plan: with ``dry_run``, where the plan is saved; otherwise the plan that is replayed.
        dry_run: analyse and plan only; write no model.
        report: where the JSON report is written.
        seed: of the random criterion and of the inputs that verification runs on.
        force: overwrite existing outputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: Path
    output: Path | None = None
    exact: bool = False
    keep_channels: Fraction | None = None
    keep_macs: Fraction | None = None
    keep_params: Fraction | None = None
    keep_latency: Fraction | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    cost_cache: Path | None = None
    scope: Literal["global", "layer"] = "global"
    criterion: str | None = None
    calibration: str | None = None
    calibration_size: Annotated[int, Field(ge=2)] = 512
    compensate: Literal["none", "bias", "bn", "least-squares"] | None = None
    data_dir: Path | None = None
    download: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[Side, Side] | None = None
    layout: Literal["NCHW", "NHWC"] | None = None
    fp16: bool = False
    int8: bool = False
    align: int | Literal["auto"] = "auto"
    min_keep: Annotated[float, Field(ge=0, le=1)] = 0.1
    norms: Literal["pin", "release"] = "pin"
    select_inputs: bool = False
    ignore: tuple[str, ...] = ()
    fold_bn: bool = False
    input_shape: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    plan: Path | None = None
    dry_run: bool = False
    report: Path | None = None
    seed: int = 0
    force: bool = False

    @model_validator(mode="after")
    def _check(self) -> SlimConfig:
        given = [name for name in BUDGETS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one budget")
        if self.plan and not self.dry_run and given:
            raise ValueError(f"plan replays a saved plan, so {given[0]} cannot be given with it")
        if self.output is None and not self.dry_run:
            raise ValueError("output is missing (only a dry run writes no file)")
        if self.calibration is None and (self.compensate not in (None, "none") or self.criterion == "obs"):
            raise ValueError(f"{self.compensate or 'the criterion obs'} needs calibration data")
        if self.fp16 and self.int8:
            raise ValueError("fp16 and int8 exclude each other")
        if self.int8 and self.calibration is None:
            raise ValueError("int8 needs calibration data, for the ranges of the activations")
        if self.calibration is not None and self.budget[1] is None and not self.int8:
            raise ValueError("calibration is for a budget or for int8; exact removal needs none")
        if self.calibration is not None and self.plan is not None:
            raise ValueError("plan and calibration cannot be combined: a plan holds no refitted weights")
        if isinstance(self.align, int) and self.align < 1:
            raise ValueError("align must be 1 or more")
        return self

    @property
    def budget(self) -> tuple[str, float | None]:
        """The budget's name and fraction (or ms); ``("exact", None)`` when none was given."""
        for name in BUDGETS[1:]:
            if (value := getattr(self, name)) is not None:
                return name, value
        return "exact", None


class Cost(Model):
    """Size of a model: MACs at its input shape with batch size 1, parameters, and bytes of the file."""

    params: int
    macs: int
    bytes: int


class Removed(Model):
    """How much went: channels (positions of producing axes) and groups that lost at least one."""

    channels: int
    groups: int


class Group(Model):
    """One channel group: the channels that can only go together with their like in other tensors.

    Attributes:
        name: the first node that produces the group's channels.
        nodes: all producing nodes.
        channels: removable units of the group before the cut.
        kept: units that stay.
        pinned_by: why units may not go, one sentence each, naming node and operator.
    """

    name: str
    nodes: list[str]
    channels: int
    kept: int
    pinned_by: list[str]


class Verification(Model):
    """The run of the result against its reference in ONNX Runtime.

    Attributes:
        reference: ``original`` for exact removal, ``masked`` for a lossy cut.
        max_abs_diff: largest absolute difference over all outputs.
        max_rel_diff: the same divided by the largest absolute value of that output of the reference.
        tolerance: what ``max_rel_diff`` may be at most.
        passed: always true in a written report: a failure writes no file.
    """

    reference: Literal["original", "masked"]
    max_abs_diff: float
    max_rel_diff: float
    tolerance: float
    passed: bool


class Precision(Model):
    """The result in another number format, beside the same result in float32.

    Attributes:
        type: ``float16`` or ``int8``.
        samples: inputs that both ran on: the calibration data, or random ones where there is none.
        max_abs_diff: largest absolute difference over all outputs.
        agreement: share of the samples for which both give the same class; ``None`` where the output holds no classes.
    """

    type: Literal["float16", "int8"]
    samples: int
    max_abs_diff: float
    agreement: float | None


class Latency(Model):
    """What a budget in latency came to; ms, medians of runs in turns with the original.

    Attributes:
        threads: of the CPU provider, ``None`` where ONNX Runtime chose.
        batch_size: samples a run.
        asked_ms: what was asked for: the given time, or the given fraction of ``original_ms``.
        predicted_ms: by the times of the layers.
        measured_ms: of the finished model.
        rounds: plans that were timed.
    """

    provider: str
    threads: int | None
    batch_size: int
    original_ms: float
    asked_ms: float
    predicted_ms: float
    measured_ms: float
    rounds: int


class SlimResult(StageResult):
    """Result of ``slim``.

    Attributes:
        after: of the result; ``bytes`` of a dry run is what the file would have.
        constants: removed positions whose constant was dropped (zero or unread), absorbed into a bias, or merged.
        timings: seconds of each step.
        verification: of the result; also made in a dry run. Of a result in another number format, before it was
            converted.
        precision: of a result in another number format.
        latency: of the result, when the budget was one in latency.
    """

    command: str = "slim"
    input: str
    output: str | None
    dry_run: bool
    budget: str
    criterion: str | None
    before: Cost
    after: Cost
    removed: Removed
    constants: dict[str, int]
    groups: list[Group]
    timings: dict[str, float]
    verification: Verification | None
    precision: Precision | None = None
    latency: Latency | None = None
    notes: list[str]
