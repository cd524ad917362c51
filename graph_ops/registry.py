"""One registry for everything that users name: rules, criteria, models, data sets, methods."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")


def close_matches(name: str, known: list[str]) -> str:
    """Return ``" Did you mean 'x'?"`` when a known name is close to ``name``, else an empty string."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


class Registry(Generic[T]):
    """Names to objects, filled by a decorator, read by the command line, the docs and the tests.

    >>> shapes = Registry[object]("shape")
    >>> @shapes.register("square")
    ... class Square: ...
    >>> shapes.names()
    ['square']
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Return a decorator that lists the decorated object under ``names``.

        Raises:
            ValueError: a name is taken already.
        """

        def add(item: T) -> T:
            for name in names:
                if name in self._items:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
                self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """Return the object called ``name``.

        Raises:
            ConfigError: no such name; the message gives close matches and the full list.
        """
        try:
            return self._items[name]
        except KeyError:
            raise ConfigError(
                f"unknown {self.kind} {name!r}.{close_matches(name, self.names())} Known: {', '.join(self.names())}."
            ) from None

    def names(self) -> list[str]:
        """Return the names in the order of their registration."""
        return list(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)
