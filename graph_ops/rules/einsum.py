"""Einsum, letter by letter: what MatMul does on its last two axes, for any equation.

A letter stands for one axis in every input that has it. Letters of the result pass; those that only constants bring
start fresh labels; those that are summed over end them, and two activations that share one are joined there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph import Node
from ..labels import Vector
from ..records import Contraction
from .base import Rule, rule

if TYPE_CHECKING:
    from ..analysis import Context


def terms(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """Split an equation into one letter an axis for every input and for the result.

    Args:
        equation: as in the attribute; spaces do not count, an ellipsis stands for leading axes.
        ranks: of the inputs.

    Returns:
        ``None`` where an input repeats a letter (a diagonal).

    >>> terms("b h i d, b h j d -> b h i j", [4, 4])
    (['bhid', 'bhjd'], 'bhij')
    >>> terms("...ij,jk", [3, 2])
    (['0ij', 'jk'], '0ik')
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    # Axes under an ellipsis are aligned from the right and come first in a result that is not written out.
    most = max((rank - len(term) + 3 for term, rank in zip(inputs, ranks, strict=True) if "..." in term), default=0)
    hidden = "".join(map(str, range(most)))
    spelled = []
    for term, rank in zip(inputs, ranks, strict=True):
        covered = rank - len(term) + 3
        spelled.append(term.replace("...", hidden[most - covered :] if covered else ""))
    if any(len(set(term)) < len(term) for term in spelled):
        return None
    if not arrow:
        everything = "".join(spelled)
        right = hidden + "".join(sorted(c for c in set(everything) - set(hidden) if everything.count(c) == 1))
    return spelled, right.replace("...", hidden)


@rule("Einsum")
class Einsum(Rule):
    """Ends labels of letters that are summed over, joins shared ones, passes the others."""

    def propagate(self, node: Node, ctx: Context) -> None:
        names = node.inputs
        found = terms(str(node.attribute("equation", "")), [len(ctx.shape(name)) for name in names])
        if found is None:
            ctx.pin_inputs(node, "it takes a diagonal")
            return
        inputs, result = found
        constants = {i for i, name in enumerate(names) if ctx.static(name) and not ctx.varies(name)}
        follows: dict[int, dict[int, Vector]] = {i: {} for i in constants}
        out: dict[int, Vector] = {}
        for letter in dict.fromkeys("".join(inputs)):
            places = [
                (i, term.index(letter))
                for i, term in enumerate(inputs)
                if letter in term and ctx.shape(names[i])[term.index(letter)] > 1
            ]
            moving = [(i, axis) for i, axis in places if i not in constants]
            vector = self._joined(node, ctx, [(names[i], axis) for i, axis in moving])
            summed = letter not in result
            if vector is None and not moving and places and not summed:
                length = ctx.shape(names[places[0][0]])[places[0][1]]
                vector = ctx.fresh(node, result.index(letter), length, weight=places[0])
            if vector is None:
                continue
            if not summed:
                out[result.index(letter)] = vector
            else:
                ctx.contractions.append(Contraction(node, tuple(moving), vector))
            for i, axis in places:
                if i in constants:
                    follows[i][axis] = vector
        for i, axes in follows.items():
            ctx.operand(node, i, axes)
        ctx.set(node.outputs[0], out)

    def _joined(self, node: Node, ctx: Context, places: list[tuple[str, int]]) -> Vector | None:
        """One vector for an axis that several activations share; pinned where one of them cannot be cut there."""
        vectors = [ctx.vectors(name).get(axis) for name, axis in places]
        known = [v for v in vectors if v is not None]
        for vector in known[1:]:
            ctx.join(known[0], vector)
        if known and len(known) < len(vectors):
            ctx.pin(known[0], node, "only one of two activations can be cut on an axis that they share")
        return known[0] if known else None
