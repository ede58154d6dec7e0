"""Gradient guides: exact weights whatever the shift, the shift of their papers, rewards handed over, costs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import laws
from tests.support.beds import BEDS, half_a_step
from tests.support.laws import populations, unbiased
from treesearch.backends.base import Gaussian, Guided, describe, expand, shift_mean
from treesearch.backends.exact.gaussian import LinearGaussian, Tilt
from treesearch.backends.guidance import DPS, TDS, TrustRegion
from treesearch.backends.guidance.elucd import EluCD
from treesearch.backends.guidance.flowchef import FlowChef
from treesearch.rewards.analytic import constant, linear, quadratic
from treesearch.rewards.base import Reward
from treesearch.rewards.compose import cached
from treesearch.testing import bare_chain, check_edges, check_kernel, check_store, same_result, same_task

BED, WIDE = BEDS["gaussian"], laws.WIDE
LINEAR, QUADRATIC = linear(0.8), quadratic(1.5, 1.5)
RESIDUAL = quadratic(2.0, 0.5)  # minus a squared residual
TILTS = {LINEAR: Tilt(c=0.8), QUADRATIC: Tilt(k=1.5, y=1.5), RESIDUAL: Tilt(k=2.0, y=0.5)}
FK, BON = ts.FeynmanKac(num_particles=8, ess_threshold=0.8), ts.BestOfN()
DEEP = ts.DiffusionTreeSampling(wave=8, widening_c=1.0, widening_alpha=0.4)


def log_z(reward, kernel=BED):
    return kernel.tilted(TILTS[reward]).log_z


def estimates(kernel, reward, method, n, seed=0):
    """Independent Ẑ/Z: of populations, or of single weighted samples."""
    if isinstance(method, ts.FeynmanKac):
        return populations(kernel, reward, method, log_z(reward), n, seed)
    result = ts.search(kernel, reward, ts.BestOfN(n=n), seed=seed, batch_size=WIDE)
    return np.exp(result.log_weights.numpy() - log_z(reward))


class Counted:
    """A reward's function that counts the samples it sees."""

    def __init__(self, fn):
        self.fn, self.rows = fn, 0

    def __call__(self, samples, prompts):
        self.rows += len(samples)
        return self.fn(samples, prompts)


class Bent:
    """A mean and an endpoint that are not linear in x_t, a decoder, and a last step without noise."""

    num_steps, state_shape, dtype, fingerprint = 4, (2,), torch.float64, "bent"
    stochastic = (True, False, True, True, True)

    def prior(self, noise, cond=None):
        return noise.double()

    def transition(self, x, t, cond=None):
        level = expand(t.double(), x)
        endpoint = torch.tanh(x / level) + 0.1 * x.flip(1)
        return Gaussian(0.5 * x + 0.3 * endpoint, 0.2 * (level - 1), endpoint)

    def decode(self, x0):
        return x0.exp()


# The weights are exact.

CELLS = {
    "tds": (TDS(BED, LINEAR), LINEAR, FK, 600),
    "tds quadratic": (TDS(BED, QUADRATIC), QUADRATIC, FK, 600),
    "tds importance sampling": (TDS(BED, QUADRATIC), QUADRATIC, BON, 20_000),
    "tds half": (TDS(BED, LINEAR, lam=0.5), LINEAR, replace(FK, potential="max"), 1200),
    "tds window": (TDS(BED, QUADRATIC, window=(2, 3)), QUADRATIC, FK, 1000),
    "tds without network": (TDS(BED, LINEAR, through_network=False, max_shift=0.5), LINEAR, FK, 800),
    "tds limited": (TDS(BED, QUADRATIC, max_shift=0.2), QUADRATIC, FK, 1000),
    "tds levels": (TDS(BED, LINEAR), LINEAR, replace(FK, schedule=(5, 2, 0)), 600),
    "dps": (DPS(BED, LINEAR, scale=0.2), LINEAR, FK, 800),
    "dps quadratic": (DPS(BED, QUADRATIC, scale=0.1), QUADRATIC, BON, 20_000),
    "dps residual": (DPS(BED, RESIDUAL, scale=0.1, normalise="residual"), RESIDUAL, FK, 1000),
    "dps gradient": (DPS(BED, LINEAR, scale=0.3, normalise="gradient"), LINEAR, BON, 5000),
    "trust region": (TrustRegion(BED, LINEAR), LINEAR, FK, 800),
    "trust region importance sampling": (TrustRegion(BED, QUADRATIC, kl=1.0), QUADRATIC, BON, 20_000),
    "flowchef": (FlowChef(BED, LINEAR, scale=0.1, steps=2), LINEAR, BON, 5000),
    "elucd": (EluCD(BED, LINEAR, scale=0.5, gamma=0.0), LINEAR, BON, 5000),
    "drift inside": (TDS(Guided(BED, shift_mean(half_a_step)), LINEAR), LINEAR, FK, 800),
    "drift outside": (Guided(TDS(BED, LINEAR), shift_mean(half_a_step)), LINEAR, FK, 800),
}


LONG = ("drift inside",)  # two proposals, one in the other, in that order; the other order is run always


@pytest.mark.parametrize("cell", [pytest.param(c, marks=pytest.mark.slow) if c in LONG else c for c in CELLS])
def test_z_is_unbiased(cell):
    unbiased(estimates(*CELLS[cell]))


class Planted:
    """A guided kernel with a bug in its law."""

    def __init__(self, kernel, plant):
        self.kernel, self.plant = kernel, plant

    def transition(self, x, t, cond=None):
        return self.plant(self.kernel.transition(x, t, cond))

    def __getattr__(self, name):
        if name in ("kernel", "plant"):
            raise AttributeError(name)
        return getattr(self.kernel, name)


PLANTS = {
    "no weight": lambda law: replace(law, base_mean=None),
    "weight of the opposite shift": lambda law: replace(law, base_mean=2 * law.mean - law.base_mean),
    "weight of half the shift": lambda law: replace(law, base_mean=(law.mean + law.base_mean) / 2),
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("cell", ["tds", "tds importance sampling", "dps", "trust region"])
def test_a_wrong_weight_is_seen(cell, plant):
    kernel, *rest, _ = CELLS[cell]
    gap, se = laws.error(estimates(Planted(kernel, PLANTS[plant]), *rest, 800))
    assert abs(gap) > 10 * se


def test_trees_carry_the_weights():
    """Round-robin selection, so that the root value is unbiased."""
    method = replace(DEEP, selection="round_robin")
    for kernel in (TDS(BED, LINEAR), DPS(BED, LINEAR, scale=0.2)):
        unbiased(laws.trees(kernel, LINEAR, method, log_z(LINEAR), 400, 24))


# The shift is the papers'.


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def moved(law):
    return law.mean - law.base_mean


def slope(function, x, h=1e-6):
    """Central differences of a function (n, D) -> (n,)."""
    steps = h * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.stack([(function(x + e) - function(x - e)) / (2 * h) for e in steps], 1)


@pytest.mark.parametrize("sees", ["sample", "state"])
def test_the_gradient_is_that_of_finite_differences(sees):
    kernel, t = Bent(), torch.tensor([4, 2, 3, 1, 2])
    x = normal(5, 2)
    reward = Reward(lambda s, _: (s.sin() * torch.tensor([1.0, -2.0])).sum(1), "bent", sees)
    law = kernel.transition(x, t)

    def of_endpoint(x0):
        return reward(kernel.decode(x0) if sees == "sample" else x0)

    full = slope(lambda x: of_endpoint(kernel.transition(x, t).endpoint), x)
    assert (full.abs() > 1e-3).all()
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(moved(TDS(kernel, reward, lam=0.7).transition(x, t)), 0.7 * law.std**2 * full, **close)
    noisy = expand(t > 1, x)
    torch.testing.assert_close(moved(DPS(kernel, reward, scale=0.4).transition(x, t)), noisy * 0.4 * full, **close)
    near = TDS(kernel, reward, through_network=False).transition(x, t)
    torch.testing.assert_close(moved(near), law.std**2 * slope(of_endpoint, law.endpoint), **close)
    unit = DPS(kernel, reward, scale=0.4, normalise="gradient").transition(x, t)
    want = 0.4 * math.sqrt(2) * law.std * full / full.norm(dim=1, keepdim=True)
    torch.testing.assert_close(moved(unit), want, **close)


def test_a_residual_is_divided_by_its_norm():
    x, t = torch.tensor([[0.3], [-1.0]], dtype=torch.float64), torch.tensor([3, 5])
    plain = moved(DPS(BED, RESIDUAL).transition(x, t))
    root = RESIDUAL(BED.transition(x, t).endpoint).neg().sqrt()[:, None]
    law = DPS(BED, RESIDUAL, scale=2.0, normalise="residual").transition(x, t)
    torch.testing.assert_close(moved(law), 2.0 * plain / root)
    with pytest.raises(ValueError, match="minus a squared residual"):
        DPS(BED, linear(1.0), normalise="residual").transition(torch.ones_like(x), t)


def test_the_limit_is_in_units_of_the_noise():
    x, t = normal(40, 3), torch.arange(40) % 7 + 1
    kernel, reward = BEDS["gaussian-3d"], quadratic(1.5, 1.5)
    free, limited = (TDS(kernel, reward, max_shift=limit).transition(x, t) for limit in (None, 0.8))
    size, cut = ((moved(law) / law.std).norm(dim=1) for law in (free, limited))
    assert 5 < (size > 0.8).sum() < 35
    torch.testing.assert_close(cut, size.clamp(max=0.8))
    torch.testing.assert_close(moved(limited) * size[:, None], moved(free) * cut[:, None])


def test_a_trust_region_is_a_tempered_and_limited_twist():
    x, t = normal(70, 3), torch.arange(70) % 7 + 1
    kernel, reward = BEDS["gaussian-3d"], quadratic(1.5, 1.5)
    free, bounded = TDS(kernel, reward, lam=2.0).transition(x, t), TrustRegion(kernel, reward, lam=2.0, kl=2.0)
    wish = expand(1 - (t - 1) / kernel.num_steps, x) * moved(free)
    size = (wish / free.std).norm(dim=1)
    rho = math.sqrt(2 * 2.0 / kernel.num_steps)
    assert 10 < (size > rho).sum() < 60
    torch.testing.assert_close(moved(bounded.transition(x, t)), wish * expand((rho / size).clamp(max=1.0), wish))
    assert replace(bounded, max_shift=0.1).limit == 0.1
    assert replace(bounded, max_shift=9.0).limit == bounded.limit == rho
    assert replace(bounded, window=(1, 2)).limit == math.sqrt(2.0)


@pytest.mark.parametrize(("pull", "kl"), [(1e6, 4.5), (1e6, 0.5), (0.1, 4.5)])
def test_the_divergence_of_a_trust_region_is_bounded(pull, kl):
    """KL(q | p) = E_q[-Σ log p/q]: all of the bound where the reward pulls harder than it allows, little elsewhere."""
    kernel = TrustRegion(LinearGaussian(num_steps=20), linear(pull), kl=kl)
    result = ts.search(kernel, linear(0.0), ts.BestOfN(n=4_000), batch_size=WIDE)
    spent = -result.tree.edge_weights(result.tree.leaves)
    se = spent.std() / math.sqrt(len(spent))
    if pull > 1:
        assert abs(spent.mean() - kl) < 4 * se
    else:
        assert -4 * se < spent.mean() < 0.1 * kl
    loose = ts.search(TDS(kernel.kernel, kernel.reward), linear(0.0), ts.BestOfN(n=4_000), batch_size=WIDE)
    twist = -loose.tree.edge_weights(loose.tree.leaves)
    assert pull < 1 or twist.mean() > kl + 10 * se  # without the bound it is far off


@pytest.mark.parametrize(("steps", "fraction"), [(5, 0.25), (100, 0.005)])
def test_the_twist_takes_the_variance_out_of_the_weights(steps, fraction):
    """As T grows the twist is the optimal step; a factor of std, 2 std² or -std² is far from it."""
    kernel = LinearGaussian(num_steps=steps)
    plain, twisted = (
        ts.search(k, LINEAR, ts.BestOfN(n=800), batch_size=WIDE).log_weights.var()
        for k in (kernel, TDS(kernel, LINEAR))
    )
    assert twisted < fraction * plain


def test_steering_a_twisted_kernel_is_the_twisted_sampler():
    """Weights accumulate p/q p̃_s/p̃_t, computed here from the states of one population without resampling."""
    kernel = TDS(BED, QUADRATIC)
    result = ts.search(
        kernel, QUADRATIC, ts.FeynmanKac(num_particles=6, ess_threshold=0.0, schedule=(5, 4, 3, 2, 1, 0))
    )
    path, twist, log_w = bare_chain(kernel, 6), torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for x, after, t in zip(path[:-1], path[1:], range(5, 0, -1), strict=True):
        level = torch.full((6,), t)
        p, q = BED.transition(x, level), kernel.transition(x, level)
        log_w = log_w + QUADRATIC(p.endpoint) - twist + p.log_prob(after) - q.log_prob(after)
        twist = QUADRATIC(p.endpoint)
    torch.testing.assert_close(result.log_weights, log_w + QUADRATIC(path[-1]) - twist)


@pytest.mark.parametrize("method", [FK, BON, DEEP], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kernel", [TDS(BED, QUADRATIC, lam=0.0), DPS(BED, QUADRATIC, scale=0.0)])
def test_a_guide_of_scale_zero_is_the_base_kernel(kernel, method):
    of, budget = quadratic(1.0, 0.5), ts.Budget(nfe=400)
    guided, plain = (ts.search(k, of, method, budget=budget) for k in (kernel, BED))
    same_task(guided.tasks[0], plain.tasks[0])
    assert torch.equal(guided.samples, plain.samples)


def test_steps_outside_the_window_and_without_noise_stay():
    x, t = normal(5, 2), torch.tensor([4, 1, 3, 2, 3])
    kernel = DPS(Bent(), linear(1.0), window=(1, 3))
    law, base = kernel.transition(x, t), Bent().transition(x, t)
    assert (
        (law.mean != base.mean).all(1).tolist() == law.rewards.isfinite().tolist() == [False, False, True, True, True]
    )
    assert kernel.rewards_per_nfe == kernel.backward_per_nfe == (0, 0, 1, 1, 0)
    assert (law.log_weight(law.sample(torch.zeros_like(x)))[:2] == 0).all()
    outside = kernel.transition(x[:2], t[:2])
    assert outside.rewards is None
    assert torch.equal(outside.mean, base.mean[:2])


def test_a_forbidden_endpoint_gives_no_direction():
    x = torch.tensor([[2.0], [-4.0]], dtype=torch.float64)
    law = TDS(BED, Reward(lambda s, _: (s[:, 0] * (s[:, 0] > 0)).log())).transition(x, torch.tensor([2, 2]))
    assert (moved(law) != 0).tolist() == [[True], [False]]
    assert law.rewards[1] == -math.inf


# Rewards are handed over, and every call is counted once.


@pytest.mark.parametrize(
    ("method", "held"),
    [(FK, (4, 3, 2, 1)), (replace(FK, schedule=(5, 2, 0)), (5, 2)), (BON, ()), (DEEP, ())],
    ids=["fk", "fk of three levels", "best of n", "dts"],
)
@pytest.mark.parametrize("window", [(1, 5), (1, 3)])
def test_a_reward_computed_while_guiding_is_not_computed_again(method, held, window):
    counter = Counted(QUADRATIC.fn)
    guide, other = Reward(counter, "quadratic"), Reward(lambda x, prompts: counter(x, prompts), "quadratic")
    kernel, found = TDS(BED, guide, window=window), []
    for reward in (guide, other):  # the guide's own, and one of its name that computes the same
        counter.rows = 0
        found.append(ts.search(kernel, reward, method, budget=ts.Budget(nfe=400), prompts=["a", "b"], batch_size=7))
        cost = found[-1].cost
        assert cost.reward_calls == cost.decodes == counter.rows
        assert cost.backward_nfe == cost.nfe if window == (1, 5) else 0 < cost.backward_nfe < cost.nfe
        scored = 80 * sum(t > window[1] or reward is other for t in held)
        assert cost.reward_calls == cost.backward_nfe + scored + sum(len(task.leaves) for task in found[-1].tasks)
    for got, want in zip(found[0].tasks, found[1].tasks, strict=True):
        same_task(got, want)


def test_a_cheap_guide_costs_no_backward_pass_and_one_of_states_no_decode():
    of_states = Reward(LINEAR.fn, "linear", "state")
    cost = ts.search(TDS(BED, of_states, through_network=False), LINEAR, ts.BestOfN(n=10)).cost
    assert (cost.backward_nfe, cost.decodes, cost.reward_calls) == (0, 10, 60)


def test_rewards_that_are_handed_over_in_some_rows_leave_the_others_to_the_engine():
    def every_other(law):
        rows = torch.arange(len(law.mean)) % 2 == 1
        return replace(law, rewards=law.rewards.where(rows, torch.nan))

    counter = Counted(QUADRATIC.fn)
    reward = Reward(counter, "quadratic")
    some = Planted(TDS(BED, reward), every_other)
    outside = Guided(TDS(BED, reward), shift_mean(lambda x, t, base, cond: torch.zeros_like(x)))
    calls, found = [], []
    for kernel in (TDS(BED, reward), some, outside):
        counter.rows = 0
        found.append(ts.search(kernel, reward, FK, budget=ts.Budget(nfe=400), batch_size=8).tasks[0])
        calls.append(counter.rows)
    assert calls == [80 * 6, 80 * 8, 80 * 6]
    for other in found[1:]:
        same_task(other, found[0])


def test_endpoints_that_a_search_previews_guide_as_previews():
    kernel = Bent()
    kernel.preview = lambda endpoint: endpoint.exp() + 1
    guide, other = quadratic(), Reward(quadratic().fn, "another")
    options = {"budget": ts.Budget(nfe=80)}
    handed, computed = (ts.search(TDS(kernel, guide, lam=0.1), r, FK, **options) for r in (guide, other))
    same_task(handed.tasks[0], computed.tasks[0])


def test_padding_changes_nothing():
    kernel, options = TDS(BED, QUADRATIC), {"budget": ts.Budget(nfe=200), "batch_size": 7}
    plain, padded = (ts.search(kernel, QUADRATIC, FK, batch_invariant=b, **options) for b in (False, True))
    same_result(padded, plain)


def test_a_cached_reward_can_guide():
    counter = Counted(QUADRATIC.fn)
    reward = cached(Reward(counter, "quadratic"))
    result = ts.search(TDS(BED, reward), reward, FK, budget=ts.Budget(nfe=200))
    assert result.cost.reward_calls == counter.rows == 40 * 6
    same_task(result.tasks[0], ts.search(TDS(BED, QUADRATIC), QUADRATIC, FK, budget=ts.Budget(nfe=200)).tasks[0])


def test_laws_keep_their_rewards():
    law = TDS(BED, LINEAR).transition(normal(4, 1), torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(law.rewards, LINEAR(law.endpoint))
    assert not any(v.requires_grad for v in vars(law).values())
    rows = torch.tensor([3, 3, 0])
    both = Gaussian.cat([law.take(rows), law])
    assert torch.equal(both.rewards, torch.cat([law.rewards[rows], law.rewards]))


# Prompts.


def signed(x, prompts):
    slopes = {"up": 0.8, "down": -0.8, "flat": 0.0}
    return torch.tensor([slopes[p] for p in prompts], dtype=torch.float64) * x[:, 0]


SIGNED = Reward(signed, "signed")


@pytest.mark.parametrize("method", [FK, ts.BestOfN(), DEEP], ids=lambda m: type(m).__name__)
def test_each_row_is_guided_by_its_prompt(method):
    """In batches of mixed levels and tasks: each task is what the reward of its prompt alone gives."""
    prompts, budget = ["up", "down", "flat"], ts.Budget(nfe=600)
    result = ts.search(TDS(BED, SIGNED), SIGNED, method, prompts=prompts, budget=budget, batch_size=7)
    for i, c in enumerate((0.8, -0.8, 0.0)):
        one = linear(c)
        alone = ts.search(TDS(BED, one), one, method, prompts=prompts, budget=budget, batch_size=64)
        same_task(result.tasks[i], alone.tasks[i], atol=1e-12)


def test_searches_that_share_a_guide_keep_their_prompts_apart():
    kernel, options = TDS(BED, SIGNED), {"budget": ts.Budget(nfe=600), "batch_size": 16}
    orders = (["up", "down"], ["down", "flat"])
    alone = [ts.search(kernel, SIGNED, FK, prompts=p, **options) for p in orders]
    streams = [ts.stream(kernel, SIGNED, FK, prompts=p, **options) for p in orders]
    for last in zip(*streams, strict=True):
        together = last
    for snapshot, want in zip(together, alone, strict=True):
        same_result(snapshot.result(), want)


# Laws that every kernel obeys.


@pytest.mark.parametrize(
    "kernel",
    [
        TDS(BEDS["gaussian-3d"], QUADRATIC, window=(2, 6), max_shift=0.2),
        DPS(BED, QUADRATIC, scale=0.05),
        TrustRegion(BED, QUADRATIC, kl=0.2),
    ],
)
def test_a_guided_kernel_is_a_proposal(kernel):
    """Mild guides: a population of four is to come through without resampling."""
    check_kernel(kernel, atol=0, proposal=True)


def test_a_guided_kernel_with_prompts_and_a_decoder_is_a_proposal():
    reward = Reward(lambda s, prompts: s.sum(1) * torch.tensor([float(len(p)) for p in prompts]), "length")
    check_kernel(TDS(Bent(), reward, lam=0.1), prompts=["a", "bb", "ccc"], atol=1e-12, proposal=True)


@pytest.mark.parametrize("method", [FK, DEEP], ids=lambda m: type(m).__name__)
def test_a_cut_run_goes_on_to_the_same_tree(method, tmp_path):
    check_store(method, TDS(BED, QUADRATIC), QUADRATIC, tmp_path, cuts=3)


def test_samples_are_the_guided_steps_along_their_paths():
    check_edges(TDS(BED, LINEAR), ts.search(TDS(BED, LINEAR), LINEAR, DEEP, budget=ts.Budget(nfe=400)).tasks[0], 0)


def test_the_fingerprint_tells_guides_apart(tmp_path):
    kernels = [
        TDS(BED, LINEAR),
        TDS(BED, LINEAR, lam=0.5),
        TDS(BED, QUADRATIC),
        DPS(BED, LINEAR),
        DPS(BED, LINEAR, scale=2),
    ]
    kernels += [TDS(BED, LINEAR, window=(1, 2)), TDS(LinearGaussian(num_steps=6), LINEAR)]
    kernels += [TrustRegion(BED, LINEAR), TrustRegion(BED, LINEAR, kl=2.0)]
    assert len({k.fingerprint for k in kernels}) == len(kernels)
    assert describe(TDS(BED, LINEAR)).fingerprint == TDS(BED, LINEAR).fingerprint
    assert TDS(Guided(BED, shift_mean(half_a_step)), LINEAR).fingerprint is None
    ts.search(kernels[0], LINEAR, FK, budget=ts.Budget(nfe=200), store=tmp_path / "run")
    with pytest.raises(ts.StoreError, match="fingerprint"):
        ts.resume(tmp_path / "run", kernels[1], LINEAR, budget=ts.Budget(nfe=400))


# What cannot guide says so.


def step(kernel):
    return kernel.transition(torch.full((2, 1), 0.5, dtype=torch.float64), torch.tensor([2, 4]))


@pytest.mark.parametrize(
    "fn",
    [lambda x, _: x[:, 0].detach(), lambda x, _: x[:, 0].round().int(), constant(0.3).fn],
    ids=["detached", "int", "constant"],
)
def test_a_reward_without_a_gradient_is_refused(fn):
    with pytest.raises(TypeError, match="'flat' has no gradient to its samples"):
        step(TDS(BED, Reward(fn, "flat")))


def test_a_reward_whose_own_parameters_have_gradients_is_refused_if_its_samples_have_none():
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match="no gradient to its samples"):
        step(TDS(BED, Reward(lambda x, _: x.detach() @ weight, "frozen")))


class NoGraph(laws.ShiftedPrior):
    """The bed with one method that drops the graph."""

    def __init__(self, drops):
        super().__init__(BED)
        setattr(self, drops, lambda *given: _dropped(getattr(BED, drops)(*given)))


def _dropped(made):
    return made.detach() if isinstance(made, torch.Tensor) else replace(made, endpoint=made.endpoint.detach())


def test_a_kernel_without_a_graph_is_refused_and_guided_from_its_endpoint():
    with pytest.raises(TypeError, match=r"kernel.transition keeps no graph: use through_network=False"):
        step(TDS(NoGraph("transition"), LINEAR))
    assert (moved(step(TDS(NoGraph("transition"), LINEAR, through_network=False))) != 0).all()
    with pytest.raises(TypeError, match="the decoder keeps no graph"):
        step(TDS(NoGraph("decode"), LINEAR))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_its_level(bad):
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return torch.where(torch.tensor([[False], [True]]), bad, g)

    with pytest.raises(
        ValueError, match=r"gradient of reward 'spoilt' is NaN or infinite in 1 of 2 rows, at t = \[4\]"
    ):
        step(DPS(BED, Reward(lambda x, _: Spoilt.apply(x)[:, 0], "spoilt")))


def test_settings_out_of_range_are_refused():
    for wrong, message in [
        ({"lam": -1.0}, "lam is -1.0"),
        ({"window": (0, 3)}, r"window is \(0, 3\)"),
        ({"window": (2, 9)}, "high <= 5"),
        ({"max_shift": 0.0}, "max_shift is 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            TDS(BED, LINEAR, **wrong)
    with pytest.raises(ValueError, match="lam is inf"):
        TrustRegion(BED, LINEAR, lam=math.inf)
    with pytest.raises(ValueError, match="kl is 0, expected a positive number of nats"):
        TrustRegion(BED, LINEAR, kl=0)
    with pytest.raises(ValueError, match="scale is nan"):
        DPS(BED, LINEAR, scale=math.nan)
    with pytest.raises(ValueError, match="unknown normalise 'norm'"):
        DPS(BED, LINEAR, normalise="norm")
    with pytest.raises(TypeError, match=r"guided by 'linear.0.8.' already"):
        DPS(TDS(BED, LINEAR), QUADRATIC)
    with pytest.raises(TypeError, match="guide Gaussian steps, got Mixture"):
        step(TDS(BEDS["mixture"], LINEAR))


def test_costs_by_level_need_one_number_a_level():
    kernel = Bent()
    kernel.rewards_per_nfe, kernel.backward_per_nfe = (0, 1, 1), 2
    with pytest.raises(ValueError, match="rewards_per_nfe has 3 entries, expected num_steps"):
        describe(kernel)
    kernel.rewards_per_nfe = (0, 1, 1, 0, 1)
    spec = describe(kernel)
    assert (spec.backward_per_nfe, spec.rewards_per_nfe) == ((2,) * 5, (0, 1, 1, 0, 1))


def test_a_budget_of_reward_calls_is_refused():
    with pytest.raises(ts.BudgetError, match=r"a guide calls the reward in its steps.*limit nfe instead"):
        ts.search(TDS(BED, LINEAR), LINEAR, BON, budget=ts.Budget(reward_calls=100))
