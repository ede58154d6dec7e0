import numpy as np
import pytest

from treesearch.resampling import SCHEMES
from treesearch.weights import ZeroWeights, ess, log_mean, log_mean_se, log_sum, normalise, scaled, temper

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
