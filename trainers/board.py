"""What each epoch says, for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from prune_onnx.graph_ops.errors import ConfigError

from .config import BOARD


class Board:
    """Writes the epochs' records into ``tensorboard`` below the run folder.

    Args:
        run: the run folder.
        enabled: whether to write anything.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, run: Path, enabled: bool) -> None:
        self._writer = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--tensorboard needs TensorBoard, which cannot be imported ({error}). "
                "Run: pip install 'prune-onnx[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(run / BOARD))

    def add(self, entry: dict[str, Any]) -> None:
        """Write an epoch's record, and see that it is on the disk."""
        if self._writer is None:
            return
        for key, value in entry.items():
            if key != "epoch" and value is not None:
                self._writer.add_scalar(key, value, entry["epoch"])
        self._writer.flush()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
