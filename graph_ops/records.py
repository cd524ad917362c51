"""What an analysis says of the graph: where labels begin, end, are multiplied, and what keeps them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Node
from .labels import Vector

Axes = dict[int, Vector]


@dataclass(frozen=True)
class Operand:
    """A static tensor at one use: which of its axes follow which labels."""

    node: Node
    input: int
    axes: Axes


@dataclass(frozen=True)
class Producer:
    """An output axis with fresh labels, and the weight axis that makes them (``None`` where none does)."""

    node: Node
    output: int
    axis: int
    labels: Vector
    weight: tuple[int, int] | None = None


@dataclass(frozen=True)
class Contraction:
    """A sum over labelled positions: here labels end, masks are applied and consumers can be compensated.

    Attributes:
        sides: (input index, axis) of each data input that is summed over; two for a product of two activations.
        weight: (input index, axis) of the static weight's contracted axis, if it has one.
        out: (input index, axis) of the weight's output axis, if it has one.
        groups: of a grouped convolution.
        padded: whether zero padding makes the sum see fewer positions at the borders.
        bias: input index of the bias, ``None`` when the operator has no such input.
    """

    node: Node
    sides: tuple[tuple[int, int], ...]
    labels: Vector
    weight: tuple[int, int] | None = None
    out: tuple[int, int] | None = None
    groups: int = 1
    padded: bool = False
    bias: int | None = None


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of a node: ``scale`` times the number of kept positions of each factor."""

    node: Node
    scale: int
    factors: tuple[Vector, ...]


@dataclass(frozen=True)
class Released:
    """An input axis that statistics run across and that may be cut all the same."""

    node: Node
    axis: int
    labels: Vector


@dataclass(frozen=True)
class Fork:
    """A reader that may drop positions which other readers of the same tensor keep, through a Gather.

    Attributes:
        source: labels of the tensor that is read; a source goes only when everything that reads it dropped it.
        labels: fresh labels of what the node keeps, position by position.
    """

    node: Node
    axis: int
    source: Vector
    labels: Vector


@dataclass(frozen=True)
class Pin:
    """Labels that must stay, and why."""

    labels: Vector
    reason: str


@dataclass(frozen=True)
class ChannelGroup:
    """Units that share producers.

    Attributes:
        name: the first producing node.
        nodes: all producing nodes, in order.
        units: ids of the group's units, in the order of the first producer's channels.
        pinned_by: reasons, without repetition, of the units that are pinned.
    """

    name: str
    nodes: tuple[str, ...]
    units: np.ndarray
    pinned_by: tuple[str, ...]
