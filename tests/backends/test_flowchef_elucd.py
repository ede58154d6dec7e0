"""Guides whose gradient stops at the endpoint: FlowChef at a constant velocity, EluCD's reach and classifier."""

from __future__ import annotations

import math

import pytest
import torch

import treesearch as ts
from treesearch.backends.base import Guided, describe, shift_mean
from treesearch.backends.exact.enumerable import DiscreteChain
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance.elucd import EluCD
from treesearch.backends.guidance.flowchef import FlowChef
from treesearch.backends.guidance.prompts import PROMPTS
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards import digit
from treesearch.rewards.analytic import linear, quadratic, table
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.rewards.images.classifier import Tempered, load_classifier
from treesearch.testing import check_kernel

F64 = torch.float64


def bed(eta: float = 1.0) -> GaussianTrajectories:
    cov = torch.eye(6, dtype=F64) + 0.3
    return GaussianTrajectories(torch.zeros(3, 2, dtype=F64), cov, channels=Channels(1, 1), num_steps=8, eta=eta)


BED, STILL, EXACT = bed(), bed(0.0), LinearGaussian(dim=2, num_steps=5)
PULL, CHAIN, TABLE = quadratic(2.0, 0.5), DiscreteChain.random(), table([1.0] * 4)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_mean_moves_as_the_endpoint_does(steps):
    """x̂_0 <- x̂_0 + s k (y - x̂_0), M times."""
    x, t = draws(4, 3, 2), torch.tensor([2, 4, 6, 8])
    base, law = BED.transition(x, t), FlowChef(BED, PULL, scale=0.1, steps=steps).transition(x, t)
    end = base.endpoint
    for _ in range(steps):
        end = end + 0.1 * 2.0 * (0.5 - end)
    assert (law.mean - base.mean - (end - base.endpoint)).abs().max() < 1e-12
    assert torch.equal(law.base_mean, base.mean)
    assert (law.rewards - PULL(base.endpoint)).abs().max() < 1e-12


def test_each_guided_row_climbs_for_its_own_prompt():
    signs = {"up": 1.0, "down": -1.0}

    def by_prompt(x, prompts):
        return torch.stack([signs[p] * row.sum() for p, row in zip(prompts, x, strict=True)])

    x, t, cond = draws(3, 3, 2), torch.tensor([1, 4, 8]), {PROMPTS: ["up", "down", "up"], "task": torch.arange(3)}
    law = FlowChef(BED, Reward(by_prompt, "by prompt", "state"), scale=0.1).transition(x, t, cond)
    move = (law.mean - law.base_mean).flatten(1)
    want = torch.tensor([0.0, -0.1, 0.1], dtype=F64)  # the last step has no noise and is not guided
    assert (move - want[:, None]).abs().max() < 1e-12


def test_no_network_takes_part_in_the_gradient():
    class Watched(GaussianTrajectories):
        def transition(self, x, t, cond=None):
            assert not x.requires_grad
            assert not torch.is_grad_enabled()
            return super().transition(x, t, cond)

    kernel = Watched(torch.zeros(3, 2, dtype=F64), torch.eye(6, dtype=F64), channels=Channels(1, 1), num_steps=8)
    found = ts.search(FlowChef(kernel, PULL, steps=2), PULL, ts.BestOfN(n=4))
    assert found.cost.backward_nfe == 0
    assert found.cost.reward_calls == 4 * (2 * 7 + 1)  # each of the seven noisy steps, and x_0
    elucd = ts.search(EluCD(kernel, PULL, gamma=0.0), PULL, ts.BestOfN(n=4))
    assert (elucd.cost.backward_nfe, elucd.cost.reward_calls) == (0, 4 * 8)


def test_without_noise_it_moves_as_published_and_departs():
    guided = FlowChef(STILL, PULL, scale=0.2)
    x, t = draws(4, 3, 2), torch.tensor([1, 4, 6, 8])
    base, law = STILL.transition(x, t), guided.transition(x, t)
    assert (law.mean - base.mean - 0.4 * (0.5 - base.endpoint)).abs().max() < 1e-12
    assert not law.log_weight(law.mean).any()
    assert "no weights" in guided.departs
    assert FlowChef(BED, PULL).departs is None
    assert FlowChef(STILL, PULL, scale=0).departs is None


def test_without_noise_no_weights_of_an_inner_guide_are_left_and_what_is_held_stays():
    """A guide that is asked for a move at a step without noise moves nothing; its base mean is there all the same."""
    inner = Guided(STILL, shift_mean(lambda x, t, law, cond: torch.ones_like(x)), "shift")
    assert FlowChef(inner, PULL).transition(draws(2, 3, 2), torch.tensor([3, 1])).base_mean is None
    mask = torch.tensor([[True, False]] * 3)
    kernel = FlowChef(Clamp(STILL, mask, draws(9, 3, 2, seed=1)), PULL, scale=0.2)
    x, t = draws(2, 3, 2), torch.tensor([3, 1])
    base, law = kernel.kernel.transition(x, t), kernel.transition(x, t)
    assert torch.equal(law.mean[:, mask], base.mean[:, mask])
    assert (law.mean != base.mean)[:, ~mask].all()


def test_it_reaches_for_what_is_seen():
    """The published rule on a chain without noise: the squared miss falls to a tenth."""
    plain, guided = (ts.search(k, PULL, ts.BestOfN(n=64)).rewards.mean() for k in (STILL, FlowChef(STILL, PULL)))
    assert guided > 0.1 * plain


def test_its_reach_is_the_variance_and_a_sine():
    x, t = draws(4, 3, 2), torch.tensor([2, 4, 6, 8])
    base, law = BED.transition(x, t), EluCD(BED, linear(1.0), scale=0.5, gamma=0.3).transition(x, t)
    largest = float(BED.chain.std.max() ** 2)
    sine = torch.sin(math.pi * t / 8).double()[:, None, None]
    want = 0.5 * (base.std**2 + 0.3 * largest * sine)
    assert (law.mean - base.mean - want).abs().max() < 1e-12


def images(n: int = 4) -> torch.Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_temperatures_of_the_logits():
    logits = load_classifier()(images()).double()
    assert torch.equal(digit(8, tau1=1.0, tau2=1.0)(images()), digit(8)(images()))
    found = digit(8, tau1=2.0, tau2=0.5)(images())
    assert (found - (2 * logits[:, 8] - (0.5 * logits).logsumexp(1))).abs().max() < 1e-12
    plain = digit(8, tau2=0.5)(images())
    sharp, soft = (float((digit(8, softplus=b, tau2=0.5)(images()) - plain).abs().max()) for b in (500.0, 1.0))
    assert 0 < sharp < 0.1 * soft


def test_the_gradient_stays_where_the_classifier_is_sure():
    """τ_2 = 0 is the bare logit, whose gradient does not know how sure the classifier is."""
    x = images().requires_grad_()
    (bare,) = torch.autograd.grad(digit(8, tau2=0.0).attached(x).sum(), x)
    (logit,) = torch.autograd.grad(load_classifier()(x)[:, 8].sum(), x)
    assert (bare - logit).abs().max() < 1e-6


def test_equal_temperatures_are_the_log_softmax():
    f = draws(4, 10, seed=2).requires_grad_()
    (found,) = torch.autograd.grad(Tempered(8, 1.5, 1.5)(f).sum(), f)
    (want,) = torch.autograd.grad((1.5 * f).log_softmax(1)[:, 8].sum(), f)
    assert (found - want).abs().max() <= 1.5 * 4 * 2.0**-53  # probabilities, a few roundings each


@pytest.mark.parametrize("make", [lambda: FlowChef(BED, PULL, steps=2), lambda: EluCD(BED, PULL, scale=0.5)])
def test_their_steps_obey_the_laws(make):
    check_kernel(make(), rows=6, proposal=True)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: FlowChef(BED, PULL, scale=-1.0), ValueError, "scale is -1.0"),
        (lambda: FlowChef(BED, PULL, scale=math.nan), ValueError, "scale is nan"),
        (lambda: FlowChef(BED, PULL, steps=0), ValueError, "steps is 0"),
        (lambda: FlowChef(FlowChef(BED, PULL), PULL), TypeError, "is guided by"),
        (lambda: ts.search(FlowChef(CHAIN, TABLE), TABLE, ts.BestOfN(n=2)), TypeError, "Gaussian"),
        (lambda: EluCD(BED, PULL, gamma=-0.1), ValueError, "gamma is -0.1"),
        (lambda: EluCD(BED, PULL, through_network=True), ValueError, "stops at the endpoint"),
        (lambda: EluCD(STILL, PULL), ValueError, "a chain without noise has no weights"),
        (lambda: EluCD(EXACT, PULL), TypeError, "gamma=0"),
        (lambda: digit(8, tau1=-1.0), ValueError, "tau1 and tau2"),
        (lambda: digit(8, tau2=math.nan), ValueError, "tau1 and tau2"),
        (lambda: digit(8, softplus=0.0), ValueError, "softplus is 0.0"),
        (lambda: digit(11, tau2=0.5), ValueError, "expected digits"),
    ],
)
def test_settings_out_of_range_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_levels_without_noise_are_not_guided_on_a_noisy_chain():
    assert describe(FlowChef(BED, PULL)).rewards_per_nfe == (0, 0, *(1,) * 7)
