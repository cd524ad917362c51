"""What is installed is what is here: every package and data file is listed, the entry point works, one version."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = sum(PROJECT["project"]["optional-dependencies"].values(), PROJECT["project"]["dependencies"])
SETUPTOOLS = PROJECT["tool"]["setuptools"]
LAYERS = ("graph_ops", "trainers", "pipeline", "cli")

try:
    INSTALLED = importlib.metadata.distribution("prune-onnx")
except importlib.metadata.PackageNotFoundError:
    INSTALLED = None
installed = pytest.mark.skipif(INSTALLED is None, reason="prune-onnx is not installed in this environment")


@pytest.mark.parametrize("folder", LAYERS)
def test_every_package_is_listed_and_every_listed_package_exists(folder: str) -> None:
    found = {
        ".".join(("prune_onnx", *init.parent.relative_to(ROOT).parts)) for init in (ROOT / folder).rglob("__init__.py")
    }
    listed = {name for name in SETUPTOOLS["packages"] if f"{name}.".startswith(f"prune_onnx.{folder}.")}
    assert found == listed
    assert SETUPTOOLS["package-dir"][f"prune_onnx.{folder}"] == folder


@pytest.mark.parametrize("folder", LAYERS)
def test_every_module_lies_in_a_package(folder: str) -> None:
    assert [path for path in (ROOT / folder).rglob("*.py") if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("folder", LAYERS)
def test_every_data_file_is_listed(folder: str) -> None:
    for path in (ROOT / folder).rglob("*"):
        if path.is_dir() or path.suffix in (".py", ".pyc"):
            continue
        package = path.parent
        while not (package / "__init__.py").exists():
            package = package.parent
        name = ".".join(("prune_onnx", *package.relative_to(ROOT).parts))
        patterns = [*SETUPTOOLS["package-data"].get("*", []), *SETUPTOOLS["package-data"].get(name, [])]
        assert any(path.relative_to(package).match(pattern) for pattern in patterns), path


@pytest.mark.parametrize("folder", LAYERS)
def test_the_symlinks_for_tools_lead_to_the_folders(folder: str) -> None:
    assert (ROOT / ".typing" / "prune_onnx" / folder).resolve() == ROOT / folder


def test_every_dependency_is_pinned_in_the_constraints() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", line) for line in lines)
    pinned = {canonicalize_name(Requirement(line).name) for line in lines}
    assert {canonicalize_name(Requirement(text).name) for text in DEPENDENCIES} <= pinned


def test_every_dependency_is_a_valid_requirement() -> None:
    for text in DEPENDENCIES:
        Requirement(text)  # raises where pip would refuse to build


@installed
def test_the_installed_version_is_the_projects() -> None:
    assert importlib.metadata.version("prune-onnx") == PROJECT["project"]["version"]


@installed
def test_the_installed_command_runs_from_anywhere(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "prune-onnx"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([command, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"prune-onnx {PROJECT['project']['version']}\n", "")


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{PROJECT['project']['version']}]" in text or "## [Unreleased]" in text
