"""Removing channels from a least-squares problem, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from prune_onnx.graph_ops.obs import Gram, Reader, removal_path, ridge_matrix, solve

RIDGE = 1e-3


def problem(
    seed: int, units: int = 5, k: int = 3, outputs: int = 4, rows: int = 400
) -> tuple[Gram, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((units * k, units * k))
    x = np.concatenate([rng.standard_normal((rows, units * k)) @ mix, np.ones((rows, 1))], 1)
    w = rng.standard_normal((outputs, units * k + 1))
    t = x @ w.T + 0.1 * rng.standard_normal((rows, outputs))
    return Gram.of(x, t, rows=64), w, np.arange(units * k).reshape(units, k)


def objective(gram: Gram, w0: np.ndarray, w: np.ndarray) -> float:
    """What the ridge solution minimises: mean squared error and the pull to the trained weights."""
    return gram.error(w) + float(np.sum(ridge_matrix(gram, RIDGE) * np.square(w - w0)))


def without(columns: np.ndarray, gone: list[int], size: int) -> np.ndarray:
    use = np.ones(size, bool)
    use[columns[gone].reshape(-1)] = False
    return use


def test_gram_holds_the_moments():
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((100, 6)), rng.standard_normal((100, 3))
    gram = Gram.of(x, t, rows=7)
    np.testing.assert_allclose(gram.a, x.T @ x / 100, rtol=1e-12)
    np.testing.assert_allclose(gram.b, t.T @ x / 100, rtol=1e-12, atol=1e-14)
    w = rng.standard_normal((3, 6))
    assert gram.error(w) == pytest.approx(np.square(x @ w.T - t).sum() / 100)


def test_solve_is_the_minimum():
    gram, w0, columns = problem(1)
    use = without(columns, [1, 3], w0.shape[1])
    w = solve(gram, w0, use, RIDGE)
    assert not w[:, ~use].any()
    rng = np.random.default_rng(0)
    target = np.where(use, w0, 0)  # weights that are gone do not pull
    for _ in range(20):
        nudge = 1e-3 * rng.standard_normal(w.shape) * use
        assert objective(gram, target, w) < objective(gram, target, w + nudge)


@pytest.mark.parametrize("seed", range(5))
def test_path_takes_the_cheapest_unit_at_every_step(seed):
    gram, w0, columns = problem(seed)
    size = w0.shape[1]
    path = removal_path([Reader(gram, w0, columns)], RIDGE, np.ones(len(columns), bool))
    assert sorted(path.order.tolist()) == list(range(len(columns)))
    gone: list[int] = []
    for step, unit in enumerate(path.order.tolist()):
        costs = {}
        for candidate in set(range(len(columns))) - set(gone):
            use = without(columns, [*gone, candidate], size)
            w = solve(gram, w0, use, RIDGE)
            costs[candidate] = objective(gram, w0, w)
        assert unit == min(costs, key=costs.get)
        gone.append(unit)
        grown = (path.error[step + 1] - path.error[step]) * gram.t
        before = objective(gram, w0, solve(gram, w0, without(columns, gone[:-1], size), RIDGE))
        # A removed weight still pays its pull to w0, in both: the difference is what the removal costs.
        assert grown == pytest.approx(costs[unit] - before, rel=1e-6, abs=1e-9)


def test_path_of_several_readers_adds_their_costs():
    first, second = problem(0), problem(7)
    both = [Reader(first[0], first[1], first[2]), Reader(second[0], second[1], second[2], weight=0.0)]
    alone = removal_path(both[:1], RIDGE, np.ones(5, bool))
    joint = removal_path(both, RIDGE, np.ones(5, bool))
    np.testing.assert_array_equal(alone.order, joint.order)


def test_dead_input_goes_first_and_costs_nothing():
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.standard_normal((200, 6)), np.ones((200, 1))], 1)
    x[:, 2:4] = 0
    w = rng.standard_normal((3, 7))
    gram = Gram.of(x, x @ w.T)
    path = removal_path(
        [Reader(gram, np.where(np.arange(7) // 2 == 1, 0, w), np.arange(6).reshape(3, 2))],
        RIDGE,
        np.ones(3, bool),
        stop=2,
    )
    assert path.order.tolist() == [1]
    assert path.error[-1] - path.error[0] < 1e-9


def test_only_allowed_units_go():
    gram, w0, columns = problem(2)
    allowed = np.asarray([True, False, True, False, True])
    assert set(removal_path([Reader(gram, w0, columns)], RIDGE, allowed).order.tolist()) == {0, 2, 4}


def test_units_that_feed_fewer_columns_are_compared_with_the_others():
    gram, w0, columns = problem(4)
    columns = columns.copy()
    columns[1, 2] = columns[3, 1] = columns[3, 2] = -1  # those columns belong to nobody and stay
    path = removal_path([Reader(gram, w0, columns)], RIDGE, np.ones(5, bool))
    gone: list[int] = []
    for step, unit in enumerate(path.order.tolist()):
        use = np.ones(w0.shape[1], bool)
        before = objective(gram, w0, solve(gram, w0, use_without(columns, gone, use), RIDGE))
        costs = {
            c: objective(gram, w0, solve(gram, w0, use_without(columns, [*gone, c], use), RIDGE))
            for c in set(range(5)) - set(gone)
        }
        assert unit == min(costs, key=costs.get)
        assert (path.error[step + 1] - path.error[step]) * gram.t == pytest.approx(costs[unit] - before, rel=1e-6)
        gone.append(unit)


def use_without(columns: np.ndarray, gone: list[int], use: np.ndarray) -> np.ndarray:
    left = use.copy()
    fed = columns[gone]
    left[fed[fed >= 0]] = False
    return left


def test_a_unit_that_a_reader_does_not_see_costs_nothing_there():
    gram, w0, columns = problem(5)
    unseen = columns.copy()
    unseen[2] = -1
    path = removal_path([Reader(gram, w0, unseen)], RIDGE, np.ones(5, bool))
    assert path.order[0] == 2
    assert path.error[1] == path.error[0]


def test_paths_of_many_units_take_several_at_a_time_and_end_at_the_same_error():
    rng = np.random.default_rng(0)
    units = 160
    mixed = rng.standard_normal((2000, units)) @ rng.standard_normal((units, units))
    x = np.concatenate([mixed, np.ones((2000, 1))], 1)
    w = rng.standard_normal((6, units + 1))
    gram = Gram.of(x, x @ w.T)
    columns = np.arange(units).reshape(-1, 1)
    path = removal_path([Reader(gram, w, columns)], RIDGE, np.ones(units, bool), stop=100)
    assert len(path.order) == 60
    assert len(set(path.order.tolist())) == 60
    assert (np.diff(path.error) >= 0).all()
    use = without(columns, path.order.tolist(), units + 1)
    end = objective(gram, w, solve(gram, w, use, RIDGE))
    start = objective(gram, w, solve(gram, w, np.ones(units + 1, bool), RIDGE))
    assert (path.error[-1] - path.error[0]) * gram.t == pytest.approx(end - start, rel=1e-6)


def test_moments_of_two_sets_add_up():
    rng = np.random.default_rng(1)
    x, t = rng.standard_normal((90, 4)), rng.standard_normal((90, 2))
    both, parts = Gram.of(x, t), Gram.of(x[:30], t[:30]) + Gram.of(x[30:], t[30:])
    np.testing.assert_allclose(parts.a, both.a)
    np.testing.assert_allclose(parts.b, both.b)
    assert (parts.t, parts.count) == (pytest.approx(both.t), 90)
    some = np.asarray([0, 3])
    np.testing.assert_array_equal(both.on(some).a, both.a[np.ix_(some, some)])
