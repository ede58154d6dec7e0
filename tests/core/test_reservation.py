"""The reservation price on arrays: the rate of a plan is what following it earns, and no other threshold earns more."""

import numpy as np
import pytest
from scipy.stats import norm

from treesearch.core import reservation
from treesearch.core.reservation import Line, plan, scores, spread

GOOD = Line(0.0, 0.8, 0.6)
PRICES = (0.2, 1.0)


def rate(line, prices, best, threshold):
    """Improvement per price of finishing the drafts above a threshold, by quadrature."""
    z = np.linspace(-6, 8, 4001)
    density = norm.pdf(z) * (z[1] - z[0])
    gap = (line.a + line.b * z - best) / line.sd
    hoped = line.sd * (norm.pdf(gap) + gap * norm.cdf(gap))
    up = z > threshold
    return density[up] @ hoped[up] / (prices[0] + density[up].sum() * prices[1])


@pytest.mark.parametrize("best", [0.5, 2.0, 3.3])
def test_the_rate_is_that_of_the_best_threshold(best):
    found = plan(1, {(0, 1): GOOD}, PRICES, best)
    assert found.rungs == (0, 1)
    earned = [rate(GOOD, PRICES, best, t) for t in np.linspace(-2, 4, 301)]
    assert found.gain == pytest.approx(max(earned) / rate(GOOD, (0.0, 1.0), best, -9), rel=0.01)
    threshold = np.interp(0.0, found.values[0], reservation.GRID)
    assert found.worth(0, np.array([threshold - 0.1]))[0] < 0 < found.worth(0, np.array([threshold + 0.1]))[0]


def test_drafts_that_predict_nothing_are_left_out():
    assert plan(1, {(0, 1): Line(0.0, 0.0, 1.0)}, PRICES, 2.0) == ((1,), 1.0, (), False)
    assert plan(1, {(0, 1): Line(-3.0, 0.3, 0.01)}, PRICES, 2.0).rungs == (1,)
    assert plan(1, {}, PRICES, 2.0).rungs == (1,)


def test_a_gain_that_few_pairs_promise_is_in_doubt():
    """A plan must gain 2/√n more than finishing everything; until then it is said to be doubtful."""
    weak = Line(0.0, 0.4, float(np.sqrt(0.84)))
    gain = plan(1, {(0, 1): weak}, PRICES, 2.0).gain
    assert 1.2 < gain < 1.6
    enough = (2 / (gain - 1)) ** 2
    for pairs, rungs in ((0.9 * enough, (1,)), (1.1 * enough, (0, 1))):
        found = plan(1, {(0, 1): weak._replace(pairs=pairs)}, PRICES, 2.0)
        assert (found.rungs, found.doubtful) == (rungs, len(rungs) == 1)
    assert plan(1, {(0, 1): GOOD._replace(pairs=16)}, PRICES, 2.0).rungs == (0, 1)
    assert reservation.line(np.arange(5.0), np.arange(5.0)).pairs == 5


@pytest.mark.parametrize(
    ("b", "pairs", "chance", "passed"), [(0.0, 16, 0.74, 0.24), (0.0, 256, 0.22, 0.03), (0.7, 16, 1.0, 0.97)]
)
def test_the_margin_keeps_most_of_what_gains_by_chance_out(b, pairs, chance, passed):
    """Shares of 150 draws of pairs, beside those of 300 others: four standard errors of either."""
    rng, n, ones = np.random.default_rng(1), 150, np.ones(pairs)
    best, gain = float(reservation.scores(np.arange(float(pairs)), ones).max()), []
    for _ in range(n):
        z = rng.standard_normal(pairs)
        y = b * z + np.sqrt(1 - b * b) * rng.standard_normal(pairs)
        of = reservation.line(reservation.scores(z, ones), reservation.scores(y, ones))
        gain.append(plan(1, {(0, 1): of._replace(pairs=1e12)}, (0.1, 1.0), best).gain)
        sure = plan(1, {(0, 1): of}, (0.1, 1.0), best)
        assert (sure.gain > 1) == (gain[-1] >= 1 + 2 / np.sqrt(pairs))
    for share, want in ((np.greater(gain, 1), chance), (np.greater(gain, 1 + 2 / np.sqrt(pairs)), passed)):
        assert abs(share.mean() - want) < 4 * np.sqrt(max(want * (1 - want), 0.01) * (1 / n + 1 / 300))


def test_two_rungs_are_read_where_each_is_worth_its_price():
    """By simulation: the rate of the plan is what it earns."""
    lines = {(0, 1): Line(0.0, 0.8, 0.6), (1, 2): Line(0.0, 0.9, np.sqrt(0.19)), (0, 2): Line(0.0, 0.72, 0.69)}
    prices, best, n = (0.05, 0.2, 1.0), 2.0, 400_000
    found = plan(2, lines, prices, best)
    assert found.rungs == (0, 1, 2)
    rng = np.random.default_rng(1)
    z0 = rng.normal(size=n)
    z1, on = lines[0, 1].b * z0 + lines[0, 1].sd * rng.normal(size=n), found.worth(0, z0) > 0
    y, done = lines[1, 2].b * z1 + lines[1, 2].sd * rng.normal(size=n), on & (found.worth(1, z1) > 0)
    gain = np.where(done, np.maximum(y - best, 0), 0)
    earned = gain.mean() / (prices[0] + on.mean() * prices[1] + done.mean() * prices[2])
    all_of_them = np.maximum(
        lines[1, 2].b * (0.8 * z0 + 0.6 * rng.normal(size=n)) + lines[1, 2].sd * rng.normal(size=n) - best, 0
    )
    assert earned / all_of_them.mean() == pytest.approx(found.gain, rel=8 * gain.std() / n**0.5 / gain.mean())
    assert plan(2, lines, (0.05, 0.9, 1.0), best).rungs == (0, 2)  # the second is too dear


def test_scores_are_those_of_candidates_as_they_come():
    rng = np.random.default_rng(2)
    d = rng.normal(size=20_000)
    y = 0.8 * d + 0.6 * rng.normal(size=20_000)
    read = (d > 1.5) | (rng.random(20_000) < 0.3)
    mass = spread(d, read, np.ones(20_000))
    assert mass.sum() == pytest.approx(20_000)
    assert mass[d[read] > 1.6].max() <= 3
    found = scores(y[read], mass)
    top = y[read] > 2
    assert np.abs(found[top] - y[read][top]).mean() < 0.1
    assert np.array_equal(
        scores(np.array([1.0, 1.0, 2.0]), np.ones(3))[:2], [scores(np.array([1.0, 1, 2]), np.ones(3))[0]] * 2
    )
    assert scores(np.array([-np.inf, 0.0]), np.ones(2)) == pytest.approx([norm.ppf(0.25), norm.ppf(0.75)])


def test_a_line_of_few_pairs_predicts_little():
    x = np.linspace(-1, 1, 4)
    few, many = reservation.line(x, x), reservation.line(np.tile(x, 50), np.tile(x, 50))
    assert few.b < 0.8 < 0.99 < many.b
    assert few.sd > 0.5 > 0.15 > many.sd
    assert np.isfinite(reservation.line(np.zeros(1), np.ones(1))).all()
