"""TreeSearch with endpoints: its model against dense algebra and simulations, its costs, and what it finds."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import treesearch as ts
from tests.methods.test_tree_search import best_of, random_tree, simulate
from tests.support.beds import BEDS
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.core import looks
from treesearch.core.looks import (
    UNREAD,
    Prices,
    above_samples,
    allotted,
    look_index,
    pooled,
    read,
    regression,
    with_own,
)
from treesearch.core.nested_effects import Law, Seen, index_of, posterior
from treesearch.core.tree import ROOT
from treesearch.methods.base import Status
from treesearch.methods.tree_looks import FIRST
from treesearch.rewards.analytic import linear
from treesearch.testing import check_method, check_store

LOOKING = ts.TreeSearch(looks="endpoints")


# The model


def test_what_is_seen_enters_the_sweeps_exactly():
    """The dense posterior of all nodes given leaves and noisy looks at inner nodes, μ flat."""
    rng = np.random.default_rng(0)
    parent, depth = random_tree(rng)
    tau2 = np.array([0.0, 0.7, 0.2, 1.3, 0.4])
    value, y = simulate(rng, parent, depth, tau2)
    noise = np.array([np.inf, 0.3, 1.5, 0.1, np.inf])[depth]
    seen = Seen(value + rng.standard_normal(len(y)), np.where(rng.random(len(y)) < 0.5, 1 / noise, 0.0))
    on_path = np.eye(len(parent))
    for x in range(1, len(parent)):
        on_path[x] += on_path[parent[x]]
    cov = on_path @ np.diag(tau2[depth]) @ on_path.T
    told = np.flatnonzero(~np.isnan(y) | (seen.precision > 0))
    leaf = ~np.isnan(y[told])
    error = np.zeros(len(told))
    error[~leaf] = 1 / seen.precision[told][~leaf]
    data = np.where(leaf, y[told], seen.value[told])
    inverse, ones = np.linalg.inv(cov[np.ix_(told, told)] + np.diag(error)), np.ones(len(told))
    mu_var = 1 / (ones @ inverse @ ones)
    mu = mu_var * (ones @ inverse @ data)
    gain = cov[:, told] @ inverse
    found = posterior(parent, depth, y, tau2, seen)
    np.testing.assert_allclose(found.mean, mu + gain @ (data - mu), rtol=0, atol=1e-9)
    var = np.diag(cov - gain @ cov[told]) + (1 - gain @ ones) ** 2 * mu_var
    np.testing.assert_allclose(found.var, var, rtol=0, atol=1e-9)
    own = with_own(posterior(parent, depth, y, tau2), seen)  # one observation each, by Bayes
    plain = posterior(parent, depth, y, tau2)
    at = (seen.precision > 0) & (plain.var > 0)
    want = 1 / (1 / plain.var[at] + seen.precision[at])
    np.testing.assert_allclose(own.var[at], want, rtol=1e-12)
    pull = want * (plain.mean[at] / plain.var[at] + seen.precision[at] * seen.value[at])
    np.testing.assert_allclose(own.mean[at], pull, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("c", [0.9, 0.5, 0.0, -0.7])
def test_the_correlation_is_recovered_from_what_is_known_with_errors(c):
    """V = m + error independent of m: plain correlation of z and m would be diluted by the square root of .4."""
    rng = np.random.default_rng(1)
    value = rng.standard_normal(20_000)
    mean = 0.4 * value + math.sqrt(0.4 * 0.6) * rng.standard_normal(20_000)  # V | m ~ N(m, .6)
    z = c * value + math.sqrt(1 - c * c) * rng.standard_normal(20_000)
    found, count = regression(z, mean * 3, np.full(20_000, 0.6 * 9), 9.0)
    assert found == pytest.approx(c, abs=4 / count**0.5)
    assert count > 4_000
    assert abs(np.corrcoef(z, mean)[0, 1] - c * 0.4**0.5) < 0.03


def test_levels_are_pooled():
    few = pooled(np.array([0.0, 0.0, 0.0]), np.zeros(3))
    np.testing.assert_allclose(few, looks.PRIOR)
    sure = pooled(np.array([-0.5, 0.0, 0.0]), np.array([1e6, 0.0, 0.0]))
    assert sure[0] == pytest.approx(-0.5, abs=1e-3)
    assert sure[0] < sure[1] < 0
    assert pooled(np.array([0.0] * 3), np.full(3, 1e3)).max() < 0.01


@pytest.mark.parametrize("scale", ["value", "monotone", "noise", "opposite"])
def test_looks_are_read_by_what_they_have_shown(scale):
    """Of 200 rollouts: o is V where looks are values on any scale; they fade out where they are noise."""
    rng = np.random.default_rng(2)
    parent, depth = random_tree(rng, depths=3, fan=3, roots=200)
    tau2 = np.array([0.0, 1.0, 0.5, 0.5])
    value, y = simulate(rng, parent, depth, tau2)
    reward = {
        "value": value,
        "monotone": np.exp(value),
        "noise": rng.standard_normal(len(y)),
        "opposite": -value,
    }[scale]
    reward = np.where(np.isnan(y), reward, np.nan)
    reward[3] = -math.inf
    found = read(depth, reward, np.full(len(y), 1.0), 200, tau2, posterior(parent, depth, y, tau2))
    assert found.seen.precision[3] == 0  # a forbidden endpoint is no verdict
    at = (depth == 2) & (found.seen.precision > 0)
    if scale == "noise":
        assert np.abs(found.c[1:3]).max() < 0.25
        assert found.noise[1:3].min() > 10
    else:
        assert np.abs(found.c[1:3]).min() > 0.85
        assert found.c[2] * (-1 if scale == "opposite" else 1) > 0
        upper = at & (value > -0.5)  # the lowest rewards are not told apart
        assert np.corrcoef(found.seen.value[upper], value[upper])[0, 1] > (0.8 if scale == "opposite" else 0.9)


def test_nodes_above_samples():
    parent = np.array([-1, 0, 1, 0, 3, 3])
    assert above_samples(parent, np.array([0, 0, 0, 0, 1, 0], bool)).tolist() == [True, False, False, True, True, False]


def test_the_index_of_a_look():
    """What it can be hoped to show has the variance of the posterior mean; without noise it is a sample's, cheaper."""
    law = Law(np.array([0.0, 0.3, 0.5]), np.array([0.8, 0.5, 0.0]), np.array([1.0, 1.2, 2.0]), np.array([10.0, 4.0]))
    exact, rough, none = (Prices(np.array([0.0, w, 0.0]), np.array([2.0, 1.0])) for w in (0.0, 0.9, UNREAD))
    args = (0, 3, 2, 0.4, 0.2, law)
    spread = 0.2 / (1 + 2 * 0.2 / 0.8) + 0.3
    hope = stats.norm.sf(0.8, scale=spread**0.5)
    assert look_index(*args, exact) == pytest.approx(index_of(*args) * 10 / (2 + hope * 8), rel=1e-12)
    both = 0.9 * 0.5 / 1.4
    sd = (spread * (spread + both) / (spread + 0.9)) ** 0.5
    z = 0.8 / sd
    hope = stats.norm.sf(z)
    want = (sd * stats.norm.pdf(z) - 0.8 * hope) / (1 + 5 * hope) / (2 + 8 * hope)
    assert look_index(*args, rough) == pytest.approx(want, rel=1e-9)
    assert look_index(*args, none) == -1


@pytest.mark.parametrize(("noise", "most", "fewest"), [(0.0, 12, 1), (0.05, 12, 2), (20.0, 4, 5), (UNREAD, 4, 5)])
def test_children_of_a_cascade_go_where_looks_tell_nodes_apart(noise, most, fewest):
    """Values known exactly: all to the best few; hardly known: spread out. At x_T one each, the best first."""
    tau2 = np.array([0.0, 0.3, 0.3, 0.4])
    law = Law(tau2, np.array([1.0, 0.7, 0.4, 0.0]), np.zeros(4), np.array([12.0, 9.0, 5.0]))
    prices = Prices(np.array([UNREAD, noise, noise, UNREAD]), np.array([2.0, 3.0, 4.0]))
    z, known = np.linspace(-1.5, 1.5, 6), 0.3 * min(noise, 20.0) / (0.3 + min(noise, 20.0))
    mean, var = z * math.sqrt(0.3 - known), np.full(6, known)
    taken = np.bincount(allotted(1, np.zeros(6), mean, var, law, prices, 5), minlength=6)
    assert taken.tolist() == [0, 1, 1, 1, 1, 1]
    taken = np.bincount(allotted(2, np.zeros(6), mean, var, law, prices, 12), minlength=6)
    assert taken.sum() == 12
    assert taken[5] == taken.max() <= most
    assert np.count_nonzero(taken) >= fewest
    fewer = np.bincount(allotted(2, np.array([0, 0, 0, 0, 0, 9.0]), mean, var, law, prices, 12), minlength=6)
    assert fewer[5] < taken[5]


def test_the_target_of_a_cascade_is_the_best_of_its_nodes():
    """Values known exactly, in two clusters: one child more of a node of the lower one would hardly reach the best."""
    tau2 = np.array([0.0, 0.3, 0.3, 0.4])
    law = Law(tau2, np.array([1.0, 0.7, 0.4, 0.0]), np.zeros(4), np.array([12.0, 9.0, 5.0]))
    mean, var = np.array([0.0, 0.0, 4.0, 4.0]), np.zeros(4)
    for noise in (0.0, UNREAD):
        prices = Prices(np.array([UNREAD, noise, noise, UNREAD]), np.array([2.0, 3.0, 4.0]))
        taken = np.bincount(allotted(2, np.zeros(4), mean, var, law, prices, 200), minlength=4)
        assert taken.tolist() == [0, 0, 100, 100]


# The search


def searched(bed, reward, budget, method=LOOKING, **how):
    return ts.search(bed, reward, method, budget=ts.Budget(**budget), **how)


@pytest.mark.parametrize("limit", [{"nfe": 333}, {"nfe": 600}, {"reward_calls": 200}, {"iterations": 40}, {"nfe": 5}])
def test_no_limit_is_exceeded(limit):
    result = searched(BEDS["gaussian"], linear(1.0), limit)
    search_nodes = len(result.tree) - 1
    assert result.cost.nfe <= limit.get("nfe", math.inf)
    assert result.cost.reward_calls == search_nodes <= limit.get("reward_calls", math.inf)
    assert result.cost.repeated_nfe == 0
    assert result.status == Status.BUDGET
    assert len(result.leaves)


def test_what_it_counts_is_what_it_costs():
    """NFE and calls as entered when they were chosen are those that the engine counts."""
    for nfe in (40, 577):
        result = searched(BEDS["gaussian"], linear(1.0), {"nfe": nfe})
        inner = result.tree.t > 0
        assert not np.isnan(result.tree.reward[1:]).any()
        assert result.cost.nfe > nfe - 6
        assert result.diagnostics["looks"] == inner.sum() - 1
        open_ends = np.flatnonzero((result.tree.children == 0) & inner)
        assert not set(open_ends.tolist()) & {ROOT}


def test_it_obeys_the_laws():
    check_method(ts.TreeSearch(looks="endpoints", branch_at=(5, 2)), BEDS["gaussian"], linear(1.2))


def test_a_run_goes_on_where_it_was_cut(tmp_path):
    check_store(ts.TreeSearch(looks="endpoints", branch_at=(5, 2)), BEDS["gaussian"], linear(1.2), tmp_path, cuts=2)


@pytest.mark.parametrize("fresh", [0.25, 0.5])
def test_fresh_rollouts_keep_their_share(fresh):
    """At budgets that end within the first cascade, after it and within the second."""
    bed = LinearGaussian(num_steps=20)
    for rollouts in (4, 8, 17, 20, 34, 61):
        method = ts.TreeSearch(looks="endpoints", fresh=fresh, branch_at=(20, 10, 4))
        tree = searched(bed, linear(1.0), {"nfe": 20 * rollouts}, method).tree
        ends = tree.children_of(ROOT)
        while (on := tree.children[ends] > 0).any():
            ends = np.where(on, tree.kids[tree.start[ends]], ends)
        assert np.count_nonzero(tree.t[ends] == 0) >= int(fresh * rollouts)


@pytest.mark.parametrize("reward", ["equal", "forbidden", "noise"])
def test_degenerate_rewards(reward):
    of = {
        "equal": lambda x: torch.ones(len(x)),
        "forbidden": lambda x: torch.full((len(x),), -math.inf),
        "noise": lambda x: torch.sin(1e4 * x[:, 0].double()),
    }[reward]
    result = searched(BEDS["gaussian"], of, {"nfe": 300})
    assert len(result.leaves) >= 10
    if reward != "noise":  # best-of-N, but for the x_T that are looked at beside
        rooted = above_samples(result.tree.parent, result.tree.t == 0)[result.tree.children_of(ROOT)]
        assert rooted.sum() == len(result.leaves) >= (1 - FIRST) * 60


def test_it_is_off_by_default():
    a, b = (searched(BEDS["gaussian"], linear(1.0), {"nfe": 150}, m) for m in (ts.TreeSearch(), LOOKING))
    assert np.isnan(a.tree.reward[a.tree.t > 0]).all()
    assert b.cost.reward_calls > 2 * a.cost.reward_calls
    assert "reliability" not in a.diagnostics
    assert list(b.diagnostics["reliability"]) == [5, 4, 3, 2, 1]
    with pytest.raises(ValueError, match="unknown looks 'drafts': choose none or endpoints"):
        ts.TreeSearch(looks="drafts")


def test_exact_endpoints_are_worth_many_rollouts():
    """20 rollouts' worth of NFE find more than best-of-150 on the Gaussian chain, by two standard errors over tasks."""
    bed = LinearGaussian(num_steps=20)
    tasks = searched(bed, linear(1.0), {"nfe": 24 * 400}, prompts=list(range(24))).tasks
    found = (np.array([float(task.rewards.max()) for task in tasks]) - bed.mean) / bed.std
    assert found.mean() - 2 * found.std(ddof=1) / 24**0.5 > best_of(150)


def test_it_begins_with_a_cascade():
    """16 paths side by side: a quarter are best-of-N's own; more x_T are looked at than go on, and nothing is lost."""
    bed = LinearGaussian(num_steps=20)
    result = searched(bed, linear(1.0), {"nfe": 16 * 20 + 16 * 2}, ts.TreeSearch(looks="endpoints", branch_at=(20, 10)))
    tree = result.tree
    roots = tree.children_of(ROOT)
    first = roots[:35]  # 4 rollouts, 12 + 19 looks
    assert (tree.t[first] == 20).all()
    assert np.isin(np.arange(1, 36), first).all()
    on = tree.children[first] > 0
    assert on[:4].all()
    assert on.sum() <= 16
    chosen = first[4:][on[4:]]
    assert tree.reward[chosen].min() >= np.sort(tree.reward[first[4:]])[-16]
    plain = ts.search(bed, linear(1.0), ts.BestOfN(), budget=ts.Budget(nfe=4 * 20))
    theirs = plain.rewards.numpy()
    assert np.isin(theirs.round(5), result.rewards.numpy().round(5)).all()
