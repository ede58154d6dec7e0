import math

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import laws
from tests.support.beds import BEDS
from tests.support.laws import ShiftedPrior, exact_bed, trees, unbiased
from treesearch.backends.base import Categorical
from treesearch.backends.exact.enumerable import DiscreteChain
from treesearch.backends.exact.gaussian import LinearGaussian, Tilt
from treesearch.core import backup
from treesearch.core.tree import ROOT, Tree
from treesearch.core.weights import log_mean
from treesearch.methods.base import Status
from treesearch.rewards.analytic import linear, table
from treesearch.testing import bare_chain, check_edges, check_noise, same_result

R, TILT = linear(0.8), Tilt(c=0.8)
DTS, DTS_STAR = ts.DiffusionTreeSampling, ts.DiffusionTreeSearch
DEEP = {"widening_c": 1.0, "widening_alpha": 0.5}
NARROW = {"widening_c": 1.0, "widening_alpha": 0.3}


def run(kernel, reward, method, iterations, **options):
    return ts.search(
        kernel, reward, method, budget=ts.Budget(iterations=iterations), **{"batch_size": laws.WIDE} | options
    )


METHODS = [
    DTS(wave=1, **DEEP),
    DTS(wave=7, lam=0.3, **NARROW),
    DTS(wave=5, lag=1, **DEEP),
    DTS(wave=16, selection="round_robin", **NARROW),
    DTS(wave=3, selection="uct", **DEEP),
    DTS(wave=4, lam=0.0, **DEEP),
    DTS(wave=4, lam=math.inf, **DEEP),
    DTS_STAR(wave=4, lag=1, **NARROW),
    DTS(wave=4, branch_at=(5, 2), **DEEP),
]


# 1. - 3. Values, visits, widening.


@pytest.mark.parametrize("method", METHODS, ids=range(len(METHODS)))
def test_values_and_visits_add_up(gaussian, drifting, method):
    for kernel in (gaussian, drifting):
        for task in run(kernel, linear(1.2), method, 3 * 150, prompts=["a", "b", "c"]).tasks:
            laws.values_add_up(task.tree, method.lam)
            laws.visits_add_up(task.tree, 150)


@pytest.mark.parametrize("backup_rule", ["soft", "mean", "max"])
def test_every_backup_rule_is_the_one_it_names(gaussian, backup_rule):
    tree = run(gaussian, R, DTS_STAR(backup=backup_rule, wave=4, **DEEP), 100).tree
    laws.values_add_up(tree, {"soft": 1.0, "mean": 0.0, "max": math.inf}[backup_rule])


@pytest.mark.parametrize(("c", "alpha"), [(2.0, 0.8), (1.0, 0.5), (1.0, 0.3), (3.0, 0.0)])
def test_a_node_has_at_most_the_ceiling_of_c_n_alpha_children(gaussian, c, alpha):
    tree = run(gaussian, R, DTS(wave=1, widening_c=c, widening_alpha=alpha), 300).tree
    inner = tree.t > 0
    assert (tree.children[inner] <= np.ceil(c * tree.visits[inner].astype(float) ** alpha)).all()


@pytest.mark.parametrize(("alpha", "first"), [(0.8, 37), (0.7, 14)])
def test_the_first_descent_is_at_the_published_iteration(gaussian, alpha, first):
    method = DTS(wave=1, widening_alpha=alpha)
    assert run(gaussian, R, method, first - 1).tree.children[ROOT] == first - 1
    assert run(gaussian, R, method, first).tree.children[ROOT] == first - 1


# 4. The first iterations are best-of-N.


@pytest.mark.parametrize("wave", [1, 36])
def test_the_first_36_iterations_are_best_of_n(gaussian, wave):
    tree, bon = run(gaussian, R, DTS(wave=wave), 36), run(gaussian, R, ts.BestOfN(), 36)
    assert torch.equal(tree.samples, bon.samples)
    assert tree.log_z == pytest.approx(bon.log_z)
    torch.testing.assert_close(tree.log_weights, bon.log_weights)


# 5. Round robin: E[exp(λ v_root)] = Z.

MILD, MILD_TILT = linear(0.5), Tilt(c=0.5)
CELLS = [
    (DTS(selection="round_robin", wave=1, **DEEP), 16, 180),
    (DTS(selection="round_robin", wave=8, **DEEP), 64, 120),
    (DTS(selection="round_robin", wave=8, **NARROW), 150, 120),
    (DTS(selection="round_robin", wave=5, lag=1, **DEEP), 40, 160),
    (DTS(selection="round_robin", wave=16), 100, 120),
    (DTS(selection="round_robin", wave=6, branch_at=(5, 1), **DEEP), 60, 160),
]


@pytest.mark.parametrize(("method", "iterations", "n"), CELLS, ids=range(len(CELLS)))
def test_round_robin_root_values_are_unbiased(gaussian, method, iterations, n):
    unbiased(trees(gaussian, MILD, method, gaussian.tilted(MILD_TILT).log_z, n, iterations))


@pytest.mark.parametrize("name", ["discrete", "masked", "mixture"])
def test_round_robin_root_values_are_unbiased_on_other_beds(name):
    kernel, lam = BEDS[name], 0.6
    if name == "mixture":
        reward, log_z = linear(1.0), kernel.tilted(Tilt(c=1.0), lam).log_z
    else:
        reward, log_z = exact_bed(kernel, lam)
    branch_at = (3, 2) if name == "masked" else None
    method = DTS(lam=lam, selection="round_robin", wave=8, branch_at=branch_at, **DEEP)
    unbiased(trees(kernel, reward, method, log_z, 200, 48))


def test_round_robin_root_values_are_unbiased_under_a_wrong_proposal(gaussian, drifting):
    method = DTS(selection="round_robin", wave=8, **DEEP)
    log_z = gaussian.tilted(MILD_TILT).log_z
    unbiased(trees(drifting, MILD, method, log_z, 400, 40))
    unbiased(trees(ShiftedPrior(gaussian), MILD, method, log_z, 200, 40))


@pytest.mark.slow
@pytest.mark.parametrize("method", [DTS(selection="round_robin"), DTS(selection="round_robin", **DEEP)], ids=[0, 1])
def test_round_robin_root_values_are_unbiased_over_many_trees(gaussian, method):
    """Research values at c = 1.2, M = 400: 1.003 and 1.002, each to .003."""
    unbiased(trees(gaussian, linear(1.2), method, gaussian.tilted(Tilt(c=1.2)).log_z, 1000, 400))


# Boltzmann selection: the published bias, and consistency.


def test_boltzmann_root_values_are_biased_low_as_published(gaussian):
    """E[exp(v_root)]/Z at c = 1.2, M = 100, (2, .8): .898 with one leaf at a time, a little more with stale values."""
    ratios = trees(gaussian, linear(1.2), DTS(wave=16), gaussian.tilted(Tilt(c=1.2)).log_z, 250, 100)
    gap, se = laws.error(ratios)
    assert se < 0.01
    assert 1 + gap - 4 * se < 0.915
    assert 1 + gap + 4 * se > 0.88
    assert gap < -10 * se


@pytest.mark.slow
def test_boltzmann_root_values_over_many_sequential_trees(gaussian):
    """Research: .898 (sd .104) at M = 100, .845 at M = 400."""
    log_z = gaussian.tilted(Tilt(c=1.2)).log_z
    for iterations, n, exact in ((100, 1000, 0.898), (400, 300, 0.845)):
        gap, se = laws.error(trees(gaussian, linear(1.2), DTS(wave=1), log_z, n, iterations))
        assert abs(1 + gap - exact) < 4 * (se**2 + 0.003**2) ** 0.5


def test_the_read_out_tends_to_the_target_on_a_small_bed():
    kernel, lam = DiscreteChain.random(num_steps=1, states=3), 0.5
    values = (0.0, 1.0, 2.0)
    exact = kernel.tilted(torch.tensor(values), lam).posterior

    def distance(iterations):
        found = run(
            kernel, table(values), DTS(lam=lam, wave=32, widening_alpha=0.5), 8 * iterations, prompts=list(range(8))
        )
        laws_found = [
            torch.zeros(3, dtype=torch.float64).index_add(0, t.samples[:, 0], t.log_weights.softmax(0))
            for t in found.tasks
        ]
        return float(torch.stack([(law - exact).abs().sum() / 2 for law in laws_found]).mean())

    early, late = distance(60), distance(4000)
    assert late < 0.035
    assert late < early / 2


# 1b. Limits of the soft value.


def test_the_soft_value_lies_between_its_limits_and_reaches_them(gaussian):
    tree = run(gaussian, linear(1.2), DTS(wave=8, **DEEP), 300).tree

    def root(rule, lam):
        backup.recompute(tree, backup.rule_of(rule, lam), lam)
        return tree.value[ROOT]

    mean, largest = root("mean", 1.0), root("max", 1.0)
    assert root("soft", 0.0) == mean
    assert root("soft", math.inf) == largest == tree.reward[tree.t == 0].max()
    assert root("soft", 1e-9) == pytest.approx(mean, abs=1e-6)
    assert root("soft", 1e7) == pytest.approx(largest, abs=1e-5)
    soft = [root("soft", lam) for lam in (0.1, 1.0, 10.0)]
    assert mean < soft[0] < soft[1] < soft[2] < largest


def test_forbidden_leaves_have_no_weight_and_a_forbidden_tree_says_so(gaussian):
    forbid = lambda x: torch.where(x[:, 0] > 0, x[:, 0], -math.inf)  # noqa: E731
    result = run(gaussian, forbid, DTS(wave=4, **DEEP), 200)
    laws.values_add_up(result.tree, 1.0)
    assert (result.draw(200)[:, 0] > 0).all()
    nothing = run(gaussian, lambda x: x[:, 0] - math.inf, DTS(wave=4, **DEEP), 60)
    assert nothing.log_z == -math.inf
    with pytest.raises(ts.ZeroWeights):
        nothing.draw(1)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_rewards_give_numbers(gaussian, scale):
    result = run(gaussian, linear(1e3) + scale, DTS(wave=4, **DEEP), 200)
    assert math.isfinite(result.log_z)
    assert not result.log_weights.isnan().any()
    laws.values_add_up(result.tree, 1.0)


# 6. - 7. Read-out, duplicates.


@pytest.mark.parametrize("method", [DTS(wave=4, **DEEP), DTS(wave=4, lam=0.4, **NARROW), DTS(wave=16)], ids=range(3))
def test_draws_follow_a_descent_by_soft_values(gaussian, drifting, method):
    for kernel in (gaussian, drifting):
        result = run(kernel, linear(1.2), method, 250)
        want = laws.descent_probabilities(result.tree, result.leaves, method.lam)
        np.testing.assert_allclose(result.log_weights.softmax(0), want, atol=1e-12)
        assert log_mean(result.log_weights.numpy()) == pytest.approx(method.lam * result.tree.value[ROOT], abs=1e-9)
        assert result.log_z == pytest.approx(method.lam * result.tree.value[ROOT])


def test_draws_have_the_frequencies_of_the_weights(gaussian):
    task = run(gaussian, linear(1.2), DTS(wave=4, **DEEP), 60).tasks[0]
    counts = np.bincount(task.draw_rows(40_000), minlength=len(task.leaves))
    p = task.log_weights.softmax(0).numpy()
    assert (np.abs(counts / 40_000 - p) < 4 * np.sqrt(p / 40_000) + 1e-6).all()


def test_reading_out_costs_nothing(gaussian):
    result = run(gaussian, R, DTS(wave=4, **DEEP), 60)
    before = result.cost.nfe
    result.draw(1000)
    assert result.cost.nfe == before == sum(_edge_costs(result.tree))


def _edge_costs(tree):
    """A new node costs the steps from its parent; the first step of a segment is one more call, siblings or not."""
    above = np.minimum(tree.t[tree.parent[1:]], 5)
    return (above - tree.t[1:]).astype(int).tolist()


def test_duplicate_states_are_separate_children():
    kernel = BEDS["discrete"]
    result = run(kernel, exact_bed(kernel)[0], DTS(wave=4), 60)
    tree = result.tree
    tops = result.tasks[0].fetch(laws.children(tree, ROOT))
    assert len(tops) == tree.children[ROOT] > 10
    assert len(torch.unique(tops)) <= 4


# 8. DTS*.


def test_greedy_search_returns_the_best_leaf_seen(gaussian):
    result = run(gaussian, linear(1.2), DTS_STAR(lam=math.inf, c_uct=0.0, wave=4, **DEEP), 150)
    best = result.rewards.max()
    assert result.best(1)[1][0] == best
    assert result.tree.value[ROOT] == best
    assert (result.draw(5)[:, 0] == result.best(1)[0][0, 0]).all()
    assert result.log_z is None
    assert "greedy: not a sample of π" in result.diagnostics["warnings"]


def test_the_best_reward_never_falls_with_the_budget_and_starts_at_best_of_n(gaussian):
    method = DTS_STAR(wave=4, **DEEP)
    found = ts.stream(gaussian, R, method, budget=ts.Budget(iterations=200))
    best = [snapshot.best_reward for snapshot in found]
    assert best == sorted(best)
    whole = [float(run(gaussian, R, DTS_STAR(wave=1), m).rewards.max()) for m in (10, 36, 60, 150)]
    assert whole == sorted(whole)
    bon = run(gaussian, R, ts.BestOfN(), 36)
    assert whole[1] == bon.rewards.max()


def test_uct_looks_for_high_rewards(gaussian):
    greedy = run(gaussian, linear(1.2), DTS_STAR(wave=4, c_uct=0.1, **DEEP), 20 * 150, prompts=list(range(20)))
    bon = run(gaussian, linear(1.2), ts.BestOfN(), 20 * 60, prompts=list(range(20)))
    means = [np.mean([float(t.rewards.mean()) for t in found.tasks]) for found in (greedy, bon)]
    assert means[0] > means[1] + 0.3


# 9. Noise, batches, budgets.


@pytest.mark.parametrize("method", [DTS(wave=5, lag=1, **DEEP), DTS(wave=5, **NARROW)], ids=["lag", "no lag"])
def test_the_batch_size_changes_nothing(gaussian, method):
    whole = run(gaussian, R, method, 150, batch_size=64)
    for size in (1, 7):
        same_result(run(gaussian, R, method, 150, batch_size=size), whole)


@pytest.mark.parametrize("name", ["gaussian", "discrete", "masked"])
def test_no_two_steps_of_any_tree_share_noise(name):
    kernel = BEDS[name]
    branch_at = (3, 2, 1) if name == "masked" else None
    found = run(
        kernel, lambda x: x[:, 0].double(), DTS(wave=3, branch_at=branch_at, **NARROW), 300, prompts=["ab", "c"]
    )
    check_noise([task.tree for task in found.tasks], kernel.num_steps)
    check_edges(kernel, found.tasks[1], seed=0, number=1)


def test_a_wave_of_one_is_the_sequential_algorithm(gaussian):
    """A run of waves of one equals the first iterations of a longer one: nothing looks ahead."""
    short, long = (run(gaussian, R, DTS(wave=1, **DEEP), m) for m in (40, 80))
    size = len(short.tree)
    np.testing.assert_array_equal(long.tree.parent[:size], short.tree.parent)
    np.testing.assert_array_equal(long.tree.reward[:size], short.tree.reward)


def test_an_iteration_at_an_existing_leaf_is_free_and_counts(gaussian):
    result = run(gaussian, R, DTS(wave=1, **NARROW), 400)
    extra = result.diagnostics
    assert extra["iterations"] == 400
    assert extra["rollouts"] < 400
    assert result.cost.reward_calls == extra["rollouts"]
    laws.visits_add_up(result.tree, 400)


@pytest.mark.parametrize(
    "method", [DTS(widening_c=1.0, widening_alpha=0.0), DTS_STAR(widening_c=2.0, widening_alpha=0.0)]
)
def test_a_tree_that_cannot_grow_stops_and_says_so(gaussian, method):
    result = ts.search(gaussian, R, method, budget=ts.Budget(nfe=10_000))
    assert result.tasks[0].status == Status.EXHAUSTED
    assert result.diagnostics["iterations"] < 100_000  # and not for ever


@pytest.mark.parametrize("alpha", [0.05, 0.8])
def test_a_tree_that_grows_slowly_spends_its_budget(gaussian, alpha):
    method = DTS(widening_c=1.0, widening_alpha=alpha, wave=16)
    result = ts.search(gaussian, R, method, budget=ts.Budget(nfe=200))
    assert 200 - 5 < result.cost.nfe <= 200 or result.tasks[0].status == Status.EXHAUSTED


def test_lambda_zero_selects_uniformly_and_keeps_p(gaussian):
    result = run(gaussian, linear(5.0), DTS(lam=0.0, wave=8, **DEEP), 1000)
    check_edges(gaussian, result.tasks[0], seed=0)
    assert result.log_z == 0.0
    bare = bare_chain(gaussian, int(result.tree.children[ROOT]))[-1]
    first = [leaf for leaf in result.leaves if _is_unbranched(result.tree, leaf)]
    found = result.samples[np.searchsorted(result.leaves, first)]
    assert torch.isin(found, bare).all()


def _is_unbranched(tree, leaf):
    return int(tree.key[leaf]) == int(tree.key[tree.roots([leaf])[0]])


def test_an_empty_tree_has_only_its_root():
    tree = Tree(5, key=1)
    assert len(tree) == 1
    assert tree.t[ROOT] == 6
    assert not len(tree.leaves)
    assert tree.bytes_per_node <= 64


# What a budget, a lag, a zero weight and a forbidden child must not upset.


@pytest.mark.parametrize("wave", [1, 16, 64])
@pytest.mark.parametrize("branch_at", [(6, 3), (3,), (1,), (0,)])
def test_a_root_child_below_the_prior_costs_the_whole_chain(branch_at, wave):
    kernel = LinearGaussian(num_steps=10)
    for method in (DTS(branch_at=branch_at, wave=wave), ts.DiffusionTreeSearch(branch_at=branch_at, wave=wave)):
        found = ts.search(kernel, linear(1.0), method, budget=ts.Budget(nfe=1000))
        assert 970 <= found.cost.nfe <= 1000


def test_a_snapshot_with_a_lag_reads_told_leaves_only():
    for batch_size in (4, 64):
        method = DTS(wave=8, lag=1, widening_c=1, widening_alpha=0.5)
        for snapshot in ts.stream(
            LinearGaussian(), linear(1.2), method, budget=ts.Budget(nfe=600), batch_size=batch_size
        ):
            found = snapshot.result()
            log_w = found.log_weights.numpy()
            assert log_mean(log_w) == pytest.approx(found.log_z)


def test_no_weight_no_part_at_any_lambda():
    """A proposal that draws what p forbids: log p/q = -inf there, at λ = ∞ as well."""

    class Forbidden:
        num_steps, state_shape, dtype = 1, (1,), torch.int64

        def prior(self, noise, cond=None):
            return torch.zeros(len(noise), 1, dtype=torch.int64)

        def transition(self, x, t, cond=None):
            q, p = torch.tensor([0.3, 0.3, 0.4]).double(), torch.tensor([0.5, 0.5, 0.0]).double()
            return Categorical(q.expand(len(x), 1, 3), x, p.expand(len(x), 1, 3))

        def encode(self, prompts):
            return None

        def decode(self, x0):
            return x0

    for method in (
        DTS(lam=math.inf, wave=4),
        DTS(lam=5.0, wave=4),
        ts.DiffusionTreeSearch(backup="max", wave=4),
        ts.DiffusionTreeSearch(lam=math.inf, wave=4),
    ):
        found = ts.search(Forbidden(), lambda x: x[:, 0].double(), method, budget=ts.Budget(iterations=60))
        assert found.samples.max() == 2
        assert found.tree.value[0] <= 1.0
        assert found.draw(200).max() == 1


def test_uct_looks_elsewhere_among_forbidden_children():
    method = ts.DiffusionTreeSearch(widening_c=2, widening_alpha=0.3, wave=1)
    found = ts.search(LinearGaussian(), lambda x: x[:, 0] * 0 - math.inf, method, budget=ts.Budget(iterations=300))
    visits = found.tree.visits[found.tree.parent == 0]
    assert visits[:-1].min() > 0.5 * visits.mean()  # the last child is young
