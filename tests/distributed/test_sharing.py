"""Which worker gets which rows: shares by water-filling, rows by shares."""

import numpy as np
import pytest

from treesearch.distributed.bundles import Counters
from treesearch.distributed.sharing import (
    BUNDLE_BYTES,
    Speeds,
    bundle_rows,
    deal,
    seconds,
    share_out,
    smooth,
    water_fill,
    without_noise,
)

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


# What is known of workers, and what each of them gets.


def test_speeds_that_differ_by_a_little_are_equal():
    assert without_noise(np.array([95.0, 100.0, 109.0, 120.0, 50.0])).tolist() == [100.0, 100.0, 100.0, 120.0, 50.0]


def counters(*, room=0, seconds=0.0, full_rows=0, full_seconds=0.0):
    return Counters(room=room, seconds=seconds, full_rows=full_rows, full_seconds=full_seconds)


def test_speeds_are_learned_from_full_batches_first():
    speeds = Speeds()
    speeds.learn(1, counters(room=80, seconds=1.0), first=True)  # it pays for loading
    assert speeds.of([1, 2]) == {}
    speeds.learn(1, counters(room=80, seconds=1.0), first=False)
    assert speeds.of([1, 2]) == {1: 80.0}
    speeds.learn(1, counters(full_rows=200, full_seconds=1.0), first=False)  # better than any guess
    assert speeds.of([1]) == {1: 200.0}
    speeds.learn(1, counters(room=80, seconds=1.0), first=False)
    assert speeds.of([1]) == {1: 200.0}
    speeds.learn(1, counters(full_rows=100, full_seconds=1.0), first=True)  # another search: it is loaded by now
    assert 100 < speeds.of([1])[1] < 200
    speeds.learn(2, counters(full_rows=1000, full_seconds=1.0), first=False)
    assert set(speeds.of([2, 3])) == {2}


def test_a_bundle_is_a_second_of_whole_batches_that_fit():
    assert bundle_rows(0.0, 5.0, 8, 4) == 8  # at least one batch
    assert bundle_rows(1000.0, 5.0, 8, 4) == 200
    assert bundle_rows(999.0, 5.0, 8, 4) == 192
    assert bundle_rows(1000.0, 5.0, 8, BUNDLE_BYTES // 30) == 24
    assert bundle_rows(1000.0, 5.0, 8, 2 * BUNDLE_BYTES) == 8


def test_bundles_share_passes_but_a_row_takes_its_steps():
    assert seconds([400.0, 200.0], [10.0, 5.0], 8, 100.0) == 6.0
    assert seconds([10.0], [10.0], 8, 100.0) == 0.8


def out(free, **how):
    found = {"backlog": np.zeros(2), "speed": np.array([1.0, 3.0]), "most": np.full(2, 1e9), "batch_size": 1} | how
    return share_out(np.ones(40), np.full(40, -1), np.array([5, 8]), np.array(free), **found)


def test_workers_get_what_their_speed_and_backlog_allow():
    assert np.bincount(out([True, True]))[[5, 8]].tolist() == [10, 30]
    assert np.bincount(out([True, True], backlog=np.array([40.0, 0.0]))).tolist()[8] == 40
    assert (out([True, True], most=np.array([4.0, 8.0])) < 0).sum() == 28


def test_the_share_of_a_worker_that_is_not_free_stays_queued():
    assert np.bincount(out([False, True]) + 1).tolist() == [10, *[0] * 8, 30]


def test_shares_are_whole_batches():
    assert np.bincount(out([True, True], batch_size=8) + 1)[[0, 6, 9]].tolist() == [8, 8, 24]
