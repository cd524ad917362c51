"""What every stage's result carries, and how it becomes JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from prune_onnx.graph_ops.files import write_text

SCHEMA_VERSION = 1


class Model(BaseModel):
    """Base of all parts of a result: unknown keys are an error."""

    model_config = ConfigDict(extra="forbid")


class StageResult(Model):
    """Fields shared by all results.

    Attributes:
        schema_version: raised when a field changes its meaning or goes.
        command: the stage's name: ``train``, ``slim``, ``eval`` or ``run``.
        seconds: wall time of the stage.
        environment: versions, machine and the exact command line (see :mod:`.environment`).
    """

    schema_version: int = SCHEMA_VERSION
    command: str
    seconds: float
    environment: dict[str, Any] = Field(default_factory=dict)

    def to_json(self) -> str:
        """Return the result as one indented JSON object."""
        return self.model_dump_json(indent=2)

    def write(self, path: str | Path) -> None:
        """Write the JSON object atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(path, self.to_json() + "\n")
