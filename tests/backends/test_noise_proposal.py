"""x_T drawn where a learnt policy of noise would draw it: exact weights, and what Q^W knows as a value."""

import math

import pytest
import torch

import treesearch as ts
from experiments.policies.bandit import TARGET, ring
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.guidance import Valued
from treesearch.backends.guidance.noise import MEAN, STD, NoiseProposal, NoiseValue
from treesearch.rewards.base import Reward

N = 20_000
Z = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))


class Known:
    """Noise is best at the prompt's own place, and worth minus the way there."""

    fingerprint = "known"

    def __init__(self, std=0.4):
        self.std = std

    def observations(self, prompts):
        return torch.tensor(prompts)

    def moments(self, observations):
        return observations.double(), torch.full_like(observations, self.std, dtype=torch.float64)

    def q_noise(self, observations, noise):
        return -(noise - observations).norm(dim=1).double()

    def q_action(self, observations, states):
        return -(states - observations).norm(dim=1).double()


def proposed(share=0.2, place=(1.0, -0.5), std=0.4):
    kernel = NoiseProposal(ring(3), Known(std), share=share)
    cond = {k: v.expand(N, 2) for k, v in kernel.encode([list(place)]).items() if k in (MEAN, STD)}
    return kernel, cond


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_weighed_draws_are_those_of_the_prior(share):
    kernel, cond = proposed(share)
    x = kernel.prior(Z, cond)
    weight = kernel.prior_log_weight(x, cond).exp()
    assert weight.max() <= 1 / share + 1e-9
    for f, truth in ((lambda w: torch.ones(N), 1.0), (lambda w: w[:, 0], 0.0), (lambda w: w[:, 1] ** 2, 1.0)):
        found = weight * f(x.double())
        assert (found.mean() - truth).abs() < 4 * found.std() / math.sqrt(N) + 1e-6


def test_draws_are_the_mixture_that_it_says():
    kernel, cond = proposed(0.2)
    x = kernel.prior(Z, cond).double()
    mean, second = torch.tensor([0.8, -0.4]), 0.2 * 1 + 0.8 * (0.16 + torch.tensor([1.0, 0.25]))
    assert ((x.mean(0) - mean).abs() < 4 * x.std(0) / math.sqrt(N)).all()
    assert ((x**2).mean(0) - second).abs().max() < 4 * (x**2).std() / math.sqrt(N)
    own = (x - torch.tensor([1.0, -0.5])).norm(dim=1) < 0.2
    assert own.double().mean() > 3 * ((Z - torch.tensor([1.0, -0.5])).norm(dim=1) < 0.2).double().mean()


def test_estimates_of_z_stay():
    reward = Reward(lambda samples, prompts: -4 * (samples - samples.new_tensor(TARGET)).norm(dim=1).double())
    base = ring(3)
    found = [
        ts.search(k, reward, ts.BestOfN(n=1500), prompts=[[1.0, -0.5]], seed=1, batch_size=1500, progress=False)
        for k in (base, NoiseProposal(base, Known(), share=0.3))
    ]
    plain, led = found
    error = math.hypot(plain.log_z_se, led.log_z_se)
    assert abs(plain.log_z - led.log_z) < 4 * error
    assert led.rewards.mean() != plain.rewards.mean()


def test_q_of_noise_is_the_value_of_a_root_child_and_q_of_actions_that_of_others():
    reward, steers = Reward(lambda states, prompts: states.sum(1).double(), "q", input="state"), Known()
    base = DiffusionKernel(ring(4).model, state_shape=(2,), schedule=ring(4).chain.schedule, eta=1.0)
    kernel = Valued(NoiseProposal(base, steers), reward, NoiseValue(steers, 4))
    cond = {k: (v if not hasattr(v, "value") else v.value) for k, v in kernel.encode([[1.0, -0.5]]).items()}
    cond = {k: v.expand(3, 2) if isinstance(v, torch.Tensor) else v for k, v in cond.items()}
    x, t = torch.tensor([[1.0, -0.5], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([4, 4, 2])
    law = kernel.transition(x, t, cond | {"task": torch.zeros(3, dtype=torch.int64)})
    at = torch.tensor([1.0, -0.5])
    below = -(law.endpoint[2] - at).norm().double()
    torch.testing.assert_close(law.rewards, torch.stack([torch.zeros(()).double(), -at.norm().double(), below]))


def test_searches_look_where_the_noise_is_worth_something():
    reward = Reward(lambda states, prompts: Known().q_action(torch.tensor(prompts), states), "q", input="state")
    settings = {"prompts": [[-0.9, 0.4]], "budget": ts.Budget(nfe=96), "progress": False}
    base = DiffusionKernel(ring(4).model, state_shape=(2,), schedule=ring(4).chain.schedule, eta=1.0)
    for method in (ts.FeynmanKac(lam=5.0), ts.TreeSearch(looks="endpoints", wave=2), ts.DiffusionTreeSearch(wave=2)):
        kernel = Valued(NoiseProposal(base, Known()), reward, NoiseValue(Known(), 4))
        made = ts.search(kernel, reward, method, **settings)
        assert made.best(1)[1][0] > -0.6
        assert made.cost.nfe <= 96


def test_settings_and_kernels_that_cannot_be_are_refused():
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"least": 0.0}):
        with pytest.raises(ValueError, match="expected 0 < share <= 1"):
            NoiseProposal(ring(2), Known(), **wrong)
    with pytest.raises(TypeError, match="proposes x_T already"):
        NoiseProposal(NoiseProposal(ring(2), Known()), Known())
    with pytest.raises(ValueError, match="give prompts"):
        NoiseProposal(ring(2), Known()).prior(torch.zeros(1, 2))
    one, other = (NoiseProposal(ring(2), Known(), share=s)._settings() for s in (0.1, 0.2))
    assert one != other
