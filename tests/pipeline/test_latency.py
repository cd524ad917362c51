"""Budgets in measured latency, on a machine whose times are known, and the real timer on tiny layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from prune_onnx.graph_ops.errors import ConfigError, PlanError
from prune_onnx.graph_ops.latency_model import Layer, traffic_layer
from prune_onnx.graph_ops.progress import SILENT
from prune_onnx.pipeline import latency, latency_tables
from prune_onnx.pipeline.latency_tables import PASSES, ProviderTimer, TableStore, tables
from prune_onnx.pipeline.slim import slim
from prune_onnx.pipeline.slim_schema import SlimConfig, SlimResult

from ..graph_ops.builder import Net
from ..step_times import StepStopwatch, StepTimer

PAD = {"pads": [1, 1, 1, 1]}
LAYERS = [
    Layer("Conv", 1, (8, 8), (("pads", (1, 1, 1, 1)),), (3, 3), 1, 16, 24, ("in", "out")),
    Layer("Conv", 2, (6, 6), (), (3, 3), 32, 32, 32, ("groups",)),
    Layer("Gemm", 1, (), (), (), 1, 20, 10, ("in",)),
]


def net(batch: int | str = "n") -> onnx.ModelProto:
    """A residual net, wide enough for blocks of 16."""
    made = Net()
    x = made.relu(made.bn(made.conv(made.input(batch, 3, 8, 8), 32, bias=False, **PAD)))
    y = made.relu(made.bn(made.conv(x, 64, bias=False, **PAD)))
    x = made.relu(made.op("Add", made.conv(y, 32, **PAD), x))
    for width in (64, 96, 96, 128):
        x = made.relu(made.conv(x, width, **PAD))
    return made.model(made.head(x))


def pointwise() -> onnx.ModelProto:
    """A net that is calibrated in no time."""
    made = Net()
    x = made.input("n", 3, 8, 8)
    for width in (48, 64, 64, 48, 64):
        x = made.relu(made.conv(x, width, 1))
    return made.model(made.head(x))


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> StepTimer:
    """Stands in for the provider's timer."""
    made = StepTimer()
    monkeypatch.setattr(latency, "ProviderTimer", lambda provider, threads: made)
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, timer: StepTimer) -> StepStopwatch:
    """Stands in for the provider's stopwatch."""
    made = StepStopwatch()
    monkeypatch.setattr(latency, "ProviderStopwatch", lambda provider, threads: made)
    return made


def run(folder: Path, model: onnx.ModelProto | None = None, **options: object) -> SlimResult:
    onnx.save(model or net(), folder / "in.onnx")
    values = {"input": folder / "in.onnx", "output": folder / "out.onnx", "cost_cache": folder / "cache"}
    return slim(SlimConfig(**{**values, **options}))


# ---- tables


def test_layers_are_measured_once(tmp_path: Path) -> None:
    timer = StepTimer(noise=0.1)
    store = TableStore("cpu", 1, tmp_path)
    first = tables([*LAYERS, LAYERS[0]], store, timer, SILENT)
    assert len(timer.calls) == PASSES * len(LAYERS)
    again = tables(LAYERS, store, timer, SILENT)
    assert len(timer.calls) == PASSES * len(LAYERS)
    for layer in LAYERS:
        for width in (4, 8, layer.outputs):
            known, read = (t[layer.key].seconds(layer.inputs, width) for t in (first, again))
            assert read == pytest.approx(known, rel=1e-4)  # the file has six digits
    tables([traffic_layer(3), *LAYERS], store, timer, SILENT)
    assert len(timer.calls) == PASSES * (len(LAYERS) + 1)


def test_other_threads_are_another_machine(tmp_path: Path) -> None:
    paths = {TableStore(provider, n, tmp_path).path for provider in ("cpu", "cuda") for n in (None, 1, 2)}
    assert len(paths) == 6


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"schema_version": 0}', None])
def test_a_damaged_cache_is_measured_anew(tmp_path: Path, text: str | None) -> None:
    timer = StepTimer()
    store = TableStore("cpu", 1, tmp_path)
    tables(LAYERS, store, timer, SILENT)
    if text is None:  # times that cannot be
        raw = json.loads(store.path.read_text())
        for rows in raw["layers"].values():
            rows[0][2] = float("nan")
        text = json.dumps(raw)
    store.path.write_text(text)
    tables(LAYERS, store, timer, SILENT)
    assert len(timer.calls) == 2 * PASSES * len(LAYERS)
    assert len(store.load()) == len(LAYERS)


def test_the_quicker_pass_counts(tmp_path: Path) -> None:
    class Disturbed(StepTimer):
        def times(self, layer, points):
            times = super().times(layer, points)
            return [9 * t for t in times] if len(self.calls) == 1 else times

    found = tables(LAYERS, TableStore("cpu", 1, tmp_path), Disturbed(), SILENT)
    assert found[LAYERS[0].key].full == StepTimer().times(LAYERS[0], [LAYERS[0].whole])[0]


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path: Path) -> None:
    said: list[str] = []

    class Progress(type(SILENT)):
        def warn(self, message: str) -> None:
            said.append(message)

    (tmp_path / "file").write_text("")
    assert tables(LAYERS, TableStore("cpu", 1, tmp_path / "file" / "cache"), StepTimer(), Progress())
    assert len(said) == 1
    assert "not kept" in said[0]


@pytest.mark.parametrize(
    "layer",
    [
        *LAYERS,
        Layer("ConvTranspose", 1, (4, 4), (("strides", (2, 2)),), (2, 2), 1, 8, 12, ("in", "out")),
        Layer("Conv", 1, (6, 6), (), (3, 3), 2, 32, 32, ("out",)),
        traffic_layer(1),
    ],
    ids=lambda layer: f"{layer.op}-{layer.group}",
)
@pytest.mark.parametrize("way", ["_profiled", "times"])
def test_real_layers_take_time(layer: Layer, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_tables, "SECONDS", 0.004)
    timer = ProviderTimer("cpu", 1)
    if way == "times":  # as on a GPU, every point alone
        monkeypatch.setattr(timer, "_profiled", lambda layer, points: None)
    points = layer.points if way == "_profiled" else layer.points[:2]
    times = getattr(timer, way)(layer, points)
    assert len(times) == len(points)
    assert all(0 < t < 0.1 for t in times)


# ---- budgets


@pytest.mark.parametrize("fraction", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("bend", [{}, {"power": 0.6}, {"power": 1.3, "slower": 1.1}, {"start": 0.03}], ids=str)
def test_the_measured_latency_is_what_was_asked_for(
    tmp_path: Path, clock: StepStopwatch, fraction: float, bend: dict[str, float]
) -> None:
    for key, value in bend.items():
        setattr(clock, key, value)
    found = run(tmp_path, keep_latency=fraction, report=tmp_path / "report.json").latency
    assert found.asked_ms == pytest.approx(fraction * found.original_ms)
    assert abs(found.measured_ms / found.asked_ms - 1) <= 0.05
    assert found.measured_ms < found.original_ms
    assert json.loads((tmp_path / "report.json").read_text())["latency"]["rounds"] == found.rounds
    small = onnx.load(tmp_path / "out.onnx")
    assert clock.pair(net(), small, {})[1] == pytest.approx(found.measured_ms)


def test_milliseconds_are_the_same_budget(tmp_path: Path, clock: StepStopwatch) -> None:
    first = run(tmp_path, keep_latency=0.6)
    asked = first.latency.asked_ms
    second = run(tmp_path, latency_ms=asked, force=True)
    assert second.latency.asked_ms == asked
    assert [g.kept for g in second.groups] == [g.kept for g in first.groups]
    assert second.budget == "latency_ms"


def test_the_same_times_give_the_same_model(tmp_path: Path, clock: StepStopwatch, timer: StepTimer) -> None:
    clock.power = 0.8
    run(tmp_path, keep_latency=0.5)
    asked = len(timer.calls)
    model = (tmp_path / "out.onnx").read_bytes()
    run(tmp_path, keep_latency=0.5, force=True)
    assert (tmp_path / "out.onnx").read_bytes() == model
    assert len(timer.calls) == asked


def test_a_model_that_gets_slower_keeps_its_structure(tmp_path: Path, clock: StepStopwatch) -> None:
    clock.slower = 3.0
    result = run(tmp_path, latency_ms=1e3)
    assert result.removed.channels == 0
    assert any("structure is kept" in note for note in result.notes)
    assert result.latency.measured_ms == result.latency.original_ms


def test_what_cannot_be_reached_is_refused_with_what_can(tmp_path: Path, clock: StepStopwatch) -> None:
    clock.start = 50.0
    with pytest.raises(PlanError, match=r"--keep-latency 0.2 cannot be reached.* takes .* ms") as caught:
        run(tmp_path, keep_latency=0.2)
    assert not (tmp_path / "out.onnx").exists()
    least = float(str(caught.value).split(" takes ")[1].split()[0])
    assert run(tmp_path, latency_ms=1.02 * least).latency.measured_ms <= 1.05 * 1.02 * least


def test_when_corrections_do_not_get_there_the_smallest_is_taken(
    tmp_path: Path, clock: StepStopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.power = 0.3
    monkeypatch.setattr(latency, "ROUNDS", 1)
    found = run(tmp_path, keep_latency=0.6, min_keep=0.0).latency
    assert found.measured_ms <= 1.05 * found.asked_ms


def test_a_result_that_turns_out_slower_is_not_written(
    tmp_path: Path, timer: StepTimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Turning(StepStopwatch):
        def pair(self, original, model, feeds):
            before, after = super().pair(original, model, feeds)
            return before, (after if self.pairs < 3 else 1.5 * before)

    turning = Turning()
    monkeypatch.setattr(latency, "ProviderStopwatch", lambda provider, threads: turning)
    with pytest.raises(PlanError, match="nothing is gained"):
        run(tmp_path, keep_latency=0.7)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("options", [{}, {"criterion": "l2"}, {"compensate": "none"}, {"scope": "layer"}], ids=str)
def test_calibrated_pruning_meets_it_too(tmp_path: Path, clock: StepStopwatch, options: dict[str, object]) -> None:
    clock.power = 0.8
    x = np.random.default_rng(0).standard_normal((32, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    data = {"calibration": str(tmp_path / "data.npz"), "calibration_size": 32}
    found = run(tmp_path, pointwise(), keep_latency=0.6, **data, **options).latency
    assert found.measured_ms <= 1.05 * found.asked_ms
    assert found.measured_ms >= 0.8 * found.asked_ms  # a share for every group alike comes in coarse steps
    assert "scope" in options or found.measured_ms >= 0.95 * found.asked_ms


def test_measured_steps_serve_other_budgets(tmp_path: Path, clock: StepStopwatch) -> None:
    result = run(tmp_path, keep_macs=0.5)
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.latency is None
    free = [g for g in result.groups if not g.pinned_by]
    assert all(g.kept % 16 == 0 for g in free)


def test_a_fixed_batch_is_measured_as_it_is(tmp_path: Path, clock: StepStopwatch) -> None:
    assert run(tmp_path, net(2), keep_latency=0.7).latency.measured_ms > 0
    with pytest.raises(ConfigError, match="holds 2 samples"):
        run(tmp_path, net(2), keep_latency=0.7, batch_size=4, force=True)


def test_the_batch_is_part_of_what_is_measured(tmp_path: Path, clock: StepStopwatch) -> None:
    result = run(tmp_path, keep_latency=0.7, batch_size=4)
    assert result.latency.batch_size == 4
    stored = json.loads(next((tmp_path / "cache").iterdir()).read_text())
    assert {json.loads(key)["batch"] for key in stored["layers"]} == {4}


@pytest.mark.parametrize(
    "options", [{"keep_latency": 0.5, "keep_macs": 0.5}, {"keep_latency": 0.5, "latency_ms": 3}, {"latency_ms": 0}]
)
def test_budgets_that_do_not_go_together(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SlimConfig(input="a.onnx", output="b.onnx", **options)


def test_models_above_2_gb_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.model_io, "PROTOBUF_LIMIT", 1000)
    with pytest.raises(ConfigError, match="below 2 GB"):
        latency.ProviderStopwatch("cpu", 1).together([net(1)], {})


def test_real_models_are_timed_in_turns() -> None:
    watch = latency.ProviderStopwatch("cpu", 1)
    small, large = net(1), net(1)
    feeds = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    before, after = watch.pair(large, small, feeds)
    assert 0.3 < after / before < 3
