"""Universal guidance: shifts that are those of its ε̂' in the chain's own step, exact weights, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch

import treesearch as ts
from tests.support.flows import GaussianFlow
from treesearch.backends.base import describe
from treesearch.backends.chains.diffusion import to_endpoint
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.exact.moments import Moments
from treesearch.backends.guidance import TDS, FlowChef, Universal
from treesearch.backends.guidance.prompts import PROMPTS
from treesearch.rewards.analytic import quadratic
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.testing import check_kernel

F64 = torch.float64
FLOW = GaussianFlow(
    Schedule.flow(torch.linspace(0, 1, 9)),
    Moments(torch.zeros(3).double(), torch.eye(3, dtype=F64), torch.ones(3).double()),
    eta=1.0,
)


def bed(eta: float = 1.0, steps: int = 8) -> GaussianTrajectories:
    cov = torch.eye(6, dtype=F64) + 0.3
    return GaussianTrajectories(torch.zeros(3, 2, dtype=F64), cov, channels=Channels(1, 1), num_steps=steps, eta=eta)


BED, PULL = bed(0.7), quadratic(2.0, 0.5)
X, T = torch.randn(4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 4, 6, 8])


def stepped(x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The mean of the chain's step with an ε̂."""
    at = BED.chain.at
    endpoint, _ = to_endpoint("epsilon", eps, x, at("alpha", t, x), at("sigma", t, x))
    return at("alpha_s", t, x) * endpoint + at("direction", t, x) * eps


def noise_of(x: torch.Tensor, t: torch.Tensor, endpoint: torch.Tensor) -> torch.Tensor:
    return (x - BED.chain.at("alpha", t, x) * endpoint) / BED.chain.at("sigma", t, x)


def test_the_mean_is_that_of_the_moved_noise():
    base, sigma = BED.transition(X, T), BED.chain.at("sigma", T, X)
    eps = noise_of(X, T, base.endpoint)
    through = TDS(BED, PULL).transition(X, T)
    gradient = (through.mean - through.base_mean) / base.std**2  # ∇_{x_t} r(x̂_0)
    end = base.endpoint
    for _ in range(3):
        end = end + 0.1 * 2.0 * (0.5 - end)
    back = BED.chain.at("alpha", T, X) / sigma * (end - base.endpoint)
    for options, moved in (
        ({"scale": 0.3}, 0.3 * sigma * gradient),
        ({"scale": 0.0, "steps": 3}, back),
        ({"scale": 0.3, "steps": 3}, 0.3 * sigma * gradient + back),
    ):
        law = Universal(BED, PULL, length=0.1, **options).transition(X, T)
        assert (law.mean - stepped(X, T, eps - moved)).abs().max() < 1e-12
        assert torch.equal(law.base_mean, base.mean)
        assert (law.rewards - PULL(base.endpoint)).abs().max() < 1e-12


def test_it_goes_where_flowchef_goes_by_another_length():
    law, chef = (k.transition(X, T) for k in (Universal(BED, PULL, scale=0.0, steps=2), FlowChef(BED, PULL, steps=2)))
    at = BED.chain.at
    lever = at("alpha_s", T, X) - at("direction", T, X) * at("alpha", T, X) / at("sigma", T, X)
    assert (law.mean - law.base_mean - lever * (chef.mean - chef.base_mean)).abs().max() < 1e-12


def test_each_row_climbs_for_its_own_prompt():
    signs = {"up": 1.0, "down": -1.0}

    def by_prompt(x, prompts):
        return torch.stack([signs[p] * row.sum() for p, row in zip(prompts, x, strict=True)])

    kernel = Universal(BED, Reward(by_prompt, "by prompt", "state"), scale=0.0, steps=1, window=(3, 8))
    law = kernel.transition(X, T, {PROMPTS: ["up", "down", "up"], "task": torch.tensor([0, 0, 1, 2])})
    moved = (law.mean - law.base_mean).flatten(1).mean(1)
    assert moved.sign().tolist() == [0, 1, -1, 1]


def test_weights_are_exact_and_costs_are_told():
    kernel = Universal(bed(steps=5), PULL, scale=0.05, steps=2, length=0.02)
    check_kernel(kernel, rows=6, proposal=True)
    plain = ts.search(kernel.kernel, PULL, ts.BestOfN(n=8000), batch_size=4096)
    found = ts.search(kernel, PULL, ts.BestOfN(n=2000), batch_size=2000)
    assert abs(found.log_z - plain.log_z) < 4 * math.hypot(found.log_z_se, plain.log_z_se)
    spec = describe(kernel)
    assert spec.rewards_per_nfe == (0, 0, 3, 3, 3, 3)  # the last step has no noise
    assert spec.backward_per_nfe == (0, 0, 1, 1, 1, 1)
    assert set(describe(Universal(BED, PULL, scale=0.0, steps=1)).backward_per_nfe) == {0}


def with_value(x, t, law, cond):
    return x.flatten(1).sum(1)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Universal(LinearGaussian(), PULL), TypeError, "no kernel on a backends.chains"),
        (lambda: Universal(FLOW, PULL), ValueError, "divides by α_t, which is 0 at x_T"),
        (lambda: Universal(BED, PULL, scale=-1.0), ValueError, "scale is -1.0"),
        (lambda: Universal(BED, PULL, through_network=False), ValueError, "goes through it; scale=0 leaves"),
        (lambda: Universal(bed(0.0), PULL), ValueError, "a chain without noise has no weights"),
        (lambda: Universal(BED, PULL, scale="1"), ValueError, "scale is '1'"),
        (lambda: Universal(BED, PULL, steps=1.5), ValueError, "steps is 1.5"),
        (lambda: Universal(BED, PULL, length=0.0), ValueError, "length is 0.0"),
        (lambda: Universal(BED, PULL, value=with_value), ValueError, "TDS takes values"),
        (lambda: Universal(TDS(BED, PULL), PULL), TypeError, "guided by .* already"),
    ],
)
def test_what_cannot_guide_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_flows_are_guided_backwards():
    x, t = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.tensor([8, 3])
    law = Universal(FLOW, PULL, scale=0.0, steps=1).transition(x, t)
    assert torch.isfinite(law.mean).all()
    assert not torch.equal(law.mean, law.base_mean)
