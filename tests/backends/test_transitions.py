import math

import pytest
import torch
from scipy import stats

from treesearch.backends.base import Categorical, Gaussian, Guided, Mixture, describe, inverse_cdf, shift_mean, uniform
from treesearch.backends.exact.gaussian import LinearGaussian

F64 = torch.float64


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian(n=5, d=3, seed=0, moved=True):
    std = make(n, 1, seed=seed + 1).abs() + 0.1
    return Gaussian(make(n, d, seed=seed), std, make(n, d, seed=seed + 2), make(n, d, seed=seed + 3) if moved else None)


def categorical(n=4, tokens=2, words=3, seed=0, moved=True):
    probs, base = (make(n, tokens, words, seed=seed + k).softmax(-1) for k in range(2))
    return Categorical(probs, torch.zeros(n, tokens, dtype=torch.int64), base if moved else None)


def mixture(n=3, parts=2, d=1, seed=0):
    mix = make(n, parts, seed=seed).log_softmax(1)
    return Mixture(mix, make(n, parts, d, seed=seed + 1), make(n, parts, seed=seed + 2).abs() + 0.2, make(n, d))


def test_gaussian_log_prob_is_the_normal_density():
    law, x = gaussian(), make(5, 3, seed=9)
    want = torch.distributions.Normal(law.mean, law.std.expand(5, 3)).log_prob(x).sum(1)
    torch.testing.assert_close(law.log_prob(x), want)


def test_gaussian_log_weight_is_log_p_minus_log_q():
    law = gaussian()
    x = law.sample(make(5, 3, seed=9))
    base = Gaussian(law.base_mean, law.std, law.endpoint)
    torch.testing.assert_close(law.log_weight(x), base.log_prob(x) - law.log_prob(x))
    assert not gaussian(moved=False).log_weight(x).any()


def test_gaussian_log_weight_keeps_its_digits_in_many_dimensions():
    n, d = 1, 200_000
    mean, z = torch.zeros(n, d), make(n, d).float()
    law = Gaussian(mean + 1e-3, torch.full((n, 1), 1.0), mean, mean)
    x = law.sample(z)
    delta = (law.mean - law.base_mean).double()
    exact = -((x.double() - law.mean.double()) * delta + 0.5 * delta**2).sum()
    assert law.log_weight(x).dtype == F64
    assert float((law.log_weight(x) - exact).abs()) < 1e-6


def test_a_deterministic_gaussian_step_is_an_atom():
    law = Gaussian(make(2, 3), torch.zeros(2, 1, dtype=F64), make(2, 3))
    x = law.sample(make(2, 3, seed=5))
    assert torch.equal(x, law.mean)
    assert law.log_prob(x).tolist() == [0, 0]
    assert law.log_prob(x + 1).tolist() == [-math.inf] * 2
    still = Gaussian(law.mean, law.std, law.endpoint, law.mean)
    assert still.log_weight(x).tolist() == [0, 0]
    moved = Gaussian(law.mean, law.std, law.endpoint, law.mean + 1)
    assert moved.log_weight(x).tolist() == [-math.inf] * 2


def test_mixture_log_prob_integrates_to_one_and_is_what_sample_draws():
    law = mixture()
    grid = torch.linspace(-12, 12, 4001, dtype=F64)
    for row in range(3):
        one = law.take(torch.full((4001,), row))
        density = one.log_prob(grid[:, None]).exp()
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-9)
        drawn = law.take(torch.full((20_000,), row)).sample(make(20_000, 2, seed=row))[:, 0]
        cdf = torch.cumulative_trapezoid(density, grid)
        assert stats.kstest(drawn.numpy(), lambda x, c=cdf: torch_interp(x, grid[1:], c)).pvalue > 1e-3


def torch_interp(x, grid, values):
    import numpy as np

    return np.interp(x, grid.numpy(), values.numpy())


def test_categorical_log_prob_sums_to_one_and_its_weight_is_p_over_q():
    law = categorical()
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    for row in range(4):
        one = law.take(torch.full((9,), row))
        assert float(one.log_prob(every).exp().sum()) == pytest.approx(1)
        ratio = one.log_weight(every).exp() * one.log_prob(every).exp()
        assert float(ratio.sum()) == pytest.approx(1)
    assert not categorical(moved=False).log_weight(every[:4]).any()


def test_categorical_frequencies_are_its_probabilities():
    law = categorical(n=1, tokens=1).take(torch.zeros(50_000, dtype=torch.int64))
    counts = torch.bincount(law.sample(make(50_000, 1))[:, 0], minlength=3).double()
    assert stats.chisquare(counts.numpy(), (law.probs[0, 0] * 50_000).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    "law", [gaussian(), gaussian(moved=False), categorical(), mixture()], ids=lambda x: type(x).__name__
)
def test_cat_and_take_move_whole_rows(law):
    n = len(law.endpoint)
    rows = torch.tensor([n - 1, 0, 0, 1])
    shape = (len(rows), law.mean.shape[-1] + 1) if isinstance(law, Mixture) else (len(rows), *law.endpoint.shape[1:])
    z = make(*shape, seed=4)
    taken = law.take(rows)
    x = taken.sample(z)
    for i, row in enumerate(rows):
        alone = law.take(row[None])
        assert torch.equal(alone.sample(z[[i]]), x[[i]])
        assert torch.equal(alone.log_prob(x[[i]]), taken.log_prob(x)[[i]])
        assert torch.equal(alone.log_weight(x[[i]]), taken.log_weight(x)[[i]])
    both = type(law).cat([law.take(rows[:1]), law.take(rows[1:])])
    assert torch.equal(both.sample(z), x)
    assert torch.equal(both.log_weight(x), taken.log_weight(x))
    assert torch.equal(both.endpoint, taken.endpoint)


def test_inverse_cdf_edges():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=F64)
    for u, want in ((0.0, 1), (0.499, 1), (0.5, 3), (1.0, 3)):
        assert int(inverse_cdf(probs, torch.tensor([u], dtype=F64))) == want
    sure = torch.tensor([[0.0, 1.0, 0.0]])
    assert {int(inverse_cdf(sure, torch.tensor([u]))) for u in (0.0, 0.3, 1.0)} == {1}
    short = torch.tensor([[0.1, 0.2]], dtype=F64)  # rows need not be normalised
    assert int(inverse_cdf(short, torch.tensor([0.34], dtype=F64))) == 1


def test_uniform_is_the_normal_cdf():
    z = torch.tensor([-8.0, 0.0, 8.0])
    torch.testing.assert_close(uniform(z), torch.from_numpy(stats.norm.cdf(z.numpy().astype(float))))


def test_shift_mean_leaves_deterministic_rows_and_keeps_the_first_base():
    base = Gaussian(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1))
    guide = shift_mean(lambda x, t, b, c: torch.ones(2, 1))
    once = guide(None, None, base, None)
    assert once.mean.flatten().tolist() == [0, 1]
    assert guide(None, None, once, None).base_mean.flatten().tolist() == [0, 0]
    with pytest.raises(TypeError, match="Gaussian"):
        guide(None, None, categorical(), None)


def test_describe_fills_in_defaults_and_refuses_nonsense():
    spec = describe(LinearGaussian(dim=2))
    assert (spec.noise_shape, spec.stochastic, spec.rows_per_nfe) == ((2,), (True,) * 6, (1,) * 6)
    guided = Guided(LinearGaussian(), shift_mean(lambda x, t, b, c: 0 * b.mean), "none")
    assert describe(guided).fingerprint == f"Guided({LinearGaussian().fingerprint}, none)"
    assert spec.branchable(1)
    assert spec.branchable(6)

    class Bad(LinearGaussian.__mro__[-1]):
        num_steps, state_shape, prior, transition, decode = 3, (1,), None, None, None

    Bad.stochastic = [True]
    with pytest.raises(ValueError, match="stochastic has 1 entries, expected num_steps"):
        describe(Bad())
    with pytest.raises(TypeError, match="it has no `num_steps`"):
        describe(object())
