"""The atomic write that every output goes through."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_onnx.graph_ops import files
from prune_onnx.graph_ops.errors import OutputError


def test_the_file_appears_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    with files.atomic_write(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert target.read_text() == "half"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


@pytest.mark.parametrize("error", [RuntimeError("killed"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_inside_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")

    def write() -> None:
        with files.atomic_write(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def test_text_and_bytes(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "grün\n")
    files.write_bytes(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == "grün\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"


def test_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    there = tmp_path / "there.onnx"
    there.touch()
    with pytest.raises(OutputError, match=r"exists already\. Pass --force"):
        files.check_output(there)
    assert files.check_output(there, force=True) == there
    with pytest.raises(OutputError, match="is a folder"):
        files.check_output(tmp_path, force=True)
    with pytest.raises(OutputError, match="is not a folder"):
        files.check_output(there / "below" / "it.onnx")
    assert files.check_output(tmp_path / "new" / "out.onnx") == tmp_path / "new" / "out.onnx"
    assert not (tmp_path / "new").exists()
