"""The HTML and Markdown reports, on results that no machine had to measure."""

from __future__ import annotations

import doctest
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_onnx.graph_ops.errors import OutputError
from prune_onnx.pipeline import formats
from prune_onnx.pipeline.charts import latency_charts, rounds_chart, trade_off, training_charts
from prune_onnx.pipeline.eval_results import (
    Accuracy,
    AccuracyChange,
    Agreement,
    Candidate,
    EvalResult,
    GateResult,
    Latency,
    Layer,
    Measured,
    MetricChange,
    NodeTime,
    Profile,
    Speedup,
    Stored,
    Timing,
    TimingSamples,
)
from prune_onnx.pipeline.report import to_markdown, write_html
from prune_onnx.pipeline.rows import change_rows, spent
from prune_onnx.pipeline.slim_schema import Cost, Group, Removed, SlimResult, Verification
from prune_onnx.pipeline.train import TrainResult

EPOCHS = [
    {
        "epoch": e,
        "loss": 2.2 * 0.8**e + 0.05,
        "lr": 0.1,
        "validation_loss": 0.3,
        "validation_accuracy": 0.985 - 0.5 * 0.75**e,
        "dead_channels": max(0, 30 * (e - 4)),
        "seconds": 3.0,
    }
    for e in range(1, 21)
]


def latency(blocks: list[list[float]]) -> Latency:
    every = np.concatenate(blocks)
    p50, p90, p95, p99 = np.quantile(every, (0.5, 0.9, 0.95, 0.99))
    return Latency(mean=every.mean(), p50=p50, p90=p90, p95=p95, p99=p99, cv=every.std() / every.mean(),
                   runs=len(every), p50_ci95=(p50 * 0.99, p50 * 1.01))  # fmt: skip


def timing(batch_size: int = 1, *, baseline: bool = True) -> Timing:
    rng = np.random.default_rng(batch_size)

    def blocks(center: float) -> list[list[float]]:
        return [(center * batch_size * (1 + rng.gamma(2, 0.02, 40)) * rng.normal(1, 0.01)).tolist() for _ in range(20)]

    mine, theirs = blocks(0.41), blocks(0.98)
    before = latency(theirs) if baseline else None
    return Timing(
        batch_size=batch_size,
        model=latency(mine),
        baseline=before,
        speedup=Speedup(p50=before.p50 / latency(mine).p50, ci95=(2.31, 2.44)) if before else None,
        stable=True,
        samples_ms=TimingSamples(model=mine, baseline=theirs if baseline else None),
    )


def eval_result(*, baseline: bool = True, batch_sizes: tuple[int, ...] = (1,), **changes: Any) -> EvalResult:
    timings = [timing(size, baseline=baseline) for size in batch_sizes]
    first = timings[0]

    def measured(file: str, params: int, macs: int, size: int, times: Latency, top1: float) -> Measured:
        return Measured(file=file, params=params, macs=macs, bytes=size, latency_ms=times,
                        throughput_per_s=1e3 / times.mean,
                        accuracy=Accuracy(top1=top1, top5=0.9961, samples=10_000))  # fmt: skip

    values: dict[str, Any] = {
        "seconds": 21.3,
        "environment": {
            "versions": {"prune-onnx": "0.1.0", "onnx": "1.19.0", "onnxruntime-gpu": "1.23.0", "numpy": "2.3.1"},
            "python": "3.11.9",
            "platform": "Linux-6.8-x86_64-with-glibc2.39",
            "cpu": "AMD EPYC 9354 32-Core Processor",
            "cores": 2,
            "load_1min": 0.31,
            "argv": ["/usr/bin/prune-onnx", "eval", "runs/my model/slim.onnx", "--baseline", "runs/base.onnx"],
            "date": "2026-01-31T12:00:00+00:00",
        },
        "model": measured("runs/slim.onnx", 121_410, 28_400_000, 498_112, first.model, 0.9142),
        "baseline": measured("runs/base.onnx", 271_098, 40_551_040, 1_096_534, first.baseline, 0.9173)
        if first.baseline
        else None,
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "data": "cifar10, 10,000 test images",
        "speedup": first.speedup,
        "accuracy_change": AccuracyChange(top1=-0.0031, ci95=(-0.0058, -0.0004)) if baseline else None,
        "agreement": Agreement(top1=0.9711, max_abs_diff=6.1, samples=10_000) if baseline else None,
        "timings": timings,
        "gates": [],
        "verdict": "passed",
        "hints": [],
    }
    return EvalResult(**(values | changes))


GATES = [
    GateResult(name="min-speedup", limit=1.3, value=2.38, ci95=(2.31, 2.44), unit="x", passed=True, verdict="passed"),
    GateResult(name="max-accuracy-drop", limit=0.25, value=0.31, ci95=(0.04, 0.58), unit="pp", passed=False,
               verdict="inconclusive"),
    GateResult(name="max-size", limit=4e5, value=498_112, ci95=(498_112, 498_112), unit="bytes", passed=False,
               verdict="failed"),
]  # fmt: skip


def slim_result(count: int = 19) -> SlimResult:
    rng = np.random.default_rng(0)
    groups = []
    for i in range(count):
        channels = 16 * 2 ** (3 * i // count)
        pinned = [f"Softmax node 'head.{i}' runs across the axis"] if i % 8 == 7 else []
        kept = channels if pinned else int(channels * rng.uniform(0.3, 1))
        groups.append(Group(name=f"layer{i // 6}.{i % 6}.conv1", nodes=[f"conv{i}"], channels=channels, kept=kept,
                            pinned_by=pinned))  # fmt: skip
    return SlimResult(
        seconds=1.2,
        input="base.onnx",
        output="slim.onnx",
        dry_run=False,
        budget="keep_macs",
        criterion="l2",
        before=Cost(params=271_098, macs=40_551_040, bytes=1_096_534),
        after=Cost(params=121_410, macs=28_400_000, bytes=498_112),
        removed=Removed(channels=312, groups=17),
        constants={"dropped": 1, "absorbed": 2, "merged": 0},
        groups=groups,
        timings={"analyse": 0.1},
        verification=Verification(
            reference="masked", max_abs_diff=1e-6, max_rel_diff=2.4e-7, tolerance=1e-4, passed=True
        ),
        notes=[],
    )


def several(*, baseline: bool = True, **changes: Any) -> EvalResult:
    """Three models on one baseline, the last beaten by the first."""
    result = eval_result(baseline=baseline, gates=GATES, verdict="failed", **changes)
    candidates = []
    for number, (factor, top1) in enumerate(((1.0, 0.9142), (0.6, 0.88), (1.4, 0.9))):
        own = result.model.latency_ms
        ends = (own.p50_ci95[0] * factor, own.p50_ci95[1] * factor)
        latency_ms = own.model_copy(update={"p50": own.p50 * factor, "p50_ci95": ends})
        accuracy = Accuracy(top1=top1, top5=0.99, samples=10_000)
        shown = {"file": f"runs/model{number}.onnx", "latency_ms": latency_ms, "accuracy": accuracy}
        change = AccuracyChange(top1=top1 - 0.9173, ci95=(top1 - 0.92, top1 - 0.915)) if baseline else None
        candidates.append(
            Candidate(
                model=result.model.model_copy(update=shown),
                speedup=result.speedup,
                accuracy_change=change,
                metric_change=None,
                agreement=result.agreement,
                timings=result.timings,
                gates=GATES[: number + 1],
                verdict="failed",
                on_front=number < 2,
            )
        )
    return result.model_copy(update={"candidates": candidates})


WIDTHS = [16, 16, 16, 32, 32, 32, 64, 64, 64]
LAYERS = [Layer(name=f"conv{i}", op_type="Conv", before=n, after=n - 3 * i // 2) for i, n in enumerate(WIDTHS)]
PROFILE = Profile(
    runs=20,
    model=[NodeTime(name="conv1", op_type="Conv", ms=0.2), NodeTime(name="reorder", op_type="ReorderInput", ms=0.01)],
    baseline=[NodeTime(name="conv1", op_type="Conv", ms=0.5), NodeTime(name="conv|2", op_type="Conv", ms=0.1)],
)
STORED = Stored(file="earlier.json", date="2026-01-01T00:00:00+00:00", differences=["cores 4 there, 2 here"])
METRIC = MetricChange(name="scores:dice", value=-0.0123, ci95=(-0.02, -0.004))


def train_result() -> TrainResult:
    return TrainResult(
        seconds=61.0,
        model="bn-cnn",
        dataset="mnist",
        method="proximal-ns",
        epochs=20,
        accuracy={"validation": 0.9902, "test": 0.9911},
        accuracy_before_finish={"validation": 0.9902, "test": 0.9911},
        sparsity={"channels": 480, "dead_channels": 291},
        artifacts={"model": "runs/base.onnx"},
    )


class Page(html.parser.HTMLParser):
    """Collects text and attributes, and checks that every element is closed in order."""

    VOID = frozenset({"meta", "link", "br", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def page(path: Path, **parts: Any) -> Page:
    write_html(path, **parts)
    return Page(path.read_text(encoding="utf-8"))


EVERYTHING = [
    {"eval_result": eval_result(baseline=False)},
    {"eval_result": eval_result()},
    {"eval_result": eval_result(gates=GATES, verdict="failed", hints=["Measure longer."], batch_sizes=(1, 8))},
    {"eval_result": eval_result(baseline=False, batch_sizes=(1, 8)), "metrics": EPOCHS},
    {"eval_result": eval_result(), "slim_result": slim_result(), "train_result": train_result(), "metrics": EPOCHS},
    {"eval_result": eval_result(), "slim_result": slim_result(200), "metrics": EPOCHS[:1]},
    {"eval_result": eval_result(threads=None, environment={}), "slim_result": slim_result(0)},
    {"eval_result": several(layers=LAYERS, profile=PROFILE)},
    {"eval_result": several(baseline=False), "slim_result": slim_result()},
    {"eval_result": eval_result(compared_with=STORED, layers=LAYERS, metric_change=METRIC)},
    {"eval_result": eval_result(baseline=False, profile=PROFILE.model_copy(update={"baseline": None}))},
]


@pytest.mark.parametrize("parts", EVERYTHING)
def test_page_is_well_formed_and_asks_the_network_for_nothing(parts: dict[str, Any], tmp_path: Path) -> None:
    found = page(tmp_path / "r.html", **parts)
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "@import" not in source
    assert "url(" not in source
    for tag, name, value in found.attributes:
        assert name not in ("src", "srcset", "onload"), (tag, name)
        assert name != "href" or value == "data:,"
    assert not re.search(r"\b(nan|None|inf|Undefined)\b", found.text)


@pytest.mark.parametrize("parts", EVERYTHING)
def test_every_markdown_table_has_as_many_cells_in_each_line(parts: dict[str, Any]) -> None:
    text = to_markdown(**parts)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
        assert re.fullmatch(r"\|( -{3}:? \|)+| -{3} \|", table.splitlines()[1]), table
    assert text.count("<details>") == text.count("</details>")
    # GitHub renders a table and a list only after an empty line.
    assert not re.search(r"^[^|\n].*\n\|", text, re.MULTILINE)
    assert not re.search(r"\b(nan|None|Undefined)\b", text)


def test_page_and_markdown_tell_the_same_figures(tmp_path: Path) -> None:
    parts = EVERYTHING[4] | {"eval_result": eval_result(gates=GATES, verdict="failed", hints=["Measure longer."])}
    html_text, markdown = page(tmp_path / "r.html", **parts).text, to_markdown(**parts)
    figures = ["91.42 %", "91.73 %", "−0.31 pp", "498 kB", "−54.6 %", "28.4 M", "97.11 %", "2.31× to 2.44×"]
    facts = [
        "Measure longer.",
        "max-accuracy-drop",
        "0.04 pp to 0.58 pp",
        "layer3.0.conv1",
        "Softmax node 'head.7' runs across the axis",
        "312 channels went",
        "2.4e-07",
        "bn-cnn on mnist by proximal-ns",
        "291 of 480",
        "AMD EPYC",
        "prune-onnx eval 'runs/my model/slim.onnx' --baseline runs/base.onnx",
    ]
    for fact in figures + facts:
        assert fact in html_text, fact
        assert fact in markdown, fact


def test_several_models_are_told_alike_on_page_and_in_markdown(tmp_path: Path) -> None:
    parts = {"eval_result": several(layers=LAYERS, profile=PROFILE)}
    html_text, markdown = page(tmp_path / "r.html", **parts).text, to_markdown(**parts)
    names = ("model0.onnx", "model1.onnx", "model2.onnx")
    for fact in (*names, "88.00 %", "conv8", "ReorderInput", "0.600 ms", "0.200 ms"):
        assert fact in html_text, fact
        assert fact in markdown, fact
    rows = [line for line in markdown.splitlines() if line.startswith("| model")]
    assert ["●" in row for row in rows[1:]] == [True, True, False]


def test_a_stored_result_is_named_with_what_differs(tmp_path: Path) -> None:
    parts = {"eval_result": eval_result(compared_with=STORED)}
    for text in (page(tmp_path / "r.html", **parts).text, to_markdown(**parts)):
        assert "stored result of 2026-01-01" in text
        assert "cores 4 there, 2 here" in text


def test_a_metric_is_a_row_with_its_interval() -> None:
    result = eval_result(metric_change=METRIC)
    result.model.metric, result.baseline.metric = 0.8, 0.8123  # type: ignore[union-attr]
    (row,) = [row for row in change_rows(result) if row.label == "Metric"]
    assert (row.before, row.after, row.change, row.tone) == ("0.8123", "0.8", "−0.0123", "bad")
    assert row.note == "−0.02 to −0.004, scores:dice"


def test_time_of_operators_is_the_sum_of_their_nodes() -> None:
    by_operator, by_node = spent(eval_result(profile=PROFILE))
    assert [(row.op_type, row.before, row.after) for row in by_operator] == [
        ("Conv", pytest.approx(0.6), 0.2),
        ("ReorderInput", None, 0.01),
    ]
    assert [row.name for row in by_node] == ["conv1", "conv|2", "reorder"]


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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to render with")
@pytest.mark.parametrize("width", [390, 1200])
def test_chromium_renders_without_an_error_or_a_request_and_nothing_is_cut_off(width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    parts = {"slim_result": slim_result(), "train_result": train_result(), "metrics": EPOCHS}
    result = several(layers=LAYERS, profile=PROFILE, hints=["Measure longer."], batch_sizes=(1, 8))
    write_html(tmp_path / "r.html", eval_result=result, **parts)
    # The page itself has no scripts; this one opens all that is folded and tells how wide the content is. A frame is
    # as narrow as a phone, which a window cannot be.
    probe = (
        "<script>addEventListener('load', () => { document.querySelectorAll('details').forEach(d => d.open = true);"
        "parent.postMessage(document.documentElement.scrollWidth + ' of ' + innerWidth, '*'); })</script></body>"
    )
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    (tmp_path / "inner.html").write_text(source.replace("</body>", probe), encoding="utf-8")
    (tmp_path / "outer.html").write_text(
        "<!doctype html><link rel='icon' href='data:,'><title></title>"
        "<script>addEventListener('message', event => { document.title = event.data; })</script>"
        f"<iframe src='inner.html' style='width:{width}px;height:3000px;border:0'></iframe>"
    )
    log = tmp_path / "net.json"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'user'}",
         "--window-size=1300,3100", "--enable-logging=stderr", f"--log-net-log={log}", "--virtual-time-budget=1000",
         "--dump-dom", (tmp_path / "outer.html").as_uri()],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    content, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", done.stdout).groups())  # type: ignore[union-attr]
    assert content <= window == width
    events = json.loads(log.read_text())["events"]
    asked = {str(event.get("params", {}).get("url", "")) for event in events} - {""}
    ours = {url for url in asked if not re.match(r"https?://[\w.]*(google|gstatic|googleapis|gvt1)\.com/", url)}
    assert not [url for url in ours if not url.startswith(("file:", "data:", "chrome", "devtools", "about:"))]


def test_names_are_shown_not_interpreted(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|x"
    slim = slim_result(3)
    slim.groups[0].name = evil
    result = eval_result(data=evil)
    found = page(tmp_path / "r.html", eval_result=result, slim_result=slim)
    assert evil in found.text
    assert "script" not in {tag for tag, _, _ in found.attributes}
    assert r"| <script>alert(1)</script>\|x |" in to_markdown(eval_result=result, slim_result=slim)


def test_certain_changes_have_a_tone_and_uncertain_ones_do_not() -> None:
    def tone(label: str, **changes: Any) -> str:
        return next(row.tone for row in change_rows(eval_result(**changes)) if row.label == label)

    assert tone("Top-1 accuracy") == "bad"
    assert tone("Top-1 accuracy", accuracy_change=AccuracyChange(top1=-0.001, ci95=(-0.003, 0.001))) == ""
    assert tone("Latency, median") == "good"
    assert tone("Latency, median", speedup=Speedup(p50=1.1, ci95=(0.9, 1.3))) == ""
    assert tone("Latency, median", speedup=Speedup(p50=0.8, ci95=(0.7, 0.9))) == "bad"
    assert tone("MACs") == "good"


def test_report_of_a_slower_model_says_so() -> None:
    result = eval_result()
    assert result.baseline is not None
    result.model.latency_ms, result.baseline.latency_ms = result.baseline.latency_ms, result.model.latency_ms
    row = next(row for row in change_rows(result) if row.label == "Latency, median")
    assert row.change.endswith("slower")
    assert row.part is not None
    assert row.part > 1


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_html(tmp_path / "file" / "r.html", eval_result=eval_result())


# ---- charts


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


# ---- figures


def test_formats_do_as_their_examples_say() -> None:
    assert doctest.testmod(formats).failed == 0


@given(st.floats(1e-6, 1e12))
def test_three_digits_are_kept(value: float) -> None:
    factors = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    text, unit = formats.size(value).split(" ")
    assert float(text.replace(",", "")) * factors[unit] == pytest.approx(value, rel=0.0051, abs=0.5)
    text, unit = formats.milliseconds(value).split(" ")
    factors = {"µs": 1e-3, "ms": 1, "s": 1e3}
    assert float(text.replace(",", "")) * factors[unit] == pytest.approx(value, rel=0.0051)
    assert "e" not in text
