"""Keeps a process small while large arrays come and go.

The C library keeps the room of freed arrays for later ones of the same kind, and raises the size from which it hands
room back at once. Where models of hundreds of megabytes pass through several sessions that doubles the peak. Where the
C library is another one than glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Blocks of this many bytes and more get pages of their own, which go back when they are freed.
OWN_PAGES = 2**21


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    try:
        library = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
        return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
    except OSError:
        return None


def keep_small() -> None:
    """From now on large blocks go back to the system when they are freed."""
    library = _libc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, OWN_PAGES)
        library.mallopt(M_TRIM_THRESHOLD, OWN_PAGES)


def give_back() -> None:
    """Hand freed memory back to the system now."""
    library = _libc()
    if library is not None:
        library.malloc_trim(0)
