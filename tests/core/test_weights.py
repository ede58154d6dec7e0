import numpy as np
import pytest

from treesearch.core.resampling import SCHEMES
from treesearch.core.weights import ZeroWeights, ess, log_mean, log_mean_se, log_sum, normalise, scaled, temper

NEVER = np.full(4, -np.inf)
DRAW = np.random.default_rng(0)


def test_ess_is_k_for_equal_weights_one_for_a_single_one_and_between_otherwise():
    assert ess(np.full(7, 3.0)) == pytest.approx(7)
    assert ess(np.array([0.0, -np.inf, -np.inf])) == pytest.approx(1)
    for _ in range(20):
        assert 1 <= ess(DRAW.normal(size=9) * 5) <= 9


def test_all_weights_zero_is_a_state_of_its_own():
    assert ess(NEVER) == 0
    assert log_mean(NEVER) == log_sum(NEVER) == -np.inf
    assert log_mean_se(NEVER) is None
    with pytest.raises(ZeroWeights, match="all weights are zero"):
        normalise(NEVER)


def test_extreme_weights_give_numbers():
    for scale in (1e4, -1e4):
        w = scale + np.array([0.0, 1.0, -np.inf])
        assert log_mean(w) == pytest.approx(scale + np.log((1 + np.e) / 3))
        assert normalise(w).sum() == pytest.approx(1)
        assert not np.isnan(ess(w))
        assert ess(w * 1e4) == pytest.approx(1)


def test_adding_a_constant_changes_no_weight():
    w = DRAW.normal(size=50)
    np.testing.assert_allclose(normalise(w + 1e4), normalise(w), rtol=1e-9)
    assert ess(w + 1e4) == pytest.approx(ess(w))


def test_zero_times_minus_infinity_is_zero_at_lambda_zero():
    assert scaled(0.0, NEVER).tolist() == [0, 0, 0, 0]
    assert scaled(2.0, np.array([-np.inf, 1.0])).tolist() == [-np.inf, 2.0]


def test_log_mean_se_is_the_delta_method():
    w = DRAW.normal(size=100)
    share = np.exp(w) / np.exp(w).mean()
    assert log_mean_se(w) == pytest.approx(share.std(ddof=1) / 10)
    assert log_mean_se(w[:1]) is None


def test_temper_finds_the_largest_lambda_that_keeps_the_ess():
    r = DRAW.normal(size=200)
    lam = temper(lambda x: x * r, 0.0, 50.0, 100.0)
    assert ess(lam * r) == pytest.approx(100, rel=1e-6)
    assert temper(lambda x: x * r, 0.0, 1e-3, 100.0) == 1e-3
    assert temper(lambda x: x * r * 0 + np.array([0.0] + [-np.inf] * 199), 0.1, 1.0, 100.0) == pytest.approx(0.1)


WEIGHTS = [
    np.array([0.5, 0.5]),
    np.array([0.0, 0.7, 0.0, 0.3, 0.0]),
    np.array([0.1, 0.2, 0.3, 0.4]),
    np.array([0.0, 0.0, 1.0]),
    np.full(7, 1 / 7),
    normalise(np.random.default_rng(3).normal(size=9) * 2),
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("w", WEIGHTS, ids=range(len(WEIGHTS)))
def test_offspring_numbers_are_k_w_on_average(scheme, w):
    k, n = len(w), 4000
    u = np.random.default_rng(1).random((n, k + 1))
    drawn = np.stack([SCHEMES[scheme](w, row) for row in u])
    assert drawn.shape == (n, k)
    assert (np.diff(drawn, axis=1) >= 0).all(), "ancestors must increase"
    counts = np.stack([np.bincount(row, minlength=k) for row in drawn])
    assert not counts[:, w == 0].any(), "a weightless particle had offspring"
    se = counts.std(0) / n**0.5
    np.testing.assert_array_less(np.abs(counts.mean(0) - k * w), 4 * se + 1e-9)
    if scheme in ("systematic", "ssp"):
        assert (counts >= np.floor(k * w - 1e-9)).all()
        assert (counts <= np.ceil(k * w + 1e-9)).all()
    if scheme == "residual":
        assert (counts >= np.floor(k * w - 1e-9)).all()


def plain_ssp(w, u):
    """The sampling process as it is written down, a pair at a time."""
    k = len(w)
    copies, left, i = np.floor(k * w).astype(int), k * w - np.floor(k * w), 0
    for j in range(1, k):
        a, b = left[i], left[j]
        if a + b < 1:
            first = a + b == 0 or u[j] * (a + b) < a
            left[i], left[j] = (a + b, 0.0) if first else (0.0, a + b)
            i = i if first else j
        else:
            first = a + b - 1 >= 1 or u[j] * (1 - (a + b - 1)) < 1 - b
            copies[i if first else j] += 1
            left[i], left[j] = (0.0, a + b - 1) if first else (a + b - 1, 0.0)
            i = j if first else i
    copies[i] += max(0, k - copies.sum())
    return np.repeat(np.arange(k), copies)


def plain_inverse(w, points):
    cdf = np.cumsum(w)
    return np.searchsorted(cdf, np.minimum(points * cdf[-1], np.nextafter(cdf[-1], 0)), side="right")


PLAIN = {
    "multinomial": lambda w, u: plain_inverse(w, np.sort(u[: len(w)])),
    "stratified": lambda w, u: plain_inverse(w, (np.arange(len(w)) + u[: len(w)]) / len(w)),
    "systematic": lambda w, u: plain_inverse(w, (np.arange(len(w)) + u[0]) / len(w)),
    "ssp": plain_ssp,
}


@pytest.mark.parametrize("scheme", PLAIN)
def test_compiled_schemes_are_the_plain_ones(scheme):
    """The same ancestors from the same uniforms, so that recorded runs go on as they were."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        w = rng.exponential(size=int(rng.integers(1, 60))) ** rng.integers(0, 6)
        w[rng.random(len(w)) < 0.2 * (len(w) > 1)] = 0
        w = np.ones(len(w)) / len(w) if w.sum() == 0 else w / w.sum()
        u = rng.random(len(w) + 1)
        np.testing.assert_array_equal(SCHEMES[scheme](w, u), PLAIN[scheme](w, u))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_extreme_uniforms_stay_in_range(scheme):
    for u in (0.0, np.nextafter(1.0, 0)):
        for w in WEIGHTS:
            drawn = SCHEMES[scheme](w, np.full(len(w) + 1, u))
            assert len(drawn) == len(w)
            assert (w[drawn] > 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_weights_keep_everybody_where_the_scheme_can(scheme):
    drawn = SCHEMES[scheme](np.full(8, 1 / 8), np.random.default_rng(0).random(9))
    if scheme != "multinomial":
        assert drawn.tolist() == list(range(8))
