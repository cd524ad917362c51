"""``run``: what it hands from stage to stage, what it runs again, and what it leaves when something goes wrong.

The stage functions are stood in for here; they write the files that the real ones write.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prune_onnx.graph_ops.errors import ConfigError, DataError, ModelError, OutputError
from prune_onnx.graph_ops.progress import SILENT, Progress
from prune_onnx.pipeline import evaluate, slim, train
from prune_onnx.pipeline.config import load_toml, parse
from prune_onnx.pipeline.eval_results import EvalResult
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.run import RunConfig, RunResult, in_one, run
from prune_onnx.pipeline.slim_schema import Cost, Group, Removed, SlimConfig, SlimResult, Verification
from prune_onnx.pipeline.train import TrainResult
from prune_onnx.trainers.config import TrainConfig

ROOT = Path(__file__).parents[2]
TRAIN = {"model": "bn-cnn", "dataset": "digits", "method": "proximal-ns"}


def slim_result(config: SlimConfig, **changes: Any) -> SlimResult:
    cost = Cost(params=100, macs=1000, bytes=400)
    facts = {
        "seconds": 0.5,
        "input": str(config.input),
        "output": str(config.output),
        "dry_run": False,
        "budget": config.budget[0],
        "criterion": None,
        "before": cost,
        "after": cost,
        "removed": Removed(channels=0, groups=0),
        "constants": {"dropped": 1, "absorbed": 0, "merged": 0},
        "groups": [],
        "timings": {"cut": 0.25},
        "verification": None,
        "notes": [],
    }
    return SlimResult(**{**facts, **changes})


class Stages:
    """Stand-ins of the stage functions that keep what they were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.failing: dict[str, BaseException] = {}
        self.before_failure: Callable[[Any], None] = lambda config: None
        self.verdict = "passed"
        self.reports: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def _called(self, name: str, config: Any) -> None:
        self.calls.append((name, config))
        if name in self.failing:
            self.before_failure(config)
            raise self.failing[name]

    def train(self, config: TrainConfig, progress: Progress = SILENT) -> TrainResult:
        self._called("train", config)
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "model.onnx").write_text(f"trained {config.model} {config.seed}")
        (config.output / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
        return TrainResult(
            seconds=1.0,
            model=config.model,
            dataset=config.dataset,
            method=config.method,
            epochs=2,
            accuracy={"validation": 0.9, "test": 0.9},
            accuracy_before_finish={"validation": 0.9, "test": 0.9},
            sparsity={"channels": 8, "dead_channels": 2},
            artifacts={"model": str(config.output / "model.onnx")},
        )

    def slim(self, config: SlimConfig, progress: Progress = SILENT) -> SlimResult:
        self._called("slim", config)
        assert config.output is not None
        config.output.write_text(f"slim of {config.input.read_text()} by {config.budget}")
        return slim_result(config)

    def evaluate(self, config: EvalConfig, progress: Progress = SILENT) -> EvalResult:
        self._called("eval", config)
        # Only what run reads of it; the whole of it is the eval stage's to test.
        return EvalResult.model_construct(command="eval", seconds=1.0, verdict=self.verdict, environment={})

    def write_html(self, path: Path, **parts: Any) -> None:
        self.reports[path.name] = parts
        path.write_text("<html>")

    def to_markdown(self, **parts: Any) -> str:
        return "# report"


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages()
    monkeypatch.setattr(train, "train", stages.train)
    monkeypatch.setattr(slim, "slim", stages.slim)
    monkeypatch.setattr(evaluate, "evaluate", stages.evaluate)
    report = types.ModuleType("prune_onnx.pipeline.report")
    report.write_html, report.to_markdown = stages.write_html, stages.to_markdown
    monkeypatch.setitem(sys.modules, report.__name__, report)
    return stages


def config(tmp_path: Path, **options: Any) -> RunConfig:
    whole = {"train": TRAIN, "slim": {"keep_macs": 0.5}, "eval": {}}
    return parse(RunConfig, {"output": tmp_path / "out", **whole, **options}, "run.toml")


def statuses(result: RunResult) -> list[str]:
    return [f"{outcome.stage} {outcome.status}" for outcome in result.stages]


# --- what the stages are told ---


def test_the_stages_hand_over_through_their_folders(tmp_path: Path, stages: Stages) -> None:
    out = tmp_path / "out"
    result = run(config(tmp_path))
    assert stages.names == ["train", "slim", "eval"]
    (_, trained), (_, slimmed), (_, judged) = stages.calls
    assert trained.output == out / "train"
    assert (slimmed.input, slimmed.output) == (out / "train" / "model.onnx", out / "slim" / "slim.onnx")
    assert (judged.model, judged.baseline, judged.dataset) == (slimmed.output, slimmed.input, "digits")
    assert statuses(result) == ["train done", "slim done", "eval done"]
    assert result.report == str(out / "report.html")
    assert (out / "report.html").read_text() == (out / "eval" / "report.html").read_text()
    for stage in ("train", "slim", "eval"):
        assert json.loads((out / stage / "result.json").read_text())["command"] == stage


def test_the_report_is_given_all_results_and_the_metrics(tmp_path: Path, stages: Stages) -> None:
    run(config(tmp_path))
    parts = stages.reports["report.html"]
    assert parts["train_result"].dataset == "digits"
    assert parts["slim_result"].budget == "keep_macs"
    assert parts["metrics"] == [{"epoch": 1}, {"epoch": 2}]
    assert (tmp_path / "out" / "eval" / "report.md").read_text() == "# report"


def test_steps_of_slim_work_on_what_the_step_before_wrote(tmp_path: Path, stages: Stages) -> None:
    result = run(config(tmp_path, slim=[{"exact": True}, {"keep-channels": 0.5}, {"keep_macs": 0.5}]))
    slim_folder = tmp_path / "out" / "slim"
    inputs = [c.input for name, c in stages.calls if name == "slim"]
    outputs = [c.output for name, c in stages.calls if name == "slim"]
    assert outputs == [slim_folder / "step1.onnx", slim_folder / "step2.onnx", slim_folder / "slim.onnx"]
    assert inputs == [tmp_path / "out" / "train" / "model.onnx", *outputs[:2]]
    assert result.stages[1].result["budget"] == "exact, then keep_channels, then keep_macs"
    assert {path.name for path in slim_folder.glob("step*.json")} == {"step1.json", "step2.json", "step3.json"}


def test_options_at_the_top_hold_for_stages_that_do_not_say_otherwise(tmp_path: Path, stages: Stages) -> None:
    run(config(tmp_path, seed=7, data_dir=tmp_path, eval={"seed": 3}))
    assert [c.seed for _, c in stages.calls] == [7, 7, 3]
    assert stages.calls[0][1].data_dir == stages.calls[2][1].data_dir == tmp_path


def test_slim_takes_a_file_where_nothing_is_trained(tmp_path: Path, stages: Stages) -> None:
    (tmp_path / "model.onnx").write_text("model")
    run(config(tmp_path, train=None, slim={"input": tmp_path / "model.onnx"}))
    assert stages.names == ["slim", "eval"]
    assert stages.calls[1][1].baseline == tmp_path / "model.onnx"
    assert set(stages.reports["report.html"]) == {"eval_result", "slim_result"}


def test_eval_judges_the_trained_model_where_nothing_is_cut(tmp_path: Path, stages: Stages) -> None:
    run(config(tmp_path, slim=()))
    assert stages.calls[1][1].model == tmp_path / "out" / "train" / "model.onnx"
    assert stages.calls[1][1].baseline is None


def test_eval_may_name_its_own_data(tmp_path: Path, stages: Stages) -> None:
    run(config(tmp_path, eval={"data": "images"}))
    assert (stages.calls[2][1].data, stages.calls[2][1].dataset) == ("images", None)


# --- what is run again ---


def test_a_finished_run_is_not_run_again(tmp_path: Path, stages: Stages) -> None:
    first = run(config(tmp_path))
    stages.calls.clear()
    again = run(config(tmp_path))
    assert stages.calls == []
    assert statuses(again) == ["train unchanged", "slim unchanged", "eval unchanged"]
    assert [o.result for o in again.stages] == [o.result for o in first.stages]
    assert again.verdict == "passed"


def test_a_folder_that_was_moved_is_still_up_to_date(tmp_path: Path, stages: Stages) -> None:
    run(config(tmp_path))
    (tmp_path / "out").rename(tmp_path / "moved")
    stages.calls.clear()
    run(config(tmp_path, output=tmp_path / "moved"))
    assert stages.calls == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"eval": {"min_time": 5}}, ["eval"]),
        ({"slim": {"keep_macs": 0.6}}, ["slim", "eval"]),
        ({"train": {**TRAIN, "seed": 1}}, ["train", "slim", "eval"]),
        ({"data_dir": Path("elsewhere")}, []),
        ({"force": True}, ["train", "slim", "eval"]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_only_what_a_change_reaches_is_run_again(
    tmp_path: Path, stages: Stages, change: dict, expected: list[str]
) -> None:
    run(config(tmp_path))
    stages.calls.clear()
    run(config(tmp_path, **change))
    assert stages.names == expected


@pytest.mark.parametrize(("name", "expected"), [("train/model.onnx", ["train"]), ("slim/slim.onnx", ["slim"])])
def test_a_file_that_was_changed_or_lost_is_made_again(
    tmp_path: Path, stages: Stages, name: str, expected: list[str]
) -> None:
    run(config(tmp_path))
    for harm in (lambda path: path.write_text("damaged"), Path.unlink):
        harm(tmp_path / "out" / name)
        stages.calls.clear()
        run(config(tmp_path))
        # What is made again has the same content, so the stages after it are up to date.
        assert stages.names == expected


def test_an_input_file_that_changed_is_cut_again(tmp_path: Path, stages: Stages) -> None:
    model = tmp_path / "model.onnx"
    options = config(tmp_path, train=None, slim={"input": model})
    model.write_text("one")
    run(options)
    model.write_text("three")
    stages.calls.clear()
    run(options)
    assert stages.names == ["slim", "eval"]


def test_training_from_scratch_counts_its_dense_network_as_an_input(tmp_path: Path, stages: Stages) -> None:
    dense = tmp_path / "dense.onnx"
    table = {"model": "small.onnx", "dataset": "digits", "reinit": True, "budget-of": str(dense)}
    options = config(tmp_path, train=table, slim=[], eval=None)
    for content, runs in (("one", ["train"]), ("one", []), ("three", ["train"])):
        dense.write_text(content)
        stages.calls.clear()
        run(options)
        assert stages.names == runs
    assert stages.calls[0][1].budget_of == dense


def test_an_inconclusive_measurement_is_repeated(tmp_path: Path, stages: Stages) -> None:
    stages.verdict = "inconclusive"
    assert run(config(tmp_path)).exit_code == 4
    stages.calls.clear()
    stages.verdict = "failed"
    assert run(config(tmp_path)).exit_code == 3
    assert stages.names == ["eval"]
    stages.calls.clear()
    assert run(config(tmp_path)).exit_code == 3, "a gate that failed fails again"
    assert stages.calls == []


# --- one stage ---


def test_one_stage_runs_on_what_the_others_left(tmp_path: Path, stages: Stages) -> None:
    for stage in ("train", "slim", "eval"):
        result = run(config(tmp_path), stage)
        assert [outcome.stage for outcome in result.stages] == [stage]
    assert stages.names == ["train", "slim", "eval"]
    assert result.verdict == "passed"


def test_one_stage_without_its_model_says_which_comes_first(tmp_path: Path, stages: Stages) -> None:
    with pytest.raises(ConfigError, match=r"train/model\.onnx is missing: run --stage train first"):
        run(config(tmp_path), "slim")
    with pytest.raises(ConfigError, match=r"slim/slim\.onnx is missing: run --stage slim first"):
        run(config(tmp_path), "eval")
    assert not (tmp_path / "out").exists()


def test_a_stage_that_is_not_configured_is_an_error(tmp_path: Path, stages: Stages) -> None:
    with pytest.raises(ConfigError, match=r"has no \[eval\] table"):
        run(config(tmp_path, eval=None), "eval")


# --- mistakes and failures ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": None, "slim": (), "eval": None}, r"there is nothing to do"),
        ({"train": {"method": "x", "dataset": "y"}}, r"\[train\]: model is missing"),
        ({"slim": {"keep_mac": 0.5}}, r"\[slim\]: keep_mac: unknown key\. Did you mean"),
        ({"slim": [{}, {"keep-macs": 7}]}, r"\[\[slim\]\] number 2: keep_macs: 7 should be less"),
        ({"slim": {"input": "x.onnx"}}, r"\[slim\]: input: it is what the stage before writes"),
        ({"slim": {"output": "x.onnx"}}, r"\[slim\]: output: run sets it itself"),
        ({"train": {**TRAIN, "resume": True}}, r"\[train\]: resume: run sets it itself"),
        ({"train": None}, r"\[slim\]: input is missing: there is no \[train\] table"),
        ({"train": None, "slim": ()}, r"\[eval\]: model is missing"),
        ({"stages": 3}, r"run.toml: stages: unknown key"),
    ],
)
def test_a_mistake_in_any_table_is_found_before_any_work(
    tmp_path: Path, stages: Stages, options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config(tmp_path, **options))
    assert stages.calls == []
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_does_not_exist_is_an_error_that_leaves_nothing(tmp_path: Path, stages: Stages) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx does not exist"):
        run(config(tmp_path, train=None, slim={"input": tmp_path / "absent.onnx"}))
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_fails_at_once_leaves_nothing(tmp_path: Path, stages: Stages) -> None:
    stages.failing["train"] = DataError("no such files")
    with pytest.raises(DataError):
        run(config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_fails_leaves_no_old_result_behind(tmp_path: Path, stages: Stages) -> None:
    run(config(tmp_path))
    stages.failing["slim"] = ModelError("broken")
    with pytest.raises(ModelError):
        run(config(tmp_path, slim={"keep_macs": 0.6}))
    assert not (tmp_path / "out" / "slim").exists()
    with pytest.raises(ConfigError, match="run --stage slim first"):
        run(config(tmp_path, slim={"keep_macs": 0.6}), "eval")


def test_training_that_was_stopped_is_resumed_under_the_same_options_only(tmp_path: Path, stages: Stages) -> None:
    stages.failing["train"] = KeyboardInterrupt()
    stages.before_failure = lambda config: (config.output / "checkpoint.pt").write_text("half")
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path))
    stages.failing.clear()
    changed = {**TRAIN, "epochs": 3}
    run(config(tmp_path, train=changed), "train")
    asked = [(c.resume, c.force) for _, c in stages.calls]
    assert asked == [(False, True), (True, False), (False, True)]
    assert not (tmp_path / "out" / "train" / "checkpoint.pt").exists(), "the other run's checkpoint is taken away"


def test_files_that_run_did_not_write_are_left_alone(tmp_path: Path, stages: Stages) -> None:
    mine = tmp_path / "out" / "train" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(OutputError, match="did not write"):
        run(config(tmp_path))
    run(config(tmp_path, force=True))
    assert mine.read_text() == "years of work"


# --- results ---


def test_steps_in_one_result_go_from_the_first_to_the_last(tmp_path: Path) -> None:
    def group(name: str, channels: int, kept: int) -> Group:
        return Group(name=name, nodes=[name], channels=channels, kept=kept, pinned_by=[])

    def check(reference: str, largest: float, relative: float) -> Verification:
        facts = {"max_abs_diff": largest, "max_rel_diff": relative, "tolerance": 1, "passed": True}
        return Verification(reference=reference, **facts)

    base = SlimConfig(input=tmp_path / "a", output=tmp_path / "b")
    big, small = Cost(params=9, macs=9, bytes=9), Cost(params=1, macs=1, bytes=1)
    first = slim_result(
        base, before=big, removed=Removed(channels=3, groups=1), groups=[group("a", 8, 5), group("gone", 4, 0)],
        verification=check("original", 3, 0.2), notes=["x"],
    )  # fmt: skip
    second = slim_result(
        base, after=small, removed=Removed(channels=4, groups=2), groups=[group("a", 5, 2), group("b", 6, 5)],
        verification=check("masked", 4, 0.1), notes=["x", "y"],
    )  # fmt: skip
    whole = in_one([first, second])
    assert (whole.before, whole.after) == (big, small)
    assert {(g.name, g.channels, g.kept) for g in whole.groups} == {("a", 8, 2), ("gone", 4, 0), ("b", 6, 5)}
    assert whole.removed == Removed(channels=7, groups=3)
    assert whole.constants["dropped"] == 2
    assert whole.timings == {"cut": 0.5}
    assert whole.verification == check("masked", 4, 0.2)
    assert whole.notes == ["x", "y"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    assert parse(RunConfig, load_toml(path), path.name).stages()


def test_an_unchanged_run_is_quick_and_imports_no_torch(tmp_path: Path, stages: Stages) -> None:
    run(config(tmp_path))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from prune_onnx.pipeline.run import RunConfig, run\n"
        f"result = run(RunConfig(output=Path({str(tmp_path / 'out')!r}), train={TRAIN!r}, "
        "slim={'keep_macs': 0.5}, eval={}))\n"
        "assert {o.status for o in result.stages} == {'unchanged'}, result.stages\n"
        "heavy = {'torch', 'onnxruntime', 'matplotlib', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {"PYTHONPATH": str(ROOT / ".typing"), "PATH": ""}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.perf_counter() - began < 5, "a loaded machine is slow, but not that slow"
