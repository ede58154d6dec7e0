"""Known entries that a model was not trained with: replacement as a law of its own."""

import math
from dataclasses import replace

import pytest
import torch

import treesearch as ts
from treesearch.backends.base import Wrapper
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import TDS
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards.analytic import constant, linear
from treesearch.testing import check_kernel

F64 = torch.float64
TOLERANCE = 0.5


def matrix(value):
    return torch.tensor([[value]], dtype=F64)


BASE = GaussianTrajectories.of_system(
    matrix(0.9), matrix(0.7), matrix(-0.5), horizon=3, start=1.0, noise=0.5, behaviour=0.6, num_steps=8
)
MASK = torch.tensor([[True, False], [False, False], [True, False]])
VALUES = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [-0.4, math.nan]], dtype=F64)
CLAMP = Clamp(BASE, MASK, VALUES)


def given() -> torch.Tensor:
    """Mean of the chain's law given the values up to the tolerance."""
    mean, cov = BASE.law
    seen = MASK.flatten()
    noisy = cov[seen][:, seen] + TOLERANCE**2 * torch.eye(2, dtype=F64)
    return mean + cov[:, seen] @ torch.linalg.solve(noisy, VALUES[MASK] - mean[seen])


def test_replacement_is_another_law_and_says_so():
    result = ts.search(CLAMP, constant(0.0), ts.BestOfN(n=8000), batch_size=8192)
    assert (result.samples.double().flatten(1).mean(0) - given()).abs().max() > 0.1
    assert "law of its own" in CLAMP.departs


def test_replaced_entries_are_the_values_noised_at_every_level():
    x, t = BASE.prior(torch.randn(4000, 3, 2)), torch.full((4000,), 5)
    alpha, sigma = (float(v[4]) for v in (BASE.chain.schedule.alpha, BASE.chain.schedule.sigma))
    law = CLAMP.transition(x, t)
    below = law.sample(torch.randn(4000, 3, 2, generator=torch.Generator().manual_seed(0)))[:, MASK]
    assert below.mean(0).tolist() == pytest.approx((alpha * VALUES[MASK]).tolist(), abs=4 * sigma / 4000**0.5)
    assert below.std(0).tolist() == pytest.approx([sigma, sigma], rel=0.05)
    assert (law.endpoint[:, MASK] == VALUES[MASK]).all()
    free = BASE.transition(x, t)
    torch.testing.assert_close(law.mean[:, ~MASK], free.mean[:, ~MASK], rtol=0, atol=0)
    done = CLAMP.transition(x, torch.ones_like(t)).sample(torch.randn(4000, 3, 2))
    assert (done[:, MASK] == VALUES[MASK]).all()


def test_outside_a_guide_what_is_replaced_weighs_nothing():
    kernel, free = Clamp(TDS(BASE, linear()), MASK, VALUES), TDS(BASE, linear())
    x, t = torch.randn(4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.full((4,), 5)
    law, want = kernel.transition(x, t), free.transition(x, t)
    assert torch.equal(law.base_mean, torch.where(MASK, law.mean, want.base_mean))
    z = torch.randn(4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    alone = torch.where(MASK, want.base_mean, want.mean)
    assert (
        law.log_weight(law.sample(z)) - replace(want, mean=alone).log_weight(alone + want.std * z)
    ).abs().max() < 1e-12


def test_what_is_held_is_told_with_what_the_kernel_inside_holds():
    class Holds(Wrapper):
        def held(self, x, cond):
            return torch.tensor([[False, True], [False, False], [False, False]]).expand(x.shape)

    x = torch.zeros(2, 3, 2)
    assert torch.equal(CLAMP.held(x, None).expand(x.shape), MASK.expand(x.shape))
    assert Clamp(Holds(BASE), MASK, VALUES).held(x, None).sum().item() == 2 * 3


def test_conformance():
    check_kernel(CLAMP)


def test_replacement_is_noisy_where_the_base_kernel_is_not():
    still = DiffusionKernel(lambda x, t: x, state_shape=(2,), schedule=Schedule.flow(torch.linspace(0, 1, 5)), eta=0.0)
    kernel = Clamp(still, torch.tensor([True, False]), torch.zeros(2))
    assert kernel.stochastic.tolist() == [True, False, True, True, True]
    check_kernel(kernel)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_is_known_is_exact_at_x_0_where_the_grid_ends_above_it(eta):
    noise = torch.linspace(0.1, 0.9, 5)
    kernel = DiffusionKernel(lambda x, t: 0 * x, state_shape=(2,), schedule=Schedule.flow(noise), eta=eta)
    clamped = Clamp(kernel, torch.tensor([True, False]), torch.tensor([0.7, 0.0]))
    assert clamped.stochastic[1] == (eta > 0)
    done = clamped.transition(torch.randn(9, 2), torch.ones(9, dtype=torch.int64)).sample(torch.randn(9, 2))
    assert (done[:, 0] == torch.tensor(0.7)).all()
    check_kernel(clamped)


def test_fingerprints_tell_masks_and_values_apart():
    kernels = [CLAMP, Clamp(BASE, MASK, VALUES + 1), Clamp(BASE, ~MASK, torch.zeros(3, 2))]
    assert len({kernel.fingerprint for kernel in kernels}) == len(kernels)
    assert Clamp(BASE, MASK, VALUES).fingerprint == CLAMP.fingerprint


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (lambda: Clamp(LinearGaussian(), torch.ones(1, dtype=torch.bool), torch.zeros(1)), TypeError, "noise levels"),
        (lambda: Clamp(BASE, MASK[:2], VALUES), ValueError, r"mask has shape \(2, 2\), expected .*\(3, 2\)"),
        (lambda: Clamp(BASE, MASK, VALUES[0]), ValueError, "values has shape"),
        (lambda: Clamp(BASE, MASK.float(), VALUES), ValueError, "mask must be bool"),
        (lambda: Clamp(BASE, torch.zeros_like(MASK), VALUES), ValueError, "a known entry"),
        (lambda: Clamp(BASE, ~MASK, VALUES), ValueError, "finite"),
    ],
)
def test_bad_input(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()
