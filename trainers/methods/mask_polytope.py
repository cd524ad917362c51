"""Frank-Wolfe over relaxed masks: minimising without a projection, by vertices that are masks themselves.

    min over m of f(m),   C = {m in [0, 1]^n : sum m <= k} = the convex hull of the masks with at most k ones
    v_t = argmin over v in C of <grad f(m_t), v>:  1 at the k most negative entries, where they are negative
    m_{t+1} = m_t + 2 / (t + 2) * (v_t - m_t)

The gap <grad f(m), m - v> is never negative, bounds f(m) - min f for a convex f, and falls like 1 / t. Several blocks,
each with a k of its own, make a product of such sets; all of this then holds block by block.

Sources: Frank and Wolfe (1956); Jaggi, "Revisiting Frank-Wolfe" (2013), for step and rate; momentum as in Mokhtari et
al., "Stochastic Conditional Gradient Methods" (2020): an average of gradients takes the gradient's place in the choice
of v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MaskPolytope:
    """The relaxed masks of a vector that is cut into blocks.

    Attributes:
        blocks: (size, largest sum) of each block, in order.
    """

    blocks: tuple[tuple[int, int], ...]

    def split(self, vector: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the blocks of a vector, as views."""
        return vector.split([size for size, _ in self.blocks])

    def minimiser(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the vertex v that minimises <gradient, v>: of equal entries the earlier, of zeros none."""
        vertex = torch.zeros_like(gradient)
        for part, slopes, (_, keep) in zip(self.split(vertex), self.split(gradient), self.blocks, strict=True):
            chosen = slopes.argsort(stable=True)[:keep]
            part[chosen] = (slopes[chosen] < 0).to(part.dtype)
        return vertex

    def middle(self, alive: torch.Tensor) -> torch.Tensor:
        """Return the point that spreads each block's sum evenly over its entries that are alive (boolean)."""
        point = torch.zeros_like(alive, dtype=torch.float32)
        for part, live, (_, keep) in zip(self.split(point), self.split(alive), self.blocks, strict=True):
            part[live] = min(1.0, keep / max(1, int(live.sum())))
        return point

    def rounded(self, point: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
        """Return the boolean mask of each block's largest entries, of equal ones those with the larger ``ties``."""
        mask = torch.zeros_like(point, dtype=torch.bool)
        for part, values, seconds, (size, keep) in zip(
            self.split(mask), self.split(point), self.split(ties), self.blocks, strict=True
        ):
            order = seconds.argsort(stable=True)
            order = order[values[order].argsort(stable=True)]
            part[order[size - keep :]] = True
        return mask

    def contains(self, point: torch.Tensor, tolerance: float = 1e-5) -> bool:
        """Return whether a point is in the set, sums up to a relative rounding error."""
        inside = bool((point >= -tolerance).all() and (point <= 1 + tolerance).all())
        sums = (part.double().sum().item() for part in self.split(point))
        return inside and all(
            s <= keep + tolerance * max(keep, 1) for s, (_, keep) in zip(sums, self.blocks, strict=True)
        )


def frank_wolfe(
    gradient: Callable[[torch.Tensor], torch.Tensor],
    polytope: MaskPolytope,
    start: torch.Tensor,
    steps: int,
    *,
    rho: float = 0.0,
) -> tuple[torch.Tensor, list[float]]:
    """Minimise by Frank-Wolfe steps of length 2 / (t + 2).

    Args:
        gradient: of the objective at a point.
        polytope: the feasible set.
        start: a point of it; left as it is.
        steps: how many.
        rho: weight of the past in the average of gradients that chooses the vertices; 0 is plain Frank-Wolfe.

    Returns:
        The last point, and the gap before each step.
    """
    point, average, gaps = start.clone(), None, []
    for step in range(steps):
        slope = gradient(point)
        average = slope if average is None else rho * average + (1 - rho) * slope
        best = polytope.minimiser(slope)
        gaps.append(torch.dot(slope.double(), (point - best).double()).item())
        vertex = best if rho == 0 else polytope.minimiser(average)
        point.lerp_(vertex, 2 / (step + 2))
    return point, gaps
