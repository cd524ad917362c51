"""How library code tells a person what it is doing, without printing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


class Progress:
    """Silent progress; ``cli`` passes a subclass that draws bars and lines on stderr."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """Open a task of ``total`` steps; the yielded function advances it by a number of steps."""
        yield lambda steps: None

    def note(self, message: str) -> None:
        """Say one line of information (an epoch's metrics, a choice that was made)."""

    def warn(self, message: str) -> None:
        """Say one line that the user should not miss."""


SILENT = Progress()
