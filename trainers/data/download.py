"""Downloads, only when asked for. A file appears when it is complete and has the published checksum, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.graph_ops.progress import Advance, Progress


class _Bar:
    """What pooch wants of a progress bar, on top of :class:`Progress`. Pooch sets ``total`` to the size in bytes."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.total = 0
        self.done = 0

    def update(self, size: int) -> None:
        # Pooch ends with reset() and update(total), to fill bars that compressed transfers leave short.
        size = min(size, self.total - self.done)
        self.done += size
        self.advance(size)

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def download(urls: Sequence[str], target: Path, *, sha256: str, size: int, progress: Progress) -> None:
    """Fetch ``target`` from the first of ``urls`` that gives the right bytes.

    Args:
        urls: mirrors, best first.
        target: the file to write; its folder is made.
        sha256: of the file, as published.
        size: of the file in bytes.
        progress: shows the transfer.

    Raises:
        DataError: no mirror has it; the message says what happened at each and where to put the file by hand.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # it would write to stderr, which is the caller's
    failures = []
    for url in urls:
        with progress.task(f"downloading {url}", size) as advance:
            try:
                pooch.retrieve(
                    url,
                    known_hash=f"sha256:{sha256}",
                    fname=target.name,
                    path=target.parent,
                    downloader=pooch.HTTPDownloader(progressbar=_Bar(advance)),
                )
                return
            except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
                failures.append(f"{url}: {' '.join(str(error).split())}")
    raise DataError(f"cannot download {target.name}: {'; '.join(failures)}. Put the file into {target.parent} by hand.")
