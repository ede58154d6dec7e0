"""x_T drawn where a learnt policy of noise would draw it: exact weights."""

import math
from dataclasses import replace

import pytest
import torch

import treesearch as ts
from experiments.policies.bandit import TARGET, ring
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.guidance.noise import MEAN, STD, NoiseProposal
from treesearch.backends.guidance.noise_law import NoiseLaw
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

    def noise(self, observations, z=None):
        return observations if z is None else observations + self.std * z

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


def test_searches_look_where_the_noise_is_worth_something():
    reward = Reward(lambda states, prompts: Known().q_action(torch.tensor(prompts), states), "q", input="state")
    settings = {"prompts": [[-0.9, 0.4]], "budget": ts.Budget(nfe=96), "progress": False}
    base = DiffusionKernel(ring(4).model, state_shape=(2,), schedule=ring(4).chain.schedule, eta=1.0)
    kernel = NoiseProposal(base, Known())
    for method in (ts.FeynmanKac(lam=5.0), ts.TreeSearch(wave=2), ts.DiffusionTreeSearch(wave=2)):
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


class Begins:
    """The ring from a place of its own: at a picture (noised), at given noise, or where conditioning says so."""

    def __init__(self, first):
        self.inner, self.first = ring(2), first

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def prior(self, noise, cond=None):
        return self.first(noise, cond or {})


def test_kernels_that_begin_elsewhere_are_refused():
    begun = [lambda w, cond: 0.7 + 0.7 * w, lambda w, cond: torch.ones_like(w), lambda w, cond: 0.5 * w]
    for first in begun:
        with pytest.raises(ValueError, match="no multiple of its noise"):
            NoiseProposal(Begins(first), Known())
    known = NoiseProposal(Begins(lambda w, cond: w * 0 + 1 if "known" in cond else w), Known())
    cond = {MEAN: torch.zeros(3, 2), STD: torch.ones(3, 2)}
    assert torch.equal(known.prior(Z[:3], cond), NoiseProposal(ring(2), Known()).prior(Z[:3], cond))
    with pytest.raises(ValueError, match="no multiple of its noise"):
        known.prior(Z[:3], cond | {"known": torch.ones(3)})


def test_a_prior_of_another_spread_is_weighed_by_its_noise():
    base = ring(3)
    wide = DiffusionKernel(base.model, state_shape=(2,), schedule=replace(base.chain.schedule, prior_std=14.0), eta=0.0)
    kernel, plain = NoiseProposal(wide, Known(), share=0.2), NoiseProposal(base, Known(), share=0.2)
    cond = {MEAN: torch.tensor([[1.0, -0.5]]).expand(64, 2), STD: torch.full((64, 2), 0.4)}
    x, w = kernel.prior(Z[:64], cond), plain.prior(Z[:64], cond)
    torch.testing.assert_close(x, 14.0 * w)
    torch.testing.assert_close(kernel.prior_log_weight(x, cond), plain.prior_log_weight(w, cond), atol=1e-4, rtol=1e-4)


def test_noise_that_is_all_but_certain_keeps_the_least_spread():
    kernel = NoiseProposal(ring(2), Known(std=1e-9), least=0.3)
    torch.testing.assert_close(kernel.encode([[1.0, -0.5]])[STD], torch.full((1, 2), 0.3))


def test_a_law_of_noise_is_the_policy_of_noise_and_says_so():
    base, places = ring(3), [[1.0, -0.5], [-1.0, 0.3]]
    reward = Reward(lambda samples, prompts: -(samples - samples.new_tensor(TARGET)).norm(dim=1).double())
    kernel = NoiseLaw(base, Known(0.2))
    cond = {k: v.repeat_interleave(N // 2, 0) for k, v in kernel.encode(places).items()}
    x = kernel.prior(Z, cond).double()
    for rows, place in zip((x[: N // 2], x[N // 2 :]), places, strict=True):
        assert ((rows.mean(0) - torch.tensor(place)).abs() < 4 * 0.2 / math.sqrt(N / 2)).all()
        torch.testing.assert_close(rows.std(0), torch.full((2,), 0.2, dtype=torch.float64), rtol=0.03, atol=0)
    found = ts.search(kernel, reward, ts.BestOfN(), prompts=places, budget=ts.Budget(nfe=60))
    for task in found.tasks:
        assert any("drawn by a learnt policy of noise" in said for said in task.diagnostics["warnings"])
        assert (task.log_weights.diff() == task.rewards.diff()).all()
    with pytest.raises(ValueError, match="give prompts"):
        kernel.prior(Z[:1])
    with pytest.raises(TypeError, match="proposes x_T already"):
        NoiseLaw(NoiseProposal(base, Known()), Known())
