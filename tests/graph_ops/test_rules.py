"""Every operator rule: what it cuts computes what the masked original does, tensor by tensor."""

from __future__ import annotations

import pytest

from prune_onnx.graph_ops.rules.base import RULES

from .builder import check_cut
from .cases import CASES, Case
from .test_pins import PINNED_OPS

COVERED = {op for case in CASES for op in case.covers}


@pytest.mark.parametrize(("seed", "fraction"), [(0, 0.5), (1, 0.9)], ids=["half", "most"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cut_equals_mask(case: Case, seed: int, fraction: float) -> None:
    result = check_cut(case.model(), seed=seed, fraction=fraction, **case.check)
    assert set(result.pinned) == case.pinned
    assert set(case.covers) <= result.touched


@pytest.mark.parametrize("op", list(RULES))
def test_every_rule_has_a_case(op: str) -> None:
    assert op in COVERED | PINNED_OPS, f"write a case in tests/graph_ops/cases for the rule of {op}"
