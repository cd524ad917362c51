"""Configuration: TOML in, pydantic models out, and errors that name the key and what to write instead."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.graph_ops.registry import close_matches

Schema = TypeVar("Schema", bound=BaseModel)

MOST_ERRORS = 2
"""Errors shown at once: a message is one or two lines."""


def parse(
    schema: type[Schema],
    values: Mapping[str, Any],
    source: str = "options",
    labels: Mapping[str, str] | None = None,
) -> Schema:
    """Validate ``values`` against ``schema``.

    Args:
        schema: a pydantic model that forbids extra keys.
        values: keys in the schema's spelling, or with hyphens as the flags have them.
        source: where the values come from, such as a file's name; stands before the key in an error.
        labels: how to call single keys in an error, where that is better than ``source: key`` (a flag's name).

    Raises:
        ConfigError: an unknown key (close matches are named), a missing or a wrong value.
    """
    known = keys(schema)
    plain = {key.replace("-", "_"): value for key, value in values.items()}
    names = {key.replace("-", "_"): label for key, label in (labels or {}).items()}
    for key in plain:
        if key not in known:
            label = names.get(key, f"{source}: {key}")
            hint = close_matches(key, known) or f" Known: {', '.join(known)}."
            raise ConfigError(f"{label}: unknown key.{hint}")
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        found: dict[str, list[Mapping[str, Any]]] = {}
        for detail in error.errors(include_url=False):
            found.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
        lines = [
            _explain(names.get(key, f"{source}: {key}" if key else source), plain.get(key), details)
            for key, details in found.items()
        ]
        raise ConfigError("\n".join(lines[:MOST_ERRORS])) from None


def keys(schema: type[BaseModel]) -> list[str]:
    """Return the keys that ``schema`` takes, in its order; an alias stands for its field."""
    return [field.alias or name for name, field in schema.model_fields.items()]


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing, unreadable or not TOML (the message has line and column).
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def to_toml(values: Mapping[str, Any], table: str = "") -> str:
    """Return JSON-like values as TOML that :func:`load_toml` reads back; ``None`` is left out.

    Args:
        values: strings, numbers, booleans, lists of these, mappings, and lists of mappings (an array of tables).
        table: name of the table that the values belong to; empty at the top.
    """
    plain, tables = [], []
    for key, value in values.items():
        name = key if re.fullmatch(r"[\w-]+", key, re.ASCII) else _toml_value(key)
        path = f"{table}.{name}" if table else name
        if isinstance(value, Mapping):
            tables.append(f"\n[{path}]\n{to_toml(value, path)}")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            tables.extend(f"\n[[{path}]]\n{to_toml(item, path)}" for item in value)
        elif value is not None:
            plain.append(f"{name} = {_toml_value(value)}\n")
    return "".join(plain + tables)


def _toml_value(value: Any) -> str:
    # JSON's strings, numbers, booleans and arrays of them are TOML's as well, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _explain(label: str, value: Any, details: list[Mapping[str, Any]]) -> str:
    """Return one line for all that pydantic says of one key (a union gives one complaint for each member)."""
    # A list with a wrong entry has too few right ones as well, which says nothing.
    details = [d for d in details if d["type"] != "too_short" or len(d["loc"]) > 1] if len(details) > 1 else details
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    problems = list(dict.fromkeys(_problem(detail) for detail in details))
    if problems == ["missing"]:
        return f"{label} is missing."
    expected = [name for d in details if d["type"] == "literal_error" for name in re.findall("'(.*?)'", d["msg"])]
    shown = str(value) if isinstance(value, str) and value.strip() else repr(value)
    if problems[0].startswith("should be "):
        rest = [p.removeprefix("should be ") for p in problems[1:]]
        hint = close_matches(value, expected) if isinstance(value, str) else ""
        return f"{label}: {shown} {' or '.join([problems[0], *rest])}.{hint}"
    return f"{label}: {'; '.join(problems)}."


def _problem(detail: Mapping[str, Any]) -> str:
    """Return pydantic's message without its set phrases, as the end of a sentence."""
    if detail["type"] == "missing":
        return "missing"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    if message.startswith("Input should be "):
        return "should be " + re.sub(", (unable to|got a).*", "", message.removeprefix("Input should be "))
    return message
