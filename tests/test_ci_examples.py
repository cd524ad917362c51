"""The CI examples, job by job: each in a folder of its own, with nothing but its checkout, caches and artifacts.

The commands are run as they stand; only ``pip`` is stood in for, because what it would install is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_onnx.pipeline.config import load_toml
from prune_onnx.pipeline.run import RunConfig
from prune_onnx.pipeline.stamps import Fingerprints, Stamp, stage_key

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CI = ROOT / "examples" / "ci"


class Workplace:
    """Where jobs run: a store of artifacts and caches, and commands that are ready to use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"
        self.store.mkdir()
        self.summary = folder / "summary.md"
        commands = folder / "bin"
        commands.mkdir()
        program = f"{sys.executable} -c 'from prune_onnx.cli.main import main; main()'"
        for name, line in {"prune-onnx": f'exec {program} "$@"', "pip": f'echo "$@" >> {folder}/pip.log'}.items():
            (commands / name).write_text(f"#!/bin/sh\n{line}\n")
            (commands / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / ".typing"),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "OMP_NUM_THREADS": "1",  # training does not wait for processors that others use
        }

    def checkout(self, name: str) -> Path:
        """Return a fresh folder with what a checkout has that the jobs need."""
        place = self.folder / name
        shutil.copytree(CI, place / "examples" / "ci")
        for file in ("constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / file, place / file)
        return place

    def run(self, line: str, place: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a step as CI does: in bash, which stops at the first error."""
        environment = self.environment | variables
        return subprocess.run(
            ["bash", "-eo", "pipefail", "-c", line], cwd=place, env=environment, capture_output=True, text=True
        )

    def put(self, key: str, path: Path) -> None:
        """Keep a folder; times are lost, as they are between machines."""
        shutil.copytree(path, self.store / key, copy_function=shutil.copyfile, dirs_exist_ok=True)

    def get(self, key: str, path: Path) -> None:
        """Bring a folder back."""
        if (self.store / key).exists():
            shutil.copytree(self.store / key, path, copy_function=shutil.copyfile)

    @property
    def installed(self) -> list[str]:
        """What pip was told."""
        return (self.folder / "pip.log").read_text().splitlines()


def github_job(workflow: dict[str, Any], name: str, workplace: Workplace, place: str) -> list[str]:
    """Run a job of a GitHub workflow; return what its steps wrote to stderr."""
    folder, said = workplace.checkout(place), []
    caches = []
    for step in workflow["jobs"][name]["steps"]:
        action, given = step.get("uses", "").split("@")[0], step.get("with", {})
        if action == "actions/cache":
            workplace.get(f"cache {given['key']}", folder / given["path"])
            caches.append(given)
        elif action == "actions/download-artifact":
            workplace.get(given["name"], folder / given["path"])
        elif action == "actions/upload-artifact":
            workplace.put(given["name"], folder / given["path"])
        elif action:
            assert action in ("actions/checkout", "actions/setup-python")
        else:
            done = workplace.run(step["run"], folder, workflow["env"])
            assert done.returncode == 0, (step, done.stderr)
            said.append(done.stderr)
    for cache in caches:
        workplace.put(f"cache {cache['key']}", folder / cache["path"])
    return said


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return yaml.safe_load((CI / "github-actions.yml").read_text())


@pytest.fixture(scope="module")
def github(workflow: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """All jobs of the GitHub workflow have run."""
    workplace = Workplace(tmp_path_factory.mktemp("github"))
    for name in workflow["jobs"]:
        github_job(workflow, name, workplace, name)
    return workplace


def test_github_jobs_hand_over_and_end_in_a_report(github: Workplace, workflow: dict[str, Any]) -> None:
    assert list(workflow["jobs"]) == ["train", "slim", "eval"]
    assert set(os.listdir(github.store)) >= {"train", "slim", "report"}
    page = (github.store / "report" / "report.html").read_text()
    assert "Training" in page, "the report has what the job that trained handed on"
    assert "Channels kept" in page
    assert "## slim.onnx against model.onnx" in github.summary.read_text()
    assert github.installed == ["install -c constraints.txt .[digits]"] * 3


def test_what_the_github_jobs_install_exists(workflow: dict[str, Any]) -> None:
    assert (ROOT / "constraints.txt").is_file()
    assert '\ndigits = ["scikit-learn' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / workflow["env"]["PIPELINE"]).is_file()


def test_an_unchanged_stage_from_the_cache_costs_under_a_second(github: Workplace, workflow: dict[str, Any]) -> None:
    said = github_job(workflow, "train", github, "again")
    assert "train: up to date" in said[-1]
    line = f"prune-onnx run {CI / 'pipeline.toml'} --stage train --json"
    done = github.run(line, github.folder / "again", {})
    (stage,) = json.loads(done.stdout)["stages"]
    assert stage["status"] == "unchanged"
    assert stage["seconds"] < 1
    assert json.loads(done.stdout)["seconds"] < 1


def test_gitlab_jobs_hand_over_and_end_in_a_report(
    github: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pipeline = yaml.safe_load((CI / "gitlab-ci.yml").read_text())
    workplace = Workplace(tmp_path_factory.mktemp("gitlab"))
    jobs = [pipeline[stage] for stage in pipeline["stages"]]
    workplace.put("cache", github.store / "train")  # an earlier pipeline trained already
    for job in jobs:
        folder = workplace.checkout(job["stage"])
        for path in job.get("cache", {}).get("paths", []):
            workplace.get("cache", folder / path)
        for earlier in workplace.store.iterdir():  # GitLab hands all artifacts of earlier stages on
            if earlier.name != "cache":
                workplace.get(earlier.name, folder / "runs" / "ci" / earlier.name)
        for line in [*pipeline["default"]["before_script"], *job["script"]]:
            done = workplace.run(line, folder, pipeline["variables"])
            allowed = job.get("allow_failure", {}).get("exit_codes")
            assert done.returncode in (0, allowed), (line, done.stderr)
        for path in job["artifacts"]["paths"]:
            assert Path(path).name == job["stage"]
            workplace.put(Path(path).name, folder / path)
    assert (workplace.store / "eval" / "report.html").is_file()
    assert workplace.installed == ["install -c constraints.txt .[digits]"] * 3


def test_a_cache_of_other_options_is_not_used(github: Workplace) -> None:
    folder = github.checkout("changed")
    github.get("train", folder / "runs" / "ci" / "train")
    path = folder / "examples" / "ci" / "pipeline.toml"
    path.write_text(path.read_text().replace("epochs = 4", "epochs = 5"))
    (stage,) = [s for s in RunConfig.model_validate(load_toml(path)).stages() if s.name == "train"]
    stamp = Stamp.read(folder / "runs" / "ci" / "train")
    assert stamp is not None
    assert stage_key("train", stage.folder, stage.configs, Fingerprints()) != stamp.key
