"""Plain training: no sparse term. The dense control of every comparison, and the base of post-training pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from prune_onnx.graph_ops.progress import SILENT, Progress

from .base import Method
from .scales import batch_norms, start_scales

if TYPE_CHECKING:
    from ..config import Schedule


@dataclass
class Plain(Method):
    """Plain training, without a sparse term: the dense control.

    Attributes:
        init_gamma: initial BatchNorm scale; ``None`` leaves the network's own. 0.5 makes it the papers' baseline.
    """

    name: ClassVar[str] = "plain"

    init_gamma: float | None = None

    def prepare(self, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: Progress = SILENT) -> None:
        if self.init_gamma is not None:
            start_scales(batch_norms(model), self.init_gamma)
