"""What a command gives its stage, and what it prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from prune_onnx.graph_ops.importance import CRITERIA
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline import evaluate, run, slim, train
from prune_onnx.pipeline.eval_results import EvalResult, GateResult, NodeTime, Profile, Stored
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.run import RunConfig, RunResult, StageOutcome
from prune_onnx.pipeline.slim_schema import SlimConfig, SlimResult
from prune_onnx.pipeline.train import TrainResult
from prune_onnx.trainers.config import TrainConfig
from prune_onnx.trainers.data import DATASETS
from prune_onnx.trainers.methods import METHODS
from prune_onnx.trainers.models import MODELS

Invoke = Callable[..., Result]


class Stage:
    """Stands in for a stage function: keeps the configuration, speaks to its progress, returns a result."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.configs: list[Any] = []

    def __call__(self, config: Any, *arguments: Any) -> Any:
        self.configs.append((config, *arguments[:-1]) if len(arguments) > 1 else config)
        progress: Progress = arguments[-1]
        progress.note("a note")
        progress.warn("a warning")
        with progress.task("work", 3) as advance:
            advance(3)
        return self.result


@pytest.fixture
def slimming(monkeypatch: pytest.MonkeyPatch, slim_result: SlimResult) -> Stage:
    stage = Stage(slim_result)
    monkeypatch.setattr(slim, "slim", stage)
    return stage


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch, eval_result: Callable[..., EvalResult]) -> Stage:
    stage = Stage(eval_result())
    monkeypatch.setattr(evaluate, "evaluate", stage)
    return stage


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Stage:
    accuracy = {"validation": 0.9853, "test": 0.9844}
    stage = Stage(
        TrainResult(
            seconds=5.0,
            model="bn-cnn",
            dataset="digits",
            method="proximal-ns",
            epochs=20,
            accuracy=accuracy,
            accuracy_before_finish=accuracy,
            sparsity={"channels": 224, "dead_channels": 91},
            artifacts={"model": "runs/x/model.onnx"},
        )
    )
    monkeypatch.setattr(train, "train", stage)
    return stage


# --- streams ---


def test_tables_are_on_stdout_and_all_else_on_stderr(invoke: Invoke, slimming: Stage) -> None:
    result = invoke("slim", "in.onnx", "out.onnx", "--keep-macs", "0.5")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "a note",
        "Warning: a warning",
        "DONE: 1.2 s: prune-onnx slim in.onnx out.onnx --keep-macs 0.5",
    ]
    for text in ("MACs", "40.8 M", "20.4 M", "−50.0 %", "conv[red]1", "24 channels of 1 groups removed (keep_macs)"):
        assert text in result.stdout
    assert "1 of 2 groups shown; -v" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr, "no colours where there is no terminal"


def test_verbose_shows_every_group_and_why_it_is_pinned(invoke: Invoke, slimming: Stage) -> None:
    assert "the graph output 'y' reads it" in invoke("slim", "in.onnx", "out.onnx", "-v").stdout


def test_quiet_leaves_result_and_warnings(invoke: Invoke, slimming: Stage) -> None:
    result = invoke("slim", "in.onnx", "out.onnx", "-q")
    assert result.stderr == "Warning: a warning\n"
    assert "MACs" in result.stdout


def test_json_is_one_object_and_nothing_else(
    invoke: Invoke, slimming: Stage, judging: Stage, training: Stage
) -> None:
    for stage, arguments in (
        (slimming, ["slim", "in.onnx", "out.onnx"]),
        (judging, ["eval", "m.onnx"]),
        (training, ["train", "--model", "bn-cnn", "--dataset", "digits", "--method", "plain", "-o", "x"]),
    ):
        result = invoke(*arguments, "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout) == stage.result.model_dump(mode="json")
        assert result.stderr.startswith("a note\n")


def test_json_of_a_failure_leaves_stdout_empty(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("slim", tmp_path / "absent.onnx", tmp_path / "out.onnx", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "absent.onnx" in result.stderr


def test_the_closing_line_can_be_pasted_into_a_shell(invoke: Invoke, slimming: Stage) -> None:
    stderr = invoke("slim", "in.onnx", "out.onnx", "--ignore", "a b*").stderr
    assert stderr.splitlines()[-1].endswith("prune-onnx slim in.onnx out.onnx --ignore 'a b*'")


# --- eval: verdicts, gates ---


@pytest.mark.parametrize(("verdict", "code"), [("passed", 0), ("failed", 3), ("inconclusive", 4)])
def test_the_verdict_is_exit_code_and_closing_line(
    invoke: Invoke, judging: Stage, eval_result: Callable[..., EvalResult], verdict: str, code: int
) -> None:
    gate = {"name": "min-speedup", "limit": 1.3, "value": 2.0, "ci95": (1.9, 2.1), "unit": "x", "passed": True}
    judging.result = eval_result(verdict, [{**gate, "verdict": verdict}])
    result = invoke("eval", "slim.onnx", "--baseline", "base.onnx", "--min-speedup", "1.3x")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1].startswith(f"{verdict.upper()}: 3.0 s: prune-onnx eval slim.onnx")
    gate_line = next(line for line in result.stdout.splitlines() if line.startswith("min-speedup"))
    assert gate_line.split() == ["min-speedup", "1.30×", "2.00×", "1.90×", "to", "2.10×", verdict]


def test_eval_shows_baseline_model_and_change(invoke: Invoke, judging: Stage) -> None:
    lines = invoke("eval", "slim.onnx", "--baseline", "base.onnx", "-v").stdout.splitlines()
    assert lines[0].split() == ["baseline", "model", "change", "95", "%", "interval"]
    rows = {line.split("  ")[0]: line for line in lines}
    assert rows["Top-1 accuracy"].split()[2:8] == ["98.00", "%", "97.00", "%", "−1.00", "pp"]
    assert "2.00× faster" in rows["Latency, median"]
    assert "−50.0 %" in rows["File size"]
    row = ["8", "2.00", "ms", "1.00", "ms", "8,000", "/s", "2.00×", "unstable"]
    assert any(line.split() == row for line in lines)
    assert "Note: The machine was busy." in lines
    assert "Python" in lines[-1], "-v shows the environment"


def test_eval_of_one_model_shows_no_empty_columns(invoke: Invoke, judging: Stage) -> None:
    judging.result = judging.result.model_copy(
        update={"baseline": None, "speedup": None, "accuracy_change": None, "agreement": None}
    )
    lines = invoke("eval", "slim.onnx").stdout.splitlines()
    assert lines[0].split() == ["model", "95", "%", "interval"]


def test_several_models_are_a_row_each_with_their_gates(invoke: Invoke, judging: Stage) -> None:
    gate = {"name": "min-speedup", "limit": 1.3, "value": 2.0, "ci95": (1.9, 2.1), "unit": "x", "passed": True}
    one = judging.result
    first = one.judged[0].model_copy(update={"gates": [GateResult(**gate, verdict="passed")]})
    slower = one.model.model_copy(update={"file": "other.onnx"})
    second = first.model_copy(update={"model": slower, "on_front": False, "verdict": "failed", "gates": []})
    judging.result = one.model_copy(update={"candidates": [first, second]})
    result = invoke("eval", "slim.onnx", "other.onnx", "more.onnx", "--baseline", "base.onnx")
    assert judging.configs[0].models == (Path("slim.onnx"), Path("other.onnx"), Path("more.onnx"))
    lines = result.stdout.splitlines()
    assert "top-1 accuracy" in lines[0]
    rows = {line.split()[0]: line for line in lines[1:4]}
    assert list(rows) == ["base.onnx", "slim.onnx", "other.onnx"]
    assert "baseline" in rows["base.onnx"]
    assert rows["slim.onnx"].rstrip().endswith("on the front")
    assert rows["other.onnx"].rstrip().endswith("failed")
    assert [line.split()[0] for line in lines].count("min-speedup") == 1
    assert "Note: The machine was busy." in lines


def test_profile_and_stored_result_are_shown(invoke: Invoke, judging: Stage) -> None:
    times = [NodeTime(name="conv1", op_type="Conv", ms=0.5), NodeTime(name="conv2", op_type="Conv", ms=0.25)]
    judging.result = judging.result.model_copy(
        update={
            "profile": Profile(runs=5, model=times[:1], baseline=times),
            "compared_with": Stored(file="main.json", date="2026-01-01", differences=[]),
        }
    )
    short = invoke("eval", "slim.onnx", "--compare", "main.json").stdout.splitlines()
    assert ["Conv", "0.750", "ms", "0.500", "ms"] in [line.split() for line in short]
    assert "The baseline is the result in main.json (2026-01-01)." in short
    long = invoke("eval", "slim.onnx", "--compare", "main.json", "-v").stdout
    assert "conv2 (Conv)" in long


# --- what the stage is given ---


def test_flags_become_the_stages_configuration(invoke: Invoke, slimming: Stage) -> None:
    invoke("slim", "in.onnx", "out.onnx", "--keep-macs", "0.5", "--ignore", "a*", "--ignore", "b", "--align", "8",
           "--input-shape", "x:1x3x8x8", "--seed", "3", "--force")  # fmt: skip
    assert slimming.configs == [
        SlimConfig(input="in.onnx", output="out.onnx", keep_macs=0.5, ignore=("a*", "b"), align=8,
                   input_shape={"x": (1, 3, 8, 8)}, seed=3, force=True)
    ]  # fmt: skip


def test_numbers_with_units_and_lists_reach_eval(invoke: Invoke, judging: Stage) -> None:
    invoke("eval", "m.onnx", "--baseline", "b.onnx", "--dataset", "digits", "--batch-size", "1,8", "--mean", "0.5,0.5",
           "--std", "0.2,0.2", "--max-accuracy-drop", "0.5pp", "--max-size", "2MB")  # fmt: skip
    expected = EvalConfig(
        model="m.onnx", baseline="b.onnx", dataset="digits", batch_size=(1, 8), mean=(0.5, 0.5), std=(0.2, 0.2),
        max_accuracy_drop=0.5, max_size=2e6,
    )  # fmt: skip
    assert judging.configs == [expected]


@pytest.mark.parametrize("threads", [("--threads", "1,2"), ("--threads", "1", "--threads", "2")])
def test_threads_are_swept_like_batch_sizes(invoke: Invoke, judging: Stage, threads: tuple[str, ...]) -> None:
    invoke("eval", "m.onnx", *threads, "--pin")
    assert judging.configs == [EvalConfig(model="m.onnx", threads=(1, 2), pin=True)]


def test_options_of_a_gpu_reach_eval(invoke: Invoke, judging: Stage) -> None:
    invoke("eval", "m.onnx", "--provider", "cuda", "--cuda-layout", "nhwc", "--no-tf32", "--conv-search", "heuristic",
           "--cuda-graph")  # fmt: skip
    invoke("eval", "m.onnx", "--provider", "tensorrt", "--fp16", "--engine-cache", "engines", "--cuda-graph")
    assert judging.configs == [
        EvalConfig(model="m.onnx", provider="cuda", cuda_layout="nhwc", tf32=False, conv_search="heuristic",
                   cuda_graph=True),
        EvalConfig(model="m.onnx", provider="tensorrt", fp16=True, engine_cache="engines", cuda_graph=True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cuda-graph"], "cuda_graph is an option of provider cuda and tensorrt, not of cpu"),
        (["--cuda-layout", "nhwc"], "cuda_layout is an option of provider cuda, not of cpu"),
        (["--provider", "cuda", "--fp16"], "fp16 is an option of provider tensorrt, not of cuda"),
        (["--provider", "tensorrt", "--no-tf32"], "tf32 is an option of provider cuda, not of tensorrt"),
        (["--provider", "cuda", "--pin"], "pin is an option of provider cpu, not of cuda"),
        (["--threads", "0"], "--threads"),
        (["--threads", "two"], "--threads"),
    ],
)
def test_options_that_the_provider_has_not_are_refused(
    invoke: Invoke, judging: Stage, arguments: list[str], message: str
) -> None:
    result = invoke("eval", "m.onnx", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not judging.configs


def test_lambda_is_a_flag_of_train(invoke: Invoke, training: Stage) -> None:
    invoke("train", "--model", "m", "--dataset", "d", "--method", "proximal-ns", "-o", "run", "--lambda", "1e-3",
           "--milestones", "0.3,0.6", "--no-nesterov")  # fmt: skip
    assert training.configs == [
        TrainConfig(model="m", dataset="d", method="proximal-ns", output="run", lambda_=1e-3, milestones=(0.3, 0.6),
                    nesterov=False)
    ]  # fmt: skip


def test_output_may_be_a_flag_but_not_both(invoke: Invoke, slimming: Stage) -> None:
    assert invoke("slim", "in.onnx", "-o", "out.onnx").exit_code == 0
    assert slimming.configs[0].output == Path("out.onnx")
    result = invoke("slim", "in.onnx", "out.onnx", "-o", "other.onnx")
    assert result.exit_code == 2
    assert "OUT.onnx and --output say the same; give one." in result.stderr


def test_the_configuration_file_lies_below_flags(invoke: Invoke, slimming: Stage, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[slim]\ninput = 'in.onnx'\nkeep-macs = 0.5\nscope = 'layer'\n")
    result = invoke("slim", "--config", path, "-o", "out.onnx", "--scope", "global", "--keep-params", "0.8")
    assert result.exit_code == 0
    assert slimming.configs == [SlimConfig(input="in.onnx", output="out.onnx", keep_params=0.8)]


def test_a_mistake_in_the_file_names_the_file(invoke: Invoke, slimming: Stage, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("keep_mac = 0.5\n")
    result = invoke("slim", "in.onnx", "out.onnx", "--config", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {path}: keep_mac: unknown key. Did you mean 'keep_macs'")


def test_print_config_is_read_back_and_runs_nothing(invoke: Invoke, slimming: Stage, tmp_path: Path) -> None:
    arguments = ["slim", "in.onnx", "out.onnx", "--keep-macs", "0.5", "--ignore", "é*", "--input-shape", "x:1x3"]
    printed = invoke(*arguments, "--print-config")
    assert (printed.exit_code, printed.stderr, slimming.configs) == (0, "", [])
    assert tomllib.loads(printed.stdout)["align"] == "auto", "defaults are shown too"
    path = tmp_path / "c.toml"
    path.write_text(printed.stdout)
    invoke(*arguments)
    invoke("slim", "--config", path)
    assert slimming.configs[0] == slimming.configs[1]
    as_json = json.loads(invoke(*arguments, "--print-config", "--json").stdout)
    assert as_json["keep_macs"] == 0.5


def test_resume_takes_the_options_of_the_run(invoke: Invoke, training: Stage, tmp_path: Path) -> None:
    first = TrainConfig(model="bn-cnn", dataset="digits", method="plain", output=tmp_path, epochs=7)
    (tmp_path / "config.toml").write_text(first.to_toml())
    assert invoke("train", "-o", tmp_path, "--resume").exit_code == 0
    assert training.configs == [first.model_copy(update={"resume": True})]
    result = invoke("train", "-o", tmp_path / "elsewhere", "--resume")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (2, "Error: --model is missing.")


# --- reports ---


def test_report_writes_the_object_that_json_prints(invoke: Invoke, training: Stage, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    arguments = ["train", "--model", "m", "--dataset", "d", "--method", "plain", "-o", "x", "--report", report]
    result = invoke(*arguments, "--json")
    assert json.loads(report.read_text()) == json.loads(result.stdout)
    refused = invoke(*arguments)
    assert refused.exit_code == 1
    assert "exists already. Pass --force" in refused.stderr
    assert len(training.configs) == 1, "refused before any work"
    assert invoke(*arguments, "--force").exit_code == 0


def test_a_stage_that_writes_its_report_itself_is_told_where(invoke: Invoke, slimming: Stage, tmp_path: Path) -> None:
    invoke("slim", "in.onnx", "out.onnx", "--report", tmp_path / "r.json")
    assert slimming.configs[0].report == tmp_path / "r.json"
    assert not (tmp_path / "r.json").exists()


# --- run ---


@pytest.fixture
def running(
    monkeypatch: pytest.MonkeyPatch, slim_result: SlimResult, eval_result: Callable[..., EvalResult]
) -> Stage:
    def outcome(name: str, status: str, result: Any) -> StageOutcome:
        facts = {"stage": name, "status": status, "seconds": 1.5, "folder": f"out/{name}"}
        return StageOutcome(**facts, result=result.model_dump(mode="json"))

    stages = [outcome("slim", "unchanged", slim_result), outcome("eval", "done", eval_result("failed"))]
    result = RunResult(seconds=3.0, output="out", stages=stages, report="out/report.html", verdict="failed")
    stage = Stage(result)
    monkeypatch.setattr(run, "run", stage)
    return stage


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.toml"
    path.write_text("output = 'out'\n[slim]\ninput = 'm.onnx'\nkeep_macs = 0.5\n[eval]\nlimit = 5\n")
    return path


def test_run_shows_the_stages_and_ends_on_the_verdict(invoke: Invoke, running: Stage, pipeline_file: Path) -> None:
    result = invoke("run", pipeline_file, "--stage", "eval", "-o", "elsewhere", "--seed", "4")
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["slim", "unchanged", "1.5", "s", "out/slim"]
    assert "Report: out/report.html" in lines
    assert result.stderr.splitlines()[-1].startswith("FAILED: 3.0 s: prune-onnx run ")
    ((config, stage),) = running.configs
    assert stage == "eval"
    table = {"input": "m.onnx", "keep_macs": 0.5}
    assert config == RunConfig(output="elsewhere", seed=4, slim=(table,), eval={"limit": 5})


def test_run_without_a_file_or_with_a_wrong_one_is_a_usage_error(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("run").exit_code == 2
    result = invoke("run", tmp_path / "absent.toml")
    assert (result.exit_code, result.stderr) == (2, f"Error: cannot read {tmp_path / 'absent.toml'}: "
                                                    "No such file or directory.\n")


def test_run_prints_its_configuration_as_the_file_it_came_from(
    invoke: Invoke, running: Stage, pipeline_file: Path
) -> None:
    values = tomllib.loads(invoke("run", pipeline_file, "--print-config").stdout)
    assert values["slim"] == [{"input": "m.onnx", "keep_macs": 0.5}]
    assert (values["output"], values["eval"], running.configs) == ("out", {"limit": 5}, [])


# --- listings ---


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["slim", "--list-criteria"], CRITERIA),
        (["train", "--list-models"], MODELS),
        (["train", "--list-datasets"], DATASETS),
        (["train", "--list-methods"], METHODS),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_listings_read_the_registries(invoke: Invoke, arguments: list[str], names: Any) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(names)
    rows = json.loads(invoke(*arguments, "--json").stdout)
    assert [row["name"] for row in rows] == list(names)
    assert len({row["description"] for row in rows} - {""}) == len(rows), "each has a line of its own"


def test_the_operators_are_listed_with_their_rules(invoke: Invoke) -> None:
    rows = json.loads(invoke("slim", "--list-ops", "--json").stdout)
    assert {"Conv", "MatMul", "Concat"} <= {name for row in rows for name in row["name"].split()}


def test_listing_a_registry_of_places_imports_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from prune_onnx.cli.listing import described_unimported
    from prune_onnx.graph_ops.registry import Registry

    (tmp_path / "places").mkdir()
    (tmp_path / "places" / "__init__.py").touch()
    (tmp_path / "places" / "bomb.py").write_text(
        'def found():\n    """What it is.\n\n    More.\n    """\nraise ImportError("imported")\nalias = found\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[str] = Registry("thing")
    registry.register("x")("bomb:found")
    registry.register("y")("bomb:alias")
    assert described_unimported(registry, "places") == [("x", "What it is."), ("y", "")]
    assert isinstance(sys.modules.pop("places"), types.ModuleType)


def test_a_latency_budget_is_flags(invoke: Invoke, slimming: Stage) -> None:
    flags = ["--keep-latency", "0.5", "--provider", "cuda", "--threads", "2", "--batch-size", "8", "--cost-cache", "c"]
    invoke("slim", "in.onnx", "out.onnx", *flags)
    config = slimming.configs[0]
    assert config.budget == ("keep_latency", 0.5)
    assert (config.provider, config.threads, config.batch_size, config.cost_cache) == ("cuda", 2, 8, Path("c"))
    assert invoke("slim", "in.onnx", "out.onnx", "--latency-ms", "3.5").exit_code == 0
    assert slimming.configs[1].budget == ("latency_ms", 3.5)
