"""Whether a stage's folder still holds what its configuration and its input files give.

Each stage of ``run`` keeps ``stage.json`` in its folder. It is written first as unfinished and again, last of all
files, as finished. A file counts by its content; size and time only tell whether the content has to be read again, so
that folders may be handed from one machine to another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.files import write_text
from prune_onnx.trainers.config import INCIDENTAL as TRAIN_INCIDENTAL

from .environment import capture
from .results import Model

FILE = "stage.json"

INCIDENTAL = frozenset(TRAIN_INCIDENTAL) | {"report", "html", "markdown", "github_summary", "engine_cache"}
"""Options that say where files lie and how a stage is run, but do not change what it finds out."""

OWN_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
"""``package.module:function``: a network or a metric of the user's own."""

DATA_SUFFIXES = (".onnx", ".npz", ".npy")
"""Text options that end so, or hold a slash, are files when there is one."""


class Seen(NamedTuple):
    """A file's content when it was last read, and what told then that it had not changed."""

    size: int
    mtime_ns: int
    sha256: str


class Stamp(Model):
    """The content of ``stage.json``.

    Attributes:
        key: hash of everything that decides the stage's result.
        finished: whether all files were written.
        artefacts: SHA-256 of each file of the folder, by its path in it.
        seen: every file that was read for the hashes, inputs and artefacts.
    """

    key: str
    finished: bool
    artefacts: dict[str, str] = Field(default_factory=dict)
    seen: dict[str, Seen] = Field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Stamp | None:
        """Return a folder's stamp, or ``None`` where there is none that this version understands."""
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, folder: Path) -> None:
        """Write the stamp.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n")

    def holds(self, key: str, folder: Path, files: Fingerprints) -> bool:
        """Whether the stage is finished, under this key, and its files are as it left them."""
        return self.finished and self.key == key and all(
            files.of(folder / name) == sha256 for name, sha256 in self.artefacts.items()
        )


class Fingerprints:
    """SHA-256 of files and folders; what was seen before and has the same size and time is not read again."""

    def __init__(self, known: Mapping[str, Seen] | None = None) -> None:
        self._known = known or {}
        self.seen: dict[str, Seen] = {}

    def of(self, path: Path) -> str | None:
        """Return the hash of a file's content, or of all files below a folder; ``None`` where there is nothing."""
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return _hash([[file.relative_to(path).as_posix(), self.of(file)] for file in files])
        try:
            now = path.stat()
            known = self._known.get(str(path))
            if known is None or known[:2] != (now.st_size, now.st_mtime_ns):
                with path.open("rb") as content:
                    known = Seen(now.st_size, now.st_mtime_ns, hashlib.file_digest(content, "sha256").hexdigest())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
        self.seen[str(path)] = known
        return known.sha256

    def folder(self, folder: Path) -> dict[str, str]:
        """Return the hash of every file below a stage's folder, its stamp left out."""
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / FILE)
        return {file.relative_to(folder).as_posix(): self.of(file) or "" for file in files}


def stage_key(name: str, folder: Path, configs: Sequence[BaseModel], files: Fingerprints) -> str:
    """Return the hash of all that decides a stage's result: options, contents of input files, and versions.

    Args:
        name: the stage. What ``eval`` measures depends on the machine and on ONNX Runtime too.
        folder: where the stage writes; files in it are no inputs.
        configs: the configuration of each step.
        files: reads the input files.
    """
    environment = capture()
    versions = environment["versions"]
    facts = {"version": versions.get("prune-onnx")}
    if name == "eval":
        runtimes = [versions.get(package) for package in ("onnxruntime", "onnxruntime-gpu")]
        facts |= {"cpu": environment["cpu"], "onnxruntime": runtimes}
    return _hash([name, facts, [_essence(config, folder, files) for config in configs]])


def _essence(config: BaseModel, folder: Path, files: Fingerprints) -> dict[str, Any]:
    """Return the options that count, with contents in the place of paths."""
    values = config.model_dump(exclude=INCIDENTAL & set(type(config).model_fields))
    return {key: _content(value, folder, files) for key, value in values.items()}


def _content(value: Any, folder: Path, files: Fingerprints) -> Any:
    """Return the content of the file that an option names, or the option itself."""
    if isinstance(value, list | tuple):
        return [_content(item, folder, files) for item in value]
    if isinstance(value, Path):
        return value.name if folder in value.parents else files.of(value) or str(value)
    if not isinstance(value, str):
        return value
    if OWN_FUNCTION.fullmatch(value):  # a module in the current folder is a file as well
        module = Path(value.partition(":")[0].replace(".", "/") + ".py")
        return [value, files.of(module)]
    return (files.of(Path(value)) or value) if "/" in value or value.endswith(DATA_SUFFIXES) else value


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
