"""Values fitted to samples: closed forms, order, shrinkage, floors."""

import math

import numpy as np
import pytest

from treesearch.core import values
from treesearch.core.values import Value, fit, isotonic, tempered
from treesearch.core.weights import ess

CHANCE = np.random.default_rng(0)


def sample(n, slope=0.7, noise=0.3, seed=0):
    """u, y, and weights for π and p of draws of p."""
    chance = np.random.default_rng(seed)
    u = chance.normal(size=n)
    y = slope * u + noise * chance.normal(size=n)
    return u, y, y.copy(), np.zeros(n)


@pytest.mark.parametrize("slope", [0.0, 0.4, 0.9])
def test_the_slope_of_a_linear_value_is_found(slope):
    found = fit(*sample(20_000, slope), slope=0.5)
    at = np.array([-0.3, 0.5, 1.3])
    want = slope * (at - 0.5)  # log E[exp y | u] less a constant: the noise does not depend on u
    got = found.fitted(at)
    np.testing.assert_allclose(got - got[1], want, atol=0.03)


def test_the_fit_is_the_same_from_weighted_draws_of_the_target():
    """Particles of a tilted population, weighed back, lead to the value that draws of p lead to."""
    chance, tilt = np.random.default_rng(1), 0.6
    u = chance.normal(size=20_000) + tilt  # draws of p exp(tilt u)
    y = 0.7 * u + 0.3 * chance.normal(size=len(u))
    log_p = -tilt * u
    at = np.array([-0.5, 1.5])
    tilted, plain = fit(u, y, log_p + y, log_p, 0.5), fit(*sample(20_000), 0.5)
    assert np.diff(tilted.fitted(at)) == pytest.approx(np.diff(plain.fitted(at)), abs=0.06)
    assert tilted.fitted(at) == pytest.approx(plain.fitted(at), abs=0.06)


def test_heights_are_on_the_scale_of_the_floor():
    u, y, log_w, log_p = sample(5_000)
    assert np.exp(fit(u, y, log_w, log_p, 0.5).fitted(u)).mean() == pytest.approx(1, abs=1e-9)
    moved = fit(u, y, log_w + 700, log_p - 900, 0.5)  # scale of the weights
    np.testing.assert_allclose(moved.fitted(u), fit(u, y, log_w, log_p, 0.5).fitted(u), atol=1e-9)


def test_a_constant_in_the_reward_changes_no_twist():
    u, y, log_w, log_p = sample(500)
    at = np.linspace(-2, 2, 9)
    there = fit(u + 50, y + 50, log_w + 50, log_p, 0.5).twist(at + 50)
    np.testing.assert_allclose(there, fit(u, y, log_w, log_p, 0.5).twist(at), atol=1e-9)


def test_few_samples_leave_the_slope_to_the_prior():
    gaps = [fit(*sample(4, slope=0.0, noise=3.0, seed=s), slope=0.5).slope - 0.5 for s in range(40)]
    far = [fit(*sample(4_000, slope=0.0, noise=3.0, seed=s), slope=0.5).slope - 0.5 for s in range(4)]
    assert abs(np.mean(gaps)) < 0.25
    assert np.mean(far) == pytest.approx(-0.5, abs=0.1)


def test_bends_are_followed_where_there_are_many_samples_and_not_where_noise_makes_them():
    chance = np.random.default_rng(2)
    u = chance.uniform(-3, 3, 8_000)
    y = np.minimum(u, 0.0) + 0.2 * chance.normal(size=len(u))  # flat from 0 on
    found = fit(u, y, y, np.zeros(len(u)), 0.5)
    left, right = found.fitted(np.array([-1.0, -0.3, 0.8, 2.0])).reshape(2, 2)
    assert np.diff(left) > 0.5
    assert np.diff(right) < 0.05
    straight = fit(*sample(400, noise=1.0), slope=0.5)
    steps = np.diff(straight.heights) / np.diff(straight.knots)
    assert np.ptp(steps) < 0.25, "a straight line with noise around it was bent"


def test_values_rise_at_most_as_fast_as_the_endpoint():
    for seed in range(60):
        chance = np.random.default_rng(seed)
        n = int(chance.integers(2, 200))
        u, y = (
            10.0 ** chance.integers(-3, 4) * chance.normal(size=n),
            10.0 ** chance.integers(-3, 4) * chance.normal(size=n),
        )
        found = fit(u, y, y + chance.normal(size=n), chance.normal(size=n), slope=chance.uniform())
        steps = np.diff(found.fitted(np.sort(np.append(u, found.knots))))
        gaps = np.diff(np.sort(np.append(u, found.knots)))
        assert np.isfinite(found.heights).all()
        assert (steps >= -1e-9 * np.abs(found.heights).max()).all()
        assert (steps <= gaps * (1 + 1e-6) + 1e-9 * (1 + np.abs(found.heights).max())).all()


def test_beyond_the_samples_the_slope_is_the_prior_one():
    found = fit(*sample(2_000), slope=0.05)
    top, bottom = found.knots[-1], found.knots[0]
    assert np.diff(found.fitted(np.array([top, top + 100.0]))) == pytest.approx(5.0)
    assert np.diff(found.fitted(np.array([bottom - 100.0, bottom]))) == pytest.approx(5.0)


def test_the_floor_bounds_what_a_twist_takes_away():
    value = Value(np.array([0.0, 1.0]), np.array([0.0, 1.0]), 1.0, floor=0.1)
    assert value.twist(np.array([-1e6])) == pytest.approx(math.log(0.1))
    assert value.twist(np.array([0.0])) == pytest.approx(0.0)  # log(.1 + .9 e^0)
    assert value.twist(np.array([50.0])) == pytest.approx(50 + math.log(0.9))
    assert Value.guess(0.3).twist(np.array([-7.0])) == pytest.approx(-2.1)


def test_endpoints_and_samples_that_are_forbidden_do_not_count():
    u, y, log_w, log_p = sample(300)
    spoiled = [np.concatenate([x, more]) for x, more in ((u, [-np.inf, 1.0]), (y, [0.0, -np.inf]))]
    weights = [np.concatenate([log_w, [0.0, -np.inf]]), np.concatenate([log_p, [0.0, 0.0]])]
    at = np.linspace(-1, 1, 5)
    np.testing.assert_array_equal(fit(*spoiled, *weights, 0.5).fitted(at), fit(u, y, log_w, log_p, 0.5).fitted(at))


@pytest.mark.parametrize("y", [np.full(9, -np.inf), np.append(np.full(8, -np.inf), 0.0)], ids=["none", "one"])
def test_nothing_to_fit_to_is_the_guess(y):
    assert fit(np.arange(9.0), y, y, np.zeros(9), 0.3) == Value.guess(0.3) or fit(
        np.arange(9.0), y, y, np.zeros(9), 0.3
    ).fitted(np.array([2.0])) == pytest.approx(0.6)


def test_equal_endpoints_say_nothing():
    y = CHANCE.normal(size=50)
    found = fit(np.full(50, 3.0), y, y, np.zeros(50), 0.3)
    assert np.ptp(found.twist(np.full(5, 3.0))) == 0


def test_tempering_keeps_an_effective_size():
    log_w = 40 * CHANCE.normal(size=1_000)
    weights, effective = tempered(log_w)
    assert effective == pytest.approx(100, rel=1e-6)
    assert 1 / np.square(weights).sum() == pytest.approx(effective)
    mild = 0.1 * CHANCE.normal(size=1_000)
    np.testing.assert_allclose(tempered(mild)[0], np.exp(mild) / np.exp(mild).sum())
    assert tempered(mild)[1] == pytest.approx(ess(mild))
    few, _ = tempered(np.array([0.0, -np.inf, -1e9]))
    assert few[1] == 0
    assert few.sum() == pytest.approx(1)


def test_isotonic_regression_is_the_closest_ordered_sequence():
    np.testing.assert_allclose(isotonic(np.array([1.0, 3.0, 2.0, 2.5, 0.0, 9.0])), [1, 1.875, 1.875, 1.875, 1.875, 9])
    for seed in range(20):
        y = np.random.default_rng(seed).normal(size=7)
        got = isotonic(y)
        assert (np.diff(got) >= 0).all()
        # the projection onto a cone: the residual is orthogonal to the fit, and turns away from every ordered sequence
        assert (y - got) @ got == pytest.approx(0, abs=1e-12)
        assert all((y - got)[k:].sum() <= 1e-12 for k in range(1, 7))
        assert (y - got).sum() == pytest.approx(0, abs=1e-12)


def test_the_prior_slope_rises_as_noise_falls():
    slopes = [values.prior_slope(t, 50) for t in range(50, -1, -1)]
    assert slopes[0] == 0
    assert slopes[-1] == 1
    assert (np.diff(slopes) > 0).all()
