"""The examples: each script runs as it stands where its data is there; what is too slow to run must parse."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from prune_onnx.cli.main import program
from prune_onnx.pipeline.config import load_toml, parse
from prune_onnx.pipeline.run import RunConfig

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Commands ``prune-onnx`` and ``python`` of this interpreter, first on the path."""
    commands = tmp_path / "bin"
    commands.mkdir()
    start = f"{sys.executable} -c 'from prune_onnx.cli.main import main; main()'"
    for name, line in {"prune-onnx": start, "python": sys.executable}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        (commands / name).chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    root = EXAMPLES.parent / ".typing"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MIN_TIME": "0.2"}


def run(environment: dict[str, str], *arguments: object) -> None:
    """Run a script and expect it to end well."""
    line = [str(argument) for argument in arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pictures_of_ones_own(tmp_path: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    run(environment, EXAMPLES / "own-images" / "prune.sh", tmp_path / "out")
    assert (tmp_path / "out" / "slim.onnx").stat().st_size < (tmp_path / "out/train/model.onnx").stat().st_size
    assert len(list((tmp_path / "out/images/test").rglob("*.png"))) == 450


def test_detector_from_elsewhere(tmp_path: Path, environment: dict[str, str]) -> None:
    model = Path(os.environ.get("PRUNE_ONNX_ULTRAFACE", ""))
    if not model.is_file():
        pytest.skip("PRUNE_ONNX_ULTRAFACE does not name the detector's file; see examples/detector/README.md")
    run(environment, EXAMPLES / "detector" / "prune.sh", model, tmp_path)
    slim = json.loads((tmp_path / "slim.json").read_text())
    assert slim["after"]["macs"] <= 0.7 * slim["before"]["macs"]
    assert slim["verification"]["passed"]


def test_a_missing_detector_is_an_error_that_says_where_it_is_from(tmp_path: Path, environment: dict[str, str]) -> None:
    script = EXAMPLES / "detector" / "prune.sh"
    line = [str(script), str(tmp_path / "none.onnx"), str(tmp_path / "out")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "README.md" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.toml")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_pipelines_are_valid(path: Path) -> None:
    parse(RunConfig, load_toml(path), source=path.name)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_commands_of_scripts_parse(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^prune-onnx .+$", text, flags=re.M)
    assert lines
    for line in lines:
        # Variables stand for one word each, an array of options for none, a default for its value.
        line = re.sub(r"\"\$\{\w+\[@\]\}\"", "", line)
        line = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", line)
        words = shlex.split(line)
        command = program.get_command(click.Context(program), words[1])
        try:
            command.make_context(words[1], words[2:])
        except click.ClickException as error:
            pytest.fail(f"{line}: {error.format_message()}")
