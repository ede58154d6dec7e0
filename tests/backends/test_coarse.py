"""Jumps of coarse chains: what the fine chain makes of the same noise, and the law of the chain on the sub-grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from treesearch.backends.base import Categorical, Gaussian
from treesearch.backends.base.grids import subgrid
from treesearch.backends.chains.coarse import Coarse
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual
from treesearch.backends.chains.schedules import Schedule

T, SHAPE = 12, (2, 3)
GRID = (12, 9, 5, 4, 0)
ROUNDING = 64 * 2.0**-52  # some ten float64 operations a step on numbers about 1
F64 = torch.float64


def cosine(prediction="v", final=1.0) -> Schedule:
    bar = torch.cos(torch.linspace(0.1, 1.5, T, dtype=F64)) ** 2
    bar = torch.cat([torch.tensor([final], dtype=F64), bar])
    return Schedule(torch.arange(T), bar.sqrt(), (1 - bar).sqrt(), prediction)


def flow() -> Schedule:
    return Schedule.flow(torch.linspace(0, 1, T + 1, dtype=F64), torch.arange(T))


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


CHAINS = {
    "ancestral": Chain(cosine()),
    "half": Chain(cosine(), eta=0.5),
    "still": Chain(cosine(), eta=0.0),
    "by level": Chain(cosine(), eta=torch.linspace(0, 1, T + 1, dtype=F64)[:, None, None]),
    "ddpm": Chain(cosine(), step="ddpm", clip_sample=1.0),
    "renoise": Chain(cosine(), step="renoise"),
    "noise left": Chain(cosine(final=0.995)),
    "flow": Chain(flow()),
    "half flow": Chain(flow(), eta=0.7),
    "still flow": Chain(flow(), eta=0.0),
    "mean reverting": Chain(MeanReverting().schedule(T)),
    "residual": Chain(Residual(predicts="residual").schedule(T), eta=0.6),
}


def endpoint_of(chain: Chain, x0: Tensor) -> Tensor:
    return x0 if chain.clip_sample is None else x0.clamp(-chain.clip_sample, chain.clip_sample)


def pair(chain: Chain, x: Tensor, t: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """x̂_0 held, and the ε̂ that goes with it and x."""
    return x0, (x - chain.at("alpha", t, x) * x0) / chain.at("sigma", t, x)


def held(chain: Chain, x: Tensor, t: int, s: int, x0: Tensor, z: Tensor) -> Tensor:
    """The fine chain from t to s with x̂_0 held, on its noise z (T + 1, n, *state)."""
    for u in range(t, s, -1):
        at = torch.full((len(x),), u)
        x = chain.law(x, at, pair(chain, x, at, x0)).sample(z[u])
    return x


def every_level() -> Tensor:
    return torch.arange(1, T + 1)


@pytest.mark.parametrize("name", CHAINS)
def test_a_jump_is_the_fine_chain_with_its_endpoint_held(name):
    chain = CHAINS[name]
    coarse, t = Coarse(chain, GRID), every_level()
    x, x0, z = draws(T, *SHAPE), endpoint_of(chain, draws(T, *SHAPE, seed=1)), draws(T + 1, T, *SHAPE, seed=2)
    law = coarse.law(x, t, chain.law(x, t, pair(chain, x, t, x0)))
    noise = torch.einsum("tu,ut...->t...", torch.from_numpy(coarse.weights)[1:], z)
    for i, (level, got) in enumerate(zip(t.tolist(), law.sample(noise), strict=True)):
        want = held(chain, x[i : i + 1], level, int(coarse.below[level]), x0[i : i + 1], z[:, i : i + 1])
        assert (got - want[0]).abs().max() <= ROUNDING * max(1, float(x.abs().max())), level


def sub(of: Schedule, levels: tuple[int, ...]) -> Schedule:
    """The schedule of a sub-grid."""
    at = torch.tensor(levels).flip(0)
    carry = None if of.carry is None else torch.stack(
        [of.carry[s:t].prod() for s, t in zip(at[:-1].tolist(), at[1:].tolist(), strict=True)])  # fmt: skip
    return Schedule(of.timestep[at[1:] - 1], of.alpha[at], of.sigma[at], of.prediction, of.prior_std, carry)


@pytest.mark.parametrize("name", ["ancestral", "still", "ddpm", "renoise", "noise left", "flow", "still flow",
                                  "mean reverting"])  # fmt: skip
def test_it_has_the_law_of_the_chain_on_the_sub_grid(name):
    """At η = 0 and 1, with an output that a network gave and the step clips."""
    chain = CHAINS[name]
    coarse, on = Coarse(chain, GRID), chain.on(sub(chain.schedule, GRID))
    t, place = torch.tensor(GRID[:-1]), torch.arange(len(GRID) - 1, 0, -1)
    x, output = draws(len(t), *SHAPE), 2 * draws(len(t), *SHAPE, seed=1)
    got, want = coarse.law(x, t, chain.law(x, t, output)), on.law(x, place, output)
    for part in ("mean", "std", "endpoint"):
        assert (getattr(got, part) - getattr(want, part)).abs().max() <= 4 * ROUNDING, part


@pytest.mark.parametrize("step", ["ddim", "ddpm"])
def test_clipped_endpoints_keep_their_noise_estimate(step):
    chain = Chain(cosine(), step=step, clip_sample=0.5)
    coarse, on = Coarse(chain, GRID), chain.on(sub(chain.schedule, GRID))
    t, place = torch.tensor(GRID[:-1]), torch.arange(len(GRID) - 1, 0, -1)
    x, output = draws(len(t), *SHAPE), 2 * draws(len(t), *SHAPE, seed=1)
    gap = coarse.law(x, t, chain.law(x, t, output)).mean - on.law(x, place, output).mean
    assert gap.abs().max() <= 4 * ROUNDING


@pytest.mark.parametrize("name", ["ancestral", "flow"])
def test_weights_of_ancestral_sampling_are_differences_of_snr(name):
    chain = CHAINS[name]
    coarse, of = Coarse(chain, GRID), chain.schedule
    snr = (of.alpha / of.sigma).square().numpy()  # 1/n²
    for t in range(2, T + 1):
        s = int(coarse.below[t])
        if s:
            want = np.zeros(T + 1)
            want[s + 1 : t + 1] = (snr[s:t] - snr[s + 1 : t + 1]) / (snr[s] - snr[t])
            assert np.abs(coarse.weights[t] ** 2 - want).max() < ROUNDING


@pytest.mark.parametrize("name", CHAINS)
def test_weights_are_of_unit_noise(name):
    coarse, of = Coarse(CHAINS[name], GRID), CHAINS[name].schedule
    noisy = [t > 0 and bool(of.sigma[coarse.below[t]] > 0) and not name.startswith("still") for t in range(T + 1)]
    assert np.abs((coarse.weights**2).sum(1) - noisy).max() < ROUNDING
    assert not np.triu(coarse.weights, 1).any()  # of no step above the jump


@pytest.mark.parametrize("name", CHAINS)
def test_a_jump_of_one_step_is_the_kernel_s_own(name):
    chain = CHAINS[name]
    coarse, t = Coarse(chain, range(T, -1, -1)), every_level()
    x = draws(T, *SHAPE).float()
    fine = chain.law(x, t, draws(T, *SHAPE, seed=1).float())
    law = coarse.law(x, t, fine)
    assert torch.equal(law.mean, fine.mean)
    assert torch.equal(law.std.expand_as(x), fine.std.expand_as(x))
    assert torch.equal(torch.from_numpy(coarse.weights).diagonal()[1:] > 0, chain.std[1:].flatten() > 0)


def test_noise_that_eta_leaves_to_a_direction_is_the_fine_chain_s():
    """With 0 < η < 1 the sub-grid's own step keeps more of ε̂ than the fine steps do."""
    chain = CHAINS["half"]
    t, x = torch.tensor([9]), draws(1, *SHAPE)
    fine = chain.law(x, t, draws(1, *SHAPE, seed=1))
    place = torch.tensor([3])
    on = chain.on(sub(chain.schedule, GRID)).law(x, place, draws(1, *SHAPE, seed=1))
    assert float(Coarse(chain, GRID).law(x, t, fine).std) > 1.01 * float(on.std)


def test_a_chain_around_an_offset_jumps_around_it():
    chain, m = CHAINS["mean reverting"], draws(3, *SHAPE, seed=3)
    coarse, t = Coarse(chain, GRID), torch.tensor([12, 10, 5])
    x, output = draws(3, *SHAPE), draws(3, *SHAPE, seed=1)
    plain = coarse.law(x - m, t, chain.law(x - m, t, output))
    law = coarse.law(x, t, chain.law(x, t, output, m), m)
    assert (law.mean - m - plain.mean).abs().max() <= ROUNDING


def test_entries_that_the_kernel_gives_no_noise_get_none():
    coarse, t = Coarse(CHAINS["ancestral"], GRID), torch.tensor([12, 9])
    still = torch.zeros(2, *SHAPE, dtype=F64)
    law = coarse.law(still, t, Gaussian(still, still, still))
    assert not law.std.any()


def test_walks_end_at_0_from_every_level():
    coarse = Coarse(CHAINS["ancestral"], GRID)
    assert coarse.below.tolist() == [0, 0, 0, 0, 0, 4, 5, 5, 5, 5, 9, 9, 9]
    assert coarse.evaluations.tolist() == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize(("steps", "m"), [(50, 10), (50, 50), (7, 3), (2, 2)])
def test_a_sub_grid_has_as_many_levels_as_it_evaluates(steps, m):
    levels = subgrid(steps, m)
    assert levels[0] == steps
    assert levels[-1] == 0
    assert len(set(levels)) == m + 1
    Coarse(Chain(cosine()), subgrid(T, 5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: subgrid(50, 1), ValueError, "expected 2..T"),
        (lambda: subgrid(50, 51), ValueError, "expected 2..T"),
        (lambda: subgrid(50, 2.5), ValueError, "expected 2..T"),
        (lambda: subgrid(50, True), ValueError, "expected 2..T"),
        (lambda: Coarse(CHAINS["flow"], (11, 5, 0)), ValueError, "fall from T = 12 to 0"),
        (lambda: Coarse(CHAINS["flow"], (12, 5)), ValueError, "fall from T"),
        (lambda: Coarse(CHAINS["flow"], (12, 5, 5, 0)), ValueError, "fall from T"),
        (lambda: Coarse(CHAINS["flow"], (12, 5.5, 0)), ValueError, "fall from T"),
        (lambda: Coarse(Chain(cosine(), eta=torch.rand(1, *SHAPE)), GRID), ValueError, "from entry to entry"),
        (lambda: Coarse(CHAINS["flow"], GRID).law(draws(1), torch.tensor([1]), Categorical(draws(1), draws(1))),
         TypeError, "Categorical"),
    ],
)  # fmt: skip
def test_what_is_no_sub_grid_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
