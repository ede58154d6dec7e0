"""Steering by an observation: the pull, the evidence, the spread, and log Z = log p(y) on a Gaussian bed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import treesearch as ts
from treesearch.backends.base import Shared, Wrapper, describe
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import DPS, TDS, EluCD, FlowChef, Spread, Steered, spread
from treesearch.backends.guidance.steered import SPREAD
from treesearch.backends.wrappers.cycle import Cycle
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import Reward, summands
from treesearch.rewards.channels import Channels
from treesearch.rewards.observation import Operator, masked, measurement
from treesearch.testing import check_kernel

F64 = torch.float64
SHAPE = (3, 2)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: torch.Tensor, cov: torch.Tensor, **options) -> GaussianTrajectories:
    return GaussianTrajectories(mean.reshape(SHAPE), cov, channels=Channels(1, 1), **{"num_steps": 20} | options)


ROOT, ROWS = 0.5 * draws(6, 6, seed=1), draws(2, 6, seed=2)
KERNEL = gaussian(0.3 * draws(6, seed=3), ROOT @ ROOT.T + 0.05 * torch.eye(6, dtype=F64))
DENSE = Operator(lambda x: x.flatten(1) @ ROWS.to(x).T, lambda v: (v @ ROWS.to(v)).reshape(len(v), *SHAPE), "rows")
SHORT = gaussian(KERNEL.mean, KERNEL.cov, num_steps=5)
MASK = torch.tensor([[True, False], [False, False], [True, False]])


def seen(tolerance: float, kernel: GaussianTrajectories = KERNEL) -> tuple[Reward, float]:
    """The reward of an observation, and its log evidence under the kernel's own law."""
    mean, cov = kernel.law
    y = ROWS @ (mean + torch.linalg.cholesky(cov) @ draws(6, seed=4)) + tolerance * draws(2, seed=5)
    noise = tolerance**2 * torch.eye(2, dtype=F64)
    evidence = torch.distributions.MultivariateNormal(ROWS @ mean, ROWS @ cov @ ROWS.T + noise).log_prob(y)
    return measurement(DENSE, y, tolerance=tolerance), float(evidence)


def errors(kernel, reward: Reward, evidence: float, method: ts.methods.base.Method, seeds: int = 6) -> torch.Tensor:
    """log Ẑ - log p(y) of several seeds."""
    options = {"batch_size": 256, "budget": ts.Budget(nfe=256 * kernel.num_steps)}
    found = [ts.search(kernel, reward, method, seed=s, **options).log_z for s in range(seeds)]
    return torch.tensor(found, dtype=F64) - evidence


EVERY = ts.FeynmanKac(potential="difference", schedule=(*range(19, 1, -1), 0), num_particles=256)


@pytest.mark.parametrize("tolerance", [0.3, 0.1])
def test_log_z_is_the_evidence_where_raw_endpoints_miss_it(tolerance):
    reward, evidence = seen(tolerance)
    assert errors(KERNEL, reward, evidence, EVERY, seeds=4).mean() < -1
    found = errors(Steered(KERNEL, reward), reward, evidence, EVERY)
    assert abs(found.mean()) < 0.1
    ratio = found.exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))


def test_trees_take_the_values_as_they_stand():
    reward, evidence = seen(0.1)
    steered = Steered(KERNEL, reward)
    found = errors(steered, reward, evidence, ts.TreeSampling(), seeds=3)
    assert abs(found.mean()) < 0.3


def test_values_of_the_right_spread_lose_less():
    """There x_0 given x_t is N(x̂_0, r_t² I); r_t of states of unit variance is twice as large as theirs."""
    kernel = gaussian(torch.zeros(6, dtype=F64), 0.25 * torch.eye(6, dtype=F64))
    reward, evidence = seen(0.1, kernel)
    right = errors(Steered(kernel, reward), reward, evidence, EVERY)
    of = kernel.chain.schedule
    wide = tuple((of.sigma / (of.alpha**2 + of.sigma**2).sqrt()).tolist())
    unit = errors(Steered(kernel, reward, spread=wide), reward, evidence, EVERY)
    assert abs(right.mean()) < 0.1
    assert right.square().mean() < unit.square().mean()


@pytest.mark.parametrize("name", ["dense", "mask"])
def test_the_pull_and_the_value_are_those_of_dense_algebra(name):
    operator = DENSE if name == "dense" else masked(MASK)
    y, tolerance, r = draws(2, seed=6), 0.2, 0.7
    kernel = Steered(KERNEL, measurement(operator, y, tolerance=tolerance), spread=(r,) * 21)
    x, t = draws(4, *SHAPE, seed=7), torch.tensor([2, 5, 9, 20])
    base, law = KERNEL.transition(x, t), kernel.transition(x, t)
    a = operator(torch.eye(6, dtype=F64).reshape(6, *SHAPE)).T  # (M, D)
    noisy = r**2 * a @ a.T + tolerance**2 * torch.eye(2, dtype=F64)
    gap = y - base.endpoint.flatten(1) @ a.T
    end = base.endpoint.flatten(1) + gap @ torch.linalg.solve(noisy, r**2 * a)
    of, s = KERNEL.chain.schedule, t - 1
    alpha, sigma, alpha_s, sigma_s = (v[:, None] for v in (of.alpha[t], of.sigma[t], of.alpha[s], of.sigma[s]))
    eps = (x.flatten(1) - alpha * end) / sigma
    mean = alpha_s * end + (sigma_s**2 - law.std.flatten(1) ** 2).clamp_min(0).sqrt() * eps
    assert (law.mean.flatten(1) - mean).abs().max() < 1e-12
    value = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), noisy).log_prob(gap)
    assert (law.rewards - value).abs().max() < 1e-12
    assert torch.equal(law.base_mean, base.mean)
    assert torch.equal(law.endpoint, base.endpoint)


def test_the_published_rule_projects_and_says_that_it_departs():
    reward, _ = seen(0.1)
    kernel = Steered(KERNEL, reward, rule="paper")
    x = draws(4, *SHAPE, seed=7)
    law = kernel.transition(x, torch.tensor([2, 5, 9, 20]))
    assert (DENSE(law.endpoint) - reward.fn.observed).abs().max() < 1e-10
    assert not law.log_weight(law.sample(x)).any()
    assert law.rewards is None
    assert "projection" in kernel.departs
    assert Steered(KERNEL, reward).departs is None

    class Elsewhere(Wrapper):
        departs = "a law of its own"

    assert Steered(Elsewhere(KERNEL), reward).departs == "a law of its own"


def test_the_spread_is_how_far_the_chain_ends_from_its_endpoints():
    """x_s = m_t x_t + s_t z and x̂_0 = g_t x_t: E (x_0 - g_t x_t)² in closed form."""
    kernel, steps = gaussian(torch.zeros(6, dtype=F64), 0.25 * torch.eye(6, dtype=F64)), range(1, 21)
    law = kernel.transition(torch.ones(20, *SHAPE, dtype=F64), torch.tensor(steps))
    m, g = law.mean[:, 0, 0], law.endpoint[:, 0, 0]
    noise = law.std.flatten(1)[:, 0] ** 2
    above = [1.0]  # variance of x_T, ..., x_1
    for t in reversed(steps[1:]):
        above.append(float(m[t - 1] ** 2 * above[-1] + noise[t - 1]))
    slope, rest, want = 1.0, 0.0, [0.0]
    for t, variance in zip(steps, reversed(above), strict=True):
        rest += slope**2 * float(noise[t - 1])
        slope *= float(m[t - 1])
        want.append(math.sqrt((slope - float(g[t - 1])) ** 2 * variance + rest))
    found = torch.tensor(spread(kernel, n=400).state, dtype=F64)
    assert spread(kernel, n=400) == spread(kernel, n=400)
    # 2,400 squares: a standard error of 1.4 % of r; five of them
    assert ((found - torch.tensor(want, dtype=F64)).abs() <= 0.072 * torch.tensor(want, dtype=F64) + 1e-12).all()


def test_a_spread_is_itself_however_it_is_given():
    reward, _ = seen(0.3)
    given = [Steered(KERNEL, reward, spread=s) for s in ([1] * 21, (1.0,) * 21, (1.0,) * 20 + (1.5,))]
    assert given[0].fingerprint == given[1].fingerprint != given[2].fingerprint
    assert hash(given[0]) == hash(given[1])
    assert Steered(KERNEL, reward, rule="paper").fingerprint != Steered(KERNEL, reward).fingerprint


def test_its_steps_obey_the_laws():
    reward, _ = seen(0.3)
    check_kernel(Steered(SHORT, reward, pilot=16), rows=6, proposal=True)
    check_kernel(Steered(SHORT, reward, rule="paper"), rows=6)
    both = reward + measurement(bowl, Y, tolerance=0.5) + TOTAL
    check_kernel(Steered(SHORT, both, pilot=16), rows=6, proposal=True)


# The pilot.


class Counting(Wrapper):
    """A kernel that counts its evaluations."""

    rows = 0

    def transition(self, x, t, cond=None):
        type(self).rows += len(x)
        return self.kernel.transition(x, t, cond)

    @property
    def fingerprint(self):
        return "counting"


def test_a_spread_is_measured_once_and_told():
    class Bed(Counting):
        pass

    reward, _ = seen(0.3)
    kernel = Steered(Bed(SHORT), reward, pilot=24)
    assert (
        kernel.fingerprint
        == Steered(Bed(SHORT), reward, pilot=24).fingerprint
        != Steered(Bed(SHORT), reward).fingerprint
    )
    assert Bed.rows == 0
    assert kernel.measured.nfe == Bed.rows == 24 * 5
    budget = ts.Budget(nfe=5 * 8)
    found = [ts.search(kernel, reward, ts.BestOfN(), budget=budget) for _ in range(2)]
    assert Bed.rows == 24 * 5 + 2 * 5 * 8
    assert found[0].diagnostics["measured"] == {"nfe": 24 * 5}
    assert found[0].cost.nfe == 5 * 8
    given = Steered(Bed(SHORT), reward, spread=spread(SHORT, n=24))
    again = ts.search(given, reward, ts.BestOfN(), budget=budget)
    assert "measured" not in again.diagnostics
    assert torch.equal(torch.as_tensor(again.log_weights), torch.as_tensor(found[0].log_weights))


def test_a_search_hands_its_spread_to_every_evaluation():
    reward, _ = seen(0.3)
    kernel, other = Steered(SHORT, reward), spread(SHORT, n=5, seed=3)
    x, t = draws(2, *SHAPE), torch.tensor([2, 4])
    told = kernel.transition(x, t, {"task": torch.zeros(2), SPREAD: other})
    want = Steered(SHORT, reward, spread=other).transition(x, t)
    assert torch.equal(told.mean, want.mean)
    assert not torch.equal(kernel.transition(x, t).mean, want.mean)


class Prompted(Wrapper):
    """Scaled by a prompt, without which it does not run."""

    def encode(self, prompts):
        return {"scale": torch.tensor([float(p) for p in prompts], dtype=F64)}

    def transition(self, x, t, cond=None):
        assert SPREAD not in cond
        law = self.kernel.transition(x, t)
        return replace(law, mean=law.mean * cond["scale"][:, None, None])


def test_a_spread_takes_prompts_in_turn_where_a_kernel_needs_them():
    kernel, reward = Prompted(SHORT), seen(0.3)[0]
    same, mixed = (spread(kernel, n=20, prompts=p) for p in (["1"], ["1", "0.1"]))
    assert same.state == spread(SHORT, n=20).state != mixed.state
    with pytest.raises(ValueError, match=r"a pilot of Prompted without prompts.*say prompts="):
        ts.search(Steered(kernel, reward), reward, ts.BestOfN(n=4), prompts=["1"])
    steered = Steered(kernel, reward, prompts=["1", "0.1"], pilot=20)
    assert steered.measured.cond[SPREAD].value.state == mixed.state
    assert steered.fingerprint != Steered(kernel, reward, pilot=20).fingerprint
    alone = ts.search(Steered(SHORT, reward, spread=mixed), reward, ts.BestOfN(n=4), seed=1)
    found = ts.search(steered, reward, ts.BestOfN(n=4), prompts=["1"], seed=1)
    assert torch.equal(torch.as_tensor(found.log_weights), torch.as_tensor(alone.log_weights))


# Several observations, and some that are not linear.

TOTAL = Reward(lambda x, _: 0.1 * x.double().flatten(1).sum(1), "total", "state")


def test_linear_measurements_of_a_sum_are_one():
    """As one dense operator whose rows and observations are in units of their tolerances."""
    y, z = draws(2, seed=6), draws(2, seed=8)
    parts = measurement(DENSE, y, tolerance=0.2) + measurement(masked(MASK), z, tolerance=0.5)
    a = torch.cat([ROWS / 0.2, masked(MASK)(torch.eye(6, dtype=F64).reshape(6, *SHAPE)).T / 0.5])
    joint = Operator(lambda x: x.flatten(1) @ a.to(x).T, lambda v: (v @ a.to(v)).reshape(len(v), *SHAPE), "joint")
    one = measurement(joint, torch.cat([y / 0.2, z / 0.5]), tolerance=1.0)
    r = (0.7,) * 21
    found, want = step(Steered(KERNEL, parts, spread=r)), step(Steered(KERNEL, one, spread=r))
    assert (found.mean - want.mean).abs().max() < 1e-12
    assert (found.rewards - want.rewards + 2 * math.log(0.2) + 2 * math.log(0.5)).abs().max() < 1e-12
    projected = step(Steered(KERNEL, parts, rule="paper")).endpoint
    assert (DENSE(projected) - y).abs().max() < 1e-10


def test_parts_that_see_nothing_of_each_other_need_no_matrix(monkeypatch):
    monkeypatch.setattr("treesearch.backends.guidance.stacked.LARGEST", 1)
    other = masked(torch.tensor([[False, True], [False, True], [False, False]]))
    apart = measurement(masked(MASK), torch.zeros(2), tolerance=0.1) + measurement(other, torch.ones(2), tolerance=0.3)
    law = step(Steered(KERNEL, apart, spread=(0.7,) * 21))
    alone = [step(Steered(KERNEL, part, spread=(0.7,) * 21)) for part in summands(apart)]
    assert (law.rewards - sum(one.rewards for one in alone)).abs().max() < 1e-12
    assert (law.mean - law.base_mean - sum(one.mean - one.base_mean for one in alone)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="of the measurements together is no multiple"):
        Steered(KERNEL, apart + measurement(masked(MASK), torch.zeros(2), tolerance=0.1))


def test_a_gradient_is_the_linear_rule_where_the_operator_is_linear():
    """With s_t² = r_t² g, for A A* = g I: here of half of two entries."""
    y, r, g = draws(2, seed=6), 0.7, 0.25
    half = Operator(lambda x: 0.5 * x[:, MASK], lambda v: torch.zeros(len(v), *SHAPE, dtype=v.dtype).masked_scatter(
        MASK, 0.5 * v), "half", g)  # fmt: skip
    want = step(Steered(KERNEL, measurement(half, y, tolerance=0.2), spread=(r,) * 21))
    by_gradient = Spread((r,) * 21, ((r * math.sqrt(g),) * 21,), "given")
    for of in ("state", "sample"):
        found = step(Steered(KERNEL, measurement(half.forward, y, tolerance=0.2, of=of), spread=by_gradient))
        assert (found.mean - want.mean).abs().max() < 1e-12
        assert (found.rewards - want.rewards).abs().max() < 1e-12


def test_what_is_seen_is_as_far_off_as_the_pilot_finds_it():
    reward = measurement(lambda x: 3 * x, torch.zeros(SHAPE), tolerance=0.2)
    found = spread(SHORT, reward, n=20)
    assert found.seen[0] == pytest.approx([3 * r for r in found.state], rel=1e-12)


def test_log_z_of_a_bent_observation_is_that_of_plain_sampling():
    """A target of e^{-x²} kind, for which importance sampling from p is a reference: four standard errors."""
    reward = measurement(bowl, torch.tensor([0.8, 0.1]), tolerance=0.3)
    plain = ts.search(SHORT, reward, ts.BestOfN(n=20_000), batch_size=4096)
    kernel = Steered(SHORT, reward)
    found = ts.search(kernel, reward, ts.BestOfN(n=2_000), batch_size=2000)
    assert abs(found.log_z - plain.log_z) < 4 * math.hypot(found.log_z_se, plain.log_z_se)
    assert found.diagnostics["ess"] / 2_000 > plain.diagnostics["ess"] / 20_000
    assert found.cost.reward_calls == 2_000 * (1 + 5)  # told: the endpoints are shown to it


def test_other_terms_are_scored_and_steer_nothing():
    reward, _ = seen(0.3)
    r, total = (0.7,) * 6, reward + TOTAL
    plain, both = (Steered(SHORT, of, spread=r) for of in (reward, total))
    x, t = draws(4, *SHAPE, seed=7), torch.tensor([2, 5, 3, 4])
    one, other = plain.transition(x, t), both.transition(x, t)
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(other.rewards, one.rewards + TOTAL(one.endpoint))
    assert describe(plain).rewards_per_nfe == (0,) * 6
    assert describe(both).rewards_per_nfe == (0, 1, 1, 1, 1, 1)
    budget = ts.Budget(nfe=5 * 8)
    assert ts.search(both, total, ts.BestOfN(), budget=budget).cost.reward_calls == 8 * (5 + 1)


def test_other_terms_get_the_prompts_of_their_rows():
    def by_prompt(x, prompts):
        return torch.tensor([float(p) for p in prompts]) + 0 * x.double().flatten(1).sum(1)

    reward = seen(0.3)[0]
    both = reward + Reward(by_prompt, "by prompt", "state")
    kernel = Steered(SHORT, both, pilot=8)
    cond = {k: v.value if isinstance(v, Shared) else v for k, v in kernel.encode(["1", "20"]).items()}
    x, t = draws(3, *SHAPE), torch.tensor([2, 4, 1])
    found = kernel.transition(x, t, cond | {"task": torch.tensor([1, 0, 1])}).rewards
    want = Steered(SHORT, reward, pilot=8).transition(x, t).rewards
    assert (found - want - torch.tensor([20.0, 1.0, 20.0])).abs().max() < 1e-12
    assert not Steered(SHORT, reward).encode(["1"])
    ts.search(kernel, both, ts.FeynmanKac(num_particles=4), prompts=["1", "20"])


def test_loops_are_a_cycle_around_the_projection():
    reward, _ = seen(0.1)
    kernel = Cycle(Steered(SHORT, reward, rule="paper"), low=1, high=3, times=2)
    found = ts.search(kernel, reward, ts.BestOfN(n=4))
    assert (DENSE(found.samples) - reward.fn.observed).abs().max() < 1e-10
    assert any("projection of the endpoint" in text for text in found.diagnostics["warnings"])


GUIDES = {"dps": lambda r: DPS(SHORT, r, scale=0.01), "tds": lambda r: TDS(SHORT, r), "flowchef": lambda r: FlowChef(
    SHORT, r, scale=0.001), "elucd": lambda r: EluCD(SHORT, r, gamma=0.0)}  # fmt: skip


@pytest.mark.parametrize("name", GUIDES)
def test_guides_take_a_measurement_as_any_reward(name):
    reward, _ = seen(3.0)  # weak enough for the first rules, which take no account of what is still noise
    plain = ts.search(SHORT, reward, ts.BestOfN(n=64))
    found = ts.search(GUIDES[name](reward), reward, ts.BestOfN(n=64))
    assert found.samples.shape == plain.samples.shape
    assert found.rewards.mean() > plain.rewards.mean()


def bowl(x):
    """Two entries of a state, bent."""
    return x[:, :2, 0] ** 2


def steps(x):
    return x[:, :2, 0].round().detach()


def root(x):
    return (0 * x[:, :2, 0]).sqrt()


def wide(size: int) -> Reward:
    """An observation of many entries whose A A* is no multiple of I."""
    rows = torch.ones(size, 6, dtype=F64)
    return measurement(
        Operator(lambda x: x.flatten(1) @ rows.to(x).T, lambda v: (v @ rows.to(v)).reshape(len(v), *SHAPE), "wide"),
        torch.zeros(size),
        tolerance=1.0,
    )


def step(kernel: Steered):
    return kernel.transition(draws(4, *SHAPE, seed=7), torch.tensor([2, 5, 9, 20]))


def wrong_adjoint() -> Operator:
    return Operator(DENSE.forward, lambda v: -DENSE.adjoint(v), "rows")


CLIPPED = gaussian(torch.zeros(6, dtype=F64), torch.eye(6, dtype=F64))
CLIPPED.chain = Chain(CLIPPED.chain.schedule, clip_sample=1.0)
Y, STILL = torch.zeros(2), gaussian(torch.zeros(6, dtype=F64), torch.eye(6, dtype=F64), eta=0.0)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Steered(LinearGaussian(), measurement(DENSE, Y, tolerance=1)), TypeError, "its noise levels"),
        (lambda: Steered(TDS(KERNEL, linear()), measurement(DENSE, Y, tolerance=1)), TypeError, "is guided already"),
        (lambda: Steered(KERNEL, linear()), TypeError, "than a measurement, or a sum with one"),
        (lambda: Steered(KERNEL, 2 * seen(0.1)[0]), ValueError, "tolerance/√w"),  # no likelihood
        (lambda: Steered(KERNEL, seen(0.1)[0] + 2 * seen(0.3)[0]), ValueError, "tolerance/√w"),
        (lambda: Steered(KERNEL, seen(0.1)[0].fn), TypeError, "than a measurement"),
        (lambda: Steered(KERNEL, seen(0.1)[0].min(seen(0.3)[0])), TypeError, "than a measurement"),  # no sum
        (lambda: Steered(KERNEL, measurement(bowl, Y, tolerance=1), rule="paper"), TypeError, "published projection"),
        (lambda: Steered(KERNEL, measurement(bowl, Y[:1], tolerance=1)), ValueError, r"expected \(2,\)"),
        (lambda: Steered(KERNEL, measurement(bowl, Y, tolerance=1), spread=(0.1,) * 21), ValueError, "tells of 0 non-"),
        (lambda: step(Steered(KERNEL, measurement(steps, Y, tolerance=1), pilot=2)), TypeError, "has no gradient"),
        (lambda: step(Steered(KERNEL, measurement(root, Y, tolerance=1), pilot=2)), ValueError, "is not finite in 4"),
        (lambda: Steered(KERNEL, wide(4097)), ValueError, "y has 4097 entries, more than 4096"),
        (lambda: Steered(KERNEL, seen(0.1)[0], pilot=1), ValueError, "pilot is 1"),
        (lambda: Steered(CLIPPED, measurement(masked(MASK), 9 + Y, tolerance=1)), ValueError, "entries from 9 to 9,"),
        (lambda: Steered(KERNEL, measurement(wrong_adjoint(), Y, tolerance=1)), ValueError, "do not belong together"),
        (lambda: Steered(KERNEL, measurement(DENSE, torch.zeros(3), tolerance=1)), ValueError, r"expected \(2,\)"),
        (lambda: Steered(KERNEL, seen(0.1)[0], rule="soft"), ValueError, "unknown rule 'soft'"),
        (lambda: Steered(KERNEL, seen(0.1)[0], spread=(0.1,) * 20), ValueError, "spread has 20 entries"),
        (lambda: Steered(KERNEL, seen(0.1)[0], spread=(-0.1,) * 21), ValueError, "finite number >= 0"),
        (lambda: Steered(KERNEL, seen(0.1)[0], spread=0.1), ValueError, "spread has 0.1, expected a finite"),
        (lambda: Steered(STILL, seen(0.1)[0]), ValueError, "chain without noise"),
        (lambda: spread(KERNEL, n=1), ValueError, "n is 1"),
    ],
)  # fmt: skip
def test_what_cannot_steer_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_a_posterior_on_one_sample_is_told_what_helps():
    reward = seen(1e-3)[0]
    found = ts.search(KERNEL, reward, ts.BestOfN(n=8)).diagnostics["warnings"]
    assert any("take more particles, a wider tolerance" in each for each in found)
    assert not any("lam = " in each for each in found)


def test_another_reward_than_the_observed_is_an_error():
    """Its values are of the observation: they would be lost without a word."""
    with pytest.raises((TypeError, ValueError), match=r"another reward|of reward|declares values"):
        ts.search(Steered(KERNEL, seen(0.1)[0]), linear(), ts.BestOfN(n=4))
