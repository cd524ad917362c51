"""The pages of ``docs/`` and the README: their commands run or parse, their links lead somewhere, nothing is left out.

A block of a console session that follows ``<!-- runs -->`` is executed, one that follows ``<!-- fails N -->`` has to
end with exit code N and print the error that stands below the command. All other commands have to parse. Every page
is executed from the top in a folder of its own, in which the training run of ``train.md`` has been made already.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from prune_onnx.cli.main import COMMANDS, program
from prune_onnx.graph_ops.importance import CRITERIA
from prune_onnx.graph_ops.rules import RULES
from prune_onnx.trainers.data import DATASETS
from prune_onnx.trainers.methods import METHODS, method_class

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READMES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[a-z]+)(?: (?P<code>\d+))? -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
FIRST_RUN = "runs/digits"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    text: str
    mark: str | None = None
    code: int = 0

    def commands(self) -> Iterator[tuple[list[str], list[str]]]:
        """Yield the arguments of every ``prune-onnx`` command and the lines that stand below it."""
        for part in re.split(r"^\$ ", self.text.replace("\\\n", " "), flags=re.M)[1:]:
            line, *output = part.splitlines()
            words = shlex.split(line, comments=True)
            if words[:1] == ["prune-onnx"]:
                yield words[1:], [line for line in output if line.strip()]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(m["kind"], m["text"], m["mark"], int(m["code"] or 0)) for m in found]


def written(page: Path, folder: Path) -> None:
    """Write the files that a page shows: TOML and Python blocks whose first line is a comment with a file's name."""
    for block in blocks(page):
        name = re.match(r"# ([\w./-]+\.(?:toml|py))$", block.text.splitlines()[0])
        if block.kind in ("toml", "python") and name:
            path = folder / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the training run with which ``train.md`` begins."""
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    folder = tmp_path_factory.mktemp("trained")
    arguments = next(words for block in blocks(DOCS / "train.md") for words, _ in block.commands())
    assert arguments[-2:] == ["-o", FIRST_RUN], "train.md no longer begins with the run of all pages"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(program, arguments)
    assert result.exit_code == 0, result.output
    return folder / FIRST_RUN


RUNNING = [page for page in PAGES if any(block.mark for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
def test_marked_commands_do_what_the_page_says(
    page: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / FIRST_RUN)
    written(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in [block for block in blocks(page) if block.mark]:
        assert block.mark in ("runs", "fails")
        assert list(block.commands()), "a marked block without a command"
        for arguments, output in block.commands():
            if block.mark == "runs" and arguments[-2:] == ["-o", FIRST_RUN]:
                continue  # made already
            result = CliRunner().invoke(program, arguments)
            assert result.exit_code == block.code, f"{arguments}: {result.output}"
            if block.mark == "fails" and block.code != 3:
                said = " ".join(result.stderr.split())
                assert " ".join(" ".join(output).split()) in said, f"{arguments} says: {said}"


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_all_commands_parse(page: Path) -> None:
    for block in blocks(page):
        for arguments, _ in block.commands() if block.kind == "console" else ():
            if arguments[0].startswith("-"):
                continue
            assert arguments[0] in COMMANDS, arguments
            command = program.get_command(click.Context(program), arguments[0])
            try:
                command.make_context(arguments[0], list(arguments[1:]))
            except click.exceptions.Exit as end:  # --help
                assert end.exit_code == 0  # noqa: PT017
            except click.ClickException as error:
                if block.mark != "fails":
                    pytest.fail(f"{shlex.join(arguments)}: {error.format_message()}")


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in LINK.findall(text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_every_page_is_in_the_index_and_named_by_the_readme() -> None:
    index, readme = (DOCS / "index.md").read_text(encoding="utf-8"), READMES[0].read_text(encoding="utf-8")
    for page in PAGES:
        assert page.stem == "index" or f"({page.name})" in index, page.name
        assert f"(docs/{page.name})" in readme, page.name


def test_every_method_has_its_equation_and_source() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (.+?)\n(.*?)(?=^#|\Z)", text, flags=re.M | re.S))
    for name in METHODS:
        titles = [title for title in sections if f"`{name}`" in title]
        assert len(titles) == 1, f"{name} needs one section"
        section = sections[titles[0]]
        if name != "plain":
            assert "```text" in section, f"{name} has no equation"
            assert "Source:" in section, f"{name} has no source"
        for option in method_class(name).options():
            assert f"`--{option.rstrip('_').replace('_', '-')}`" in section, f"{name} takes {option}"


def test_every_criterion_is_described() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.+) \|$", text, flags=re.M))
    assert set(CRITERIA) <= set(rows)
    for name in CRITERIA:
        needs = CRITERIA.get(name).needs
        assert rows[name].split(" | ")[-1] == needs, f"{name} needs {needs}"


def test_every_rule_family_and_data_set_is_named() -> None:
    design = (DOCS / "design.md").read_text(encoding="utf-8")
    for family in {type(RULES.get(name)).__module__.rpartition(".")[2] for name in RULES}:
        assert f"`{family}`" in design, family
    train = (DOCS / "train.md").read_text(encoding="utf-8")
    for name in DATASETS:
        assert f"`{name}`" in train, name


EXTENSION = """
import runpy, sys
from importlib import import_module
from pathlib import Path

overlay = Path("overlay")
lists = {}
for path in sorted(overlay.glob("*/**/*.py")):
    folder = ".".join(path.relative_to(overlay).parts[:-1])
    package = import_module(f"prune_onnx.{folder}")
    if path.name == "__init__.py":
        lists[package] = path.read_text()
    elif path.parent.as_posix() not in package.__path__:
        package.__path__.append(path.parent.as_posix())
for package, lines in lists.items():
    exec(lines, vars(package))
runpy.run_path("overlay/try_it.py")
"""
"""Puts the files that the page shows beside those of the packages, and executes the lines for their lists."""


def test_extensions_of_the_page_work_and_are_short(tmp_path: Path, trained: Path) -> None:
    page = DOCS / "extending.md"
    shutil.copytree(trained, tmp_path / FIRST_RUN)
    written(page, tmp_path / "overlay")
    files = [path for path in (tmp_path / "overlay").rglob("*.py") if path.name not in ("__init__.py", "try_it.py")]
    assert len(files) == len(re.findall(r"^## (?!Try)", page.read_text(encoding="utf-8"), flags=re.M))
    for path in files:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 30, f"{path.name} has 30 lines or more"
    environment = {"PYTHONPATH": str(ROOT / ".typing"), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", EXTENSION], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("Error|Traceback", done.stderr), done.stderr
