"""Random networks: a cut is the masked original, and exact removal changes nothing, whatever the operators."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from prune_onnx.graph_ops.branches import fold_constant_branches
from prune_onnx.graph_ops.constants import Constants
from prune_onnx.graph_ops.cut import cut
from prune_onnx.graph_ops.exact import carry, removable

from .builder import analysed, check_cut, check_valid, distance, outputs_of
from .random_graphs import describe, networks

SETTINGS = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@SETTINGS
@given(
    model=networks(),
    seed=st.integers(0, 99),
    fraction=st.sampled_from([0.3, 0.6, 1.0]),
    options=st.fixed_dictionaries({"release": st.booleans(), "select": st.booleans()}),
)
def test_cut_equals_mask(model: onnx.ModelProto, seed: int, fraction: float, options: dict[str, bool]) -> None:
    note(describe(model))
    check_cut(model, seed=seed, fraction=fraction, vacuous=True, **options)


@SETTINGS
@given(model=networks(), select=st.booleans())
def test_exact_removal_changes_nothing(model: onnx.ModelProto, select: bool) -> None:
    """Constant branches are replaced and dead channels removed, and the outputs are what they were."""
    note(describe(model))
    smaller, result = model, model
    while smaller is not None:
        result = smaller
        analysis, feeds = analysed(result, select=select)
        known = Constants(analysis)
        smaller = fold_constant_branches(analysis, known)
    keep = ~removable(analysis, known)
    result = cut(analysis, keep, carry(analysis, known, keep))
    check_valid(result, model)
    for inputs in feeds:
        for a, b in zip(outputs_of(model, inputs), outputs_of(result, inputs), strict=True):
            assert distance(a, b, max(1.0, float(np.abs(a).max()))) <= 1e-5
