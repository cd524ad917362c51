"""The arrows between the folders: cli -> pipeline -> trainers -> graph_ops, and what each may bring along.

Imports are read from the source, those inside functions too. Heavy libraries are also held off at run time.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("graph_ops", "trainers", "pipeline", "cli")
"""From the bottom up: a folder may import those before it."""

SHOWING = {"click", "rich"}
BANNED = {
    "graph_ops": SHOWING | {"torch", "accelerate", "onnxruntime", "onnxscript", "pydantic", "jinja2", "matplotlib"},
    "trainers": SHOWING | {"onnxruntime", "jinja2", "matplotlib"},
    "pipeline": SHOWING,
    "cli": {"torch", "onnxruntime", "onnx", "numpy", "matplotlib"},
}
LOWEST = {"numpy", "onnx", "onnx_graphsurgeon", "google", "ml_dtypes"}
"""All that graph_ops may import beside the standard library; ``google`` is the protobuf that onnx is made of."""

SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str, int]]:
    """Yield line, module and level (0 is absolute) of every import statement of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", node.level


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def test_the_sources_are_found() -> None:
    assert {layer_of(path) for path in SOURCES} == set(LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    layer = layer_of(path)
    below = LAYERS[: LAYERS.index(layer)]
    depth = len(path.relative_to(ROOT).parts) - 1
    for line, module, level in imports(path):
        where = f"{path.relative_to(ROOT)}:{line}: {module}"
        first, _, rest = module.partition(".")
        if level:
            assert level <= depth, f"{where} climbs out of {layer}; import prune_onnx.<folder> instead"
            continue
        assert first not in LAYERS, f"{where}: import prune_onnx.{module}, which is what users have"
        if first == "prune_onnx":
            target = rest.partition(".")[0]
            assert target != layer, f"{where}: inside a folder imports are relative"
            assert target in below, f"{where}: {layer} may import {', '.join(below) or 'no other folder'}"
        assert first not in BANNED[layer], f"{where}: not in {layer}"
        if layer == "graph_ops" and first != "prune_onnx":
            assert first in sys.stdlib_module_names | LOWEST, f"{where}: not in graph_ops"


@pytest.mark.parametrize("path", [p for p in SOURCES if p != ROOT / "cli" / "output.py"], ids=lambda p: p.name)
def test_only_the_output_module_prints(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.relative_to(ROOT)}:{node.lineno}: return a result, or tell progress"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("prune_onnx.cli.main", {"torch", "onnxruntime", "onnx", "numpy", "matplotlib", "pydantic", "rich"}),
        ("prune_onnx.cli.train", {"torch", "onnxruntime", "onnx", "matplotlib"}),
        ("prune_onnx.cli.slim", {"torch", "onnxruntime", "onnx", "matplotlib"}),
        ("prune_onnx.cli.eval", {"torch", "onnxruntime", "onnx", "matplotlib"}),
        ("prune_onnx.cli.run", {"torch", "onnxruntime", "onnx", "matplotlib"}),
        ("prune_onnx.trainers.data", {"torch", "onnx"}),
        ("prune_onnx.trainers.models", {"torch"}),
        ("prune_onnx.trainers.methods", {"torch"}),
        ("prune_onnx.trainers.config", {"torch", "numpy"}),
        ("prune_onnx.pipeline.train", {"torch", "onnxruntime", "matplotlib"}),
        ("prune_onnx.pipeline.slim", {"torch", "matplotlib"}),
        ("prune_onnx.pipeline.evaluate", {"torch", "matplotlib"}),
        ("prune_onnx.pipeline.report", {"torch", "onnxruntime", "matplotlib"}),
    ],
)
def test_a_module_comes_without_what_it_may_not_need(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}\nfound = {heavy!r} & set(sys.modules)\nsys.exit(f'imports {{found}}' if found else 0)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
