"""The charts of a report: what is drawn is what was measured."""

from __future__ import annotations

import re

import numpy as np
import pytest

from prune_onnx.pipeline.charts import latency_charts, rounds_chart, trade_off, training_charts
from prune_onnx.pipeline.eval_results import Timing, TimingSamples

from .fixed_results import EPOCHS, eval_result, latency, several, timing


def coordinates(path: str) -> np.ndarray:
    return np.array([[float(v) for v in pair.split(",")] for pair in re.findall(r"[-\d.]+,[-\d.]+", path)])


def spread(samples: list[float]) -> Timing:
    blocks = [samples, samples]
    return Timing(batch_size=1, model=latency(blocks), baseline=None, speedup=None, stable=True,
                  samples_ms=TimingSamples(model=blocks, baseline=None))  # fmt: skip


@pytest.mark.parametrize(
    "shown",
    [timing(), timing(baseline=False), spread([1.0] * 30), spread([0.001, 1000.0] * 30), spread([0.02, 0.021] * 9)],
    ids=["two", "one", "constant", "wide", "microseconds"],
)
def test_charts_stay_inside_their_square(shown: Timing) -> None:
    charts = [*latency_charts(shown), rounds_chart(shown)]
    for chart in charts:
        for line in chart.lines:
            points = coordinates(line.path)
            assert np.isfinite(points).all()
            assert points.min() >= 0
            assert points.max() <= 100
        for tick in [*chart.x_ticks, *chart.y_ticks, *(line.mark for line in chart.lines if line.mark)]:
            assert 0 <= tick.at <= 100
        assert 1 <= len(chart.x_ticks) <= 20


def test_distribution_peaks_where_the_samples_are() -> None:
    baseline, model = latency_charts(timing())
    peaks = []
    for chart in (baseline, model):
        points = coordinates(chart.lines[0].path)
        peaks.append(points[points[:, 1].argmin(), 0])
        assert chart.lines[0].mark is not None
        assert abs(chart.lines[0].mark.at - peaks[-1]) < 10
    assert peaks[0] > peaks[1] + 50


def test_training_curves_are_drawn_for_what_changed() -> None:
    assert [chart.title for chart in training_charts(EPOCHS)] == [
        "Training loss",
        "Validation accuracy",
        "Channels at zero",
    ]
    without = [{"epoch": e, "loss": 1 / e, "validation_accuracy": None, "dead_channels": 0} for e in (1, 2)]
    assert [chart.title for chart in training_charts(without)] == ["Training loss"]
    assert training_charts([]) == []
    loss = coordinates(training_charts(EPOCHS)[0].lines[0].path)
    assert (np.diff(loss[:, 1]) > 0).all()  # a falling loss: y grows downwards
    assert (loss[0, 0], loss[-1, 0]) == (0, 100)


def test_the_trade_off_plot_has_every_model_where_it_belongs() -> None:
    plot = trade_off(several())
    assert plot is not None
    places = {point.label: point for point in plot.points}
    assert [places[name].kind for name in ("base.onnx", "model0.onnx", "model1.onnx", "model2.onnx")] == [
        "baseline", "front", "front", "model"]  # fmt: skip
    assert places["model1.onnx"].x < places["model0.onnx"].x < places["model2.onnx"].x < places["base.onnx"].x
    assert places["base.onnx"].y < places["model0.onnx"].y < places["model2.onnx"].y < places["model1.onnx"].y
    ends = [end for point in plot.points for end in (point.x, point.y, *point.across, *(point.along or ()))]
    assert all(0 <= end <= 100 for end in ends)
    steps = coordinates(plot.front)
    assert (np.diff(steps[:, 0]) >= 0).all()
    assert (np.diff(steps[:, 1]) <= 0).all()
    assert trade_off(eval_result(baseline=False)) is None
