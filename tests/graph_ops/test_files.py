"""The atomic write that every output goes through."""

from __future__ import annotations

import itertools
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

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


# A file that was opened when the interrupt came, and not yet entered as a context, is closed when it is cleared away.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    steps = itertools.count()

    def interrupt_at(last: int) -> bool:
        """Write, with an interrupt at that line of the module; return whether there were so many."""

        def trace(frame: FrameType, event: str, value: object) -> Any:
            if frame.f_code.co_filename != files.__file__:
                return None
            if event == "line" and next(left) == last:
                raise KeyboardInterrupt
            return trace

        left = itertools.count()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            files.write_text(target, "new")
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    while True:
        target.write_text("old")
        if not interrupt_at(next(steps)):
            break
        assert target.read_text() in ("old", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]
    assert target.read_text() == "new"
    assert next(steps) > 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_what_must_not_be_interrupted(number: int) -> None:
    class Caught(BaseException):
        pass

    def catch(*_: object) -> None:
        raise Caught

    done = []

    def work() -> None:
        with files.uninterrupted():
            signal.raise_signal(number)
            done.append("all")

    before = signal.signal(number, catch)
    try:
        with pytest.raises(Caught):
            work()
        assert signal.getsignal(number) is catch
    finally:
        signal.signal(number, before)
    assert done == ["all"]


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
