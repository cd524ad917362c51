"""Fingerprints follow contents, and keys follow what decides a result and nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from prune_onnx.graph_ops.errors import ConfigError
from prune_onnx.pipeline import stamps
from prune_onnx.pipeline.eval_schema import EvalConfig
from prune_onnx.pipeline.slim_schema import SlimConfig
from prune_onnx.pipeline.stamps import Fingerprints, Stamp, stage_key


def test_a_file_counts_by_its_content_not_by_its_name_or_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    os.utime(tmp_path / "b", (1, 1))
    (tmp_path / "c").write_bytes(b"else")
    files = Fingerprints()
    assert files.of(tmp_path / "a") == files.of(tmp_path / "b") != files.of(tmp_path / "c")
    assert files.of(tmp_path / "absent") is None


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"content")
    first = Fingerprints()
    expected = first.of(path)
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: pytest.fail("the file was read"))
    assert Fingerprints(first.seen).of(path) == expected


def test_a_changed_file_of_the_same_size_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = Fingerprints()
    before = first.of(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(0, first.seen[str(path)].mtime_ns + 1))
    assert Fingerprints(first.seen).of(path) != before


def test_a_folder_counts_by_names_and_contents_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"1")
    before = Fingerprints().of(folder)
    assert Fingerprints().of(folder) == before
    (folder / "cat" / "1.png").rename(folder / "cat" / "2.png")
    renamed = Fingerprints().of(folder)
    (folder / "cat" / "2.png").write_bytes(b"2")
    assert len({before, renamed, Fingerprints().of(folder)}) == 3


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"secret")

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=f"cannot read {path}: Permission denied"):
        Fingerprints().of(path)


def key(tmp_path: Path, name: str = "slim", **options: object) -> str:
    config = SlimConfig(**{"input": tmp_path / "in.onnx", "output": tmp_path / "out" / "slim.onnx", **options})
    return stage_key(name, tmp_path / "out", [config], Fingerprints())


@pytest.mark.parametrize(
    "options", [{"keep_macs": 0.5}, {"seed": 1}, {"ignore": ("a*",)}, {"criterion": "l1"}], ids=lambda o: next(iter(o))
)
def test_the_key_follows_every_option_that_decides_the_result(tmp_path: Path, options: dict) -> None:
    assert key(tmp_path, **options) != key(tmp_path)


@pytest.mark.parametrize("options", [{"force": True}, {"report": "r.json"}, {"output": "elsewhere.onnx"}], ids=str)
def test_the_key_ignores_options_that_only_say_where_and_how(tmp_path: Path, options: dict) -> None:
    assert key(tmp_path, **options) == key(tmp_path)


def test_the_key_follows_the_content_of_the_input_not_its_place(tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_bytes(b"model")
    (tmp_path / "moved.onnx").write_bytes(b"model")
    before = key(tmp_path)
    assert key(tmp_path, input=tmp_path / "moved.onnx") == before
    (tmp_path / "in.onnx").write_bytes(b"other")
    assert key(tmp_path) != before


def test_the_key_follows_every_one_of_several_models_and_the_metrics_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    source = tmp_path / "own" / "scores.py"
    source.parent.mkdir()

    def eval_key() -> str:
        config = EvalConfig(model=tmp_path / "m.onnx", more=more, data="x.npz", metric="own.scores:dice")
        return stage_key("eval", tmp_path / "out", [config], Fingerprints())

    keys = [eval_key()]
    for path in (more[1], source):
        path.write_bytes(b"content")
        keys.append(eval_key())
        path.write_bytes(b"other content")
        keys.append(eval_key())
    assert len(set(keys)) == len(keys)
    assert eval_key() == keys[-1]


def test_the_key_follows_the_content_of_data_given_as_text(tmp_path: Path) -> None:
    def eval_key() -> str:
        config = EvalConfig(model=tmp_path / "m.onnx", data=str(tmp_path / "x.npz"))
        return stage_key("eval", tmp_path / "out", [config], Fingerprints())

    (tmp_path / "x.npz").write_bytes(b"1")
    before = eval_key()
    (tmp_path / "x.npz").write_bytes(b"22")
    assert eval_key() != before


@pytest.mark.parametrize(("name", "follows"), [("eval", True), ("slim", False)])
def test_only_what_is_measured_depends_on_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, follows: bool
) -> None:
    before = key(tmp_path, name)
    environment = stamps.capture()
    monkeypatch.setattr(stamps, "capture", lambda: {**environment, "cpu": "another"})
    assert (key(tmp_path, name) != before) == follows


def test_the_key_follows_the_version_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(tmp_path)
    environment = stamps.capture()
    versions = {**environment["versions"], "prune-onnx": "99"}
    monkeypatch.setattr(stamps, "capture", lambda: {**environment, "versions": versions})
    assert key(tmp_path) != before


def test_a_stamp_holds_until_key_or_files_change(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    files = Fingerprints()
    Stamp(key="k", finished=True, artefacts=files.folder(tmp_path), seen=files.seen).write(tmp_path)
    stamp = Stamp.read(tmp_path)
    assert stamp is not None
    assert set(stamp.artefacts) == {"a"}
    assert stamp.holds("k", tmp_path, Fingerprints(stamp.seen))
    assert not stamp.holds("other", tmp_path, Fingerprints(stamp.seen))
    (tmp_path / "a").write_bytes(b"22")
    assert not stamp.holds("k", tmp_path, Fingerprints(stamp.seen))
    (tmp_path / "a").unlink()
    assert not stamp.holds("k", tmp_path, Fingerprints(stamp.seen))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json", b'{"key": 1, "finished": true, "new": 2}'])
def test_an_absent_or_unknown_stamp_is_no_stamp(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "stage.json").write_bytes(content)
    assert Stamp.read(tmp_path) is None
