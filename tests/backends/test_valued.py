"""Declared values: they score what is above t = 0 as they stand, in every method, and never the samples."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import laws
from tests.support.beds import BEDS
from treesearch.backends.base import Gaussian, Guided, Wrapper, describe, shift_mean
from treesearch.backends.exact.gaussian import LinearGaussian, Tilt
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import DAS, DPS, TDS, GuidanceScales, TrustRegion, Valued
from treesearch.backends.guidance.gradient import GradientGuided
from treesearch.backends.guidance.prompts import PROMPTS
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.cli.show import read_result_of
from treesearch.planning.warm_start import WarmStart
from treesearch.rewards.analytic import linear, quadratic
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.testing import bare_chain, check_kernel, check_store, same_task

F64 = torch.float64
BED = BEDS["gaussian"]  # T = 5
LINEAR, QUADRATIC = linear(0.8), quadratic(1.5, 1.5)
EVERY = (5, 4, 3, 2, 1, 0)
FK = ts.FeynmanKac(num_particles=8, ess_threshold=0.8, schedule=EVERY)
TREE = ts.TreeSampling(schedule=EVERY)


def exact(kernel, tilt):
    """The soft value in closed form."""
    of = kernel.tilted(tilt).value
    return lambda x, t, law, cond: of(x, t)


V = exact(BED, Tilt(c=0.8))


def odd(x, t, law, cond):
    """A value that is wrong, of everything that it is given."""
    return x.double().flatten(1).sum(1).sin() - 0.1 * t + 0.01 * law.endpoint.double().flatten(1).sum(1)


# What is exact.


def best_shift(x, t, base, cond):
    """std² λ ∇V_s at the mean, s = t - 1: the step draws from p exp(λ V_s)."""
    with torch.enable_grad():
        at = base.mean.detach().requires_grad_()
        slope = torch.autograd.grad(BED.tilted(Tilt(c=0.8)).value(at, t - 1).sum(), at)[0]
    return base.std**2 * slope


@pytest.mark.parametrize("method", [FK, TREE], ids=["fk", "tree sampling"])
def test_with_the_exact_value_and_its_steps_all_of_the_variance_is_in_x_T(method):
    """Every weight below x_T is 1: log Ẑ = log mean exp(λ V_T(x_T)), which α_T ≈ 0 makes nearly constant."""
    kernel = Guided(Valued(BED, LINEAR, V), shift_mean(best_shift))
    found = ts.search(kernel, LINEAR, method, budget=ts.Budget(nfe=8 * 5))
    x_T = bare_chain(BED, 8)[0]
    at_T = BED.tilted(Tilt(c=0.8)).value(x_T, torch.full((8,), 5))
    assert found.log_z == pytest.approx(float(torch.logsumexp(at_T, 0) - math.log(8)), abs=1e-12)
    off = ts.search(Guided(Valued(BED, LINEAR, odd), shift_mean(best_shift)), LINEAR, method, budget=ts.Budget(nfe=40))
    assert abs(off.log_z - found.log_z) > 1e-3


def test_a_wrong_value_costs_variance_and_no_bias():
    kernel = TDS(BED, LINEAR, lam=0.5, value=odd)
    laws.unbiased(laws.populations(kernel, LINEAR, FK, BED.tilted(Tilt(c=0.8)).log_z, 800))


class Measured:
    """y = A x_0 up to a tolerance, x_0 standard normal in 6-D: the law of x_0 given x_t, and so V_t, is Gaussian."""

    kernel = LinearGaussian(num_steps=20, dim=6, mean=0.0, std=1.0)

    def __init__(self, tolerance):
        draw = torch.Generator().manual_seed(3)
        self.A = torch.randn(2, 6, generator=draw, dtype=F64) / math.sqrt(6)
        self.y = self.A @ torch.randn(6, generator=draw, dtype=F64)
        self.noise = tolerance**2 * torch.eye(2, dtype=F64)
        self.reward = Reward(lambda x, _: self.density(x, torch.zeros(len(x), dtype=F64)), "measurement")

    def density(self, mean, rest):
        """log N(y; A mean, rest A Aᵀ + tolerance²)."""
        cov = rest[:, None, None] * (self.A @ self.A.T) + self.noise
        gap = self.y - mean @ self.A.T
        size = torch.linalg.solve(cov, gap[..., None])[..., 0]
        return -0.5 * ((gap * size).sum(1) + torch.logdet(cov) + 2 * math.log(2 * math.pi))

    def value(self, x, t, law, cond):
        bar = self.kernel.reverse.bar[t]
        return self.density(law.endpoint, 1 - bar)

    @property
    def log_z(self):
        return float(self.density(torch.zeros(1, 6, dtype=F64), torch.ones(1, dtype=F64)))


class Refit(Wrapper):
    """A kernel that hides that what it knows are declared values: methods may fit them."""

    valued = False


@pytest.mark.parametrize(("tolerance", "least"), [(0.1, 2.0), (0.03, 10.0)])
def test_declared_values_are_calibrated_where_rewards_of_endpoints_are_not(tolerance, least):
    """Against log Z in closed form: right within their own standard errors, where raw rewards are nats low."""
    bed, every = Measured(tolerance), tuple(range(20, -1, -1))
    valued, guided = Valued(bed.kernel, bed.reward, bed.value), TDS(bed.kernel, bed.reward, value=bed.value)
    fk, tree = ts.FeynmanKac(num_particles=128, schedule=every), ts.TreeSampling(schedule=every)

    def run(kernel, method, seed=0):
        budget = ts.Budget(nfe=128 * 20)
        return ts.search(kernel, bed.reward, method, budget=budget, seed=seed, batch_size=laws.WIDE)

    assert run(bed.kernel, fk).log_z - bed.log_z < -least
    for kernel, method, largest in ((valued, fk, 0.6), (guided, fk, 0.3), (guided, tree, 0.3)):
        for seed in range(2):
            found = run(kernel, method, seed)
            assert found.log_z_se < largest
            assert abs(found.log_z - bed.log_z) < 4 * found.log_z_se


def test_a_declared_value_is_taken_as_it_is_and_one_that_is_not_is_fitted():
    declared, hidden = Valued(BED, LINEAR, V), Refit(Valued(BED, LINEAR, V))
    assert describe(declared).valued
    assert not describe(hidden).valued
    one, other = (ts.search(k, LINEAR, TREE, budget=ts.Budget(nfe=5 * 640)) for k in (declared, hidden))
    assert one.diagnostics["waves"] == other.diagnostics["waves"] == [40, 120, 480]
    assert set(one.diagnostics["slopes"].values()) == {1.0}
    assert len(set(other.diagnostics["slopes"].values())) == 5
    states = bare_chain(BED, 1)[0]
    assert one.tree.reward[1] == other.tree.reward[1] == float(V(states, torch.tensor([5]), None, None)[0])


# The law is untouched.


@pytest.mark.parametrize("name", BEDS)
def test_a_valued_kernel_is_its_kernel(name):
    kernel = BEDS[name]
    valued = Valued(kernel, LINEAR, odd)
    check_kernel(valued, atol=0)
    x = bare_chain(kernel, 6)[1]
    t = torch.full((6,), kernel.num_steps - 1)
    law, bare = valued.transition(x, t), kernel.transition(x, t)
    for of in ("mean", "std", "probs", "log_mix", "base_mean"):
        got, want = (getattr(getattr(one, "law", one), of, None) for one in (law, bare))
        assert got is want or torch.equal(got, want)
    torch.testing.assert_close(law.rewards, odd(x, t, bare, None), rtol=0, atol=0)
    rows = torch.tensor([4, 0, 0])
    assert torch.equal(law.take(rows).rewards, law.rewards[rows])
    assert not law.log_weight(law.sample(torch.zeros(6, *describe(kernel).noise_shape))).any()


# Every method that scores states reads the values.

METHODS = {
    "fk": FK,
    "tree sampling": TREE,
    "beam": ts.BeamSearch(beam_width=2, branching=3),
    "svdd": ts.SVDD(),
    "rollover": ts.RolloverBudget(quota=3),
    "depth first": ts.DepthFirst(threshold=0.5, backtracks=3, depth=2),
}


class Counted:
    """A reward's function that counts the samples it sees."""

    def __init__(self):
        self.rows = 0

    def __call__(self, samples, prompts):
        self.rows += len(samples)
        return 0.8 * samples.flatten(1)[:, 0].double()


def held_states(result):
    """(rewards, states, levels) of the scored nodes above t = 0."""
    tree, fetch = result.tree, result.tasks[0].fetch
    at = np.flatnonzero((tree.t > 0) & ~np.isnan(tree.reward))
    return torch.from_numpy(tree.reward[at]), fetch._stored(at), torch.from_numpy(tree.t[at].astype(np.int64))


def scored_by(result, kernel, value):
    """See that states above t = 0 were scored by a value."""
    rewards, x, t = held_states(result)
    assert len(rewards) >= 4
    torch.testing.assert_close(rewards, value(x, t, kernel.transition(x, t), None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("way", ["valued", "tds"])
def test_methods_score_states_by_the_value_and_samples_by_the_reward(name, way):
    counter = Counted()
    reward = Reward(counter, "counted")
    kernel = Valued(BED, reward, odd) if way == "valued" else TDS(BED, reward, value=odd)
    result = ts.search(kernel, reward, METHODS[name], budget=ts.Budget(nfe=300), batch_size=16)
    scored_by(result, BED, odd)
    assert counter.rows == result.cost.reward_calls
    np.testing.assert_array_equal(result.rewards, 0.8 * result.samples[:, 0])


TRACKS = GaussianTrajectories(
    torch.zeros(3, 2, dtype=F64), torch.eye(6, dtype=F64), channels=Channels(1, 1), num_steps=6
)
TRACKS.renoise = lambda x, t_from, t_to, noise: 0.5 * x + noise
MASK = torch.tensor([[True, False], [False, False], [True, False]])
TOTAL = Reward(lambda x, _: 0.3 * x.double().flatten(1).sum(1), "total")


def of_state(x, t, law, cond):
    """A value of x_t alone, so that wrappers which move endpoints move no values."""
    return 0.2 * x.double().flatten(1).sum(1).sin() - 0.1 * t


AROUND = {
    "guided": lambda k: Guided(k, shift_mean(lambda x, t, base, cond: 0.1 * base.std), "drift"),
    "clamp": lambda k: Clamp(k, MASK, torch.zeros(3, 2, dtype=F64)),
    "scales": lambda k: GuidanceScales(k, (0.0, 1.0), (4, 2)),
    "warm start": lambda k: WarmStart(k, torch.zeros(1, 1, 3, 2, dtype=F64), 4),
}


@pytest.mark.parametrize("way", ["valued", "tds"])
@pytest.mark.parametrize("name", AROUND)
def test_wrappers_hand_values_on(name, way):
    made = Valued(TRACKS, TOTAL, of_state) if way == "valued" else TDS(TRACKS, TOTAL, value=of_state, lam=0.1)
    kernel = AROUND[name](made)
    assert describe(kernel).valued
    assert kernel.scores is TOTAL
    result = ts.search(kernel, TOTAL, ts.FeynmanKac(num_particles=6, schedule=(4, 2, 0)), batch_size=5)
    rewards, x, t = held_states(result)
    x = x[:, :-1] if name == "scales" else x
    torch.testing.assert_close(rewards, of_state(x, t, None, None), rtol=0, atol=1e-12)


def test_a_value_may_be_declared_of_what_wrappers_make():
    around = Clamp(TRACKS, MASK, torch.zeros(3, 2, dtype=F64))
    kernel = Valued(around, TOTAL, odd)
    scored_by(ts.search(kernel, TOTAL, ts.FeynmanKac(num_particles=6, schedule=(4, 2, 0))), around, odd)


def test_a_guide_by_another_reward_keeps_its_prompts_and_its_calls():
    """Guided by one reward, searched for another, scored by a value of that."""
    counter = Counted()

    def by_prompt(x, prompts):
        return counter(x, prompts) * torch.tensor([float(p) for p in prompts])

    guide = Reward(by_prompt, "guide")
    kernel = Valued(TDS(BED, guide), QUADRATIC, odd)
    result = ts.search(kernel, QUADRATIC, FK, prompts=["1", "2"], budget=ts.Budget(nfe=200))
    assert result.cost.reward_calls == counter.rows + sum(len(task.leaves) for task in result.tasks)
    assert kernel.proposes_for is BED
    steeper = Reward(lambda x, prompts: 2 * counter(x, prompts), "guide")
    alone = ts.search(
        Valued(TDS(BED, steeper), QUADRATIC, odd), QUADRATIC, FK, prompts=["1", "2"], budget=ts.Budget(nfe=200)
    )
    same_task(result.tasks[1], alone.tasks[1], atol=1e-12)


# Guides lean along the value.


def normal(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def moved(law):
    return law.mean - law.base_mean


X, LEVELS = normal(5, 3), torch.tensor([7, 2, 3, 5, 4])
WIDE_BED = BEDS["gaussian-3d"]


def bent(x, t, law, cond):
    return (x * law.endpoint).sum(1).tanh() + 0.1 * t * x[:, 0].cos()


def slope(function, x, h=1e-6):
    """Central differences of a function (n, D) -> (n,)."""
    steps = h * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.stack([(function(x + e) - function(x - e)) / (2 * h) for e in steps], 1)


def test_a_guide_moves_along_the_gradient_of_the_value():
    law = WIDE_BED.transition(X, LEVELS)
    full = slope(lambda x: bent(x, LEVELS, WIDE_BED.transition(x, LEVELS), None), X)
    step, close = law.std**2 * full, {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(
        moved(TDS(WIDE_BED, LINEAR, lam=0.7, value=bent).transition(X, LEVELS)), 0.7 * step, **close
    )
    torch.testing.assert_close(moved(DPS(WIDE_BED, LINEAR, value=bent).transition(X, LEVELS)), full, **close)
    das = DAS(WIDE_BED, LINEAR, gamma=0.2, value=bent)
    torch.testing.assert_close(moved(das.transition(X, LEVELS)), das.factors[LEVELS - 1][:, None] * step, **close)
    trust = TrustRegion(WIDE_BED, LINEAR, kl=1e9, value=bent)
    torch.testing.assert_close(moved(trust.transition(X, LEVELS)), (1 - (LEVELS - 1) / 7)[:, None] * step, **close)
    straight = slope(lambda x: bent(x, LEVELS, replace(law, endpoint=law.endpoint + x - X), None), X)
    near = TDS(WIDE_BED, LINEAR, value=bent, through_network=False)
    torch.testing.assert_close(moved(near.transition(X, LEVELS)), law.std**2 * straight, **close)
    for kernel in (das, trust, near):
        torch.testing.assert_close(kernel.transition(X, LEVELS).rewards, bent(X, LEVELS, law, None), rtol=0, atol=0)


@pytest.mark.parametrize("through", [True, False])
def test_the_reward_of_the_endpoint_as_a_value_is_the_guide_without_one(through):
    def same(x, t, law, cond):
        return QUADRATIC.attached(law.endpoint)

    for kind in (TDS, DAS, TrustRegion):
        plain, valued = (kind(WIDE_BED, QUADRATIC, through_network=through, value=v) for v in (None, same))
        one, other = (k.transition(X, LEVELS) for k in (plain, valued))
        for name in ("mean", "std", "endpoint", "base_mean", "rewards"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        found = [ts.search(k, QUADRATIC, ts.FeynmanKac(num_particles=8)) for k in (plain, valued)]
        same_task(found[0].tasks[0], found[1].tasks[0])


def test_levels_outside_the_window_have_values_and_stay():
    kernel = TDS(BED, LINEAR, value=odd, window=(2, 3))
    x, t = normal(5, 1), torch.tensor([5, 4, 3, 2, 1])
    law, base = kernel.transition(x, t), BED.transition(x, t)
    assert (law.mean != base.mean)[:, 0].tolist() == [False, False, True, True, False]
    torch.testing.assert_close(law.rewards, odd(x, t, base, None), rtol=0, atol=0)
    assert not any(v.requires_grad for v in vars(law).values())
    torch.testing.assert_close(kernel.transition(x[:2], t[:2]).rewards, law.rewards[:2], rtol=0, atol=0)
    check_kernel(TDS(WIDE_BED, LINEAR, value=of_state, window=(2, 6), max_shift=0.2), atol=0, proposal=True)


def test_a_shift_sees_the_rows_that_are_guided():
    seen = []

    class Spy(GradientGuided):
        def shift(self, step):
            seen.append(step)
            return 0.25 * step.x

    x, t = normal(5, 1), torch.tensor([5, 4, 3, 2, 1])
    for window, rows in (((2, 3), slice(2, 4)), (None, slice(None))):
        law = Spy(BED, LINEAR, window=window).transition(x, t)
        base, step = BED.transition(x, t), seen[-1]
        for got, want in zip(
            (step.x, step.t, step.law.endpoint, step.law.std, step.rewards),
            (x, t, base.endpoint, base.std, LINEAR(base.endpoint)),
            strict=True,
        ):
            assert torch.equal(got, want[rows])
        assert step.gradient.shape == step.x.shape
        torch.testing.assert_close(moved(law)[rows], 0.25 * x[rows])


# What it costs, and prompts.


def test_costs_are_those_that_the_value_tells_of():
    def dear(x, t, law, cond):
        return reward(law.endpoint)

    counter = Counted()
    reward, dear.rewards_per_nfe = Reward(counter, "counted"), 1
    for kernel, calls, backward in (
        (Valued(BED, LINEAR, odd), (0,) * 6, (0,) * 6),
        (Valued(BED, reward, dear), (0, 1, 1, 1, 1, 1), (0,) * 6),
        (Valued(TDS(BED, LINEAR, window=(1, 2)), reward, dear), (0, 2, 2, 1, 1, 1), (0, 1, 1, 0, 0, 0)),
        (TDS(BED, LINEAR, value=odd, window=(1, 2)), (0,) * 6, (0, 1, 1, 0, 0, 0)),
        (TDS(BED, LINEAR, value=of_state, through_network=False), (0,) * 6, (0,) * 6),
    ):
        spec = describe(kernel)
        assert (spec.rewards_per_nfe, spec.backward_per_nfe) == (calls, backward)
    cost = ts.search(Valued(BED, reward, dear), reward, FK).cost
    assert cost.reward_calls == counter.rows == 8 * 6
    limited = ts.search(Valued(BED, LINEAR, odd), LINEAR, FK, budget=ts.Budget(reward_calls=96))
    assert limited.cost.reward_calls == 16  # a level's values call no reward


@pytest.mark.parametrize("way", ["valued", "tds"])
def test_a_value_gets_the_prompts_of_its_rows(way):
    signs, prompts, budget = {"up": 0.8, "down": -0.8}, ["up", "down"], ts.Budget(nfe=400)

    def value(x, t, law, cond):
        slopes = torch.tensor([signs[p] for p in cond[PROMPTS]], dtype=F64)
        return slopes * law.endpoint[:, 0]

    def make(value):
        return Valued(BED, LINEAR, value) if way == "valued" else TDS(BED, LINEAR, value=value)

    together = ts.search(make(value), LINEAR, FK, prompts=prompts, budget=budget, batch_size=7)
    for i, prompt in enumerate(prompts):
        sign = signs[prompt]
        alone = ts.search(
            make(lambda x, t, law, cond, c=sign: c * law.endpoint[:, 0]), LINEAR, FK, prompts=prompts, budget=budget
        )
        same_task(together.tasks[i], alone.tasks[i], atol=1e-12)


# Values of one reward are no values of another.


@pytest.mark.parametrize(
    "kernel",
    [Valued(BED, LINEAR, V), TDS(BED, LINEAR, value=V), Guided(Valued(BED, linear(0.8), V), best_shift)],
    ids=["valued", "tds", "guided"],
)
def test_another_reward_is_refused_before_anything_is_begun(kernel, tmp_path):
    with pytest.raises(
        ts.errors.UsageError, match=r"values of reward 'linear.0.8.', .* for 'linear.0.9.'.*--reward kernel"
    ):
        ts.search(kernel, linear(0.9), FK, store=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ts.errors.UsageError, match="values of reward"):
        ts.search(kernel, Reward(LINEAR.fn, "linear(0.8)"), FK)  # of its name
    equal = ts.search(Valued(BED, LINEAR, V), linear(0.8), FK)  # by its expression
    scored_by(equal, BED, V)


def test_a_guide_without_a_value_may_meet_another_reward():
    found = ts.search(TDS(BED, LINEAR), QUADRATIC, FK)
    rewards, x, t = held_states(found)
    torch.testing.assert_close(rewards, QUADRATIC(BED.transition(x, t).endpoint), rtol=0, atol=1e-12)


class Forgetful(Wrapper):
    """A wrapper of somebody's who makes laws anew."""

    def transition(self, x, t, cond=None):
        law = self.kernel.transition(x, t, cond)
        return Gaussian(law.mean, law.std, law.endpoint)


def test_a_value_that_got_lost_is_no_reward():
    with pytest.raises(ts.errors.KernelError, match=r"declares values .`valued`., and 8 of 8 states came without one"):
        ts.search(Forgetful(Valued(BED, LINEAR, V)), LINEAR, FK)


# Runs.


@pytest.mark.parametrize("method", [FK, TREE], ids=["fk", "tree sampling"])
def test_a_cut_run_goes_on_to_the_same_tree(method, tmp_path):
    check_store(method, Valued(BED, LINEAR, odd), LINEAR, tmp_path, cuts=3)


def test_a_run_is_read_as_it_was_and_goes_on_with_its_values_alone(tmp_path):
    kernel, budget = Valued(BED, LINEAR, odd), ts.Budget(nfe=5 * 640)
    found = ts.search(kernel, LINEAR, TREE, budget=budget, store=tmp_path / "run")
    config, read = read_result_of(tmp_path / "run")
    assert config["valued"] is True
    assert read.log_z == found.log_z
    assert read.diagnostics["slopes"] == found.diagnostics["slopes"]
    hidden = Refit(kernel)
    with pytest.raises(ts.errors.StoreError, match="valued differs"):
        ts.resume(tmp_path / "run", hidden, LINEAR, budget=ts.Budget(nfe=5_000))


def of_its_own(scale):
    return lambda x, t, law, cond: scale * x[:, 0]


def test_values_are_part_of_the_fingerprint():
    made = [Valued(BED, LINEAR, of_its_own(c)).fingerprint for c in (1.0, 1.0, 2.0)]
    guided = [TDS(BED, LINEAR, value=of_its_own(c)).fingerprint for c in (1.0, 1.0, 2.0)]
    for one, again, other in (made, guided):
        assert one == again != other
    assert "value" not in TDS(BED, LINEAR).fingerprint
    unreadable = (i for i in range(3))
    for kernel in (Valued, lambda k, r, v: TDS(k, r, value=v)):
        assert kernel(BED, LINEAR, lambda x, t, law, cond: unreadable).fingerprint is None


# Bad input.


def returns(values):
    return lambda x, t, law, cond: values(x)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (returns(lambda x: x[:, 0] * math.nan), r"the value is NaN or \+inf in 5 of 5 rows, at t = \[1, 2, 3, 4, 5\]"),
        (returns(lambda x: torch.full((5,), math.inf)), r"NaN or \+inf in 5 of 5 rows"),
        (returns(lambda x: x), r"the value returned torch.float64 of shape \(5, 1\), expected real numbers \(5,\)"),
        (returns(lambda x: x[:, 0] + 0j), "the value returned torch.complex128"),
        (returns(lambda x: [0.0] * 5), "the value returned list, expected a tensor of 5 numbers"),
    ],
)
def test_what_a_value_returns_is_checked(value, message):
    for kernel in (Valued(BED, LINEAR, value), TDS(BED, LINEAR, value=value)):
        with pytest.raises((TypeError, ValueError), match=message):
            kernel.transition(normal(5, 1), torch.arange(5) + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Valued(BED, LINEAR, LINEAR), r"value is the reward 'linear.0.8.', expected a function value"),
        (lambda: Valued(BED, LINEAR, 3.0), r"value is 3.0, expected a function value\(x_t, t, law, cond\)"),
        (lambda: TDS(BED, LINEAR, value=Counted), "expected a function value"),
        (lambda: Valued(BED, "linear", V), "expected a reward or a function of samples, got str"),
        (lambda: Valued(Valued(BED, LINEAR, V), LINEAR, V), "Valued declares values already: one value a kernel"),
        (lambda: TDS(Valued(BED, LINEAR, V), LINEAR), "Valued is guided by 'linear.0.8.' already"),
        (lambda: describe(Bare()), "Bare is valued and has no `scores`"),
        (
            lambda: TDS(BED, LINEAR, value=lambda x, *_: x[:, 0].detach()).transition(
                normal(5, 1), torch.arange(5) + 1
            ),
            "the value keeps no graph: score by it without a guide",
        ),
    ],
)
def test_what_cannot_be_declared_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


class Bare(Wrapper):
    valued = True

    def __init__(self):
        object.__setattr__(self, "kernel", BED)
