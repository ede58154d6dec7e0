"""Steering by an observation: the pull, the evidence, the spread, and log Z = log p(y) on a Gaussian bed."""

from __future__ import annotations

import math

import pytest
import torch

import treesearch as ts
from treesearch.backends.base import Wrapper
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import TDS
from treesearch.backends.guidance.steered import Steered, spread
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.rewards.observation import Operator, masked, measurement
from treesearch.testing import check_kernel

F64 = torch.float64
SHAPE = (3, 2)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: torch.Tensor, cov: torch.Tensor, **options) -> GaussianTrajectories:
    return GaussianTrajectories(mean.reshape(SHAPE), cov, channels=Channels(1, 1), **{"num_steps": 20} | options)


ROOT, ROWS = 0.5 * draws(6, 6, seed=1), draws(2, 6, seed=2)
KERNEL = gaussian(0.3 * draws(6, seed=3), ROOT @ ROOT.T + 0.05 * torch.eye(6, dtype=F64))
DENSE = Operator(lambda x: x.flatten(1) @ ROWS.to(x).T, lambda v: (v @ ROWS.to(v)).reshape(len(v), *SHAPE), "rows")
MASK = torch.tensor([[True, False], [False, False], [True, False]])


def seen(tolerance: float, kernel: GaussianTrajectories = KERNEL) -> tuple[Reward, float]:
    """The reward of an observation, and its log evidence under the kernel's own law."""
    mean, cov = kernel.law
    y = ROWS @ (mean + torch.linalg.cholesky(cov) @ draws(6, seed=4)) + tolerance * draws(2, seed=5)
    noise = tolerance**2 * torch.eye(2, dtype=F64)
    evidence = torch.distributions.MultivariateNormal(ROWS @ mean, ROWS @ cov @ ROWS.T + noise).log_prob(y)
    return measurement(DENSE, y, tolerance=tolerance), float(evidence)


def errors(kernel, reward: Reward, evidence: float, method: ts.methods.base.Method, seeds: int = 6) -> torch.Tensor:
    """log Ẑ - log p(y) of several seeds."""
    options = {"batch_size": 256, "budget": ts.Budget(nfe=256 * kernel.num_steps)}
    found = [ts.search(kernel, reward, method, seed=s, **options).log_z for s in range(seeds)]
    return torch.tensor(found, dtype=F64) - evidence


EVERY = ts.FeynmanKac(potential="difference", schedule=(*range(19, 1, -1), 0), num_particles=256)


@pytest.mark.parametrize("tolerance", [0.3, 0.1])
def test_log_z_is_the_evidence_where_raw_endpoints_miss_it(tolerance):
    reward, evidence = seen(tolerance)
    assert errors(KERNEL, reward, evidence, EVERY, seeds=4).mean() < -1
    found = errors(Steered(KERNEL, reward, spread=spread(KERNEL)), reward, evidence, EVERY)
    assert abs(found.mean()) < 0.1
    ratio = found.exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))


def test_trees_take_the_values_as_they_stand():
    reward, evidence = seen(0.1)
    steered = Steered(KERNEL, reward, spread=spread(KERNEL))
    found = errors(steered, reward, evidence, ts.TreeSampling(), seeds=3)
    assert abs(found.mean()) < 0.3


def test_values_of_the_right_spread_lose_less():
    """There x_0 given x_t is N(x̂_0, r_t² I); r_t of states of unit variance is twice as large as theirs."""
    kernel = gaussian(torch.zeros(6, dtype=F64), 0.25 * torch.eye(6, dtype=F64))
    reward, evidence = seen(0.1, kernel)
    right = errors(Steered(kernel, reward, spread=spread(kernel)), reward, evidence, EVERY)
    unit = errors(Steered(kernel, reward), reward, evidence, EVERY)
    print(right, unit)
    assert abs(right.mean()) < 0.1
    assert right.square().mean() < unit.square().mean()


@pytest.mark.parametrize("name", ["dense", "mask"])
def test_the_pull_and_the_value_are_those_of_dense_algebra(name):
    operator = DENSE if name == "dense" else masked(MASK)
    y, tolerance, r = draws(2, seed=6), 0.2, 0.7
    kernel = Steered(KERNEL, measurement(operator, y, tolerance=tolerance), spread=(r,) * 21)
    x, t = draws(4, *SHAPE, seed=7), torch.tensor([2, 5, 9, 20])
    base, law = KERNEL.transition(x, t), kernel.transition(x, t)
    a = operator(torch.eye(6, dtype=F64).reshape(6, *SHAPE)).T  # (M, D)
    noisy = r**2 * a @ a.T + tolerance**2 * torch.eye(2, dtype=F64)
    gap = y - base.endpoint.flatten(1) @ a.T
    end = base.endpoint.flatten(1) + gap @ torch.linalg.solve(noisy, r**2 * a)
    of, s = KERNEL.chain.schedule, t - 1
    alpha, sigma, alpha_s, sigma_s = (v[:, None] for v in (of.alpha[t], of.sigma[t], of.alpha[s], of.sigma[s]))
    eps = (x.flatten(1) - alpha * end) / sigma
    mean = alpha_s * end + (sigma_s**2 - law.std.flatten(1) ** 2).clamp_min(0).sqrt() * eps
    assert (law.mean.flatten(1) - mean).abs().max() < 1e-12
    value = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), noisy).log_prob(gap)
    assert (law.rewards - value).abs().max() < 1e-12
    assert torch.equal(law.base_mean, base.mean)
    assert torch.equal(law.endpoint, base.endpoint)


def test_the_published_rule_projects_and_says_that_it_departs():
    reward, _ = seen(0.1)
    kernel = Steered(KERNEL, reward, rule="paper")
    x = draws(4, *SHAPE, seed=7)
    law = kernel.transition(x, torch.tensor([2, 5, 9, 20]))
    assert (DENSE(law.endpoint) - reward.fn.observed).abs().max() < 1e-10
    assert not law.log_weight(law.sample(x)).any()
    assert law.rewards is None
    assert "projection" in kernel.departs
    assert Steered(KERNEL, reward).departs is None

    class Elsewhere(Wrapper):
        departs = "a law of its own"

    assert Steered(Elsewhere(KERNEL), reward).departs == "a law of its own"


def test_the_spread_is_how_far_the_chain_ends_from_its_endpoints():
    """x_s = m_t x_t + s_t z and x̂_0 = g_t x_t: E (x_0 - g_t x_t)² in closed form."""
    kernel, steps = gaussian(torch.zeros(6, dtype=F64), 0.25 * torch.eye(6, dtype=F64)), range(1, 21)
    law = kernel.transition(torch.ones(20, *SHAPE, dtype=F64), torch.tensor(steps))
    m, g = law.mean[:, 0, 0], law.endpoint[:, 0, 0]
    noise = law.std.flatten(1)[:, 0] ** 2
    above = [1.0]  # variance of x_T, ..., x_1
    for t in reversed(steps[1:]):
        above.append(float(m[t - 1] ** 2 * above[-1] + noise[t - 1]))
    slope, rest, want = 1.0, 0.0, [0.0]
    for t, variance in zip(steps, reversed(above), strict=True):
        rest += slope**2 * float(noise[t - 1])
        slope *= float(m[t - 1])
        want.append(math.sqrt((slope - float(g[t - 1])) ** 2 * variance + rest))
    found = torch.tensor(spread(kernel, n=400), dtype=F64)
    assert spread(kernel, n=400) == tuple(found.tolist())
    # 2,400 squares: a standard error of 1.4 % of r; five of them
    assert ((found - torch.tensor(want, dtype=F64)).abs() <= 0.072 * torch.tensor(want, dtype=F64) + 1e-12).all()


def test_a_spread_is_itself_however_it_is_given():
    reward, _ = seen(0.3)
    given = [Steered(KERNEL, reward, spread=spread) for spread in ([1] * 21, (1.0,) * 21, (1.0,) * 20 + (1.5,))]
    assert given[0].fingerprint == given[1].fingerprint != given[2].fingerprint
    assert hash(given[0]) == hash(given[1])
    assert Steered(KERNEL, reward, rule="paper").fingerprint != Steered(KERNEL, reward).fingerprint


def test_its_steps_obey_the_laws():
    reward, _ = seen(0.3)
    check_kernel(Steered(KERNEL, reward), rows=6, proposal=True)
    check_kernel(Steered(KERNEL, reward, rule="paper"), rows=6)


def wrong_adjoint() -> Operator:
    return Operator(DENSE.forward, lambda v: -DENSE.adjoint(v), "rows")


Y, STILL = torch.zeros(2), gaussian(torch.zeros(6, dtype=F64), torch.eye(6, dtype=F64), eta=0.0)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Steered(LinearGaussian(), measurement(DENSE, Y, tolerance=1)), TypeError, "its noise levels"),
        (lambda: Steered(TDS(KERNEL, linear()), measurement(DENSE, Y, tolerance=1)), TypeError, "is guided already"),
        (lambda: Steered(KERNEL, linear()), TypeError, "than a linear measurement of states"),
        (lambda: Steered(KERNEL, measurement(torch.sin, Y, tolerance=1)), TypeError, "than a linear measurement"),
        (lambda: Steered(KERNEL, measurement(DENSE, Y, tolerance=1, of="sample")), TypeError, "measurement of states"),
        (lambda: Steered(KERNEL, measurement(wrong_adjoint(), Y, tolerance=1)), ValueError, "do not belong together"),
        (lambda: Steered(KERNEL, measurement(DENSE, torch.zeros(3), tolerance=1)), ValueError, r"expected \(2,\)"),
        (lambda: Steered(KERNEL, seen(0.1)[0], rule="soft"), ValueError, "unknown rule 'soft'"),
        (lambda: Steered(KERNEL, seen(0.1)[0], spread=(0.1,) * 20), ValueError, "spread has 20 entries"),
        (lambda: Steered(KERNEL, seen(0.1)[0], spread=(-0.1,) * 21), ValueError, "finite number >= 0"),
        (lambda: Steered(KERNEL, seen(0.1)[0], spread=0.1), ValueError, "spread has 0.1, expected a finite"),
        (lambda: Steered(STILL, seen(0.1)[0]), ValueError, "chain without noise"),
        (lambda: spread(KERNEL, n=1), ValueError, "n is 1"),
    ],
)  # fmt: skip
def test_what_cannot_steer_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_another_reward_than_the_observed_is_an_error():
    """Its values are of the observation: they would be lost without a word."""
    with pytest.raises((TypeError, ValueError), match=r"another reward|of reward|declares values"):
        ts.search(Steered(KERNEL, seen(0.1)[0]), linear(), ts.BestOfN(n=4))
