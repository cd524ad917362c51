"""Configuration: what is read is what was written, and every mistake names its key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.pipeline.config import keys, load_toml, parse, to_toml
from prune_onnx.pipeline.eval_schema import EvalConfig


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    input: Path
    keep_macs: Annotated[float, Field(gt=0, le=1)] | None = None
    align: int | Literal["auto"] = "auto"
    scope: Literal["global", "layer"] = "global"
    lambda_: float | None = Field(default=None, alias="lambda")
    sizes: tuple[int, ...] = ()
    quiet: bool = False

    @model_validator(mode="after")
    def _check(self) -> Options:
        if self.quiet and self.keep_macs:
            raise ValueError("quiet and keep_macs exclude each other")
        return self


def test_parse_takes_hyphens_underscores_aliases_and_text_values() -> None:
    options = parse(Options, {"input": "a.onnx", "keep-macs": "0.5", "align": "8", "lambda": "1e-4", "sizes": [1, 2]})
    assert options == Options(input=Path("a.onnx"), keep_macs=0.5, align=8, lambda_=1e-4, sizes=(1, 2))


def test_keys_are_the_spelling_of_flags_and_files() -> None:
    assert keys(Options) == ["input", "keep_macs", "align", "scope", "lambda", "sizes", "quiet"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep-mac": 1}, "c.toml: keep_mac: unknown key. Did you mean 'keep_macs'?"),
        ({}, "c.toml: input is missing."),
        ({"keep_macs": 2}, "--keep-macs: 2 should be less than or equal to 1."),
        ({"keep_macs": "half"}, "--keep-macs: half should be a valid number."),
        ({"align": "autoo"}, "c.toml: align: autoo should be a valid integer or 'auto'. Did you mean 'auto'?"),
        ({"scope": "globl"}, "c.toml: scope: globl should be 'global' or 'layer'. Did you mean 'global'?"),
        ({"scope": ""}, "c.toml: scope: '' should be 'global' or 'layer'."),
        ({"sizes": [1, "x"]}, "c.toml: sizes: [1, 'x'] should be a valid integer."),
        ({"quiet": True, "keep_macs": 0.5}, "c.toml: quiet and keep_macs exclude each other."),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_remedy(values: dict, message: str) -> None:
    needed = {"input": "a.onnx"} if values else {}
    with pytest.raises(ConfigError) as error:
        parse(Options, {**needed, **values}, "c.toml", {"keep-macs": "--keep-macs"})
    assert str(error.value) == message


def test_an_unknown_key_without_a_close_match_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"zzz: unknown key\. Known: input, keep_macs, .*, quiet\."):
        parse(Options, {"input": "a", "zzz": 1})


def test_at_most_two_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse(Options, {"keep_macs": 2, "align": "x", "scope": "y", "quiet": "perhaps"})
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*c.toml: No such file or directory"),
        (b"a = \n", r"c.toml is not valid TOML: .*line 1"),
        (b"\xff\xfe", "c.toml is not valid TOML"),
    ],
)
def test_load_toml_says_why_a_file_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_toml(path)


def test_load_toml_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load_toml(tmp_path)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)
PLAIN = st.one_of(TEXT, st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.dictionaries(TEXT, st.one_of(PLAIN, st.lists(PLAIN, max_size=3)), max_size=3),
    lambda inner: st.dictionaries(TEXT, st.one_of(PLAIN, inner, st.lists(inner, min_size=1, max_size=3)), max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_to_toml_is_read_back_as_it_was(values: dict) -> None:
    assert tomllib.loads(to_toml(values)) == values


def test_to_toml_leaves_none_out() -> None:
    assert to_toml({"a": None, "b": {"c": None, "d": 1}}) == "\n[b]\nd = 1\n"


@pytest.mark.parametrize(("given", "said"), [(["0"], "0"), (["4", "0"], "['4', '0']")])
def test_a_list_with_a_wrong_entry_is_not_called_too_short(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(EvalConfig, {"model": "m.onnx", "batch_size": given})
    assert str(caught.value) == f"options: batch_size: {said} should be greater than or equal to 1."


def test_an_empty_list_is_too_short() -> None:
    with pytest.raises(ConfigError, match="at least 1 item"):
        parse(EvalConfig, {"model": "m.onnx", "batch_size": []})
