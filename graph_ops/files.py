"""Output files appear complete or not at all."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError


def check_output(path: str | Path, *, force: bool = False) -> Path:
    """Refuse an output path before any work is done.

    Raises:
        OutputError: the path exists and ``force`` is false, is a folder, or its folder cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give a file name.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file; give a file name.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already. Pass --force to overwrite it.")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"cannot write {path}: {parent} is not a folder.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {parent}.")
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends well, remove it otherwise.

    The temporary file lies in the same folder, so that the final step is an atomic rename.

    Raises:
        OutputError: the file cannot be written (disk full, no permission, ...).
    """
    path = Path(path)
    # Named before it is made: an interrupt in between must find it to remove it.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(mode=0o600, exist_ok=False)
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        # Where the folder is a file, there is nothing to remove either.
        with suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off SIGINT and SIGTERM to the end of the block, for steps of which none may be left out.

    Signals reach a program's main thread only; in another one there is nothing to put off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda which, frame: came.append(which)) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, UTF-8.

    Raises:
        OutputError: the file cannot be written.
    """
    write_bytes(path, text.encode())
