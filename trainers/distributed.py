"""Training in several processes, as ``torchrun`` starts them: who shows which images, and who writes files.

Every step's batch is the same as in one process, and each process shows its share of it: every ``size``-th image.
Gradients are averaged so that each image counts alike, whatever the shares' sizes. A batch with fewer than two images a
process is shown by every process whole. So, up to rounding, the network is the one that one process trains on the same
global batch, with two exceptions:

* BatchNorm. Each process normalises by its own share, and the running statistics are those of the first process;
  ``sync_bn`` takes the statistics of the whole batch, for two small messages a layer and pass.
* Dropout. Each process draws its own.

Only the first process writes files and speaks. Sums of a few numbers, and once an epoch the network's state, go from
process to process; masks and other states of the methods are then alike to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_onnx.graph_ops.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn


def processes() -> int:
    """Return how many processes ``torchrun`` has started for this training."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else 1


def is_first() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return processes() == 1 or os.environ["RANK"] == "0"


@dataclass(frozen=True)
class Ranks:
    """This process among all that train the network.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, start: int, stop: int) -> slice:
        """Return which of the images ``start`` to ``stop`` this process shows; all of them where they are too few."""
        split = stop - start >= 2 * self.size
        return slice(start + self.rank, stop, self.size) if split else slice(start, stop)

    def weight(self, shown: int, whole: int) -> float:
        """Return what a share of ``shown`` images counts for in a batch of ``whole``; all shares make ``whole``."""
        return shown if shown < whole else whole / self.size

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes."""
        return self._reduced(value, "SUM")

    def highest(self, value: int, device: torch.device) -> int:
        """Return the largest of the processes' numbers."""
        import torch

        return value if self.size == 1 else int(self._reduced(torch.tensor(value, device=device), "MAX"))

    def gather(self, value: Any) -> list[Any]:
        """Return what all processes have here, by their numbers."""
        found = [value] * self.size
        if self.size > 1:
            import torch.distributed as dist

            dist.all_gather_object(found, value)
        return found

    def align(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first."""
        if self.size > 1:
            import torch.distributed as dist

            for value in model.state_dict().values():
                dist.broadcast(value, 0)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let the first process through the body before the others: it fetches what they then find."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def _reduced(self, value: torch.Tensor, operation: str) -> torch.Tensor:
        if self.size == 1:
            return value
        import torch.distributed as dist

        value = value.clone()
        dist.all_reduce(value, getattr(dist.ReduceOp, operation))
        return value


def current() -> Ranks:
    """Return this process among those that have joined."""
    import torch.distributed as dist

    joined = dist.is_available() and dist.is_initialized()
    return Ranks(dist.get_rank(), dist.get_world_size()) if joined else Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` has started, for the body; nothing to do where it has not.

    Args:
        device: the run's device: with ``cpu``, and where CUDA is absent, messages go through gloo, else through nccl.

    Raises:
        ConfigError: this torch cannot train in several processes.
    """
    if processes() == 1:
        yield Ranks()
        return
    import torch
    from torch import distributed as dist

    if not dist.is_available():
        raise ConfigError("this build of torch has no torch.distributed: train in one process, without torchrun.")
    from accelerate import PartialState

    PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        ranks = current()
        yield ranks
        ranks.wait()  # leaving while others still talk would break their connections
    finally:
        dist.destroy_process_group()
