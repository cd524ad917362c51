"""Flags follow the schema: names, help, defaults, and values as the schema takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import click
import pytest
from pydantic import BaseModel, ConfigDict, Field

from prune_onnx.cli.options import flag_name, given_values, merged, schema_flags, schema_texts
from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.pipeline.config import keys, parse
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.trainers.config import TrainConfig


class Options(BaseModel):
    """Options.

    Attributes:
        input: the file; see
            ``keep_macs``.
        keep_macs: what stays; ``None`` keeps all.
        align: multiples.
        scope: ``global`` or not.
        lambda_: strength.
        sizes: of batches.
        globs: of nodes.
        shapes: of inputs.
        fold: a switch.
        check: a switch that is on.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    input: Path
    keep_macs: Annotated[float, Field(gt=0)] | None = None
    align: int | Literal["auto"] = "auto"
    scope: Literal["global", "layer"] = "global"
    lambda_: float | None = Field(default=None, alias="lambda")
    sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 8)
    globs: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    fold: bool = False
    check: bool = True


@pytest.fixture
def command() -> click.Command:
    flags = schema_flags(Options, {"First": ("scope", "keep_macs")}, {"globs": "GLOB"}, ())
    return click.Command("options", params=list(flags), callback=lambda **params: given_values(params, Options))


def call(command: click.Command, *arguments: str) -> dict:
    return command.main(list(arguments), standalone_mode=False)


def test_every_field_is_a_flag_once_sections_first() -> None:
    flags = schema_flags(Options, {"First": ("scope", "keep_macs")}, {}, ("fold",))
    assert [(f.section, f.opts[0]) for f in flags[:2]] == [("First", "--scope"), ("First", "--keep-macs")]
    assert sorted(f.opts[0] for f in flags) == sorted(flag_name(key) for key in keys(Options) if key != "fold")
    assert {f.section for f in flags[2:]} == {"More options"}


def test_a_section_must_not_name_a_key_that_does_not_exist() -> None:
    with pytest.raises(KeyError, match="keep_mac"):
        schema_flags(Options, {"First": ("keep_mac",)}, {}, ())


def test_what_is_not_given_is_left_to_file_and_schema(command: click.Command) -> None:
    assert call(command) == {}


def test_values_reach_the_schema_in_its_own_form(command: click.Command) -> None:
    given = call(
        command, "--input", "a.onnx", "--keep-macs", "0.5", "--align", "8", "--lambda", "1e-4", "--sizes", "1, 4",
        "--sizes", "8", "--globs", "a*", "--globs", "b,c", "--shapes", "x:0:1x3", "--fold", "--no-check",
    )  # fmt: skip
    assert parse(Options, given) == Options(
        input=Path("a.onnx"), keep_macs=0.5, align=8, lambda_=1e-4, sizes=(1, 4, 8), globs=("a*", "b,c"),
        shapes={"x:0": (1, 3)}, fold=True, check=False,
    )  # fmt: skip


def test_a_switch_can_be_turned_off_against_the_file(command: click.Command) -> None:
    assert call(command, "--no-fold") == {"fold": False}


@pytest.mark.parametrize("text", ["1x3", "x:", "x:1x", "x:ax3", ":1"])
def test_a_shape_of_the_wrong_form_is_an_error_with_the_right_one(command: click.Command, text: str) -> None:
    with pytest.raises(click.BadParameter, match="not of the form NAME:1x3x224x224"):
        call(command, "--shapes", text)


def test_help_comes_from_the_docstring_with_flags_and_defaults() -> None:
    assert schema_texts(Options) == {
        "input": "The file; see --keep-macs.  [required]",
        "keep_macs": "What stays; unset keeps all.  [default: unset]",
        "align": "Multiples.  [default: auto]",
        "scope": "global or not.  [default: global]",
        "lambda": "Strength.  [default: unset]",
        "sizes": "Of batches.  [default: 1,8]",
        "globs": "Of nodes.  [default: unset]",
        "shapes": "Of inputs.  [default: unset]",
        "fold": "A switch.  [default: off]",
        "check": "A switch that is on.  [default: on]",
    }


@pytest.mark.parametrize("schema", [TrainConfig, SlimConfig, EvalConfig])
def test_every_option_of_every_stage_has_help(schema: type[BaseModel]) -> None:
    assert [key for key, text in schema_texts(schema).items() if text.startswith("  [")] == []


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text("keep-macs = 0.5\nscope = 'layer'\n")
    return path


def test_flags_lie_over_the_file(toml: Path) -> None:
    values, labels = merged({"scope": "global"}, toml, "slim", ())
    assert values == {"keep_macs": 0.5, "scope": "global"}
    assert labels == {"keep_macs": f"{toml}: keep_macs"}


def test_a_flag_replaces_what_it_excludes_in_the_file(toml: Path) -> None:
    values, _ = merged({"keep_params": 0.7}, toml, "slim", ("keep_macs", "keep_params"))
    assert values == {"keep_params": 0.7, "scope": "layer"}


def test_a_table_of_the_commands_name_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("output = 'x'\n[slim]\nkeep_macs = 0.5\n[eval]\nlimit = 3\n")
    assert merged({}, path, "slim", ())[0] == {"keep_macs": 0.5}
    path.write_text("[[slim]]\nexact = true\n")
    with pytest.raises(ConfigError, match=r"\[\[slim\]\] is a list of steps"):
        merged({}, path, "slim", ())
