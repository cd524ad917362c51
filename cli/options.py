"""Flags made from a stage's configuration schema: names, types, help and defaults live there and nowhere else."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.pipeline.config import keys, load_toml

UNSET = "unset"
"""How help shows a default of ``None``."""


class Flag(click.Option):
    """An option that belongs to a section of the help page.

    Args:
        args: as of :class:`click.Option`.
        section: heading under which the option stands.
        both: show the ``--no-`` form of a switch too; of one that is off, it only overrules a configuration file.
        kwargs: as of :class:`click.Option`.
    """

    def __init__(self, *args: Any, section: str, both: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        self._both = both

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option's line of the help page."""
        record = super().get_help_record(ctx)
        return (record[0].split(" / ")[0], record[1]) if record and not self._both else record


def flag_name(key: str) -> str:
    """Return the flag of a configuration key.

    >>> flag_name("keep_macs")
    '--keep-macs'
    """
    return "--" + key.rstrip("_").replace("_", "-")


def schema_flags(
    schema: type[BaseModel], sections: Mapping[str, Sequence[str]], metavars: Mapping[str, str], skip: Sequence[str]
) -> list[Flag]:
    """Return one flag for every field of ``schema``, in the order of ``sections``.

    Args:
        schema: a stage's configuration.
        sections: headings of the help page to keys; keys that stand nowhere come last, under "More options".
        metavars: how the values of some keys are shown, where the type says too little.
        skip: keys that are given in another way.
    """
    named = [key for members in sections.values() for key in members]
    rest = [key for key in keys(schema) if key not in named and key not in skip]
    fields = dict(zip(keys(schema), schema.model_fields.items(), strict=True))
    texts = schema_texts(schema)
    return [
        _flag(key, *fields[key], section, texts, metavars.get(key))
        for section, members in {**sections, "More options": rest}.items()
        for key in members
    ]


def schema_texts(schema: type[BaseModel]) -> dict[str, str]:
    """Return the help of every key: what the schema's docstring says under ``Attributes:``, and the default."""
    texts: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            texts[name] = " ".join(text.split())
    helps = {}
    for key, (name, field) in zip(keys(schema), schema.model_fields.items(), strict=True):
        text = re.sub("``(.*?)``", lambda m: flag_name(m[1]) if m[1] in schema.model_fields else m[1], texts[name])
        text = text.replace("None", UNSET).rstrip(".")
        if not texts[name].startswith("``"):  # a name or value keeps its case
            text = text[:1].upper() + text[1:]
        helps[key] = f"{text}.  [{_default(field)}]"
    return helps


def given_values(params: Mapping[str, Any], schema: type[BaseModel]) -> dict[str, Any]:
    """Return what the command line gave for the schema's keys, as the schema takes it.

    Raises:
        click.BadParameter: a value such as ``NAME:1x3x224x224`` that has not its form.
    """
    values: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        value = params.get(name)
        if value is None or value == ():
            continue
        kind = _kind(field.annotation)
        key = field.alias or name
        if kind == "numbers":
            value = [part.strip() for text in value for part in text.split(",")]
        elif kind == "shapes":
            value = dict(_shape(text, flag_name(key)) for text in value)
        values[key] = value
    return values


def merged(
    given: Mapping[str, Any], config: Path | None, command: str, exclusive: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Put the flags over the configuration file.

    Args:
        given: what the command line gave.
        config: TOML file: the command's keys at its top, or in a table named after the command.
        command: the command's name.
        exclusive: keys of which one is enough: a flag among them drops the file's.

    Returns:
        The values, and where the file's values come from, by key.

    Raises:
        ConfigError: the file cannot be read, or has no table for one command.
    """
    if config is None:
        return dict(given), {}
    table = load_toml(config)
    table = table.get(command, table)
    if isinstance(table, list):
        raise ConfigError(f"{config}: [[{command}]] is a list of steps, which only run takes; give a file with one.")
    file = {key.replace("-", "_"): value for key, value in table.items()}
    if any(key in given for key in exclusive):
        file = {key: value for key, value in file.items() if key not in exclusive}
    return {**file, **given}, {key: f"{config}: {key}" for key in file if key not in given}


def _flag(
    key: str, name: str, field: FieldInfo, section: str, texts: Mapping[str, str], metavar: str | None
) -> Flag:
    """Return the flag of one field; its value stays text, which the schema converts."""
    flag, kind = flag_name(key), _kind(field.annotation)
    names = [name, f"{flag}/--no-{flag[2:]}" if kind == "switch" else flag]
    if key == "output":
        names.append("-o")
    help = texts[key]
    if kind == "switch":
        return Flag(names, help=help, section=section, default=None, both=field.default is True)
    value_type = {"choice": click.Choice(_choices(field.annotation)), "path": click.Path()}.get(kind)
    return Flag(
        names,
        help=help,
        section=section,
        default=None,
        type=value_type,
        metavar=metavar or _METAVARS[kind],
        multiple=kind in ("numbers", "shapes", "texts"),
    )


_METAVARS = {
    "path": "PATH",
    "numbers": "A,B,...",
    "shapes": "NAME:1x3x224x224",
    "texts": "TEXT",
    "int": "INT",
    "float": "FLOAT",
    "text": "TEXT",
    "choice": None,
}


def _members(annotation: Any) -> list[Any]:
    """Return the types that a field takes: unions taken apart, ``Annotated`` and ``None`` taken off."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(annotation) if arg is not type(None) for m in _members(arg)]
    return [annotation]


def _kind(annotation: Any) -> str:
    """Return which form a field's value has on the command line, a key of ``_METAVARS`` or ``switch``."""
    members = _members(annotation)
    origins = [typing.get_origin(member) for member in members]
    if tuple in origins:
        item = _members(typing.get_args(members[origins.index(tuple)])[0])[0]
        return "numbers" if item in (int, float) else "texts"
    if dict in origins:
        return "shapes"
    if origins == [typing.Literal]:
        return "choice"
    single = members[0] if len(members) == 1 else None
    return {bool: "switch", int: "int", float: "float", Path: "path"}.get(single, "text")


def _choices(annotation: Any) -> list[str]:
    return [str(c) for m in _members(annotation) if typing.get_origin(m) is typing.Literal for c in typing.get_args(m)]


def _default(field: FieldInfo) -> str:
    """Return how help shows a field's default."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return f"default: {'on' if value else 'off'}"
    if isinstance(value, tuple | list):
        return f"default: {','.join(map(str, value)) or UNSET}"
    return f"default: {UNSET if value in (None, {}) else value}"


def _shape(text: str, flag: str) -> tuple[str, list[int]]:
    """Return name and sizes of ``NAME:1x3x224x224``; a name may hold colons itself."""
    name, _, sizes = text.rpartition(":")
    if not name or not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise click.BadParameter(f"{text!r} is not of the form NAME:1x3x224x224.", param_hint=flag)
    return name, [int(size) for size in sizes.split("x")]
