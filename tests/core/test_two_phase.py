"""Two-phase sampling on arrays: who is finished how often, that the estimate is unbiased, what π costs least."""

import numpy as np
import pytest

from tests.support import laws
from treesearch.core import two_phase
from treesearch.core.two_phase import Fit, Pairs, chances, systematic, terms
from treesearch.core.values import Value

RNG = np.random.default_rng(3)
U = RNG.normal(size=23)
PI = chances(1.5 * U, 9, 0.1)
OFFSETS = (np.arange(1000) + 0.5) / 1000


def known(log_m=-np.inf, log_s=0.0, log_rest=0.0):
    return Fit(Value.guess(1.0), log_m, log_s, log_rest)


def test_chances_are_between_the_floor_and_one_and_sum_to_what_is_finished():
    assert PI.sum() == pytest.approx(9, abs=1e-9)
    assert PI.min() == 0.1
    assert PI.max() == 1
    inside = (PI > 0.1) & (PI < 1)
    assert np.ptp(np.log(PI[inside]) - 1.5 * U[inside]) < 1e-9
    assert np.array_equal(chances(U, 23, 0.1), np.ones(23))
    assert np.allclose(chances(np.full(5, -np.inf), 2, 0.1), 0.4)
    for count in (2, 24):
        with pytest.raises(ValueError, match=r"expected 0\.1 to 1 of them"):
            chances(U, count, 0.1)


def test_a_candidate_is_finished_as_often_as_its_chance_says():
    drawn = [systematic(PI, U, float(u)) for u in OFFSETS]
    assert {len(who) for who, _ in drawn} == {9}
    assert np.allclose(drawn[0][1], PI, atol=1e-9)
    found = np.bincount(np.concatenate([who for who, _ in drawn]), minlength=23) / len(OFFSETS)
    assert np.abs(found - PI).max() < 2 / len(OFFSETS)
    assert all(np.array_equal(systematic(np.ones(7), np.zeros(7), u)[0], np.arange(7)) for u in (0.0, 0.4))


@pytest.mark.parametrize("log_m", [np.full(23, -np.inf), U, 2 - 3 * U], ids=["none", "good", "wrong"])
def test_the_mean_over_all_choices_is_the_mean_weight_whatever_m_is(log_m):
    log_w = U + 0.3 * RNG.normal(size=23)
    found = []
    for u in OFFSETS:
        who, pi = systematic(PI, U, float(u))
        each = terms(log_m, log_w[who], pi, who)
        found.append(each.mean * np.exp(each.log_unit))
    assert np.mean(found) == pytest.approx(np.exp(log_w).mean(), abs=20 / len(OFFSETS) * np.exp(log_m.max()) + 0.01)


def waves(found, count=40, finish=12, n=800):
    """Ẑ and its variance as estimated, of single waves of candidates w = exp(u + half a unit of noise)."""
    rng = np.random.default_rng(5)
    for _ in range(n):
        u = rng.normal(size=count)
        log_w = 0.5 * u + 0.5 * rng.normal(size=count)
        who, pi = systematic(chances(found.s(u), finish, 0.1), u, rng.random())
        made = two_phase.combine([terms(found.m(u), log_w[who], pi, who)], np.ones(1))
        yield np.exp(made.log_z), made.error * np.exp(made.log_z) / made.relative


@pytest.mark.parametrize("log_m", [-np.inf, np.log(0.9)], ids=["Horvitz-Thompson", "difference"])
def test_the_variance_is_not_estimated_too_low(log_m):
    half = Fit(Value(np.zeros(1), np.zeros(1), 0.5), log_m, 0.0, 0.0)
    z, error = map(np.array, zip(*waves(half), strict=True))
    laws.unbiased(z / np.exp(0.25))
    noise = np.std(error**2) / len(z) ** 0.5 + np.var(z) * (2 / len(z)) ** 0.5
    assert np.mean(error**2) > np.var(z) - 4 * noise
    assert np.mean(error**2) < 3 * np.var(z)


def test_the_share_finished_is_neyman_s():
    """Without bounds the least of (c + E π)(A + E s²/π) is at π = s √(c / A)."""
    u = 0.3 * RNG.normal(size=400)
    s, cost, rest = 0.2 * np.exp(u), 0.2, 1.0
    found = two_phase.share(known(log_s=np.log(0.2)), u, 1e-6, lambda p: 99.0 if p is None else cost + p)
    assert found == pytest.approx(float(np.mean(s) * np.sqrt(cost / rest)), rel=0.11)  # h is tried in steps of a tenth


def test_drafts_that_say_nothing_are_not_made():
    def price(p):
        return 1.0 if p is None else 0.2 + p

    u, log_w = RNG.normal(size=(2, 400))
    found = two_phase.fit(Pairs(u, log_w, np.zeros(400)))
    assert two_phase.share(found, u, 0.1, price) is None
    found = two_phase.fit(Pairs(u, 2 * u + 0.1 * log_w, np.zeros(400)))
    assert 0.1 <= two_phase.share(found, u, 0.1, price) < 0.6


def test_m_has_at_most_the_mean_weight_and_takes_selection_into_account():
    u = RNG.normal(size=3000)
    log_w = u + 0.5 * RNG.normal(size=3000)
    pi = chances(u, 900, 0.1)
    who, pi = systematic(pi, u, 0.5)
    found = two_phase.fit(Pairs(u[who], log_w[who], -np.log(pi[who])))
    assert 0.7 < np.exp(found.m(u)).mean() / np.exp(log_w).mean() < 1.1
    assert two_phase.fit(Pairs(u[:7], log_w[:7], np.zeros(7))) is None
    assert two_phase.fit(Pairs(u, np.zeros(3000), np.zeros(3000))) is None


def test_forbidden_drafts_and_samples_have_no_weight():
    u = np.append(RNG.normal(size=60), -np.inf)
    found = two_phase.fit(Pairs(u, np.where(u > 0, u, -np.inf), np.zeros(61)))
    assert found.m(u)[-1] == -np.inf
    assert np.isfinite(found.s(u)[:-1]).all()
    assert chances(found.s(u), 20, 0.1)[-1] == 0.1
    nothing = terms(np.full(3, -np.inf), np.full(2, -np.inf), np.ones(3), np.arange(2))
    assert two_phase.combine([nothing], np.ones(1)).log_z == -np.inf


def test_waves_are_weighed_by_their_planned_sizes():
    assert np.allclose(two_phase.shares(np.array([1, 3, 12])), np.diff([0, 1, 8, 64]) / 64)
    ones = [two_phase.Terms(0.0, np.ones(3)), two_phase.Terms(-700.0, np.full(2, np.exp(700.0)))]
    assert two_phase.combine(ones, two_phase.shares(np.array([1, 2]))).log_z == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(two_phase.combine([two_phase.Terms(0.0, np.array([-2.0, 1.0]))], np.ones(1)).log_z)


@pytest.mark.parametrize("lam", [1.0, 1e2, 1e3, 1e5])
@pytest.mark.parametrize("kind", ["line", "steps", "apart"])
def test_fits_at_large_lam(lam, kind):
    """Where exp(λ r) underflows beside the largest: on logs, m has the scale of w."""
    rng = np.random.default_rng(7)
    r = rng.normal(size=60)
    d = 0.3 * r + rng.normal(size=60)
    log_w = lam * {"line": r, "steps": (r > 1).astype(float), "apart": 5 * r}[kind]
    found = two_phase.fit(Pairs(lam * d, log_w, np.zeros(60)))
    assert found is not None
    assert np.isfinite([found.log_s, found.log_rest]).all() or found.log_rest == -np.inf
    ceiling = log_w.max() - np.log(60) + np.log((log_w == log_w.max()).sum()) + 60 * np.exp(-lam)
    assert np.logaddexp.reduce(found.m(lam * d)) - np.log(60) <= ceiling + 2
    two_phase.share(found, lam * d, 0.1, lambda p: 1.0 if p is None else 0.2 + p)


def test_a_fit_does_not_depend_on_the_unit_of_weights():
    u = RNG.normal(size=40)
    log_w = u + RNG.normal(size=40)
    one, other = (two_phase.fit(Pairs(u, log_w + shift, np.zeros(40))) for shift in (0.0, 900.0))
    assert other.m(u) - one.m(u) == pytest.approx(np.full(40, 900.0), abs=1e-9)
    assert other.s(u) - one.s(u) == pytest.approx(np.full(40, 900.0), abs=1e-9)
    assert other.log_rest - one.log_rest == pytest.approx(1800.0, abs=1e-9)
