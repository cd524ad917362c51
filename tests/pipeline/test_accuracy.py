"""Counting right answers, and what is said of two models on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import parser

from prune_onnx.graph_ops.errors import DataError
from prune_onnx.pipeline.accuracy import (
    Batch,
    Kept,
    compare_outputs,
    label_rank,
    mcnemar,
    paired_interval,
    predict,
    tally,
)
from prune_onnx.pipeline.sessions import create_session

EYE = np.eye(7)
# Gives class 1 where the identity gives class 0.
SWAPPED = EYE[[1, 0, 2, 3, 4, 5, 6]]


def samples(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 7)).astype(np.float32), rng.integers(0, 7, n)


def batches(x: np.ndarray, y: np.ndarray | None, size: int) -> Iterator[Batch]:
    for start in range(0, len(x), size):
        yield x[start : start + size], None if y is None else y[start : start + size]


@given(
    st.integers(1, 6).flatmap(
        lambda classes: st.lists(
            st.tuples(st.lists(st.integers(0, 3), min_size=classes, max_size=classes), st.integers(0, classes - 1)),
            min_size=1,
            max_size=5,
        )
    )
)
def test_rank_is_the_place_in_a_stable_sort(rows: list[tuple[list[int], int]]) -> None:
    scores = np.array([row for row, _ in rows], np.float32)
    labels = np.array([label for _, label in rows])
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [int(np.flatnonzero(line == label)[0]) for line, label in zip(order, labels, strict=True)]
    assert label_rank(scores, labels).tolist() == expected
    np.testing.assert_array_equal(label_rank(scores, labels) == 0, scores.argmax(1) == labels)


def test_nan_is_never_right() -> None:
    scores = np.array([[np.nan, 1, 0], [0, np.nan, 5], [np.nan] * 3])
    assert label_rank(scores, np.array([0, 2, 1])).tolist() == [3, 3, 3]


@pytest.mark.parametrize("fixed", [None, 1, 4, 16])
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_counts_do_not_depend_on_how_samples_are_batched(
    fixed: int | None, batch: int, save_linear: Callable[..., Path]
) -> None:
    session = create_session(save_linear("m.onnx", EYE, batch=fixed or "N"))
    x, y = samples(23)
    (found,) = tally([session], None, batches(x, y, batch))
    accuracy = found.accuracy()
    assert accuracy is not None
    assert accuracy.samples == found.samples == 23
    assert accuracy.top1 == np.mean(x.argmax(1) == y)
    assert accuracy.top5 == np.mean([label in np.argsort(-row)[:5] for row, label in zip(x, y, strict=True)])
    np.testing.assert_array_equal(predict(session, x)[0], x)


def test_pairs_are_counted(save_linear: Callable[..., Path]) -> None:
    model, baseline = (create_session(save_linear(f"{i}.onnx", w)) for i, w in enumerate((SWAPPED, EYE)))
    x, y = samples(200)
    (found,) = tally([model], baseline, batches(x, y, 64))
    mine, theirs = (x @ SWAPPED).argmax(1), x.argmax(1)
    assert found.gained == np.sum((mine == y) & (theirs != y)) > 0
    assert found.lost == np.sum((mine != y) & (theirs == y)) > 0
    assert found.change is not None
    assert found.change.top1 == pytest.approx(np.mean(mine == y) - np.mean(theirs == y))
    assert found.agreement.top1 == np.mean(mine == theirs)
    assert found.agreement.max_abs_diff == pytest.approx(np.abs(x @ SWAPPED - x).max(), rel=1e-6)
    assert found.accuracy(1).top1 == np.mean(theirs == y)  # type: ignore[union-attr]
    (reverse,) = tally([baseline], model, batches(x, y, 64))
    assert (reverse.gained, reverse.lost) == (found.lost, found.gained)


def test_model_against_itself_agrees_completely(save_linear: Callable[..., Path]) -> None:
    session = create_session(save_linear("m.onnx", EYE))
    x, y = samples(50)
    (found,) = tally([session], session, batches(x, y, 8))
    assert (found.gained, found.lost, found.agreement.top1, found.agreement.max_abs_diff) == (0, 0, 1, 0)
    assert found.change is not None
    assert found.change.ci95[0] < 0 < found.change.ci95[1]


def test_without_labels_there_is_agreement_only(save_linear: Callable[..., Path]) -> None:
    session = create_session(save_linear("m.onnx", EYE))
    (found,) = tally([session], session, batches(samples(10)[0], None, 4))
    assert found.accuracy() is None
    assert found.change is None
    assert found.agreement.top1 == 1


@pytest.mark.parametrize(("n", "lose", "gain"), [(100, 0.1, 0.05), (1000, 0.02, 0.02), (300, 0.01, 0.0)])
def test_paired_interval_covers_the_truth(n: int, lose: float, gain: float) -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [gain, lose, 1 - gain - lose], size=4000)
    inside = [low <= gain - lose <= high for low, high in (paired_interval(g, c, n) for g, c, _ in draws.tolist())]
    assert 0.94 <= np.mean(inside) <= 0.999


def test_paired_interval_is_symmetric_and_shrinks_with_samples() -> None:
    low, high = paired_interval(3, 8, 100)
    assert paired_interval(8, 3, 100) == pytest.approx((-high, -low))
    widths = [high - low for low, high in (paired_interval(3 * k, 8 * k, 100 * k) for k in (1, 4, 16, 64))]
    np.testing.assert_allclose(np.array(widths[:-1]) / widths[1:], 2, rtol=0.1)
    assert all(-1 <= edge <= 1 for edge in paired_interval(0, 1, 1))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (3, 3), (2, 9), (9, 2), (40, 70), (0, 2000)])
def test_mcnemar_is_the_two_sided_sign_test(gained: int, lost: int) -> None:
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))
    assert 0 <= mcnemar(gained, lost) <= 1


def test_top5_has_its_own_pairs(save_linear: Callable[..., Path]) -> None:
    backwards = EYE[::-1]
    model, baseline = (create_session(save_linear(f"{i}.onnx", w)) for i, w in enumerate((backwards, EYE)))
    x, y = samples(300)
    (found,) = tally([model], baseline, batches(x, y, 64))
    hits = [np.array([label in np.argsort(-row)[:5] for row, label in zip(z, y, strict=True)]) for z in (x[:, ::-1], x)]
    assert (found.gained5, found.lost5) == (np.sum(hits[0] & ~hits[1]), np.sum(~hits[0] & hits[1]))
    assert found.change is not None
    assert found.change.top5 == pytest.approx(np.mean(hits[0]) - np.mean(hits[1]))
    assert found.change.top5_ci95 == paired_interval(found.gained5, found.lost5, 300)


def test_several_models_are_counted_as_each_would_be_alone(save_linear: Callable[..., Path]) -> None:
    weights = (SWAPPED, EYE[::-1], EYE)
    *models, baseline = (create_session(save_linear(f"{i}.onnx", w)) for i, w in enumerate(weights))
    x, y = samples(100)
    kept = Kept(3)
    found = tally(models, baseline, batches(x, y, 32), keep=kept)
    assert found == [tally([model], baseline, batches(x, y, 64))[0] for model in models]
    for which, weight in enumerate(weights):
        np.testing.assert_array_equal(kept.outputs(which)[0], x @ weight.astype(np.float32))
    np.testing.assert_array_equal(kept.labels, y)


def test_outputs_that_a_metric_judges_need_no_classes(save_linear: Callable[..., Path]) -> None:
    single = create_session(save_linear("one.onnx", np.ones((7, 1))))
    x, y = samples(6)
    (found,) = tally([single], None, [(x, y)], keep=Kept(1))
    assert found.accuracy() is None


def test_what_cannot_be_counted_is_an_error(save_linear: Callable[..., Path]) -> None:
    session = create_session(save_linear("m.onnx", EYE))
    x, y = samples(6)
    with pytest.raises(DataError, match="labels from 0 to 7, but the model gives 7 classes"):
        tally([session], None, [(x, np.array([0, 1, 2, 3, 4, 7]))])
    with pytest.raises(DataError, match="labels from -1"):
        tally([session], None, [(x, y - y.min() - 1)])
    with pytest.raises(DataError, match="no samples"):
        tally([session], None, [])
    single = create_session(save_linear("one.onnx", np.ones((7, 1))))
    with pytest.raises(DataError, match=r"\[6, 1\] instead of one score for each class"):
        tally([single], None, [(x, y)])


def test_outputs_without_classes_have_differences_but_no_agreement() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 2, 2] y, float[1] s)
    <int64[3] shape = {-1, 2, 2}> { r = Reshape(x, shape)  y = SCALE(r)  s = ReduceMax<keepdims = 0>(x) }"""
    text = text.replace("float[1] s", "float s")
    model, baseline = (create_session(parser.parse_model(text.replace("SCALE", op))) for op in ("Neg", "Identity"))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = compare_outputs(model, baseline, [{"x": x}, {"x": 2 * x}])
    assert found.agreement.top1 is None
    assert found.agreement.max_abs_diff == 28
    assert found.agreement.samples == 4
    with pytest.raises(DataError, match="output 's' has shape"):
        tally([model], baseline, [(x, None)])


def test_nan_is_told() -> None:
    text = '<ir_version: 9, opset_import: ["" : 17]> g (float[N, 2] x) => (float[N, 2] y) { y = OP(x) }'
    model, baseline = (create_session(parser.parse_model(text.replace("OP", op))) for op in ("Log", "Identity"))
    (found,) = tally([model], baseline, [(np.array([[1, 2], [-1, 2], [0, 1]], np.float32), np.array([1, 1, 1]))])
    assert found.not_finite == 2
    assert math.isinf(found.agreement.max_abs_diff or 0)
    accuracy = found.accuracy()
    assert accuracy is not None
    assert accuracy.top1 == pytest.approx(2 / 3)
