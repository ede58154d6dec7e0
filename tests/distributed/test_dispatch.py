"""Which worker gets which rows: shares by water-filling, rows by shares."""

import numpy as np
import pytest

from treesearch.distributed.sharing import deal, smooth, water_fill

CASES = range(40)


def situation(seed):
    """(queued, backlog, speed) of a few workers, some of them alike, some idle."""
    draw = np.random.default_rng(seed)
    n = int(draw.integers(1, 7))
    backlog = draw.choice([0.0, draw.uniform(0, 3), draw.uniform(0, 0.1)], n)
    speed = draw.choice([1.0, draw.uniform(1, 100), draw.uniform(100, 10_000)], n)
    return float(draw.choice([1e-3, draw.uniform(1, 50), draw.uniform(50, 1e5)])), backlog, speed


@pytest.mark.parametrize("seed", CASES)
def test_shares_add_up_and_end_together(seed):
    queued, backlog, speed = situation(seed)
    shares = water_fill(queued, backlog, speed)
    assert (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(), queued, rtol=1e-9, atol=1e-9)
    ends = backlog + shares / speed
    some = shares > 1e-9 * queued
    np.testing.assert_allclose(ends[some], ends[some].max(), rtol=1e-6, atol=1e-9)
    assert (backlog[~some] >= ends[some].max() - 1e-6).all()  # who gets nothing is busy until then


@pytest.mark.parametrize("seed", CASES)
def test_no_other_split_ends_earlier(seed):
    queued, backlog, speed = situation(seed)

    def end(shares):
        return max((b + s / v for b, s, v in zip(backlog, shares, speed, strict=True) if s > 0), default=0.0)

    best, draw = end(water_fill(queued, backlog, speed)), np.random.default_rng(seed)
    for _ in range(300):
        other = draw.dirichlet(np.full(len(speed), draw.choice([0.1, 1.0, 10.0]))) * queued
        assert end(other) >= best * (1 - 1e-6) - 1e-9


def test_shares_by_hand():
    np.testing.assert_allclose(water_fill(30, np.zeros(2), np.array([1.0, 2.0])), [10, 20])
    np.testing.assert_allclose(water_fill(30, np.array([0.0, 10.0]), np.array([1.0, 2.0])), [50 / 3, 40 / 3])
    np.testing.assert_allclose(water_fill(5, np.array([0.0, 10.0]), np.array([1.0, 2.0])), [5, 0])
    np.testing.assert_allclose(water_fill(0, np.array([0.0, 0.0]), np.array([1.0, 2.0])), [0, 0])


def test_shares_do_not_depend_on_the_order_of_workers():
    queued, backlog, speed = 77.0, np.array([3.0, 0.0, 1.0, 2.0]), np.array([5.0, 1.0, 8.0, 3.0])
    turn = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(water_fill(queued, backlog, speed)[turn], water_fill(queued, backlog[turn], speed[turn]))


def test_a_speed_moves_towards_the_latest_measurement():
    assert smooth(None, 40.0) == 40.0
    speeds = [100.0]
    for _ in range(30):
        speeds.append(smooth(speeds[-1], 200.0))
        assert speeds[-2] < speeds[-1] < 200.0
    assert speeds[-1] > 199.0


def rows(seed):
    draw = np.random.default_rng(seed)
    n, workers = int(draw.integers(1, 200)), [4, 7, 9][: int(draw.integers(1, 4))]
    cost = draw.choice([1.0, 5.0, draw.uniform(0.001, 20)], n)
    home = draw.choice([-1, 3, *workers], n)  # 3 has gone
    return cost, home, workers, draw


@pytest.mark.parametrize("seed", CASES)
def test_everything_is_given_where_shares_suffice(seed):
    cost, home, workers, draw = rows(seed)
    shares = draw.dirichlet(np.ones(len(workers))) * cost.sum()
    given = deal(cost, home, workers, shares)
    assert np.isin(given, workers).all()
    for worker, share in zip(workers, shares, strict=True):  # to within a row's cost for each boundary between workers
        assert abs(cost[given == worker].sum() - share) <= len(workers) * cost.max() + 1e-9


@pytest.mark.parametrize("seed", CASES)
def test_nobody_gets_more_than_its_share_and_a_row(seed):
    cost, home, workers, draw = rows(seed)
    shares = draw.uniform(0, 0.7, len(workers)) * cost.sum() / len(workers)
    given = deal(cost, home, workers, shares)
    assert np.isin(given, [-1, *workers]).all()
    for worker, share in zip(workers, shares, strict=True):
        assert cost[given == worker].sum() <= share + cost.max()
    left = cost[given == -1].sum()
    assert left >= cost.sum() - shares.sum() - len(workers) * cost.max()
    assert left > 0 or len(cost) < 4 * len(workers)


def test_rows_without_a_home_are_given_in_order():
    cost = np.ones(12)
    given = deal(cost, np.full(12, -1), [5, 8], np.array([4.0, 6.0]))
    assert given.tolist() == [5] * 4 + [8] * 6 + [-1] * 2


def test_rows_go_home_while_there_is_room():
    cost, home = np.ones(8), np.array([8, 8, 5, 5, 8, 8, -1, -1])
    assert deal(cost, home, [5, 8], np.array([4.0, 4.0])).tolist() == [8, 8, 5, 5, 8, 8, 5, 5]


def test_what_a_home_has_no_room_for_is_stolen():
    cost, home = np.ones(6), np.full(6, 8)
    given = deal(cost, home, [5, 8], np.array([3.0, 3.0]))
    assert given.tolist() == [8, 8, 8, 5, 5, 5]
    assert deal(cost, home, [5], np.array([2.0])).tolist() == [5, 5, -1, -1, -1, -1]


def test_one_large_row_finds_a_worker():
    assert deal(np.array([10.0]), np.array([-1]), [1, 2], np.array([5.0, 5.0])).tolist() in ([1], [2])
    assert deal(np.array([10.0]), np.array([2]), [1, 2], np.array([5.0, 5.0])).tolist() == [2]
