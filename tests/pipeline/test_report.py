"""The HTML and Markdown reports, on results that no machine had to measure."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prune_onnx.graph_ops.errors import OutputError
from prune_onnx.pipeline.eval_results import AccuracyChange, Speedup
from prune_onnx.pipeline.report import to_markdown, write_html
from prune_onnx.pipeline.rows import change_rows, spent

from .fixed_results import (
    EPOCHS,
    GATES,
    LAYERS,
    METRIC,
    PROFILE,
    STORED,
    eval_result,
    several,
    slim_result,
    train_result,
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
