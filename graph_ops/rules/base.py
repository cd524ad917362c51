"""What a rule is. One rule an operator family, one family a file.

A rule has three sides. ``propagate`` moves labels from the inputs to the outputs during the analysis. ``constants``
says which output channels are the same number everywhere, whatever the input. ``rewrite`` adapts a node whose tensors
were cut: attributes and operands that hold sizes (weights and other static operands are sliced by the cut itself).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..graph import Node
from ..registry import Registry

if TYPE_CHECKING:
    from ..analysis import Context
    from ..constants import Constants
    from ..cut import Cut

MICROSOFT = "com.microsoft"


class Rule:
    """Base of all rules; the docstring's first line is what ``--list-ops`` shows."""

    def propagate(self, node: Node, ctx: Context) -> None:
        """Give the outputs their label vectors."""
        raise NotImplementedError(type(self).__name__)  # every rule has this side

    def constants(self, node: Node, known: Constants) -> None:
        """Mark the output channels that are compile-time constants; by default none is known to be."""

    def rewrite(self, node: Node, cut: Cut) -> None:
        """Adapt attributes and size operands after the cut; by default there are none."""


RULES: Registry[Rule] = Registry("operator rule")


def rule(*op_types: str, domain: str = "") -> object:
    """Class decorator: list one instance of the rule under operator names of a domain."""

    def add(cls: type[Rule]) -> type[Rule]:
        RULES.register(*(key(domain, op) for op in op_types))(cls())
        return cls

    return add


def key(domain: str, op_type: str) -> str:
    """Name under which an operator is listed."""
    return f"{domain}.{op_type}" if domain else op_type


def product(dims: object) -> int:
    """Return the product of sizes as a Python int (no overflow)."""
    result = 1
    for dim in dims:  # type: ignore[attr-defined]
        result *= int(dim)
    return result


def varying_axes(grid: np.ndarray) -> list[int]:
    """Axes of ``grid`` along which its entries differ."""
    return [a for a in range(grid.ndim) if grid.shape[a] > 1 and (grid != grid.take([0], a)).any()]
