"""Baselines of the search kind beside plain versions of themselves: one node at a time, written from the papers."""

import itertools
import math

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.core.test_tree_reference import Plain
from tests.support import laws
from tests.support.beds import BEDS
from treesearch.backends.base import describe
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.citations import bibtex
from treesearch.core.noise import child_keys, root_key
from treesearch.core.tree import ROOT
from treesearch.methods import METHODS
from treesearch.registry import registry as specs
from treesearch.rewards.analytic import linear
from treesearch.testing import check_budget, check_method, noise

DFS, RBF, BEAM, MCTS = ts.DepthFirst, ts.RolloverBudget, ts.LookaheadBeam, ts.MCTS
R = linear(1.0)
EVERY = [DFS, RBF, BEAM, MCTS]


def run(kernel, method, reward=R, **budget):
    return ts.search(kernel, reward, method, budget=ts.Budget(**budget), batch_size=64)


# Limits.


@pytest.mark.parametrize(
    "method",
    [
        DFS(threshold=-math.inf),
        DFS(threshold=9.0, backtracks=0),
        RBF(quota=1),
        RBF(quota=3, initial=1, schedule=(0,)),
        BEAM(beam_width=1, branching=1),
        MCTS(widening_alpha=1.0),
    ],
    ids=["dfs", "no backtracks", "rbf", "one level", "beam", "mcts"],
)
def test_a_search_without_choices_is_the_base_sampler(bed, method):
    if bed is BEDS["masked"] and isinstance(method, (BEAM, MCTS)):
        pytest.skip("its prior is deterministic: branch_at is for the user to choose")
    reward = lambda x: x[:, 0].double()  # noqa: E731
    budget = {"nfe": 100 * bed.num_steps}
    assert torch.equal(run(bed, method, reward, **budget).samples, run(bed, ts.BestOfN(), reward, **budget).samples)


def test_at_the_published_widening_mcts_begins_as_best_of_n(gaussian):
    found = run(gaussian, MCTS(), iterations=36)
    assert torch.equal(found.samples, run(gaussian, ts.BestOfN(), iterations=36).samples)


def test_draws_of_the_prior_alone_are_best_of_n(gaussian):
    """A schedule of x_0 alone makes rollover a best-of-N of its initial draws."""
    found = run(gaussian, RBF(quota=5, schedule=(0,), beside=1), iterations=3)
    assert torch.equal(found.samples, run(gaussian, ts.BestOfN(), iterations=15).samples)


# The algorithms, one node at a time.


class Paths:
    """A tree grown by hand: a child's noise has its own key, a first child goes on with its parent's."""

    def __init__(self, kernel, reward, seed=0):
        self.kernel, self.reward_of, self.spec, self.steps = kernel, reward, describe(kernel), kernel.num_steps
        self.parent, self.t, self.key = [-1], [self.steps + 1], [root_key(seed, 0)]
        self.x, self.reward, self.born = [None], [math.nan], [0]
        self.calls, self.evaluated = 0, set()

    def child(self, node, level, *, score=True):
        """A new child at a level, and its reward: that of its endpoint above x_0."""
        ordinal = np.array([self.born[node]])
        key = child_keys(np.array([self.key[node]], np.uint64), self.t[node], ordinal, at_root=node == ROOT)
        self.born[node] += 1
        return self.go_on(node, level, key, score=score)

    def go_on(self, node, level, key, *, score=True):
        x, me = self.x[node], len(self.t)
        for t in range(self.t[node], level, -1):
            z = noise(self.spec, key, t)
            known = node if t == self.t[node] and not math.isnan(self.reward[node]) else None
            x = self.kernel.prior(z) if t > self.steps else self.law(x, t, known).sample(z)
        reward = float(self.reward_of(self.law(x, level, me).endpoint if level else x)) if score else math.nan
        for column, entry in zip(
            (self.parent, self.t, self.key, self.x, self.reward, self.born),
            (node, level, int(key[0]), x, reward, 0),
            strict=True,
        ):
            column.append(entry)
        return me

    def law(self, x, t, node):
        """A scored node is evaluated once, whatever starts from it."""
        self.calls += node is None or node not in self.evaluated
        if node is not None:
            self.evaluated.add(node)
        return self.kernel.transition(x, torch.tensor([t]))

    def matches(self, found):
        tree = found.tree
        for name in ("parent", "t", "key"):
            assert getattr(tree, name).tolist() == getattr(self, name), name
        np.testing.assert_allclose(tree.reward, self.reward, rtol=0, atol=1e-12)
        assert torch.equal(found.samples, torch.cat([self.x[i] for i in found.leaves]))
        assert found.cost.nfe == self.calls
        assert found.cost.repeated_nfe == 0
        assert found.cost.reward_calls == sum(not math.isnan(r) for r in self.reward)


def plain_dive(paths, levels, thresholds, backtracks, depth, seen):
    at, stack, buffer = 0, [ROOT], [[] for _ in levels]
    while at < len(levels):
        node = paths.child(stack[at], levels[at])
        buffer[at].append(node)
        seen[at].append(paths.reward[node])
        if paths.reward[node] >= thresholds[at]:
            stack[at + 1 :] = [node]
            at += 1
        elif backtracks > 0:
            backtracks -= 1
            at = max(0, at - depth + 1)
        else:
            stack[at + 1 :] = [max(buffer[at], key=lambda n: paths.reward[n])]
            at += 1


@pytest.mark.parametrize("depth", [1, 2, 9])
@pytest.mark.parametrize("threshold", [0.4, (0.3, 0.5, 0.2, 0.6, 1.2), None, math.inf])
def test_depth_first_is_the_plain_one(gaussian, threshold, depth):
    method = DFS(threshold=threshold, quantile=0.6, backtracks=5, depth=depth, beside=1)
    paths, levels, seen = Paths(gaussian, R), (4, 3, 2, 1, 0), [[] for _ in range(5)]
    for _ in range(8):
        given = threshold if isinstance(threshold, tuple) else (threshold,) * 5
        if threshold is None:
            given = [sorted(s)[math.floor(0.6 * (len(s) - 1))] if s else -math.inf for s in seen]
        plain_dive(paths, levels, given, 5, depth, seen)
    paths.matches(run(gaussian, method, iterations=8))


def plain_rollover(paths, levels, initial, quota):
    first = [paths.child(ROOT, levels[0]) for _ in range(initial)]
    kept = max(first, key=lambda n: paths.reward[n])
    record, allowed = paths.reward[kept], quota
    for level in levels[1:]:
        tried, better = [], False
        left = allowed
        while left > 0:
            left -= 1
            tried.append(paths.child(kept, level))
            better = paths.reward[tried[-1]] > record
            if better and level > 0:
                break
        allowed = quota + (left if better else 0)
        kept = tried[-1] if better else max(tried, key=lambda n: paths.reward[n])
        record = max(record, paths.reward[kept])


@pytest.mark.parametrize(
    ("quota", "initial", "schedule"), [(4, None, None), (3, 1, None), (2, 7, None), (4, None, (3, 1, 0))]
)
def test_rollover_is_the_plain_one(gaussian, quota, initial, schedule):
    method = RBF(quota=quota, initial=initial, schedule=schedule, beside=1)
    paths = Paths(gaussian, R)
    for _ in range(8):
        plain_rollover(paths, schedule or (4, 3, 2, 1, 0), initial or quota, quota)
    paths.matches(run(gaussian, method, iterations=8))


def plain_lookahead(paths, levels, width, branching):
    def rollout(path):
        path = list(path)
        fresh = paths.child(path[-1], levels[len(path) - 1], score=len(path) == len(levels))
        path.append(fresh)
        while len(path) <= len(levels):
            key, level = np.array([paths.key[path[-1]]], np.uint64), levels[len(path) - 1]
            paths.born[path[-1]] += 1
            path.append(paths.go_on(path[-1], level, key, score=level == 0))
        return path

    beam = [rollout([ROOT]) for _ in range(width * branching)]
    for at in range(1, len(levels)):
        beam = sorted(beam, key=lambda p: -paths.reward[p[-1]])[:width]
        beam += [rollout(path[: at + 1]) for path in list(beam) for _ in range(branching - 1)]


@pytest.mark.parametrize(("width", "branching"), [(2, 3), (1, 4), (3, 1)])
def test_the_lookahead_beam_is_the_plain_one(gaussian, width, branching):
    method = BEAM(beam_width=width, branching=branching, branch_at=(5, 3, 2), beside=1)
    paths = Paths(gaussian, R)
    for _ in range(2):
        plain_lookahead(paths, (5, 3, 2, 0), width, branching)
    found = run(gaussian, method, iterations=2)
    cost = width * branching * 5 + width * (branching - 1) * (5 + 3 + 2)
    assert found.cost.nfe == 2 * cost
    paths.matches(found)


class Means(Plain):
    """UCT whose values are means over the iterations that passed through."""

    def tell(self, leaves):
        for leaf in leaves:
            self.value[leaf] = float(self.reward(self.x[leaf]))
        for node in range(len(self.t) - 1, -1, -1):
            if below := [c for c in self.children[node] if not math.isnan(self.value[c])]:
                visits = [self.visits[c] - 1 for c in below]
                self.value[node] = float(np.average([self.value[c] for c in below], weights=visits))


@pytest.mark.parametrize(("wave", "c_uct", "alpha"), [(1, 0.5, 0.5), (6, 1.4, 0.4), (4, 0.1, 0.2)])
def test_mcts_is_the_plain_one(gaussian, wave, c_uct, alpha):
    method = MCTS(wave=wave, c_uct=c_uct, widening_c=1.0, widening_alpha=alpha)
    # `Plain` reads λ and the lag of the method it is given.
    plain = Means(gaussian, R, method, "uct", c_uct).run(200)
    tree = run(gaussian, method, iterations=200).tree
    for name in ("parent", "t", "key", "visits"):
        assert getattr(tree, name).tolist() == getattr(plain, name), name
    np.testing.assert_allclose(tree.value, plain.value, atol=1e-9)


def test_an_mcts_value_is_the_mean_of_its_iterations(gaussian):
    """Not of its leaves: iterations that ended at a known leaf count again."""
    tree = run(gaussian, MCTS(widening_c=1.0, widening_alpha=0.3, wave=4), iterations=300).tree
    leaves = np.flatnonzero(tree.t == 0)
    assert (tree.visits[leaves] > 2).any()
    mean = np.average(tree.reward[leaves], weights=tree.visits[leaves] - 1)
    assert tree.value[ROOT] == pytest.approx(mean)
    assert abs(mean - tree.reward[leaves].mean()) > 1e-3


# Budgets, resumption, batches, noise.

LAWS = [
    DFS(threshold=0.5, backtracks=2, beside=64),
    RBF(quota=2, beside=64),
    BEAM(beam_width=2, branching=3, beside=8),
    MCTS(widening_c=1.0, widening_alpha=0.3, wave=40),
]


@pytest.mark.parametrize("method", LAWS, ids=lambda m: type(m).__name__)
def test_every_method_obeys_the_laws(gaussian, method):
    check_method(method, gaussian, linear(1.2))


@pytest.mark.parametrize(
    "method",
    [
        DFS(threshold=0.5, backtracks=3, depth=2, schedule=(7, 2, 0), beside=40),
        RBF(quota=5, schedule=(9, 8, 1, 0), beside=40),
        BEAM(),
    ],
    ids=["dfs", "rbf", "beam"],
)
def test_uneven_levels_spend_their_budgets(method):
    check_budget(method, LinearGaussian(num_steps=10), R)


@pytest.mark.parametrize("make", [DFS, RBF, BEAM])
def test_more_budget_goes_on_where_less_ended(gaussian, make):
    found = [run(gaussian, make(beside=1), iterations=n) for n in (1, 2, 4, 8)]
    best = [float(f.rewards.max()) for f in found]
    assert best == sorted(best)
    for less, more in itertools.pairwise(found):
        assert np.array_equal(more.tree.key[: len(less.tree)], less.tree.key)


@pytest.mark.parametrize("make", [RBF, BEAM])
def test_looking_ahead_beats_best_of_n(gaussian, make):
    prompts, budget = list(range(30)), ts.Budget(nfe=30 * 260)
    ours, bon = (
        ts.search(gaussian, R, m, prompts=prompts, budget=budget, batch_size=laws.WIDE) for m in (make(), ts.BestOfN())
    )
    gain = [float(a.rewards.max() - b.rewards.max()) for a, b in zip(ours.tasks, bon.tasks, strict=True)]
    assert np.mean(gain) > 4 * np.std(gain) / 30**0.5


def test_searches_run_on_discrete_chains():
    reward = lambda x: x.double().sum(1)  # noqa: E731
    for method in (DFS(threshold=1.0), RBF(), BEAM(branch_at=(3, 2)), MCTS(branch_at=(3, 2))):
        bed = BEDS["masked"]
        found = run(bed, method, reward, nfe=100 * bed.num_steps)
        assert found.cost.nfe >= 97 * bed.num_steps
        assert "greedy: not a sample of π" in found.diagnostics["warnings"]
        assert found.log_z is None


def test_forbidden_endpoints_do_not_stop_a_descent(gaussian):
    forbid = lambda x: torch.where(x[:, 0] > 0.5, x[:, 0], -math.inf)  # noqa: E731
    for method in (DFS(threshold=0.0), DFS(), RBF(), BEAM()):
        found = run(gaussian, method, forbid, nfe=500)
        assert found.cost.nfe >= 485
        assert found.best(1)[1][0] > 0.5


# Settings and names.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DFS(threshold=math.nan), "threshold is nan"),
        (lambda: DFS(backtracks=-1), "backtracks is -1"),
        (lambda: DFS(quantile=2.0), "quantile is 2.0"),
        (lambda: DFS(depth=0), "depth is 0"),
        (lambda: DFS(schedule=(3, 1)), "lacks 0"),
        (lambda: RBF(quota=0), "quota is 0"),
        (lambda: RBF(schedule=(3, 1)), "lacks 0"),
        (lambda: BEAM(branching=0), "branching is 0"),
        (lambda: MCTS(c_uct=-1.0), "c_uct is -1.0"),
        (lambda: MCTS(wave=0), "wave is 0"),
        (lambda: run(BEDS["gaussian"], DFS(threshold=(1.0, 2.0)), nfe=100), "threshold has 2 numbers, expected 5"),
    ],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tuple_of_thresholds_survives_a_store(gaussian, tmp_path):
    method = DFS(threshold=(-math.inf, 0.1, 0.2, 0.3, 0.4), backtracks=2, beside=40)
    ts.search(gaussian, R, method, budget=ts.Budget(nfe=200), store=tmp_path / "run")
    more = ts.resume(tmp_path / "run", gaussian, R, budget=ts.Budget(nfe=600))
    assert 582 <= more.cost.nfe <= 600


def test_methods_have_names_and_papers():
    for make in EVERY:
        assert METHODS[make.__name__] is make
        (name,) = (short for short, long in specs.METHOD_NAMES.items() if long == make.__name__)
        assert specs.method(name) == make()
        assert bibtex(make.papers).count("@") >= 2
    assert specs.method("depth-first(threshold=0.5)") == DFS(threshold=0.5)
