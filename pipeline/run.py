"""The ``run`` stage: train, slim and eval from one configuration, each only when it is not up to date.

The stages hand over through folders, so that each may run on its own, in a job of its own:
``OUT/train`` (``model.onnx``), ``OUT/slim`` (``slim.onnx``), ``OUT/eval`` (``report.html``, ``report.md``), each with
``result.json`` and ``stage.json`` (see :mod:`.stamps`). ``OUT/report.html`` is a copy of the report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from prune_onnx.graph_ops.errors import ConfigError, ModelError, OutputError
from prune_onnx.graph_ops.files import write_bytes, write_text
from prune_onnx.graph_ops.progress import SILENT, Progress
from prune_onnx.trainers.config import TrainConfig
from prune_onnx.trainers.distributed import processes

from .config import keys, parse
from .environment import capture
from .eval_results import EXIT_CODES, EvalResult
from .eval_schema import EvalConfig
from .gates import Verdict
from .results import Model, StageResult
from .slim_schema import Group, Removed, SlimConfig, SlimResult, Verification
from .stamps import FILE as STAMP
from .stamps import Fingerprints, Stamp, stage_key

StageName = Literal["train", "slim", "eval"]

RESULT = "result.json"
REPORT = "report.html"

SET_BY_RUN = ("output", "report", "html", "markdown", "slim_report", "force", "resume", "dry_run")
"""Options of the stages that ``run`` sets itself."""

SHARED = ("seed", "data_dir", "download")
"""Options of ``run`` that hold for every stage that has them and does not say otherwise."""


@dataclass(frozen=True)
class Stage:
    """One stage with its options checked.

    Attributes:
        name: which one.
        folder: where its files go.
        configs: one configuration; several for the steps of ``slim``, each on what the one before it wrote.
        before: folders of the stages before it, by name.
    """

    name: StageName
    folder: Path
    configs: tuple[BaseModel, ...]
    before: dict[str, Path]


class RunConfig(BaseModel):
    """Options of ``prune-onnx run``; ``train``, ``slim`` and ``eval`` are the tables of the configuration file.

    Paths are relative to the current folder, as on the command line.

    Attributes:
        output: the folder of all results.
        seed: of every stage that has none of its own.
        data_dir: folder of the data files, for every stage.
        download: fetch missing data files.
        force: run stages again that are up to date, and take over folders that something else has written.
        train: options of ``train``; leave it out to start from a file.
        slim: options of ``slim``, or a list of them: steps, one after another. ``input`` is the trained model, or has
            to be given where there is no ``train``.
        eval: options of ``eval``; ``model``, ``baseline`` and ``dataset`` follow from the stages before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path
    seed: int = 0
    data_dir: Path | None = None
    download: bool = False
    force: bool = False
    train: dict[str, Any] | None = None
    slim: tuple[dict[str, Any], ...] = ()
    eval: dict[str, Any] | None = None

    @field_validator("slim", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if not self.stages():
            raise ValueError("there is nothing to do: give a [train], [slim] or [eval] table")
        return self

    def stages(self) -> list[Stage]:
        """Return the stages in their order, with all options checked and all paths filled in.

        Raises:
            ConfigError: a wrong or missing option of a stage; the message names its table.
        """
        folders = {name: self.output / name for name in ("train", "slim", "eval")}
        stages: list[Stage] = []

        def add(name: StageName, *configs: BaseModel) -> None:
            stages.append(Stage(name, folders[name], configs, {stage.name: stage.folder for stage in stages}))

        original = None
        if self.train is not None:
            add("train", self._parse(TrainConfig, "[train]", self.train, output=folders["train"]))
            original = folders["train"] / "model.onnx"
        if self.slim:
            steps = self._slim_steps(folders["slim"], original)
            add("slim", *steps)
            original = steps[0].input
        if self.eval is not None:
            values: dict[str, Any] = {}
            if self.slim:
                values |= {"model": folders["slim"] / "slim.onnx"}
                if "compare" not in self.eval:
                    values["baseline"] = original
            elif original is not None:
                values["model"] = original
            if self.train is not None and "data" not in self.eval:
                values["dataset"] = self.train.get("dataset")
            add("eval", self._parse(EvalConfig, "[eval]", {**values, **self.eval}))
        return stages

    def _slim_steps(self, folder: Path, source: Path | None) -> tuple[SlimConfig, ...]:
        """Return the configuration of each step; all but the last write ``step1.onnx``, ``step2.onnx``, ..."""
        steps = []
        for number, values in enumerate(self.slim, 1):
            label = "[slim]" if len(self.slim) == 1 else f"[[slim]] number {number}"
            if "input" in values and source is not None:
                raise ConfigError(f"{label}: input: it is what the stage before writes; leave it out.")
            if "input" not in values and source is None:
                raise ConfigError(f"{label}: input is missing: there is no [train] table that would give a model.")
            output = folder / ("slim.onnx" if number == len(self.slim) else f"step{number}.onnx")
            steps.append(self._parse(SlimConfig, label, {"input": source, **values}, output=output, force=True))
            source = output
        return tuple(steps)

    def _parse(self, schema: type[BaseModel], label: str, values: dict[str, Any], **fixed: Any) -> Any:
        """Return a stage's options: ``fixed`` ones are not the user's to set, ``values`` overrule the shared ones."""
        known = keys(schema)
        for key in values:
            if key.replace("-", "_") in SET_BY_RUN and key.replace("-", "_") in known:
                raise ConfigError(f"{label}: {key}: run sets it itself; leave it out.")
        shared = {key: getattr(self, key) for key in SHARED if key in known}
        return parse(schema, {**shared, **values, **fixed}, source=label)


class StageOutcome(Model):
    """What became of a stage.

    Attributes:
        stage: which one.
        status: ``unchanged`` when it was up to date, and nothing was done.
        seconds: wall time now.
        folder: where its files lie.
        result: the stage's own result, as in its ``result.json``; for several steps of ``slim``, of all of them.
    """

    stage: StageName
    status: Literal["done", "unchanged"]
    seconds: float
    folder: str
    result: dict[str, Any]

    def typed(self) -> StageResult:
        """Return ``result`` as what the stage function returned."""
        from .train import TrainResult

        schemas = {"train": TrainResult, "slim": SlimResult, "eval": EvalResult}
        return schemas[self.stage].model_validate(self.result)


class RunResult(StageResult):
    """Result of ``run``.

    Attributes:
        output: the folder of all results.
        stages: in their order; with ``--stage``, that one.
        report: the HTML report, when ``eval`` is among the stages; its Markdown twin lies in the folder of ``eval``.
        verdict: of ``eval``.
    """

    command: str = "run"
    output: str
    stages: list[StageOutcome]
    report: str | None
    verdict: Verdict | None

    @property
    def exit_code(self) -> int:
        """That of ``eval``: 0 passed, 3 a gate failed, 4 inconclusive; 0 without it."""
        return EXIT_CODES[self.verdict or "passed"]


def run(config: RunConfig, stage: StageName | None = None, progress: Progress = SILENT) -> RunResult:
    """Bring all stages up to date, or one of them.

    A stage is run again when its options, the content of a file that it reads or writes, or the program's version has
    changed (for ``eval``, the machine or ONNX Runtime too); a measurement that was inconclusive is repeated. Training
    that was stopped goes on from its checkpoint.

    Args:
        config: the stages and their options.
        stage: only this one, on the files that the stages before it left.
        progress: told what is being done.

    Raises:
        PruneOnnxError: whatever a stage raises; the stages before it are finished then.
        ConfigError: ``stage`` is not in the configuration, the file that it starts from is missing, or several
            processes were started.
        OutputError: a stage's folder holds files of something else, or cannot be written.
    """
    began = time.perf_counter()
    if processes() > 1:
        raise ConfigError("run works in one process. Train with torchrun and train, then call run without it.")
    stages = config.stages()
    if stage is not None and stage not in [s.name for s in stages]:
        raise ConfigError(f"--stage {stage}: the configuration has no [{stage}] table.")
    outcomes = [_bring_up_to_date(s, config.force, progress) for s in stages if stage in (None, s.name)]
    measured = next((outcome for outcome in outcomes if outcome.stage == "eval"), None)
    report = config.output / REPORT
    if measured:
        write_bytes(report, (Path(measured.folder) / REPORT).read_bytes())
    return RunResult(
        seconds=round(time.perf_counter() - began, 3),
        environment=capture(),
        output=str(config.output),
        stages=outcomes,
        report=str(report) if measured else None,
        verdict=measured.result["verdict"] if measured else None,
    )


def _bring_up_to_date(stage: Stage, force: bool, progress: Progress) -> StageOutcome:
    """Run a stage, unless its folder holds already what it would give."""
    began = time.perf_counter()
    _check_inputs(stage)
    stamp = Stamp.read(stage.folder)
    files = Fingerprints(stamp.seen if stamp else None)
    key = stage_key(stage.name, stage.folder, stage.configs, files)
    unchanged = stamp is not None and not force and stamp.holds(key, stage.folder, files)
    if unchanged:
        progress.note(f"{stage.name}: up to date in {stage.folder}")
        result = json.loads((stage.folder / RESULT).read_bytes())
    else:
        stopped = stamp is not None and stamp.key == key and not stamp.finished and not force
        if not stopped:
            _clear(stage.folder, stamp, force)
        Stamp(key=key, finished=False, seen=files.seen).write(stage.folder)
        progress.note(f"{stage.name}: writing to {stage.folder}")
        try:
            found = WORK[stage.name](stage, stopped, progress)
        except BaseException:
            _forget(stage.folder)
            raise
        found.write(stage.folder / RESULT)
        finished = getattr(found, "verdict", None) != "inconclusive"
        artefacts = files.folder(stage.folder)
        Stamp(key=key, finished=finished, artefacts=artefacts, seen=files.seen).write(stage.folder)
        result = found.model_dump(mode="json")
    return StageOutcome(
        stage=stage.name,
        status="unchanged" if unchanged else "done",
        seconds=round(time.perf_counter() - began, 3),
        folder=str(stage.folder),
        result=result,
    )


def _check_inputs(stage: Stage) -> None:
    """Say what is missing before anything is written, and which stage would make it."""
    folders = {folder: name for name, folder in stage.before.items()}
    for key in ("input", "model", "baseline"):
        path = getattr(stage.configs[0], key, None)
        if isinstance(path, Path) and not path.exists():
            if path.parent in folders:
                raise ConfigError(f"{path} is missing: run --stage {folders[path.parent]} first.")
            raise ModelError(f"{path} does not exist.")


def _clear(folder: Path, stamp: Stamp | None, force: bool) -> None:
    """Take away what the stage wrote before, so that nothing old passes for new if it fails now.

    Raises:
        OutputError: the folder holds files, and no stamp says that they are this stage's.
    """
    if stamp is None and not force and folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} holds files that run did not write. Pass --force to write there all the same.")
    if stamp is None:
        return
    # A stage that was stopped has listed nothing yet, but the folder is its own.
    names = stamp.artefacts or [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _forget(folder: Path) -> None:
    """Remove the folder of a stage that failed before it wrote anything."""
    if [path.name for path in folder.iterdir()] == [STAMP]:
        (folder / STAMP).unlink()
        folder.rmdir()
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def _train(stage: Stage, stopped: bool, progress: Progress) -> StageResult:
    from .train import train

    config = stage.configs[0].model_copy(update={"resume": stopped, "force": not stopped})
    return train(config, progress)


def _slim(stage: Stage, stopped: bool, progress: Progress) -> SlimResult:
    from .slim import slim

    results = [slim(config, progress) for config in stage.configs]
    if len(results) == 1:
        return results[0]
    for number, result in enumerate(results, 1):
        result.write(stage.folder / f"step{number}.json")
    return in_one(results)


def in_one(results: list[SlimResult]) -> SlimResult:
    """Return several steps as one result: from the first one's input to the last one's output.

    A group keeps its name from step to step; one that a later step no longer has is as the last step left it. Each step
    was held against its own reference: ``verification`` has the largest differences of all.
    """
    groups: dict[str, Group] = {}
    for result in results:
        for group in result.groups:
            before = groups.get(group.name)
            channels = before.channels if before else group.channels
            groups[group.name] = group.model_copy(update={"channels": channels})
    checks = [result.verification for result in results if result.verification]
    last = results[-1]
    return last.model_copy(
        update={
            "seconds": sum(result.seconds for result in results),
            "input": results[0].input,
            "budget": ", then ".join(result.budget for result in results),
            "before": results[0].before,
            "removed": Removed(
                channels=sum(result.removed.channels for result in results),
                groups=sum(group.kept < group.channels for group in groups.values()),
            ),
            "constants": _sums([result.constants for result in results]),
            "groups": list(groups.values()),
            "timings": _sums([result.timings for result in results]),
            "verification": _widest(checks) if checks else None,
            "notes": list(dict.fromkeys(note for result in results for note in result.notes)),
        }
    )


def _widest(checks: list[Verification]) -> Verification:
    """Return the largest differences of all checks; the reference is the original only where it was in all of them."""
    return Verification(
        reference="original" if all(check.reference == "original" for check in checks) else "masked",
        max_abs_diff=max(check.max_abs_diff for check in checks),
        max_rel_diff=max(check.max_rel_diff for check in checks),
        tolerance=max(check.tolerance for check in checks),
        passed=all(check.passed for check in checks),
    )


def _sums(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up mappings of numbers key by key."""
    total: dict[str, Any] = {}
    for key, value in (item for part in parts for item in part.items()):
        total[key] = total.get(key, 0) + value
    return total


def _eval(stage: Stage, stopped: bool, progress: Progress) -> EvalResult:
    from .evaluate import evaluate
    from .report import to_markdown, write_html
    from .train import TrainResult

    config = stage.configs[0]
    if config.profile is None:  # the report is for people
        config = config.model_copy(update={"profile": True})
    result = evaluate(config, progress)
    parts: dict[str, Any] = {"eval_result": result}
    if folder := stage.before.get("slim"):
        parts["slim_result"] = SlimResult.model_validate_json((folder / RESULT).read_bytes())
    if folder := stage.before.get("train"):
        parts["train_result"] = TrainResult.model_validate_json((folder / RESULT).read_bytes())
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        parts["metrics"] = [json.loads(line) for line in lines]
    write_html(stage.folder / REPORT, **parts)
    write_text(stage.folder / "report.md", to_markdown(**parts))
    return result


WORK: dict[StageName, Callable[[Stage, bool, Progress], StageResult]] = {"train": _train, "slim": _slim, "eval": _eval}
