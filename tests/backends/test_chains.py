"""Chains beyond one α_t and one η: what a step carries, tables by entry, an offset, two outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from treesearch.backends.chains.diffusion import Chain, DiffusionKernel, from_endpoint, to_endpoint
from treesearch.backends.chains.schedules import Schedule
from treesearch.testing import check_kernel

T, SHAPE = 6, (2, 3)
ROUNDING = 16 * 2.0**-52  # a dozen float64 operations on numbers about 1


def bars(steps: int = T) -> Tensor:
    """ᾱ of x_1..x_T."""
    return torch.linspace(0.95, 0.03, steps, dtype=torch.float64)


def schedule(prediction="sample", **change) -> Schedule:
    bar = torch.cat([torch.ones(1, dtype=torch.float64), bars()])
    return Schedule(torch.arange(T), bar.sqrt(), (1 - bar).sqrt(), prediction, **change)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def levels(n: int = 4) -> Tensor:
    return torch.tensor([1, 2, 4, T])[:n]


def assert_same(one, other, room: float = ROUNDING) -> None:
    for name in ("mean", "std", "endpoint"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a - b).abs().max() <= room, name


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_what_a_markov_process_carries_may_be_said(eta):
    of = schedule()
    said = schedule(carry=of.alpha[1:] / of.alpha[:-1])
    x, output = draws(4, *SHAPE), draws(4, *SHAPE, seed=1)
    assert_same(Chain(said, eta=eta).law(x, levels(), output), Chain(of, eta=eta).law(x, levels(), output))


def test_a_step_is_the_posterior_of_what_is_carried():
    """q(x_s | x_t, x_0) of x_s = α_s x_0 + σ_s ε, x_t = c x_s + (α_t - c α_s) x_0 + √(σ_t² - c²σ_s²) ε', by Bayes."""
    of = schedule()
    carry = torch.linspace(1.0, 0.6, T, dtype=torch.float64)
    chain = Chain(Schedule(of.timestep, of.alpha, of.sigma, "sample", carry=carry))
    x, x0, t = draws(3, *SHAPE), draws(3, *SHAPE, seed=1), torch.tensor([2, 3, T])
    law = chain.law(x, t, x0)
    a_t, a_s, s_t, s_s, c = (v[:, None, None] for v in (of.alpha[t], of.alpha[t - 1], of.sigma[t], of.sigma[t - 1],
                                                        carry[t - 1]))  # fmt: skip
    noise = s_t**2 - c**2 * s_s**2
    precision = 1 / s_s**2 + c**2 / noise
    mean = (a_s * x0 / s_s**2 + c * (x - (a_t - c * a_s) * x0) / noise) / precision
    assert (law.mean - mean).abs().max() <= 4 * ROUNDING
    assert (law.std - precision.rsqrt()).abs().max() <= ROUNDING


def test_tables_by_entry_are_a_chain_an_entry():
    bar = torch.stack([bars(), bars() ** 2, bars() ** 0.5], 1)
    bar = torch.cat([torch.ones(1, 3, dtype=torch.float64), bar])
    together = Chain(Schedule(torch.arange(T), bar.sqrt(), (1 - bar).sqrt(), "v"), eta=0.7)
    x, output = draws(4, 3), draws(4, 3, seed=1)
    law = together.law(x, levels(), output)
    for i in range(3):
        alone = Chain(Schedule(torch.arange(T), bar[:, i].sqrt(), (1 - bar[:, i]).sqrt(), "v"), eta=0.7)
        one = alone.law(x[:, i : i + 1], levels(), output[:, i : i + 1])
        assert torch.equal(law.mean[:, i], one.mean[:, 0])
        assert torch.equal(law.std[:, i], one.std[:, 0])


def test_noise_by_region():
    """η of the first row is 1, of the second 0: each entry is that of its own chain, and siblings can differ."""
    eta = torch.tensor([1.0, 0.0])[None, :, None].expand(1, *SHAPE)
    x, output = draws(4, *SHAPE), draws(4, *SHAPE, seed=1)
    law = Chain(schedule(), eta=eta).law(x, levels(), output)
    for row, own in enumerate((1.0, 0.0)):
        want = Chain(schedule(), eta=own).law(x, levels(), output)
        assert torch.equal(law.mean[:, row], want.mean[:, row])
        assert torch.equal(law.std[:, row], want.std.expand(4, *SHAPE)[:, row])
    assert Chain(schedule(), eta=eta).stochastic.tolist() == [True, False, *(True,) * (T - 1)]


def test_noise_by_level_and_region():
    eta = torch.zeros(T + 1, *SHAPE)
    eta[4] = 0.5
    chain = Chain(schedule(), eta=eta)
    assert chain.stochastic.nonzero().flatten().tolist() == [0, 4]
    assert chain.on(schedule().last(3)).stochastic.nonzero().flatten().tolist() == [0]
    x, output = draws(1, *SHAPE), draws(1, *SHAPE, seed=1)
    assert_same(
        chain.law(x, torch.tensor([4]), output), Chain(schedule(), eta=0.5).law(x, torch.tensor([4]), output), 0
    )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_outputs_that_add_up_to_x_are_one_output(eta):
    chain, x, endpoint = Chain(schedule(), eta=eta), draws(4, *SHAPE), draws(4, *SHAPE, seed=1)
    alpha, sigma = chain.at("alpha", levels(), x), chain.at("sigma", levels(), x)
    eps = (x - alpha * endpoint) / sigma
    assert_same(chain.law(x, levels(), (endpoint, eps)), chain.law(x, levels(), endpoint), 8 * ROUNDING)


def test_two_outputs_move_x_by_their_own_increments():
    chain, x = Chain(schedule(), eta=0.0), draws(4, *SHAPE)
    endpoint, eps, of = draws(4, *SHAPE, seed=1), draws(4, *SHAPE, seed=2), schedule()
    t = levels()
    d_alpha, d_sigma = (((v[t - 1] - v[t])[:, None, None]) for v in (of.alpha, of.sigma))
    want = x + d_alpha * endpoint + d_sigma * eps
    assert (chain.law(x, t, (endpoint, eps)).mean - want).abs().max() <= 2 * ROUNDING


@pytest.mark.parametrize("step", ["ddim", "ddpm", "renoise"])
def test_an_offset_moves_the_chain_as_a_whole(step):
    chain, m = Chain(schedule("epsilon"), step=step), draws(4, *SHAPE, seed=3)
    x, output = draws(4, *SHAPE), draws(4, *SHAPE, seed=1)
    law, bare = chain.law(x, levels(), output, m), chain.law(x - m, levels(), output)
    assert torch.equal(law.mean, bare.mean + m)
    assert torch.equal(law.endpoint, bare.endpoint + m)
    assert torch.equal(law.std, bare.std)


def test_samples_are_clipped_where_they_are_and_not_as_seen_from_the_offset():
    chain, m = Chain(schedule(), clip_sample=1.0), torch.full((4, *SHAPE), 0.75, dtype=torch.float64)
    law = chain.law(draws(4, *SHAPE), levels(), 10 * draws(4, *SHAPE, seed=1), m)
    assert law.endpoint.abs().max() == 1
    assert (law.endpoint == -1).any()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "sample"])
def test_an_output_is_told_from_what_it_means(prediction):
    sigma = torch.tensor(0.3, dtype=torch.float64)
    alpha = 1 - sigma if prediction == "flow" else (1 - sigma**2).sqrt()
    x, output = draws(4), draws(4, seed=1)
    assert (from_endpoint(prediction, *to_endpoint(prediction, output, x, alpha, sigma), alpha, sigma) - output).abs(
    ).max() <= ROUNDING  # fmt: skip


@pytest.mark.parametrize(("low", "high"), [(0, 3), (2, 5), (4, 4)])
def test_noising_up_the_chain_keeps_its_marginals(low, high):
    chain, x0 = Chain(schedule()), draws(5)
    of, t = chain.schedule, torch.full((5,), low)
    z = draws(2, 5, seed=1)
    x = chain.renoise(of.alpha[low] * x0 + of.sigma[low] * z[0], t, torch.full((5,), high), z[1])
    kept = of.alpha[high] / of.alpha[low]
    own = (of.sigma[high] ** 2 - (kept * of.sigma[low]) ** 2).clamp_min(0).sqrt()
    assert math.isclose(float((kept * of.sigma[low]) ** 2 + own**2), float(of.sigma[high] ** 2), rel_tol=1e-12)
    assert (x - (of.alpha[high] * x0 + kept * of.sigma[low] * z[0] + own * z[1])).abs().max() <= ROUNDING


def test_tables_keep_their_digits():
    """x̂_0 of a state made in float64 is its x_0 beyond the digits of float32."""
    chain, x0, z = Chain(schedule("epsilon")), draws(4, *SHAPE), draws(4, *SHAPE, seed=1)
    x = chain.at("alpha", levels(), x0) * x0 + chain.at("sigma", levels(), x0) * z
    assert (chain.law(x, levels(), z).endpoint - x0).abs().max() <= 8 * ROUNDING


def test_the_prior_has_the_spread_of_its_schedule():
    kernel = DiffusionKernel(lambda x, t: x, state_shape=(2,), schedule=schedule(prior_std=0.2))
    z = torch.ones(3, 2)
    assert torch.equal(kernel.prior(z), torch.full((3, 2), 0.2))


def test_a_kernel_with_tables_by_entry_obeys_the_laws():
    bar = torch.cat([torch.ones(1, 3, dtype=torch.float64), torch.stack([bars(), bars() ** 2, bars() ** 0.5], 1)])
    grid = Schedule(torch.arange(T), bar.sqrt(), (1 - bar).sqrt(), "sample")
    check_kernel(DiffusionKernel(lambda x, t: 0.5 * x, state_shape=(3,), schedule=grid, eta=torch.full((1, 3), 0.5)))


def test_what_is_carried_is_one_number_a_level_for_all_entries():
    bar = torch.cat([torch.ones(1, T, dtype=torch.float64), bars()[:, None].expand(T, T)])  # as many entries as levels
    carry = torch.linspace(1.0, 0.6, T, dtype=torch.float64)
    chain = Chain(Schedule(torch.arange(T), bar.sqrt(), (1 - bar).sqrt(), "sample", carry=carry))
    plain = Chain(schedule(carry=carry))
    x, output = draws(4, T), draws(4, T, seed=1)
    assert_same(chain.law(x, levels(), output), plain.law(x, levels(), output), 0)


def carried(value: float) -> Schedule:
    return schedule(carry=torch.full((T,), value, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedule(carry=torch.ones(T + 1)), "6 steps need as many values of carry, got 7"),
        (lambda: carried(3.0), "carry keeps more noise"),
        (lambda: carried(float("nan")), "carry keeps more noise"),
        (lambda: Chain(schedule(), eta=torch.ones(3)), r"eta has shape \(3,\), expected \(1, \*state\)"),
        (lambda: Chain(schedule(), eta=torch.full((1, *SHAPE), 1.5)), "outside 0..1"),
        (lambda: Chain(schedule(), eta=torch.full((1, *SHAPE), float("nan"))), "outside 0..1"),
        (lambda: Chain(schedule(), eta=torch.ones(1, *SHAPE), step="ddpm"), "has eta = 1"),
        (lambda: Schedule(torch.arange(2), torch.tensor([1.0, 0.8, 0.9]), torch.tensor([0.0, 0.5, 0.5])), "noise must"),
        (lambda: Schedule(torch.arange(1), torch.ones(2), torch.tensor([0.5, 0.1])), "noise must grow"),
        (lambda: Chain(carried(1.0)).renoise(draws(1), levels(1), levels(1), draws(1)), "its steps need x_0"),
    ],
)
def test_processes_that_are_none_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_end_of_a_chain_carries_what_the_whole_did():
    said = schedule(carry=torch.linspace(1.0, 0.6, T, dtype=torch.float64))
    whole, short = Chain(said, eta=0.7), Chain(said, eta=0.7).on(said.last(3))
    assert torch.equal(short.std, whole.std[:4])
    assert not torch.equal(short.std, Chain(schedule().last(3), eta=0.7).std)


def test_eta_by_entry_is_part_of_the_fingerprint():
    eta = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    network, other = torch.nn.Linear(2, 2), eta.clone()
    other[0, 0, 0] = 0.6
    made = [DiffusionKernel(network, state_shape=SHAPE, schedule=schedule(), eta=e) for e in (eta, eta.clone(), other)]
    first, same, apart = (kernel.fingerprint for kernel in made)
    assert first == same != apart
