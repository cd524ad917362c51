"""Operator rules, one family a file; the modules are listed here once."""

from __future__ import annotations

from ..graph import Node
from . import attention, conv, einsum, elementwise, linear, movement, normalization, pooling, reduction, reshape
from .base import RULES, Rule, key

MODULES = (conv, linear, einsum, attention, elementwise, normalization, pooling, reduction, movement, reshape)


def rule_for(node: Node) -> Rule:
    """Return the rule of a node's operator; what no rule knows pins."""
    name = key(node.domain, node.op_type)
    return RULES.get(name) if name in RULES else reduction.UNKNOWN


def table() -> list[tuple[str, str]]:
    """Return (operator names, what the rule does), one row a rule, for ``--list-ops``."""
    rows: dict[type[Rule], list[str]] = {}
    for name in RULES:
        rows.setdefault(type(RULES.get(name)), []).append(name)
    return [(" ".join(names), (cls.__doc__ or "").strip().splitlines()[0]) for cls, names in rows.items()]
