"""Small graphs for every operator rule, one module a rule family.

A case builds a graph and says which operators it is about, which groups must be pinned (all others are free) and how
the graph is analysed. ``test_rules`` cuts every case, and fails for a rule without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import onnx

from ..builder import Net

Build = Callable[[Net], str | tuple[str, ...]]


@dataclass(frozen=True)
class Case:
    """One graph.

    Attributes:
        name: of the test.
        build: adds the nodes to a net and returns the graph's outputs.
        covers: operators that must see a smaller tensor (``domain.Op`` outside the default domain).
        pinned: groups that hold a pinned unit; the last layer, as a rule.
        net: arguments of :class:`Net`.
        check: arguments of ``check_cut``.
    """

    name: str
    build: Build
    covers: tuple[str, ...]
    pinned: frozenset[str] = frozenset({"head"})
    net: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        """Build the graph."""
        net = Net(**self.net)
        outputs = self.build(net)
        return net.model(*([outputs] if isinstance(outputs, str) else outputs))


CASES: list[Case] = []
# Where one tensor is sliced in several ways, or computed weights are written out, the file holds more (or less) than
# the prediction, which follows one slice a tensor.
MACS_ONLY = {"predict": ("macs",)}


def add(
    name: str,
    build: Build,
    covers: str,
    pinned: Iterable[str] = ("head",),
    check: dict[str, Any] | None = None,
    **net: Any,
) -> None:
    """List a case."""
    assert name not in {c.name for c in CASES}, name
    CASES.append(Case(name, build, tuple(covers.split()), frozenset(pinned), net, check or {}))


def case(
    covers: str, pinned: Iterable[str] = ("head",), check: dict[str, Any] | None = None, **net: Any
) -> Callable[[Build], Build]:
    """List the decorated builder as a case; ``net`` are arguments of :class:`Net`."""

    def register(build: Build) -> Build:
        add(build.__name__, build, covers, pinned, check, **net)
        return build

    return register


from . import conv, elementwise, linear, movement, networks, normalization, pooling, reduction, reshape  # noqa: E402

__all__ = [
    "CASES",
    "MACS_ONLY",
    "Case",
    "conv",
    "elementwise",
    "linear",
    "movement",
    "networks",
    "normalization",
    "pooling",
    "reduction",
    "reshape",
]
