"""Residual diffusion: DDIM under another name of its coefficients, and its own freedom to order residual and noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.residual import Residual
from treesearch.backends.chains.schedules import Schedule

F64 = torch.float64
ROUNDING = 16 * 2.0**-52
T = 6
BOTH, ALONE, NOISE = (Residual(predicts=p) for p in ("residual+noise", "residual", "noise"))


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def law(process, schedule, eta, x, t, residual, eps, i_in):
    """A step whose network returns this residual and this noise."""
    output = {"residual+noise": torch.cat([residual, eps], 1), "residual": residual, "noise": eps}[process.predicts]
    alpha, sigma = schedule.alpha[t, None], schedule.sigma[t, None]
    read = process.read(output, x - i_in, i_in, alpha, sigma)
    return Chain(schedule, eta=eta).law(x, t, read, offset=i_in)


def test_the_published_schedules():
    a_bar, b_bar = Residual(sum_scale=0.25, train_steps=10).bars()
    a, b2 = a_bar.diff(), (b_bar**2).diff()
    i = torch.arange(1, 11, dtype=F64)
    assert torch.allclose(a, 2 * (11 - i) / 110, rtol=1e-12)
    assert torch.allclose(b2, 0.25 * 2 * i / 110, rtol=1e-12)
    assert (a_bar[0], b_bar[0]) == (0, 0)
    grid = Residual(sum_scale=0.25, train_steps=10).schedule(3)
    assert grid.timestep.tolist() == [2, 6, 9]
    assert (grid.alpha[-1], grid.prior_std) == (0, 0.5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_is_ddim_under_the_transformation_of_its_coefficients(eta):
    """ā = 1 - √ᾱ, b̄ = √(1 - ᾱ), I_in = 0, I_res = -x̂_0; DDIM's η √ᾱ_s is the noise that η adds here."""
    bar = torch.cat([torch.ones(1, dtype=F64), torch.linspace(0.95, 0.03, T, dtype=F64)])
    known = Schedule(torch.arange(T), bar.sqrt(), (1 - bar).sqrt(), "epsilon")
    ours = BOTH.on(torch.arange(T), 1 - bar.sqrt(), (1 - bar).sqrt())
    x, eps, t = draws(T, 3), draws(T, 3, seed=1), torch.arange(1, T + 1)
    own = torch.cat([torch.zeros(1, dtype=F64), eta * bar[:-1].sqrt()])[:, None].expand(T + 1, 3)
    want = Chain(known, eta=own).law(x, t, eps)
    got = law(BOTH, ours, eta, x, t, -want.endpoint, eps, torch.zeros_like(x))
    room = ROUNDING * float(want.endpoint.abs().max())
    for name in ("mean", "std", "endpoint"):
        assert (getattr(got, name) - getattr(want, name)).abs().max() <= room, name


def orders():
    """Grids of ā and b̄: the published one, one step, uneven ones, residual before noise, noise before it."""
    published = BOTH.schedule(T)
    rise, none = torch.linspace(0, 1, 4, dtype=F64), torch.zeros(3, dtype=F64)
    uneven = torch.tensor([0, 0.01, 0.5, 0.6, 0.61, 1.0], dtype=F64)
    yield 1 - published.alpha, published.sigma
    yield torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    yield uneven, uneven.flip(0).mul(-1).add(1)
    yield torch.cat([none, rise]), torch.cat([rise[:3], torch.ones(4)])  # residual first
    late = torch.cat([0.9 * rise, torch.tensor([0.93, 0.96, 1.0], dtype=F64)])
    yield late, torch.cat([0.1 * rise, torch.linspace(0.4, 1, 3, dtype=F64)])  # noise first, as far as can be


@pytest.mark.parametrize("number", range(5))
def test_a_perfect_network_gives_the_image_by_any_path(number):
    a_bar, b_bar = list(orders())[number]
    steps = len(a_bar) - 1
    schedule = BOTH.on(torch.arange(steps), a_bar, b_bar)
    clean, i_in, eps = draws(4, 3), draws(4, 3, seed=1), draws(4, 3, seed=2)
    x = i_in + schedule.prior_std * eps
    for level in range(steps, 0, -1):
        x = law(BOTH, schedule, 0.0, x, torch.full((4,), level), i_in - clean, eps, i_in).mean
    assert (x - clean).abs().max() <= ROUNDING * steps


def test_a_step_with_noise_is_the_posterior():
    """q(I_s | I_t, I_0, I_res): mean and variance as published."""
    schedule = ALONE.schedule(T)
    clean, i_in, t = draws(T - 1, 3), draws(T - 1, 3, seed=1), torch.arange(2, T + 1)
    x, residual = draws(T - 1, 3, seed=2), i_in - clean
    got = law(ALONE, schedule, 1.0, x, t, residual, residual, i_in)
    a_t, a_s = (1 - schedule.alpha[k, None] for k in (t, t - 1))
    b_t, b_s = (schedule.sigma[k, None] ** 2 for k in (t, t - 1))
    a, b = a_t - a_s, b_t - b_s
    mean = b_s / b_t * x + (b * a_s - b_s * a) / b_t * residual + b / b_t * clean
    assert (got.mean - mean).abs().max() <= 4 * ROUNDING
    assert (got.std**2 - b * b_s / b_t).abs().max() <= ROUNDING


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_parametrisations_agree_where_their_outputs_do(eta):
    """Both outputs add up to I_t here, so that either alone tells the other; ā ends at .9, where noise still tells."""
    a_bar, b_bar = BOTH.bars()
    at = torch.tensor([0, 200, 500, 683])
    clean, i_in, eps, t = draws(3, 3), draws(3, 3, seed=1), draws(3, 3, seed=2), torch.arange(1, 4)
    a, b = a_bar[at][t, None], b_bar[at][t, None]
    x = clean + a * (i_in - clean) + b * eps
    laws = [law(p, p.on(at[1:], a_bar[at], b_bar[at]), eta, x, t, i_in - clean, eps, i_in)
            for p in (BOTH, ALONE, NOISE)]  # fmt: skip
    for other in laws[1:]:
        for name in ("mean", "std", "endpoint"):
            assert (getattr(other, name) - getattr(laws[0], name)).abs().max() <= 10 * 4 * ROUNDING, name


def test_two_outputs_move_the_state_each_by_its_own_schedule():
    schedule, t = BOTH.schedule(T), torch.tensor([3, T])
    x, i_in, residual, eps = (draws(2, 3, seed=s) for s in range(4))
    got = law(BOTH, schedule, 0.0, x, t, residual, eps, i_in)
    d_a, d_b = (v[t, None] - v[t - 1, None] for v in (1 - schedule.alpha, schedule.sigma))
    assert (got.mean - (x - d_a * residual - d_b * eps)).abs().max() <= 4 * ROUNDING
    assert (got.endpoint - (i_in - residual)).abs().max() <= 4 * ROUNDING


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Residual(predicts="v"), r"unknown prediction 'v': choose residual\+noise, residual, noise"),
        (lambda: Residual(sum_scale=-1.0), "sum_scale is -1.0"),
        (lambda: Residual(train_steps=1), "train_steps is 1"),
        (lambda: BOTH.schedule(1001), "num_steps is 1001, expected 1..1000"),
        (lambda: NOISE.schedule(5), "noise alone does not give"),
        (lambda: NOISE.on(torch.arange(1), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])), "ε does not give x_0"),
        (lambda: BOTH.on(torch.arange(2), torch.tensor([0, 0.5, 0.4]), torch.tensor([0, 0.5, 0.4])), "noise must grow"),
    ],
)
def test_a_process_that_is_none_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
