"""Cyclic one-way diffusion: entries held along the path of an inverted seed, and cycles around them."""

import pytest
import torch

import treesearch as ts
from treesearch.backends.base import describe
from treesearch.backends.chains.inversion import invert
from treesearch.backends.exact.gaussian_states import GaussianStates, carried
from treesearch.backends.guidance import Steered, spread
from treesearch.backends.wrappers.cycle import Cycle
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards.observation import masked, measurement
from treesearch.testing import check_kernel

F64 = torch.float64
AT = torch.arange(6, dtype=F64)[:, None]
COV = (-0.5 * (torch.cdist(AT, AT) / 2) ** 2).exp() + 0.05 * torch.eye(6, dtype=F64)
KERNEL = GaussianStates(torch.zeros(6, dtype=F64), COV, num_steps=12)
MASK = torch.tensor([False, False, True, True, False, False])
SEED = torch.where(MASK, torch.tensor(1.2, dtype=F64), 0.0)
PATH = invert(KERNEL, SEED[None])[:, 0]
CLAMP = Clamp(KERNEL, MASK, PATH)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_held_entries_are_on_the_path_at_every_level():
    x = CLAMP.prior(noise(4, 6))
    assert torch.equal(x[:, MASK], PATH[12, MASK].expand(4, 2))
    for t in range(12, 0, -1):
        law = CLAMP.transition(x, torch.full((4,), t))
        free = KERNEL.transition(x, torch.full((4,), t))
        assert torch.equal(law.mean[:, ~MASK], free.mean[:, ~MASK])
        assert torch.equal(law.endpoint[:, MASK], SEED[MASK].expand(4, 2))
        x = law.sample(noise(4, 6, seed=t))
        assert torch.equal(x[:, MASK], PATH[t - 1, MASK].expand(4, 2))
    assert torch.equal(x[:, MASK], SEED[MASK].expand(4, 2))


def test_after_a_climb_the_network_sees_the_path_again():
    x, t = noise(4, 6), torch.full((4,), 7)
    on = torch.where(MASK, PATH[7], x)
    assert torch.equal(CLAMP.transition(x, t).mean, KERNEL.transition(on, t).mean.where(~MASK, PATH[6]))


def test_rows_are_held_at_levels_of_their_own():
    law = CLAMP.transition(noise(3, 6), torch.tensor([3, 12, 1]))
    assert torch.equal(law.mean[:, MASK], PATH[[2, 11, 0]][:, MASK])


def test_what_a_path_says_of_noise():
    assert describe(CLAMP).stochastic == describe(KERNEL).stochastic
    whole = Clamp(KERNEL, torch.ones(6, dtype=torch.bool), PATH)
    assert not any(describe(whole).stochastic)
    check_kernel(CLAMP)
    check_kernel(Cycle(CLAMP, low=4, high=8, times=2))
    assert len({k.fingerprint for k in (CLAMP, Clamp(KERNEL, MASK, SEED), Clamp(KERNEL, MASK, PATH + 1.0))}) == 3


def test_the_noise_of_a_climb_composes_to_the_variance_above():
    """c² σ_low² + v² = σ_high²: held entries that are noised afresh are noised as the level says, after a climb too."""
    law = Cycle(Clamp(KERNEL, MASK, SEED), low=4, high=8).transition(noise(2, 6), torch.full((2,), 9))
    of = KERNEL.chain.schedule
    assert (law.std[:, MASK] ** 2 - of.sigma[8] ** 2).abs().max() < 1e-15
    assert (law.mean[:, MASK] - of.alpha[8] * SEED[MASK]).abs().max() < 1e-15


def background(mean, cov):
    """Largest error of the background's mean, and the relative error of its covariance, given the seed."""
    rows = torch.eye(6, dtype=F64)[MASK]
    want = KERNEL.given(rows, SEED[MASK], 0.0)
    free = want.cov[~MASK][:, ~MASK]
    off = (cov[~MASK][:, ~MASK] - free).norm() / free.norm()
    return float((mean - want.mean)[~MASK].abs().max()), float(off)


def test_search_over_steered_removes_the_bias_that_cycles_leave():
    biased = [background(*carried(Cycle(CLAMP, low=6, high=9, times=n))) for n in (0, 3, 10)]
    assert min(max(found) for found in biased) > 0.2
    reward = measurement(masked(MASK), SEED[MASK], tolerance=0.05)
    kernel = Steered(KERNEL, reward, spread=spread(KERNEL))
    every = ts.FeynmanKac(schedule=(*range(11, 1, -1), 0))
    result = ts.search(kernel, reward, every, budget=ts.Budget(nfe=12 * 8_000), batch_size=8_000, progress=False)
    weights = torch.softmax(torch.as_tensor(result.log_weights), 0)
    x = result.samples.double()
    mean = weights @ x
    found = background(mean, (x - mean).T @ ((x - mean) * weights[:, None]))
    assert max(found) < 0.1


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: Clamp(KERNEL, MASK, PATH[:5]), r"values has shape \(5, 6\).*or a path \(13, 6\)"),
        (lambda: Clamp(KERNEL, MASK, torch.where(MASK, torch.nan, PATH)), "finite"),
    ],
)
def test_paths_that_are_none_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        wrong()
