"""Cycles: levels passed again, each step one Gaussian."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import treesearch as ts
from tests.support.flows import THREE, GaussianFlow, log_snr
from treesearch.backends.base import Wrapper, describe
from treesearch.backends.chains.second_order import SecondOrder
from treesearch.backends.exact.enumerable import DiscreteChain
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import TDS
from treesearch.backends.wrappers.cycle import Cycle
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.testing import check_kernel

F64 = torch.float64
KERNEL = GaussianTrajectories(
    torch.full((3, 2), 0.3, dtype=F64), torch.eye(6, dtype=F64) + 0.5, channels=Channels(1, 1), num_steps=6
)
TOTAL = Reward(lambda x, _: x.double().flatten(1).sum(1), "total", "state")
CARRIES = replace(log_snr(4), carry=torch.full((4,), 0.9, dtype=F64))
CYCLE = Cycle(KERNEL, low=2, high=4, times=2)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_a_chain_passes_the_levels_of_a_cycle_again():
    assert [int(level) for level in CYCLE._table] == [0, 1, 2, 3, 4, 3, 4, 3, 4, 5, 6]
    assert CYCLE.num_steps == 6 + 2 * (4 - 2)
    check_kernel(CYCLE, rows=6)
    check_kernel(Cycle(TDS(KERNEL, TOTAL), low=0, high=6), rows=6, proposal=True)


def test_no_cycle_is_the_kernel_itself():
    x, t = draws(6, 3, 2), torch.arange(1, 7)
    none, plain = Cycle(KERNEL, low=2, high=4, times=0).transition(x, t), KERNEL.transition(x, t)
    assert torch.equal(none.mean, plain.mean)
    assert torch.equal(none.std, plain.std)


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_that_goes_up_is_the_step_and_the_noise_after_it(guided):
    """From x_3 to x_2 and up to x_4: the same linear map of both noises as one after the other."""
    kernel = TDS(KERNEL, TOTAL) if guided else KERNEL
    x, of = draws(5, 3, 2), KERNEL.chain.schedule
    law = Cycle(kernel, low=2, high=4).transition(x, torch.full((5,), 5))
    inner = kernel.transition(x, torch.full((5,), 3))
    z = draws(2, 5, 3, 2, seed=1)
    low, high = torch.full((5,), 2), torch.full((5,), 4)
    at = [KERNEL.chain.renoise(inner.sample(a * z[0]), low, high, b * z[1]) for a, b in ((0, 0), (1, 0), (0, 1))]
    assert (law.mean - at[0]).abs().max() < 1e-14
    own, added = (at[1] - at[0]) / z[0], (at[2] - at[0]) / z[1]
    assert (law.std**2 - own**2 - added**2).abs().max() < 1e-13
    assert float(of.sigma[4] ** 2) > float(law.std.max() ** 2)  # and no more noise than x_4 has
    if guided:
        scale = float(of.alpha[4] / of.alpha[2])
        p = torch.distributions.Normal(scale * inner.base_mean, law.std)
        q = torch.distributions.Normal(law.mean, law.std)
        y = law.sample(z[0])
        want = (p.log_prob(y) - q.log_prob(y)).flatten(1).sum(1)
        assert (law.log_weight(y) - want).abs().max() < 1e-10


def test_what_an_evaluation_costs_is_that_of_its_own_level():
    guided = TDS(KERNEL, TOTAL, window=(4, 4))
    spec = describe(Cycle(guided, low=2, high=4, times=2))
    assert spec.rewards_per_nfe == (0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0)
    assert spec.backward_per_nfe == spec.rewards_per_nfe
    found = ts.search(Cycle(guided, low=2, high=4, times=2), TOTAL, ts.BestOfN(n=4))
    assert found.cost.nfe == 4 * 10
    assert found.cost.backward_nfe == 4 * 3


class Costly(Wrapper):
    """With figures and hints of its own at each level."""

    rows_per_nfe = (1, 2, 3, 4, 5, 6, 7)

    def diagnose(self, t):
        return str(t.tolist())


def test_rows_and_hints_are_those_of_the_kernel_s_levels():
    cycle = Cycle(Costly(KERNEL), low=2, high=4)
    assert describe(cycle).rows_per_nfe == (1, 2, 3, 4, 5, 4, 5, 6, 7)
    assert cycle.diagnose(torch.tensor([2, 3, 5, 8])) == "[2, 3, 3, 6]"


def test_cycles_of_other_levels_and_numbers_are_told_apart():
    made = [(2, 4, 1), (1, 4, 1), (2, 5, 1), (2, 4, 2)]
    assert len({Cycle(KERNEL, low=low, high=high, times=times).fingerprint for low, high, times in made}) == 4
    assert Cycle(KERNEL, low=2, high=4).fingerprint == Cycle(KERNEL, low=2, high=4, times=1).fingerprint


def test_siblings_of_a_deterministic_chain_differ_where_it_goes_up():
    still = GaussianTrajectories(
        torch.zeros(3, 2, dtype=F64), torch.eye(6, dtype=F64), channels=Channels(1, 1), num_steps=6, eta=0.0
    )
    assert describe(Cycle(still, low=2, high=4)).stochastic == (True, *(False,) * 4, True, *(False,) * 3)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Cycle(KERNEL, low=4, high=4), ValueError, "low and high are 4 and 4"),
        (lambda: Cycle(KERNEL, low=2, high=7), ValueError, "expected 0 <= low < high <= T = 6"),
        (lambda: Cycle(KERNEL, low=2.0, high=4), ValueError, "low and high are 2.0"),
        (lambda: Cycle(KERNEL, low=2, high=4, times=-1), ValueError, "times is -1"),
        (lambda: Cycle(LinearGaussian(), low=1, high=2), TypeError, "its noise levels are unknown"),
        (lambda: Cycle(DiscreteChain.random(), low=1, high=2), TypeError, "its noise levels are unknown"),
        (lambda: Cycle(CYCLE, low=1, high=2), TypeError, "its noise levels are unknown"),
        (lambda: Cycle(GaussianFlow(CARRIES, THREE), low=1, high=2), TypeError, "its steps need x_0"),
        (lambda: Cycle(SecondOrder(KERNEL), low=1, high=2), TypeError, "wrong after a climb"),
    ],
)
def test_cycles_that_are_none_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


class Around(Wrapper):
    """Its chain on x - μ, μ by task."""

    def offset(self, x, cond):
        return x.new_tensor([1.0, -2.0])[cond["task"]].reshape(-1, 1, 1).expand_as(x)

    def transition(self, x, t, cond=None):
        mu = self.offset(x, cond)
        law = self.kernel.transition(x - mu, t)
        return replace(law, mean=law.mean + mu, endpoint=law.endpoint + mu)


def test_around_an_offset_what_is_noised_is_what_lies_beyond_it():
    kernel, plain = Around(KERNEL), Cycle(KERNEL, low=2, high=4)
    x, t, cond = draws(4, 3, 2), torch.tensor([5, 5, 4, 6]), {"task": torch.tensor([0, 1, 1, 0])}
    mu = kernel.offset(x, cond)
    found, want = Cycle(kernel, low=2, high=4).transition(x + mu, t, cond), plain.transition(x, t)
    assert (found.mean - mu - want.mean).abs().max() < 1e-13
    assert torch.equal(found.std, want.std)
    guided = Cycle(TDS(kernel, TOTAL), low=2, high=4).transition(x + mu, t, cond)
    assert (guided.base_mean - found.mean).abs().max() < 1e-13
