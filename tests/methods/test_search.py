"""Laws of every search: it does not change p, its budget holds, its estimates are weighted samples."""

import math

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import laws
from tests.support.beds import BEDS
from treesearch.backends.exact.gaussian import Tilt
from treesearch.methods.base import NOT_OF_PI
from treesearch.rewards.analytic import constant, linear
from treesearch.rewards.base import as_reward
from treesearch.testing import Counting, bare_chain, check_edges

FRESH = {"widening_c": 2.0, "widening_alpha": 1.0}  # |C| < 2 N: every iteration is a rollout


def first_entry(x):
    return x[:, 0].double()


@pytest.mark.parametrize(
    "method",
    [
        ts.BestOfN(lam=0.0),
        ts.FeynmanKac(num_particles=50, lam=0.0, ess_threshold=1.0),
        ts.FeynmanKac(lam=0.0, potential="max"),
        ts.DiffusionTreeSampling(lam=0.0, wave=50, **FRESH),
        ts.DiffusionTreeSearch(lam=0.0, wave=50, **FRESH),
    ],
    ids=["bon", "fk", "fk-max", "dts", "dts-star"],
)
def test_a_thousand_samples_at_lambda_zero_are_the_bare_chain_s(bed, method):
    budget = ts.Budget(nfe=1000 * bed.num_steps)
    found = ts.search(bed, first_entry, method, budget=budget, batch_size=300)
    assert torch.equal(found.samples, bare_chain(bed, 1000)[-1])


def test_a_branching_tree_walks_the_bare_kernel(bed):
    branch_at = (3, 2) if bed is BEDS["masked"] else None
    method = ts.DiffusionTreeSampling(lam=0.0, wave=50, widening_c=1.0, widening_alpha=0.5, branch_at=branch_at)
    found = ts.search(bed, first_entry, method, budget=ts.Budget(iterations=300), batch_size=300)
    check_edges(bed, found.tasks[0], seed=0)


def test_the_target_changes_no_sample_of_best_of_n(gaussian):
    one, other = (ts.search(gaussian, linear(1.0), ts.BestOfN(n=50, lam=lam)) for lam in (0.1, 9.0))
    assert torch.equal(one.samples, other.samples)
    assert not torch.equal(one.log_weights, other.log_weights)


def test_best_of_n_is_importance_sampling(gaussian):
    exact = gaussian.tilted(Tilt(c=0.8))
    tasks = list(range(400))
    found = ts.search(
        gaussian, linear(0.8), ts.BestOfN(n=40), prompts=tasks, budget=ts.Budget(nfe=400 * 200), batch_size=laws.WIDE
    )
    laws.unbiased([np.exp(t.log_z - exact.log_z) for t in found.tasks])
    z = [(t.log_z - exact.log_z) / t.log_z_se for t in found.tasks]
    assert 0.85 < np.std(z) < 1.25
    one = ts.search(gaussian, linear(0.8), ts.BestOfN(n=20_000), batch_size=laws.WIDE)
    assert abs(laws.posterior_mean(one) - float(exact.mean)) < 0.04


def test_the_best_of_n_is_the_largest_of_n_gaussians(gaussian):
    """E max of 10 standard normals is 1.53875."""
    found = ts.search(
        gaussian,
        linear(1.0),
        ts.BestOfN(n=10),
        prompts=list(range(800)),
        budget=ts.Budget(nfe=800 * 50),
        batch_size=laws.WIDE,
    )
    best = np.array([float(t.rewards.max()) for t in found.tasks])
    assert abs(best.mean() - (0.3 + 0.8 * 1.53875)) < 4 * best.std() / 800**0.5


# Beam search.


def test_beam_search_keeps_the_best_endpoints(gaussian):
    method = ts.BeamSearch(beam_width=3, branching=4)
    found = ts.search(gaussian, linear(1.0), method, budget=ts.Budget(iterations=2))
    tree = found.tree
    for level in (4, 3, 2, 1):
        nodes = np.flatnonzero(tree.t == level)
        for beam in np.split(nodes, 2):
            kept = np.isin(beam, tree.parent)
            assert kept.sum() == 3
            assert tree.reward[beam][kept].min() >= tree.reward[beam][~kept].max()
            assert (np.bincount(tree.parent[1:], minlength=len(tree))[beam[kept]] == 4).all()


def test_beam_search_costs_k_times_t_and_says_it_is_greedy(gaussian):
    found = ts.search(gaussian, linear(1.0), ts.BeamSearch(), budget=ts.Budget(nfe=170))
    assert found.cost.nfe == 170 - 170 % 5
    assert NOT_OF_PI in found.diagnostics["warnings"]
    assert found.log_z is None
    assert found.log_z_se is None


def test_beam_search_finds_higher_rewards_than_best_of_n(gaussian):
    prompts, budget = list(range(50)), ts.Budget(nfe=50 * 80)
    beam, bon = (
        ts.search(gaussian, linear(1.0), m, prompts=prompts, budget=budget, batch_size=laws.WIDE)
        for m in (ts.BeamSearch(), ts.BestOfN())
    )
    gain = [float(a.rewards.max() - b.rewards.max()) for a, b in zip(beam.tasks, bon.tasks, strict=True)]
    assert np.mean(gain) > 4 * np.std(gain) / 50**0.5


# Results.


def test_merged_log_weights_average_to_log_z(gaussian):
    for method in (ts.BestOfN(), ts.FeynmanKac(num_particles=9), ts.DiffusionTreeSampling(wave=4)):
        found = ts.search(gaussian, linear(1.2), method, budget=ts.Budget(nfe=500))
        mean = torch.logsumexp(found.log_weights, 0) - np.log(len(found.log_weights))
        assert float(mean) == pytest.approx(found.log_z, abs=1e-9)


def test_draws_are_samples_and_seeded(gaussian):
    found = ts.search(gaussian, linear(1.2), ts.BestOfN(n=100))
    assert torch.equal(found.draw(30, seed=1), found.draw(30, seed=1))
    assert not torch.equal(found.draw(30, seed=1), found.draw(30, seed=2))
    assert torch.isin(found.draw(100), found.samples).all()


def test_rewards_are_those_of_the_returned_samples(bed):
    for method in (ts.BestOfN(), ts.FeynmanKac(num_particles=9), ts.DiffusionTreeSearch(wave=4)):
        if bed is BEDS["masked"] and isinstance(method, ts.DiffusionTreeSearch):
            continue  # its prior is deterministic: branch_at is for the user to choose
        found = ts.search(bed, first_entry, method, budget=ts.Budget(nfe=40 * bed.num_steps))
        assert torch.equal(found.rewards, first_entry(found.samples))


def test_every_limit_of_a_budget_holds(gaussian):
    for method in (ts.BestOfN(), ts.FeynmanKac(num_particles=6), ts.DiffusionTreeSampling(), ts.BeamSearch()):
        for limit in ({"nfe": 333}, {"reward_calls": 222}, {"iterations": 3}, {"nfe": 400, "reward_calls": 80}):
            cost = ts.search(gaussian, linear(1.0), method, budget=ts.Budget(**limit)).cost
            assert cost.nfe <= limit.get("nfe", np.inf)
            assert cost.reward_calls <= limit.get("reward_calls", np.inf)


def test_what_a_dropped_state_costs_is_reported_apart(gaussian):
    method = ts.DiffusionTreeSampling(wave=4, widening_c=1.0, widening_alpha=0.4)
    whole, none = (
        ts.search(gaussian, linear(1.0), method, budget=ts.Budget(nfe=400), keep_states=keep)
        for keep in ("all", "none")
    )
    assert torch.equal(whole.samples, none.samples)
    assert whole.cost.nfe == none.cost.nfe
    assert none.cost.repeated_nfe > whole.cost.repeated_nfe == 0


# λ from a pilot.


@pytest.mark.parametrize("make", [ts.BestOfN, ts.FeynmanKac, ts.DiffusionTreeSampling])
def test_an_automatic_lambda_hits_its_ess_and_is_frozen_and_paid_for(gaussian, make):
    kernel = Counting(gaussian)
    found = ts.search(kernel, linear(1.0), make(lam="auto"), budget=ts.Budget(nfe=2000))
    pilot, lam = found.diagnostics["pilot"], found.tasks[0].lam
    assert found.diagnostics["lam"] == pilot["lam"] == lam
    assert pilot["rollouts"] == 64
    assert kernel.rows == found.cost.nfe
    assert 0.97 * 2000 < found.cost.nfe <= 2000
    given = ts.search(gaussian, linear(1.0), make(lam=lam), budget=ts.Budget(nfe=2000 - 64 * 5))
    assert torch.equal(given.samples, found.samples)
    rollouts = bare_pilot(gaussian, 64)
    weights = (lam * rollouts).softmax(0)
    assert float(1 / weights.square().sum()) / 64 == pytest.approx(0.1, rel=1e-3)


def bare_pilot(kernel, n):
    """Rewards of the pilot: rollouts of population 1, whose noise the search does not use."""
    from treesearch.backends.base import describe
    from treesearch.core.noise import child_keys, root_key
    from treesearch.testing import noise

    keys = child_keys(np.array([root_key(0, 0, 1)], np.uint64), 6, np.arange(n), at_root=True)
    spec, x = describe(kernel), None
    x = kernel.prior(noise(spec, keys, 6))
    for t in range(5, 0, -1):
        x = kernel.transition(x, torch.full((n,), t)).sample(noise(spec, keys, t))
    return x[:, 0]


def test_lambda_of_a_large_pilot_is_the_closed_form(gaussian):
    """ESS fraction of N(m, s²) weights exp(λ c x) is exp(-(λ c s)²), and KL(π‖p) = (λ c s)²/2."""
    from treesearch.session.calibrate import divergence, lambda_for_ess

    rewards = bare_chain(gaussian, 40_000)[-1][:, 0].numpy()
    target = 0.4
    lam = lambda_for_ess([rewards], [np.zeros(len(rewards))], target)
    exact = np.sqrt(-np.log(target)) / 0.8
    assert lam == pytest.approx(exact, rel=0.03)
    assert divergence(rewards, np.zeros(len(rewards)), lam) == pytest.approx(-np.log(target) / 2, rel=0.08)


def test_an_automatic_lambda_needs_rewards_that_vary_and_a_budget(gaussian):
    with pytest.raises(ValueError, match="hardly vary"):
        ts.search(gaussian, constant(1.0), ts.BestOfN(lam="auto"), budget=ts.Budget(nfe=2000))
    with pytest.raises(ts.BudgetError, match="nfe=400"):
        ts.search(gaussian, linear(1.0), ts.BestOfN(lam="auto"), budget=ts.Budget(nfe=300))


@pytest.mark.parametrize(
    "method",
    [ts.BestOfN(lam=0.0), ts.FeynmanKac(num_particles=8, lam=0.0), ts.DiffusionTreeSampling(lam=0.0, wave=4)],
    ids=["bon", "fk", "dts"],
)
def test_at_lambda_zero_forbidding_rewards_count_for_nothing(gaussian, method):
    def forbid(x):
        return torch.where(x[:, 0] > 0, x[:, 0], -torch.inf)

    found = ts.search(gaussian, forbid, method, budget=ts.Budget(nfe=400))
    assert found.log_z == 0
    assert found.diagnostics["kl"] == pytest.approx(0, abs=1e-12)
    assert torch.equal(found.samples, ts.search(gaussian, linear(1.0), method, budget=ts.Budget(nfe=400)).samples)
    assert (found.draw(500)[:, 0] < 0).any()


def test_best_of_n_carries_the_weights_of_its_proposal(gaussian):
    """log p/q of every step and of the prior: without them E[Ẑ]/Z is off by far more than its standard error."""
    kernel = laws.ShiftedPrior(gaussian)
    found = ts.search(kernel, linear(0.5), ts.BestOfN(n=40_000), batch_size=laws.WIDE)
    ratios = np.exp(found.log_weights.numpy() - gaussian.tilted(Tilt(c=0.5)).log_z)
    laws.unbiased(ratios)


def test_an_automatic_lambda_that_no_lambda_can_reach_is_refused(gaussian):
    forbids = as_reward(lambda x: torch.where(x[:, 0] > 1.6, 0.0, -math.inf), name="forbids")
    with pytest.raises(ValueError, match="ESS fraction"):
        ts.search(gaussian, forbids, ts.BestOfN(lam="auto"), budget=ts.Budget(nfe=4_000))


def test_the_divergence_is_the_closed_form(gaussian):
    found = ts.search(gaussian, linear(0.6), ts.BestOfN(n=20_000), batch_size=laws.WIDE)
    assert found.diagnostics["kl"] == pytest.approx(0.5 * 0.6**2 * 0.8**2, rel=0.05)
