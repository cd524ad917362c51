"""The pages beside the papers: made from stored rows, with the published figures, and rows that say why not run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from prune_onnx.cli.main import COMMANDS

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = ("papers", "papers_claims", "papers_common", "papers_frank_wolfe", "papers_nnrelief", "papers_stages")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The scripts, which import one another by name, as they lie in their folder."""
    monkeypatch.syspath_prepend(FOLDER)
    yield {name: import_module(name) for name in SCRIPTS}
    for name in SCRIPTS:
        del sys.modules[name]


def relief_row(network: str, seed: int, error: float, left: float) -> dict[str, Any]:
    at = {"zero_weights": 80, "validation_accuracy": 0.97}
    return {
        "table": 1, "network": network, "seed": seed, "rounds": 11, "epochs": 15, "error": error, "left": left,
        "weights": 100, "seconds": 60.0, "history": [{**at, "zero_weights": 0}, at], "commands": [f"{network} {seed}"],
    }  # fmt: skip


def test_nnrelief_page_has_mean_and_deviation_beside_what_is_published(scripts: dict[str, Any]) -> None:
    rows = [relief_row("lenet300", 0, 2.0, 1.0), relief_row("lenet300", 1, 3.0, 2.0)]
    text = "\n".join(scripts["papers_nnrelief"].page(rows))
    assert "| lenet300 | paper | 11 of 15 | 60 |  | 1.98 ± 0.07 | 1.51 ± 0.07 |" in text
    assert "| lenet300 | here | 11 | 15 | 0, 1 | **2.50 ± 0.71** | **1.50 ± 0.71** |" in text
    assert "| lenet5 | paper | 20 of 20 | 60 |  | 0.97 ± 0.05 | 0.65 ± 0.02 |" in text
    assert "| lenet5 | here |  |  |  | not run | not run |" in text
    assert "| 1 | 20.00 | 3.00 |" in text  # after the pruning


def test_course_has_one_entry_for_each_training(scripts: dict[str, Any]) -> None:
    ends = scripts["papers_nnrelief"].ends
    assert ends(list(range(15)), 5) == [3, 8, 14]
    assert ends(list(range(3)), 1) == [0, 0, 2]


def test_neurons_are_active_with_connections_on_both_sides(scripts: dict[str, Any]) -> None:
    import numpy as np

    first = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0]], bool)  # (out, in): the third neuron has no input
    second = np.array([[1, 0, 1], [0, 0, 0]], bool)  # the second has no reader
    relief = scripts["papers_nnrelief"]
    assert relief.active([first, second]) == [2, 1, 1]
    other = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    assert relief.overlaps([first], [other]) == [0.5]


def test_frank_wolfe_page_and_plot(scripts: dict[str, Any], tmp_path: Path) -> None:
    def row(method: str, seed: int, accuracy: float, ratio: float, after: int) -> dict[str, Any]:
        return {"method": method, "seed": seed, "before": 10, "images": None, "ratio": ratio, "after": after,
                "accuracy": accuracy, "history": [0.9] * max(after, 1), "commands": [f"{method} {seed}"]}  # fmt: skip

    rows = [row("dense", 0, 90.0, 0.0, 0), row("plain", 0, 92.0, 0.0, 5)]
    rows += [row("frank-wolfe", seed, 91.0 + seed, 0.5, 5) for seed in (0, 1)]
    page = scripts["papers_frank_wolfe"]
    text = "\n".join(page.page(rows))
    assert "| frank-wolfe | paper | a little less | .88 |" in text
    assert "| frank-wolfe | here, 5 epochs after | 50% | **91.50 ± 0.71** (2) |" in text
    assert "| plain | here, 5 epochs after | 100% | **92.00** (1) |" in text
    page.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(("paper", "figure"), [("proximal-ns", "93.71"), ("hsq", "0.53"), ("nnrelief-cifar", "1.92")])
def test_rows_that_are_not_run_say_why_and_how_they_would_be(
    scripts: dict[str, Any], tmp_path: Path, paper: str, figure: str
) -> None:
    (tmp_path / "data").mkdir()
    scripts["papers"].main([paper, str(tmp_path / "data"), "--out", str(tmp_path / "page")])
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    claims = scripts["papers"].PAPERS[paper][0].claims
    assert text.count("| here | not run (needs the data set ") == len(claims)
    assert figure in text
    assert str(tmp_path) not in text
    assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["rows"] == []
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("prune-onnx ")]
    assert {words[1] for words in lines} <= set(COMMANDS)
    assert len(lines) >= len(claims)


def test_commands_of_a_page_are_those_that_would_run(scripts: dict[str, Any], tmp_path: Path) -> None:
    import argparse

    options = argparse.Namespace(
        runs=tmp_path, data_dir=tmp_path, device="cpu", epochs=None, width=1.0, images=None, seeds=[0]
    )
    for paper, _ in scripts["papers"].PAPERS.values():
        for claim in paper.claims:
            for _, config, line in scripts["papers_stages"].plan(claim, 3, options):
                _, stage, *words = shlex.split(line)
                command = import_module(f"prune_onnx.cli.{stage}").command
                found = command._configure(command.make_context(stage, words).params)
                untold = {"resume", "force", "data_dir", "device"}
                told = json.loads(config.model_dump_json(exclude=untold).replace(f"{tmp_path}/", "runs/"))
                assert json.loads(found.model_dump_json(exclude=untold)) == told


def small_paper(scripts: dict[str, Any], kind: str) -> Any:
    """A paper of one row, on digits."""
    claims, stages = scripts["papers_claims"], scripts["papers_stages"]
    claim = {
        "slimming": lambda: claims.pruned("digits", "bn-cnn", "network-slimming", 0.5, "1"),
        "hsq": lambda: claims.selected("digits", "bn-cnn", 50, "1"),
        "relief": lambda: claims.relieved("digits", "bn-cnn", "Adam", 2, left="1"),
    }[kind]()
    return stages.Paper("A paper", "", tuple(claim.published), (claim,))


@pytest.mark.parametrize("kind", ["slimming", "hsq", "relief"])
def test_rows_are_measured_once(
    scripts: dict[str, Any], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper, papers = small_paper(scripts, kind), scripts["papers"]
    monkeypatch.setattr(papers, "PAPERS", {"small": (paper, "")})
    arguments = ["small", str(tmp_path), "--run", "--epochs", "1", "--width", "0.5", "--images", "200"]
    arguments += ["--out", str(tmp_path / "page"), "--resume"]
    papers.main(arguments)
    (row,) = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["rows"]
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    for column, value in row["figures"].items():
        if column in paper.columns:
            assert f"{value:.2f}" in text
    assert set(paper.columns) & set(row["figures"])
    assert "not run" not in text
    monkeypatch.setattr(scripts["papers_stages"], "carried_out", None)  # nothing is left to do
    papers.main(arguments)
    assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["rows"] == [row]


def test_small_pages_are_measured(scripts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scripts["papers_nnrelief"].RECIPE, "dataset", "digits")
    out = tmp_path / "relief"
    common = [str(tmp_path), "--seeds", "0", "--images", "120", "--resume"]
    scripts["papers"].main(
        ["nnrelief", *common, "--networks", "lenet300", "--epochs", "1", "--rounds", "2", "--out", str(out)]
    )
    first, seventh = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert [len(first["history"]), first["rounds"]] == [3, 2]
    assert first["left"] < 100
    assert seventh["neurons"]["importance scores"][-1] == 10
    recipe = scripts["papers_frank_wolfe"].RECIPE
    monkeypatch.setitem(recipe, "dataset", "digits")
    monkeypatch.setitem(recipe, "model", "bn-cnn")
    out = tmp_path / "wolfe"
    scripts["papers"].main(["frank-wolfe", *common, "--pretrain", "1", "--retrain", "2", "--out", str(out)])
    rows = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["dense", *scripts["papers_frank_wolfe"].METHODS]
    assert len({len(row["history"]) for row in rows[1:]}) == 1
    assert out.with_suffix(".png").exists()
