"""What the benchmarks of bars share: a page with a row for each bar, and the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_onnx.graph_ops.files import write_text

Verdict = tuple[str, str, bool]
"""A bar, what was measured, and whether it is met."""


def page(title: str, command: str, facts: dict[str, Any], more: str, verdicts: Sequence[Verdict]) -> str:
    """Return the Markdown page.

    Args:
        title: of the page.
        command: that made it.
        facts: the environment.
        more: what else is to be said of the machine.
        verdicts: the rows.
    """
    rows = [f"| {bar} | {value} | {'yes' if met else '**no**'} |" for bar, value, met in verdicts]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    made = f"`{command}` · {facts['date']} · {facts['cpu']}, {facts['cores']} cores, {more} · {versions}"
    return "\n".join([f"# {title}", "", made, "", "| bar | measured | met |", "| --- | --- | --- |", *rows, ""])


def finish(text: str, found: dict[str, Any], verdicts: Sequence[Verdict], out: Path | None) -> None:
    """Print the page, store it with its figures, and exit with 1 when a bar is not met."""
    print(text)
    if out:
        write_text(out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
        write_text(out.with_suffix(".md"), text)
    if not all(met for _, _, met in verdicts):
        sys.exit("a bar is not met")
