"""TreeSearch: its model against dense algebra and simulations, its guarantee, and what it finds."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import treesearch as ts
from tests.support.beds import BEDS
from treesearch.backends.base import Spec, describe
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.budget import Share
from treesearch.citations import bibtex
from treesearch.core import nested_effects
from treesearch.core.nested_effects import Law, fit, improvement, index_of, masses, posterior, scores
from treesearch.core.noise import root_key
from treesearch.core.tree import ROOT
from treesearch.methods import METHODS, nested_search
from treesearch.methods.base import Problem, Status
from treesearch.methods.nested_search import START, Pool
from treesearch.registry import registry as specs
from treesearch.report import trees
from treesearch.rewards.analytic import linear
from treesearch.testing import bare_chain, check_method, check_store

SEARCH = ts.TreeSearch
STEPS = 20


def random_tree(rng, depths=4, fan=3, roots=4):
    """Parents and depths, children behind their parents, every path down to a leaf at the last depth."""
    parent, depth, layer = [-1], [0], [0]
    for level in range(1, depths + 1):
        layer = [
            (parent.append(x), depth.append(level), len(parent) - 1)[2]
            for x in layer
            for _ in range(roots if level == 1 else rng.integers(1, fan + 1))
        ]
    return np.array(parent), np.array(depth)


def simulate(rng, parent, depth, tau2):
    """V of every node, and rewards at the leaves alone."""
    value = np.zeros(len(parent))
    for x in range(1, len(parent)):
        value[x] = value[parent[x]] + math.sqrt(tau2[depth[x]]) * rng.standard_normal()
    return value, np.where(depth == depth.max(), value, np.nan)


# The model


@pytest.mark.parametrize("seed", range(3))
def test_the_sweeps_are_the_dense_posterior(seed):
    """V = μ + Σ δ with a flat μ: the joint Gaussian of all nodes given the leaves, by generalised least squares."""
    rng = np.random.default_rng(seed)
    parent, depth = random_tree(rng)
    tau2 = np.array([0.0, 0.7, 0.2, 1.3, 0.4])
    y = simulate(rng, parent, depth, tau2)[1]
    leaf = ~np.isnan(y)
    on_path = np.eye(len(parent))
    for x in range(1, len(parent)):
        on_path[x] += on_path[parent[x]]
    cov = on_path @ np.diag(tau2[depth]) @ on_path.T
    inverse, ones = np.linalg.inv(cov[np.ix_(leaf, leaf)]), np.ones(leaf.sum())
    mu_var = 1 / (ones @ inverse @ ones)
    mu = mu_var * (ones @ inverse @ y[leaf])
    gain = cov[:, leaf] @ inverse
    rest = 1 - gain @ ones
    found = posterior(parent, depth, y, tau2)
    np.testing.assert_allclose(found.mean, mu + gain @ (y[leaf] - mu), rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.var, np.diag(cov - gain @ cov[leaf]) + rest**2 * mu_var, rtol=0, atol=1e-9)
    effect, above = np.arange(1, len(parent)), parent[1:]  # δ = V(x) - V(parent)
    joint = cov - gain @ cov[leaf] + mu_var * np.outer(rest, rest)
    spread = joint[effect, effect] + joint[above, above] - 2 * joint[effect, above]
    for level in range(1, 5):
        at = depth[1:] == level
        assert found.counts[level] == pytest.approx((1 - spread[at] / tau2[level]).sum(), abs=1e-9)
        squares = (found.mean[1:] - found.mean[above])[at] ** 2
        assert found.squares[level] == pytest.approx(squares.sum(), abs=1e-9)


def test_what_is_known_about_effects_adds_up():
    """Σ counts = leaves - 1: the rewards' degrees of freedom beside the mean."""
    parent, depth = random_tree(np.random.default_rng(5))
    y = simulate(np.random.default_rng(6), parent, depth, np.full(5, 0.5))[1]
    found = posterior(parent, depth, y, np.array([0.0, 0.3, 0.1, 2.0, 0.7]))
    assert found.counts.sum() == pytest.approx(np.isfinite(y).sum() - 1, abs=1e-9)


def test_variance_components_are_recovered():
    rng = np.random.default_rng(0)
    parent, depth = random_tree(rng, roots=1000)
    tau2, prior, found = np.array([0.0, 0.5, 0.1, 1.0, 0.2]), np.array([0.0, 0.45, 0.45, 0.45, 0.45]), []
    for _ in range(10):
        y, guess = simulate(rng, parent, depth, tau2)[1], prior
        for _ in range(15):
            guess = fit(parent, depth, y, guess, prior)
        found.append(guess)
    mean, se = np.mean(found, 0), np.std(found, 0, ddof=1) / 10**0.5
    assert (np.abs(mean - tau2)[1:] < 4 * se[1:] + 0.005).all()
    assert se.max() < 0.03


def test_a_level_without_data_follows_its_neighbours(monkeypatch):
    """Siblings at the last level alone, and equal: little is resolved just above it, as far as anyone knows."""
    parent, depth, y = [-1], [0], [np.nan]
    for reward in np.random.default_rng(1).standard_normal(30):
        at = len(parent)
        parent += [0, at, at + 1, *[at + 2] * 4]
        depth += [1, 2, 3, *[4] * 4]
        y += [np.nan] * 3 + [reward] * 4
    prior = np.array([0.0, 0.25, 0.25, 0.25, 0.25])

    def fitted():
        tau2 = prior
        for _ in range(5):
            tau2 = fit(np.array(parent), np.array(depth), np.array(y), tau2, prior)
        return tau2

    found = fitted()
    assert found[4] < 0.001
    assert found[1:].sum() == pytest.approx(np.nanvar(y), rel=0.5)
    monkeypatch.setattr(nested_effects, "BORROWED", 0.0)
    alone = fitted()
    assert found[3] < 0.95 * alone[3]
    assert found[3] < found[2] < found[1]


@pytest.mark.parametrize(("gap", "sd"), [(0.0, 1.0), (1.3, 0.7), (-2.0, 1.5), (3.0, 1.0)])
def test_the_improvement_is_the_expectation(gap, sd):
    want = stats.norm.expect(lambda y: max(y - gap, 0.0), scale=sd, lb=gap, ub=gap + 12 * sd)
    assert improvement(gap, sd) == pytest.approx(want, rel=1e-6)
    draws = np.random.default_rng(0).normal(0, sd, 400_000)
    gains = np.maximum(draws - gap, 0)
    assert abs(gains.mean() - improvement(gap, sd)) < 4 * gains.std() / 400_000**0.5


def test_the_improvement_has_limits():
    assert improvement(-1.5, 0.0) == 1.5
    assert improvement(1.5, 0.0) == 0.0
    assert improvement(60.0, 1.0) == 0.0
    gaps = np.linspace(-3, 12, 200)
    values = np.array([improvement(gap, 1.0) for gap in gaps])
    assert (values >= 0).all()
    assert (np.diff(values) <= 0).all()


def test_children_and_rollouts_in_flight_lower_an_index():
    """k in flight: v -> v / (1 + k v / below); n children and they: divided by 1 + (n + k) P(V' > target)."""
    law = Law(np.array([0.0, 0.3, 0.5]), np.array([0.8, 0.5, 0.0]), np.array([1.0, 1.2, 2.0]), np.array([10.0, 4.0]))
    mean, var, tried = np.array([0.4, 0.5]), np.array([0.2, 0.3]), np.array([3, 1])
    for k in range(4):
        sd = (0.2 / (1 + k * 0.2 / 0.8) + 0.3) ** 0.5
        want = improvement(1.2 - 0.4, sd) / (1 + (3 + k) * stats.norm.sf(0.8, scale=sd)) / 10.0
        assert index_of(0, 3, k, 0.4, 0.2, law) == pytest.approx(want, rel=1e-12)
    index = np.array([index_of(d, tried[d], 0, mean[d], var[d], law) for d in (0, 1)])
    pool = Pool(np.array([7, 9]), np.array([0, 1]), tried, index.copy(), mean, var, law)
    taken = [pool.pop() for _ in range(12)]
    flying = [0, 0]
    for node, depth in taken:  # each is the largest index of that moment
        now = [index_of(d, tried[d], flying[d], mean[d], var[d], law) for d in (0, 1)]
        assert (node, depth) == ((7, 0), (9, 1))[int(np.argmax(now))]
        flying[depth] += 1
    assert min(flying) > 0


# The scale of the rewards


def test_scores_are_normal_scores_inside_and_a_line_outside():
    reward = np.exp(np.random.default_rng(0).standard_normal(4000))
    even = np.full(4000, 1 / 4000)
    y = scores(reward, even, 400)
    z, top = stats.norm.ppf((stats.rankdata(reward) - 0.5) / 4000), stats.norm.isf(0.5 / 400)
    inside = (z > -0.6) & (z < top)
    assert np.abs(y - z)[inside].max() < 0.15
    assert len(set(y[z < -0.76].tolist())) == 1
    outside = np.flatnonzero(z > top + 0.01)
    slope = np.diff(y[outside]) / np.diff(reward[outside])
    np.testing.assert_allclose(slope, slope[0], rtol=1e-6)
    order = np.argsort(reward)
    assert (np.diff(y[order]) >= 0).all()


def test_scores_do_not_depend_on_the_scale():
    rng = np.random.default_rng(2)
    reward, mass = rng.standard_normal(300), rng.dirichlet(np.ones(300))
    np.testing.assert_allclose(scores(1e6 * reward - 4e5, mass, 30), scores(reward, mass, 30), atol=1e-9)


def test_masses_are_probabilities_of_a_random_descent():
    parent, depth = random_tree(np.random.default_rng(3))
    children = np.bincount(parent[1:], minlength=len(parent))
    mass = masses(parent, children)
    for level in range(5):
        assert mass[depth == level].sum() == pytest.approx(1)
    assert mass[1] == 1 / 4


@pytest.mark.parametrize(
    "reward",
    [
        [-math.inf] * 8,
        [1.0] * 8,
        [math.inf] * 8,
        [-math.inf] * 7 + [0.0],
        [0.0] * 7 + [1.0],
        [-math.inf, math.inf] * 4,
        [1e300, -1e300] * 4,
        [0.0],
    ],
)
def test_scores_of_odd_rewards(reward):
    y = scores(np.array(reward), np.full(len(reward), 1 / len(reward)), len(reward))
    assert np.isfinite(y).all()
    order = np.argsort(reward, kind="stable")
    assert (np.diff(y[order]) >= 0).all()


# The search


def spec_of(stochastic=(True,) * (STEPS + 1)):
    return Spec(STEPS, (1,), (1,), tuple(stochastic), torch.device("cpu"), torch.float32, None)


def drive(resolved, seed, nfe, method=None):
    """Best reward of a search where N(0, resolved(t)) of it is decided by level t (1 at t = 0), and the search."""
    search = (method or SEARCH()).start(Problem(0, spec_of(), root_key(seed, 0), Share(nfe=nfe)))
    rng, tree, value = np.random.default_rng(seed), search.tree, np.zeros(1)
    while search.status == Status.RUNNING:
        if not len((work := search.ask(16)).first):
            break
        value = np.append(value, rng.standard_normal(len(tree) - len(value)))
        for x in range(work.first[0], len(tree)):
            above = tree.parent[x]
            before = resolved(tree.t[above]) if above != ROOT else 0.0
            value[x] = value[above] + (resolved(tree.t[x]) - before) ** 0.5 * value[x]
        tree.reward[work.last] = value[work.last]
        search.tell(work)
    return np.nanmax(tree.reward), search


def best_of(n):
    """E max of n standard normals."""
    return stats.norm.expect(lambda x: n * x * stats.norm.cdf(x) ** (n - 1), lb=-10, ub=10)


def evenly(t):
    return 1 - 0.9 * t / STEPS


def early(t):
    return 1 - 0.9 * (t / STEPS) ** 4


def at_the_prior(t):
    return 1.0


def plain_wave(search, wave):
    """The next wave by the formulas, node by node."""
    tree, tau2 = search.tree, search.tau2
    depth = [list(search.levels).index(t) for t in tree.t]
    mass = np.ones(len(tree))
    for x in range(1, len(tree)):
        mass[x] = mass[tree.parent[x]] / np.count_nonzero(tree.parent == tree.parent[x])
    y = np.full(len(tree), np.nan)
    y[tree.leaves] = scores(tree.reward[tree.leaves], mass[tree.leaves], np.count_nonzero(tree.parent == ROOT))
    mean, var, *_ = posterior(tree.parent, np.array(depth), y, tau2)
    line = [int(np.nanargmax(tree.reward))]
    while line[0] != ROOT:
        line.insert(0, int(tree.parent[line[0]]))
    margin = nested_search.MARGIN * tau2.sum() ** 0.5
    flying = np.zeros(len(tree))

    def index(x):
        k, d, t = flying[x], depth[x], min(int(tree.t[x]), STEPS)
        sd = (var[x] / (1 + k * var[x] / tau2[d + 1 :].sum()) + tau2[d + 1]) ** 0.5
        gap = mean[line[d + 1]] + margin - mean[x]
        gain = sd * stats.norm.pdf(gap / sd) - gap * stats.norm.sf(gap / sd)
        return gain / (1 + (tree.children[x] + k) * stats.norm.sf(gap / sd)) / (t + 0.1 * STEPS)

    picks, nfe, fresh = [], search.nfe, int(tree.children[ROOT]) * STEPS
    inner = np.flatnonzero(tree.t > 0)
    now = np.array([index(x) for x in inner])
    for _ in range(wave):
        best = ROOT
        if fresh > 0.25 * nfe:
            at = int(np.argmax(now))
            best = int(inner[at])
            flying[best] += 1
            now[at] = index(best)
        picks.append(best)
        nfe += min(int(tree.t[best]), STEPS)
        fresh += STEPS * (best == ROOT)
    return picks


@pytest.mark.parametrize("nfe", [500, 1500])
def test_a_wave_is_the_plain_one(nfe):
    search = drive(evenly, 1, nfe)[1]
    search.extend(Share(nfe=2 * nfe))
    want = plain_wave(search, 16)
    assert len(set(want)) > 4
    assert search.ask(16).source.tolist() == want


@pytest.mark.parametrize(("resolved", "factor"), [(evenly, 10), (early, 4)])
def test_it_needs_fewer_nfe_than_best_of_n(resolved, factor):
    """The mean of 20 searches is above E max of best-of-N with `factor` times the NFE, by two standard errors."""
    for rollouts in (150, 250):
        found = np.array([drive(resolved, seed, rollouts * STEPS)[0] for seed in range(20)])
        assert found.mean() - 2 * found.std(ddof=1) / 20**0.5 > best_of(factor * rollouts)


def test_it_is_hardly_worse_where_a_tree_cannot_help():
    """The reward is decided by x_T: within three tenths of a standard deviation of best-of-N at equal NFE."""
    for rollouts in (60, 200):
        found = np.array([drive(at_the_prior, seed, rollouts * STEPS)[0] for seed in range(20)])
        assert found.mean() > best_of(rollouts) - 0.3


def test_it_beats_best_of_n_on_the_gaussian_chain():
    """100 rollouts' worth of NFE find more than best-of-300, by two standard errors over 24 tasks."""
    bed = LinearGaussian(num_steps=20)
    tasks = ts.search(bed, linear(1.0), SEARCH(), prompts=list(range(24)), budget=ts.Budget(nfe=24 * 2000)).tasks
    found = (np.array([float(task.rewards.max()) for task in tasks]) - bed.mean) / bed.std
    assert found.mean() - 2 * found.std(ddof=1) / 24**0.5 > best_of(300)


@pytest.mark.parametrize("fresh", [0.1, 0.5, 1.0])
def test_the_guarantee(fresh):
    """At every wave ⌊fresh·B / T⌋ rollouts from the prior at least; they are best-of-N's."""
    bed, method = BEDS["gaussian"], SEARCH(fresh=fresh, wave=5)
    for snapshot in ts.stream(bed, linear(1.0), method, budget=ts.Budget(nfe=2000)):
        result = snapshot.result()
        tree, nfe = result.tree, snapshot.record["nfe"]
        assert tree.children[ROOT] >= max(min(START, nfe // 5), math.floor(fresh * nfe / 5))
    firsts = tree.children_of(ROOT)
    leaf = firsts + (tree.t[firsts[0]] > 0) * 5  # the leaf of a fresh rollout: one node a level
    samples = result.samples[torch.from_numpy(np.isin(result.leaves, leaf))]
    assert torch.equal(samples, bare_chain(bed, len(firsts))[-1])
    if fresh == 1:
        assert len(firsts) == 400


def test_a_smaller_budget_is_a_prefix():
    whole = drive(evenly, 3, 6000)[1].tree
    for nfe in (20, 399, 1234, 4000):
        part = drive(evenly, 3, nfe)[1].tree
        assert len(part) < len(whole)
        for name in ("parent", "t", "key"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[: len(part)])


@pytest.mark.parametrize(
    "limit", [{"nfe": 333}, {"nfe": 4000}, {"reward_calls": 100}, {"iterations": 37}, {"nfe": 5000, "reward_calls": 21}]
)
def test_no_limit_is_exceeded(limit):
    result = ts.search(BEDS["gaussian"], linear(1.0), SEARCH(), budget=ts.Budget(**limit))
    assert result.cost.nfe <= limit.get("nfe", math.inf)
    assert result.cost.reward_calls <= limit.get("reward_calls", math.inf)
    assert len(result.leaves) == result.cost.reward_calls == limit.get("iterations", result.cost.reward_calls)
    assert result.status == Status.BUDGET
    if "reward_calls" in limit:
        assert result.cost.reward_calls == limit["reward_calls"]


def test_seconds_stop_it():
    result = ts.search(BEDS["gaussian"], linear(1.0), SEARCH(), budget=ts.Budget(seconds=0.3))
    assert len(result.leaves) >= 16
    assert result.status == Status.BUDGET


@pytest.mark.parametrize("method", [SEARCH(), SEARCH(wave=40, branch_at=(5, 2), fresh=0.1)])
def test_it_obeys_the_laws(method):
    check_method(method, BEDS["gaussian"], linear(1.2))


def test_it_obeys_the_laws_on_discrete_states_and_rewards():
    check_method(SEARCH(branch_at=(3, 2)), BEDS["masked"], lambda x: x.double().sum(1))


def test_a_run_goes_on_where_it_was_cut(tmp_path):
    check_store(SEARCH(wave=6), BEDS["gaussian"], linear(1.2), tmp_path, cuts=12)


def test_a_larger_budget_goes_on(tmp_path):
    """A run that was extended keeps its tree and may choose otherwise only in the wave that the budget cut."""
    bed, reward, method = BEDS["gaussian"], linear(1.0), SEARCH(wave=4)
    ts.search(bed, reward, method, budget=ts.Budget(nfe=501), store=tmp_path / "run")
    more = ts.resume(tmp_path / "run", bed, reward, budget=ts.Budget(nfe=1500))
    assert 1490 <= more.cost.nfe <= 1500
    assert more.cost.repeated_nfe == 0
    straight = ts.search(bed, reward, method, budget=ts.Budget(nfe=501))
    np.testing.assert_array_equal(more.tree.key[: len(straight.tree)], straight.tree.key)


@pytest.mark.parametrize("keep", ["all", "frontier", "none"])
def test_states_may_be_dropped(keep):
    search = [
        ts.search(BEDS["gaussian"], linear(1.0), SEARCH(), budget=ts.Budget(nfe=600), keep_states=how)
        for how in ("all", keep)
    ]
    assert torch.equal(search[0].samples, search[1].samples)


REWARDS = {
    "equal": lambda x: torch.ones(len(x)),
    "forbidden": lambda x: torch.full((len(x),), -math.inf),
    "mostly forbidden": lambda x: torch.where(x[:, 0] > 1.0, x[:, 0].double(), -math.inf),
    "rare": lambda x: (x[:, 0] > 1.5).double(),
    "steps": lambda x: (2 * x[:, 0]).floor(),
    "huge": lambda x: 1e200 * x[:, 0].double(),
    "two values": lambda x: (x[:, 0] > 0).double(),
}


@pytest.mark.parametrize("name", REWARDS)
def test_degenerate_rewards(name):
    result = ts.search(BEDS["gaussian"], REWARDS[name], SEARCH(), budget=ts.Budget(nfe=800))
    assert result.cost.nfe >= 796
    tree = result.tree
    assert not np.isnan(tree.value).any() or name in ("equal", "forbidden")
    finite = tree.reward[np.isfinite(tree.reward)]
    if len(finite) and name not in ("equal", "forbidden"):  # values are rewards, not scores
        inner = tree.value[tree.t > 0]
        assert finite.min() <= inner.min() <= inner.max() <= finite.max()
    if name in ("equal", "forbidden"):
        assert tree.children[ROOT] == 160  # best-of-N
    if name == "mostly forbidden":
        assert result.rewards.isfinite().sum() > 0
        assert tree.children[ROOT] < 160


def test_forbidden_is_worse_than_the_worst():
    """With one finite reward among forbidden ones there is something to go on."""
    mass = np.full(100, 0.01)
    rare = np.where(np.arange(100) == 7, 0.3, -np.inf)
    y = scores(rare, mass, 100)
    assert y[7] > 2 > np.delete(y, 7).max()
    assert np.ptp(np.delete(y, 7)) == 0
    ranks = np.where(np.arange(100) < 60, -np.inf, np.arange(100) / 10)
    np.testing.assert_allclose(scores(ranks, mass, 100)[60:], scores(np.arange(100) / 10, mass, 100)[60:], atol=0.6)
    result = ts.search(
        BEDS["gaussian"], lambda x: torch.where(x[:, 0] > 1.2, 0.0, -torch.inf), SEARCH(), budget=ts.Budget(nfe=1_500)
    )
    assert result.tree.children[ROOT] < 200  # some of the NFE go below what was found


def test_it_branches_only_where_steps_have_noise():
    still = spec_of([True, False, False, *[True] * (STEPS - 2)])
    assert min(SEARCH().levels(still)) == 4
    assert SEARCH().levels(spec_of())[-1] == 1
    with pytest.raises(ValueError, match="deterministic below"):
        SEARCH(branch_at=(20, 2)).levels(still)
    flow = spec_of([True] + [False] * STEPS)
    with pytest.raises(ValueError, match="BestOfN"):
        SEARCH().levels(flow)


def test_default_levels():
    assert SEARCH().levels(describe(LinearGaussian(num_steps=50))) == (50, 45, 40, 35, 30, 25, 20, 15, 10, 5, 3, 2, 1)
    assert SEARCH().levels(describe(LinearGaussian(num_steps=1))) == (1,)
    assert SEARCH().levels(describe(LinearGaussian(num_steps=3))) == (3, 2, 1)
    long = SEARCH().levels(describe(LinearGaussian(num_steps=1000)))
    assert long[:10] == tuple(range(1000, 0, -100))
    assert long[10:] == (60, 36, 22, 13, 8, 5, 3, 2, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fresh": 1.5}, "fresh is 1.5"),
        ({"fresh": math.nan}, "fresh"),
        ({"overhead": -1}, "overhead is -1"),
        ({"overhead": math.inf}, "overhead"),
        ({"wave": 0}, "wave is 0"),
        ({"branch_at": (60,)}, "outside"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SEARCH(**settings).levels(spec_of())


def test_what_it_shows():
    result = ts.search(BEDS["gaussian"], linear(1.0), SEARCH(), budget=ts.Budget(nfe=800))
    resolved = result.diagnostics["resolved"]
    assert list(resolved) == [5, 4, 3, 2, 1, 0]
    assert 0.2 < sum(resolved.values()) < 5
    assert result.diagnostics["fresh"] == result.tree.children[ROOT]
    assert {str(flag.name) for flag in result.certificate().flags} == {"greedy", "shared_ancestors"}
    assert result.log_z is None
    assert np.isfinite(trees.layout(result.tree).value).all()


def test_it_is_registered():
    assert METHODS["TreeSearch"] is SEARCH
    assert specs.method("tree_search(fresh=0.5)") == SEARCH(fresh=0.5)
    assert "Efficient Global Optimization" in bibtex(SEARCH.papers)
