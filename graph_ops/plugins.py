"""Functions of the user's own, named ``package.module:function``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .registry import close_matches


def find_function(name: str, kind: str, role: str = "function") -> Callable[..., Any]:
    """Import a function of the user's; call it inside :func:`current_folder_first` as well, where it imports more.

    Args:
        name: ``package.module:function``; anything that can be called will do.
        kind: what it is for, for messages: ``model``, ``metric``.
        role: what it is, for messages.

    Raises:
        ConfigError: the name has another form, or there is no such module or function.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{kind} {name!r}: give package.module:{role}.")
    with current_folder_first():
        try:
            module = import_module(module_name)
        except Exception as error:  # whatever the user's module does when it is imported
            raise ConfigError(f"cannot import {module_name!r} of {kind} {name!r}: {said(error)}.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"module {module_name!r} has no {role} {attribute!r}.{close_matches(attribute, known)}")
    return function


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Search the current folder for modules before what is installed, while the block runs.

    An installed command does not have it on its path, as ``python -m`` would.
    """
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def said(error: Exception) -> str:
    """Return an error as one line without a final stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
