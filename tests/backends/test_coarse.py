"""Jumps of coarse chains: what the fine chain makes of the same noise, and the law of the chain on the sub-grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from treesearch.backends.base import Categorical, Gaussian
from treesearch.backends.chains.coarse import Coarse
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual
from treesearch.backends.chains.schedules import Schedule

T, SHAPE = 12, (2, 3)
GRID = (12, 9, 5, 4, 0)
ONE = torch.tensor([1])
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


def mixed(weights: np.ndarray, z: Tensor) -> Tensor:
    """Σ_u w[t, u] z_u of rows t = 1..T."""
    return torch.einsum("tu,ut...->t...", torch.from_numpy(weights)[1:], z)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_a_jump_is_the_fine_chain_with_its_endpoint_held(name, own):
    """Whether x_t was evaluated or a probe."""
    chain = CHAINS[name]
    coarse, t = Coarse(chain, GRID), every_level()
    at = t if own else torch.from_numpy(coarse.probed)[1:]
    x, x0, z = draws(T, *SHAPE), endpoint_of(chain, draws(T, *SHAPE, seed=1)), draws(T + 1, T, *SHAPE, seed=2)
    seen = torch.where((at == t)[:, None, None], x, draws(T, *SHAPE, seed=3))
    law = coarse.law(x, t, at, chain.law(seen, at, pair(chain, seen, at, x0)))
    for i, (level, got) in enumerate(zip(t.tolist(), law.sample(mixed(coarse.weights, z)), strict=True)):
        want = held(chain, x[i : i + 1], level, int(coarse.below[level]), x0[i : i + 1], z[:, i : i + 1])
        assert (got - want[0]).abs().max() <= ROUNDING * max(1, float(x.abs().max())), level


@pytest.mark.parametrize("name", CHAINS)
def test_a_probe_has_the_law_of_the_held_chain_amid_the_jump(name):
    chain = CHAINS[name]
    coarse, t = Coarse(chain, GRID), every_level()
    at = torch.from_numpy(coarse.probed)[1:]
    x, x0 = draws(T, *SHAPE), endpoint_of(chain, draws(T, *SHAPE, seed=1))
    law = coarse.probe(x, t, at, x0)
    for i, (level, e) in enumerate(zip(t.tolist(), at.tolist(), strict=True)):
        row, end = x[i : i + 1], x0[i : i + 1]
        assert int(coarse.below[level]) < e <= level
        mean = held(chain, row, level, e, end, torch.zeros(T + 1, 1, *SHAPE, dtype=F64))
        assert (law.mean[i] - mean[0]).abs().max() <= 4 * ROUNDING, level
        each = [held(chain, row, level, e, end, one(u)) - mean for u in range(T + 1)]
        assert (law.std[i] - torch.stack(each).square().sum(0).sqrt()).abs().max() <= ROUNDING, level


def one(u: int) -> Tensor:
    z = torch.zeros(T + 1, 1, *SHAPE, dtype=F64)
    z[u] = 1.0
    return z


def test_a_probe_sees_noise_as_the_average_of_linear_endpoints_does():
    """x̂_0 = αx/σ² · k, η = 1, where c_u x̂_0(x_u) is the fine chain's own sum, by differences."""
    chain = CHAINS["ancestral"]
    coarse, of, (t, s) = Coarse(chain, GRID), chain.schedule, (9, 5)

    def average(z: Tensor) -> Tensor:
        x, total = torch.zeros(1, *SHAPE, dtype=F64), torch.zeros(1, *SHAPE, dtype=F64)
        for u in range(t, s, -1):
            count = (of.alpha[u - 1] - of.alpha[u] * chain.direction[u] / of.sigma[u]) * (
                (chain.direction[s + 1 : u] / of.sigma[s + 1 : u]).prod()
            )
            total = total + count * of.alpha[u] / of.sigma[u] ** 2 * x
            x = held(chain, x, u, u - 1, torch.zeros(1, *SHAPE, dtype=F64), z)
        return total

    response = torch.tensor([float(average(one(u))[0, 0, 0]) for u in range(T + 1)], dtype=F64)
    assert (torch.from_numpy(coarse.probes[t]) - response / response.norm()).abs().max() < ROUNDING
    assert coarse.probes[t, s + 1] == 0  # x̂_0 is looked up before the last step's noise


@pytest.mark.parametrize(("name", "level"), [("ancestral", 7), ("renoise", 6), ("still", 7), ("flow", 7)])
def test_a_probe_stands_where_the_endpoint_counts(name, level):
    coarse = Coarse(CHAINS[name], GRID)
    assert coarse.probed[9] == level
    assert coarse.probed[[T, 5, 4, 1]].tolist() == [T, 5, 4, 1]  # at T, in single steps and to x_0: x_t itself


def test_a_walk_of_three_jumps_holds_what_it_leaves():
    chain = CHAINS["ancestral"]
    assert np.array_equal(Coarse(chain, (12, 9, 5, 0)).probed, np.arange(T + 1))
    assert not Coarse(chain, (12, 9, 5, 0)).probes.any()
    assert (Coarse(chain, (12, 9, 5, 2, 0)).probed < np.arange(T + 1)).any()


def test_where_nothing_was_evaluated_before_the_state_itself_is():
    coarse, t, x = Coarse(CHAINS["ancestral"], GRID), torch.tensor([9, 9]), draws(2, *SHAPE)
    law = coarse.probe(x, t, torch.tensor([9, 7]), torch.zeros_like(x))
    assert torch.equal(law.sample(torch.ones_like(x))[0], x[0])
    assert not torch.equal(law.mean[1], x[1])


def test_a_guide_counts_in_every_step_of_a_jump():
    """The fine chain whose x̂_0 gives the guided mean in each step."""
    chain, t = CHAINS["ancestral"], torch.tensor([9])
    coarse, at = Coarse(chain, GRID), torch.tensor([7])
    x, x0, z = draws(1, *SHAPE), draws(1, *SHAPE, seed=1), draws(T + 1, 1, *SHAPE, seed=2)
    base, guided = (chain.law(x, at, pair(chain, x, at, end)) for end in (x0, x0 + 0.3))
    law = coarse.law(x, t, at, Gaussian(guided.mean, base.std, base.endpoint, base.mean))
    want = held(chain, x, 9, 5, x0 + 0.3, z)
    noise = torch.einsum("u,u...->...", torch.from_numpy(coarse.weights[9]), z)
    assert (law.sample(noise) - want).abs().max() <= 4 * ROUNDING
    assert (law.endpoint - x0 - 0.3).abs().max() <= 16 * ROUNDING


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
    got, want = coarse.law(x, t, t, chain.law(x, t, output)), on.law(x, place, output)
    for part in ("mean", "std", "endpoint"):
        assert (getattr(got, part) - getattr(want, part)).abs().max() <= 4 * ROUNDING, part


@pytest.mark.parametrize("step", ["ddim", "ddpm"])
def test_clipped_endpoints_keep_their_noise_estimate(step):
    chain = Chain(cosine(), step=step, clip_sample=0.5)
    coarse, on = Coarse(chain, GRID), chain.on(sub(chain.schedule, GRID))
    t, place = torch.tensor(GRID[:-1]), torch.arange(len(GRID) - 1, 0, -1)
    x, output = draws(len(t), *SHAPE), 2 * draws(len(t), *SHAPE, seed=1)
    gap = coarse.law(x, t, t, chain.law(x, t, output)).mean - on.law(x, place, output).mean
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
    law = coarse.law(x, t, t, fine)
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
    assert float(Coarse(chain, GRID).law(x, t, t, fine).std) > 1.01 * float(on.std)


def test_a_chain_around_an_offset_jumps_around_it():
    chain, m = CHAINS["mean reverting"], draws(3, *SHAPE, seed=3)
    coarse, t = Coarse(chain, GRID), torch.tensor([12, 10, 5])
    x, output = draws(3, *SHAPE), draws(3, *SHAPE, seed=1)
    plain = coarse.law(x - m, t, t, chain.law(x - m, t, output))
    law = coarse.law(x, t, t, chain.law(x, t, output, m), m)
    assert (law.mean - m - plain.mean).abs().max() <= ROUNDING


def test_entries_that_the_kernel_gives_no_noise_get_none():
    coarse, t = Coarse(CHAINS["ancestral"], GRID), torch.tensor([12, 9])
    still = torch.zeros(2, *SHAPE, dtype=F64)
    law = coarse.law(still, t, t, Gaussian(still, still, still))
    assert not law.std.any()


def test_walks_end_at_0_from_every_level():
    coarse = Coarse(CHAINS["ancestral"], GRID)
    assert coarse.below.tolist() == [0, 0, 0, 0, 0, 4, 5, 5, 5, 5, 9, 9, 9]
    assert coarse.evaluations.tolist() == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Coarse(CHAINS["flow"], (11, 5, 0)), ValueError, "fall from T = 12 to 0"),
        (lambda: Coarse(CHAINS["flow"], (12, 5)), ValueError, "fall from T"),
        (lambda: Coarse(CHAINS["flow"], (12, 5, 5, 0)), ValueError, "fall from T"),
        (lambda: Coarse(CHAINS["flow"], (12, 5.5, 0)), ValueError, "fall from T"),
        (lambda: Coarse(Chain(cosine(), eta=torch.rand(1, *SHAPE)), GRID), ValueError, "from entry to entry"),
        (lambda: Coarse(CHAINS["flow"], GRID).law(draws(1), ONE, ONE, Categorical(draws(1), draws(1))), TypeError,
         "Categorical"),
    ],
)  # fmt: skip
def test_what_is_no_sub_grid_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
