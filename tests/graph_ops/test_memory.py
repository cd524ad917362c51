"""What the C library does with the room of freed arrays."""

from __future__ import annotations

import pytest

from prune_onnx.graph_ops.memory import _libc, keep_at_hand

resource = pytest.importorskip("resource")
PAGES = 2**14
"""Pages of the array that comes and goes."""


def cleared() -> int:
    """Return how many pages the system had to clear while an array came and went ten times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(b"1" * PAGES * resource.getpagesize())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(_libc() is None, reason="the C library is not glibc")
def test_room_is_kept_for_the_body_and_handed_back_afterwards() -> None:
    with keep_at_hand():
        cleared()
        assert cleared() < PAGES
    assert cleared() > PAGES
