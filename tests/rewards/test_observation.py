"""Observations: operators and their adjoints, and the likelihood of what is seen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.base import RewardError
from treesearch.rewards.observation import (
    blurred,
    check_adjoint,
    frequencies,
    grey,
    masked,
    matrix,
    measurement,
    pooled,
)

SHAPE = (3, 8, 12)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def half(*shape: int) -> torch.Tensor:
    return draws(*shape, seed=9) > 0


OPERATORS = {
    "mask": (masked(half(*SHAPE)), SHAPE),
    "pooled": (pooled(4), SHAPE),
    "blurred": (blurred(1.3), SHAPE),
    "grey": (grey(), SHAPE),
    "frequencies": (frequencies(half(8, 12)), SHAPE),
    "matrix": (matrix(draws(3, 5)), (5,)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_its_adjoint(name):
    operator, shape = OPERATORS[name]
    check_adjoint(operator, shape)
    if operator.gram is not None:
        v = draws(*operator(draws(2, *shape)).shape, seed=1)
        assert (operator(operator.adjoint(v)) - operator.gram * v).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda v: -v, "grey"),
        (lambda v: v.repeat_interleave(4, 2).repeat_interleave(4, 3), "pooled"),  # sums for means
        (lambda v: blurred(1.3)(v).roll(1, 3), "blurred"),
        (lambda v: v[:, :2], "blurred"),
    ],
)
def test_an_adjoint_of_something_else_is_refused(wrong, name):
    operator, shape = OPERATORS[name]
    with pytest.raises(ValueError, match=r"do not belong together|the adjoint of"):
        check_adjoint(dataclasses.replace(operator, adjoint=wrong), shape)


def test_a_gram_of_something_else_is_refused():
    for name, gram in (("grey", 1.0), ("blurred", 1.0)):
        operator, shape = OPERATORS[name]
        with pytest.raises(ValueError, match="no multiple 1 of the identity"):
            check_adjoint(dataclasses.replace(operator, gram=gram), shape)


def test_a_blur_is_a_mean_of_neighbours():
    x = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    x[0, 0, 7, 7] = 1
    seen = blurred(1.3)(x)[0, 0]
    assert float(seen.sum()) == pytest.approx(1, abs=1e-14)
    assert float(seen[7, 8] / seen[7, 7]) == pytest.approx(float(torch.tensor(-0.5 / 1.3**2).exp()), rel=1e-6)
    assert torch.equal(seen, seen.T)


def test_the_reward_is_the_log_likelihood_with_its_constant_and_its_gradient():
    operator, x, y = pooled(4), draws(3, *SHAPE).requires_grad_(), draws(3, 2, 3, seed=2)
    reward = measurement(operator, y, tolerance=0.3)
    want = torch.distributions.Normal(operator(x.detach()), 0.3).log_prob(y).flatten(1).sum(1)
    found = reward.attached(x)
    assert (found - want).abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert (gradient - operator.adjoint(y - operator(x.detach())) / 0.3**2).abs().max() < 1e-12


def test_log_z_is_the_evidence():
    """log N(y; A m, A Σ Aᵀ + tolerance² I) of x_0 ~ N(m, Σ), within four standard errors of importance sampling."""
    kernel, a, y = LinearGaussian(dim=3), draws(2, 3, seed=3), torch.tensor([0.4, -0.2], dtype=torch.float64)
    mean, std = kernel.mean, kernel.std
    noise = 0.25 * torch.eye(2, dtype=torch.float64)
    seen = torch.distributions.MultivariateNormal(a @ torch.full((3,), mean).double(), std**2 * a @ a.T + noise)
    found = ts.search(kernel, measurement(matrix(a), y, tolerance=0.5), ts.BestOfN(n=4000), batch_size=512)
    assert abs(found.log_z - float(seen.log_prob(y))) < 4 * found.log_z_se


def test_what_was_seen_and_how_tells_rewards_apart():
    def settings(**change):
        given = {"operator": masked(half(*SHAPE)), "observed": torch.zeros(3), "tolerance": 0.1} | change
        return measurement(given["operator"], given["observed"], tolerance=given["tolerance"]).settings

    other = ({"observed": torch.full((3,), 1e-9)}, {"tolerance": 0.2}, {"operator": masked(~half(*SHAPE))})
    assert len({settings(), *(settings(**change) for change in other)}) == 4
    assert settings() == settings()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: pooled(1), ValueError, "size is 1"),
        (lambda: pooled(2.0), ValueError, "size is 2.0"),
        (lambda: pooled(5)(draws(1, *SHAPE)), ValueError, "sides are multiples of 5"),
        (lambda: blurred(0.0), ValueError, "std is 0.0"),
        (lambda: blurred("1"), ValueError, "std is '1'"),
        (lambda: grey((0.0, 0.0)), ValueError, "not all zero"),
        (lambda: masked(torch.zeros(3, dtype=torch.bool)), ValueError, "with an entry set"),
        (lambda: masked(torch.ones(3)), ValueError, "mask must be bool"),
        (lambda: frequencies(torch.ones(3, dtype=torch.bool)), ValueError, r"mask must be \(H, W\)"),
        (lambda: matrix([1.0]), ValueError, "expected a finite matrix"),
        (lambda: matrix([[float("nan")]]), ValueError, "expected a finite matrix"),
        (lambda: measurement(pooled(2), torch.tensor([float("nan")]), tolerance=1), ValueError, "not finite"),
        (lambda: measurement(pooled(2), torch.zeros(1), tolerance=0), ValueError, "tolerance is 0"),
        (lambda: measurement(pooled(2), torch.zeros(1), tolerance=float("nan")), ValueError, "tolerance is nan"),
        (lambda: measurement(3, torch.zeros(1), tolerance=1), TypeError, "operator is int"),
        (lambda: measurement(pooled(2), torch.zeros(1), tolerance=1, of="x"), ValueError, "of is 'x'"),
        (
            lambda: measurement(pooled(2), torch.zeros(1), tolerance=1)(draws(1, *SHAPE)),
            RewardError,
            r"expected \(3",
        ),
    ],
)
def test_observations_that_are_none_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
