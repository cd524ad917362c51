"""Flags such as ``--list-models``: the names of a registry with a line about each."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_onnx.graph_ops.registry import Registry

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Listing:
    """A flag that lists what exists and ends the command.

    Attributes:
        flag: such as ``--list-criteria``.
        help: its line on the help page.
        rows: gives (name, description) of everything; called only when the flag is given.
    """

    flag: str
    help: str
    rows: Callable[[], Rows]


def described(registry: Registry[Any]) -> Rows:
    """Return the names of a registry of objects, each with the first line of its docstring."""
    return [(name, _first_line(registry.get(name).__doc__)) for name in registry]


def described_unimported(registry: Registry[str], package: str) -> Rows:
    """Return the names of a registry of places, each with the first line of the docstring that stands there.

    Args:
        registry: its items are ``"module:name"``, to be imported from ``package`` when used.
        package: the package that holds the modules. They are read, not imported: they would bring torch along.
    """
    rows = []
    for name in registry:
        module, _, attribute = registry.get(name).partition(":")
        spec = importlib.util.find_spec(f"{package}.{module}")
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        found = [node for node in tree.body if getattr(node, "name", None) == attribute]
        rows.append((name, _first_line(ast.get_docstring(found[0]) if found else None)))
    return rows


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
