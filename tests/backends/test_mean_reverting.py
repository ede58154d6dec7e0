"""Mean reversion: its steps are those of the paper, in any parametrisation, and of the order that they claim."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.schedules import Schedule

F64 = torch.float64
ROUNDING = 16 * 2.0**-52  # a dozen float64 operations on numbers about 1
PREDICTS = ("noise", "data", "velocity", "residual")
STEPS = 8


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Case:
    """Rows at every level of a chain, their forward paths and what a perfect network returns."""

    def __init__(self, predicts="residual", steps=STEPS, **settings):
        self.process = MeanReverting(predicts=predicts, **settings)
        self.schedule = self.process.schedule(steps)
        self.t = torch.arange(1, steps + 1)
        self.mu, self.clean, self.eps = draws(steps, 3), draws(steps, 3, seed=1), draws(steps, 3, seed=2)
        self.alpha, self.sigma = self.level(self.t)
        self.x = self.path(self.t)

    def level(self, t):
        return self.schedule.alpha[t, None], self.schedule.sigma[t, None]

    def path(self, t):
        alpha, sigma = self.level(t)
        return self.mu + alpha * (self.clean - self.mu) + sigma * self.eps

    def law(self, eta, x=None, output=None):
        x = self.x if x is None else x
        if output is None:
            output = self.process.target(self.clean, self.mu, self.eps, self.alpha, self.sigma)
        read = self.process.read(output, x - self.mu, self.mu, self.alpha, self.sigma)
        return Chain(self.schedule, eta=eta).law(x, self.t, read, offset=self.mu)


def test_noise_grows_along_the_published_path():
    process = MeanReverting()
    told, alpha, sigma = process.at(torch.linspace(0, 1, 101, dtype=F64))
    assert told.tolist() == pytest.approx(range(101))
    assert alpha[0] == 1
    assert math.isclose(float(alpha[-1]), 0.005, rel_tol=1e-12)
    theta = -alpha.log().diff()
    assert (theta.diff() > 0).all()  # the cosine schedule reverts faster and faster
    assert (sigma - 50 / 255 * (1 - alpha**2).sqrt()).abs().max() <= ROUNDING
    assert process.schedule(20).prior_std == 50 / 255


def test_chains_begin_where_some_signal_is_left():
    process = MeanReverting(spread=1.0, lambda_min=-4.0)
    first, last = process.schedule(7), process.schedule(7).timestep[-1]
    assert math.isclose(math.log(first.alpha[-1] / first.sigma[-1]), -4.0, rel_tol=1e-9)
    assert 0 < last < 100
    assert MeanReverting().schedule(7).timestep[-1] == 100


def test_times_are_told_by_their_noise():
    process, times = MeanReverting(), torch.tensor([0.4, 3.0, 50.25, 99.0], dtype=F64)
    _, alpha, sigma = process.at(times / 100)
    assert (process.time_of((alpha / sigma).log()) - times).abs().max() <= 1e-9
    assert process.time_of(torch.tensor([math.inf, -math.inf])).tolist() == [0, 100]


@pytest.mark.parametrize("predicts", PREDICTS)
def test_a_perfect_network_leads_back_along_the_forward_path(predicts):
    """The flow keeps ε and the endpoint is x_0, beside the 1/α that noise is divided by."""
    case = Case(predicts)
    law = case.law(eta=0.0)
    gain = 1 / case.alpha if predicts == "noise" else 1
    assert ((law.endpoint - case.clean).abs() <= 4 * ROUNDING * gain).all()
    assert ((law.mean - case.path(case.t - 1)).abs() <= 4 * ROUNDING * gain).all()
    assert not law.std.any()


def test_steps_with_noise_keep_mean_and_variance():
    """x_s = mean(x_t) + s̃ z with x_t ~ N(μ + α_t r, σ_t²) is N(μ + α_s r, σ_s²)."""
    case = Case("data")
    alpha, sigma = case.level(case.t - 1)
    middle = case.mu + case.alpha * (case.clean - case.mu)
    law, moved = case.law(1.0, middle), case.law(1.0, middle + case.sigma)
    assert (law.mean - (case.mu + alpha * (case.clean - case.mu))).abs().max() <= 4 * ROUNDING
    assert ((moved.mean - law.mean) ** 2 + law.std**2 - sigma**2).abs().max() <= 4 * ROUNDING
    assert (law.std[1:] > 0).all()


@pytest.mark.parametrize(("ours", "theirs"), [("noise", "epsilon"), ("velocity", "v"), ("data", "sample")])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_a_mean_it_is_ddim(ours, theirs, eta):
    case = Case(ours, spread=1.0)
    case.mu = torch.zeros_like(case.mu)
    case.x, output = case.path(case.t), draws(STEPS, 3, seed=5)
    known = Schedule(case.schedule.timestep, case.schedule.alpha, (1 - case.schedule.alpha**2).sqrt(), theirs)
    want, got = Chain(known, eta=eta).law(case.x, case.t, output), case.law(eta, output=output)
    gain = 1 / case.alpha.min() if ours == "noise" else 1.0
    for name in ("mean", "std", "endpoint"):
        assert (getattr(got, name) - getattr(want, name)).abs().max() <= 4 * ROUNDING * gain, name


@pytest.mark.parametrize("predicts", PREDICTS)
def test_steps_are_the_published_ones_in_x(predicts):
    """ODE-1 of data and of noise, SDE-1 of data, with the network's own output turned into D and ε."""
    case = Case(predicts)
    output = draws(STEPS, 3, seed=5)
    flow, drawn = case.law(0.0, output=output), case.law(1.0, output=output)
    keep = slice(1, None)  # h is infinite at the last step
    x, mu, a_t, s_t = (v[keep] for v in (case.x, case.mu, case.alpha, case.sigma))
    a_n, s_n = (v[keep] for v in case.level(case.t - 1))
    h = (a_n / s_n).log() - (a_t / s_t).log()
    d = flow.endpoint[keep]
    eps = (x - mu - a_t * (d - mu)) / s_t
    room = 8 * ROUNDING * (d.abs() + eps.abs() / a_t).max()
    shift = 1 - s_n / s_t + s_n / s_t * a_t - a_n
    of_data = s_n / s_t * x - a_n * torch.expm1(-h) * d + mu * shift
    of_noise = a_n / a_t * x - s_n * torch.expm1(h) * eps + mu * (1 - a_n / a_t)
    assert (flow.mean[keep] - of_data).abs().max() <= room
    assert (flow.mean[keep] - of_noise).abs().max() <= room
    fresh = -torch.expm1(-2 * h)
    shift = 1 - a_n / a_t * (-2 * h).exp() - a_n * fresh
    sde = s_n / s_t * (-h).exp() * x + a_n * fresh * d + mu * shift
    assert (drawn.mean[keep] - sde).abs().max() <= room
    assert (drawn.std[keep] - s_n * fresh.sqrt()).abs().max() <= room


def test_parametrisations_agree():
    laws = [Case(predicts).law(1.0) for predicts in PREDICTS]
    for law in laws[1:]:
        assert (law.mean - laws[0].mean).abs().max() <= 4 * ROUNDING / 0.005


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predicts": "epsilon"}, "unknown prediction 'epsilon': choose noise, data, velocity, residual"),
        ({"spread": 0.0}, "spread is 0.0"),
        ({"floor": 1.0}, "floor is 1.0"),
        ({"floor": float("nan")}, "floor is nan"),
        ({"train_steps": 1}, "train_steps is 1"),
        ({"lambda_min": "x"}, "lambda_min is 'x'"),
    ],
)
def test_a_process_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MeanReverting(**settings)
