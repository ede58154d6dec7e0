"""Noise search beside a plain version of itself, on chains with noise in every step and on a flow without."""

import itertools
import math
from contextlib import closing
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support.beds import BEDS
from treesearch.api import open_session
from treesearch.backends.base import Gaussian, describe
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.citations import bibtex
from treesearch.cli.main import main
from treesearch.core.noise import child_keys, root_key
from treesearch.core.tree import NONE, ROOT
from treesearch.engine.segments import leg
from treesearch.export import to_networkx
from treesearch.methods import METHODS
from treesearch.registry import registry as specs
from treesearch.report import trees
from treesearch.rewards.analytic import linear
from treesearch.testing import (
    bare_chain,
    check_budget,
    check_edges,
    check_kernel,
    check_method,
    check_noise,
    check_store,
    noise,
    same_result,
)

NOISE = ts.NoiseSearch
R = linear(1.0)


class Flow:
    """The probability flow of a Gaussian: x_0 = mean + std·z, whatever the number of steps."""

    dtype, fingerprint = torch.float64, "flow"

    def __init__(self, dim=3, num_steps=4):
        self.base = LinearGaussian(dim=dim, num_steps=num_steps)
        self.num_steps, self.state_shape = num_steps, (dim,)
        self.stochastic = (True,) + (False,) * num_steps

    def prior(self, noise, cond=None):
        return self.base.prior(noise)

    def transition(self, x, t, cond=None):
        mu, sd = self.base.reverse.mu[:, 0], self.base.reverse.var[:, 0].sqrt()
        z = (x - mu[t]) / sd[t][:, None]
        return Gaussian(mu[t - 1] + sd[t - 1][:, None] * z, torch.zeros(len(x), 1), mu[0] + sd[0] * z)

    def encode(self, prompts):
        return None

    def decode(self, x0):
        return x0


FLOW = Flow()
KERNELS = {"gaussian": BEDS["gaussian"], "flow": FLOW, "mixture": BEDS["mixture"], "discrete": BEDS["discrete"]}


def run(kernel, method, reward=R, *, seed=0, **budget):
    return ts.search(kernel, reward, method, budget=ts.Budget(**budget), seed=seed)


def first(x):
    return x[:, 0].double()


def plain(kernel, reward, samples, *, neighbours, theta, initial, rounds):
    """One sample at a time: nodes (parent, t, key, reward), samples, and what was evaluated."""
    spec, T = describe(kernel), kernel.num_steps
    nodes, z, x0, born = [(-1, T + 1, root_key(0, 0), math.nan)], {}, [], {ROOT: 0}

    def sample(parent):
        above = np.array([nodes[parent][2]], np.uint64)
        key = child_keys(above, nodes[parent][1], np.array([born[parent]]), at_root=parent == ROOT)
        own = noise(spec, key, T + 1)
        me = len(nodes)
        z[me] = own if parent == ROOT else math.cos(theta) * z[parent] + math.sin(theta) * own
        x = kernel.prior(z[me])
        for t in range(T, 0, -1):
            x = kernel.transition(x, torch.tensor([t])).sample(noise(spec, key, t))
        born[parent], born[me] = born[parent] + 1, 1
        x0.append(x)
        nodes.extend([(parent, T, int(key[0]), math.nan), (me, 0, int(key[0]), float(reward(x)))])
        return me

    def value(node):
        return nodes[node + 1][3]

    while True:
        climb = [sample(ROOT) for _ in range(min(initial, samples - len(x0)))]
        if len(x0) == samples:
            return nodes, x0
        pivot = max(climb, key=value)
        for _ in itertools.count() if rounds is None else range(rounds):
            found = [sample(pivot) for _ in range(min(neighbours, samples - len(x0)))]
            if len(x0) == samples:
                return nodes, x0
            pivot = max([pivot, *found], key=value)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "settings",
    [
        {"neighbours": 4, "theta": 0.3, "initial": 1, "rounds": None},
        {"neighbours": 3, "theta": 1.2, "initial": 5, "rounds": 2},
        {"neighbours": 1, "theta": 0.7, "initial": 2, "rounds": 7},
    ],
)
def test_the_search_is_the_plain_one(name, settings):
    kernel, samples = KERNELS[name], 41
    nodes, x0 = plain(kernel, first, samples, **settings)
    found = run(kernel, NOISE(**settings), first, iterations=samples)
    for column, want in zip(("parent", "t", "key", "reward"), zip(*nodes, strict=True), strict=True):
        np.testing.assert_array_equal(getattr(found.tree, column), want, column)
    assert torch.equal(found.samples, torch.cat(x0))
    assert (found.cost.nfe, found.cost.reward_calls) == (samples * kernel.num_steps, samples)
    assert found.cost.repeated_nfe == 0
    depth = [len(found.tree.lineage(node)) for node in np.flatnonzero(found.tree.t == kernel.num_steps)]
    assert max(depth) > 1  # or nothing was searched
    check_edges(kernel, found.tasks[0], 0)
    check_noise([found.tree], kernel.num_steps)


# Limits.


def test_at_angle_zero_the_pivot_is_repeated(tmp_path):
    found = run(FLOW, NOISE(theta=0.0), nfe=200)
    assert torch.equal(found.samples, found.samples[:1].expand(50, -1))
    store, kernel = tmp_path / "run", BEDS["gaussian"]
    found = ts.search(kernel, R, NOISE(theta=0.0), budget=ts.Budget(nfe=200), store=store)
    with closing(open_session(store, kernel, R)) as session:
        states = session.states.get(found.tree.slot[found.tree.t == 5])
    assert torch.equal(states, states[:1].expand(40, -1))
    assert len(found.samples.unique()) == 40  # its steps have noise of their own


@pytest.mark.parametrize("kernel", [FLOW, BEDS["gaussian"]], ids=["flow", "gaussian"])
def test_at_a_right_angle_it_is_random_search(kernel):
    found = run(kernel, NOISE(theta=math.pi / 2), nfe=60 * kernel.num_steps)
    keys, spec = found.tree.key[found.leaves], describe(kernel)
    x = kernel.prior(noise(spec, keys, kernel.num_steps + 1))
    for t in range(kernel.num_steps, 0, -1):
        x = kernel.transition(x, torch.full((60,), t)).sample(noise(spec, keys, t))
    torch.testing.assert_close(found.samples, x, rtol=0, atol=1e-7)
    assert len(set(keys.tolist())) == 60


def test_first_draws_are_those_of_best_of_n():
    found = run(BEDS["gaussian"], NOISE(initial=7, rounds=1), nfe=5 * 50)
    begins = np.isin(found.leaves, np.flatnonzero(found.tree.parent == ROOT) + 1)
    fresh = found.samples[torch.from_numpy(begins)]
    assert torch.equal(fresh, bare_chain(BEDS["gaussian"], len(fresh))[-1])
    assert begins.tolist() == (([True] * 7 + [False] * 4) * 5)[:50]


# Noise.


def test_neighbours_are_draws_of_the_prior_at_the_angle():
    """Along a line of pivots that no reward chose: N(0, I) at every depth, correlation cos^k θ at distance k."""
    count = itertools.count()
    method, kernel = NOISE(neighbours=1, theta=0.6), Flow(dim=4000, num_steps=1)
    found = run(kernel, method, lambda x: torch.tensor([float(next(count)) for _ in x]), iterations=9)
    z = (found.samples - 0.3) / 0.8
    assert found.tree.lineage(17).tolist() == found.tree.key[1::2].tolist()
    n = z.shape[1]
    assert (z.mean(1).abs() < 4 / n**0.5).all()
    assert ((z**2).mean(1) - 1).abs().max() < 4 * (2 / n) ** 0.5
    for i, j in itertools.combinations(range(9), 2):
        rho = math.cos(0.6) ** (j - i)
        assert abs(float((z[i] * z[j]).mean()) - rho) < 4 * ((1 + rho**2) / n) ** 0.5


def test_the_noise_of_a_tree_is_never_shared():
    """`check_noise` sees what a neighbour draws from."""
    tree = run(BEDS["gaussian"], NOISE(), nfe=100).tree
    check_noise([tree], 5)
    sideways = np.flatnonzero((tree.t == 5) & (tree.t[tree.parent] == 5))
    tree.key[sideways[0]] = tree.key[tree.parent[sideways[0]]]
    tree.t[sideways[0] + 1] = 5  # its steps are not to be what is caught
    tree.key[sideways[0] + 1] = 1
    with pytest.raises(AssertionError, match="shared"):
        check_noise([tree], 5)


@pytest.mark.parametrize("kernel", [FLOW, BEDS["ring"]], ids=["flow", "ring"])
def test_an_edge_with_another_angle_is_seen(kernel):
    found = run(kernel, NOISE(theta=0.4), first, nfe=30 * kernel.num_steps)
    check_edges(kernel, found.tasks[0], 0)
    found.tree.angle = 0.5
    with pytest.raises(AssertionError, match="along their paths"):
        check_edges(kernel, found.tasks[0], 0)


# What it finds.


def test_the_pivot_never_gets_worse():
    tree = run(BEDS["gaussian"], NOISE(rounds=12), nfe=1000).tree
    pivots = np.unique(tree.parent[(tree.t == 5) & (tree.t[tree.parent] == 5)])
    moved = [node for node in pivots if tree.parent[node] != ROOT]
    assert len(moved) > 5
    assert all(tree.reward[node + 1] > tree.reward[tree.parent[node] + 1] for node in moved)


def test_on_a_flow_it_climbs_past_best_of_n():
    prompts, budget = list(range(20)), ts.Budget(nfe=20 * 4 * 60)
    ours, bon = (ts.search(FLOW, R, m, prompts=prompts, budget=budget) for m in (NOISE(theta=0.5), ts.BestOfN()))
    gain = [float(a.rewards.max() - b.rewards.max()) for a, b in zip(ours.tasks, bon.tasks, strict=True)]
    assert np.mean(gain) > 4 * np.std(gain) / len(gain) ** 0.5
    assert all("greedy: not a sample of π" in task.diagnostics["warnings"] for task in ours.tasks)
    assert all(task.log_z is None for task in ours.tasks)


def test_forbidden_samples_do_not_stop_a_climb():
    forbid = lambda x: torch.where(x[:, 0] > 1.0, x[:, 0], -math.inf)  # noqa: E731
    found = run(FLOW, NOISE(theta=1.0), forbid, nfe=400)
    assert found.cost.nfe == 400
    assert found.best(1)[1][0] > 1.0


# Laws.


def test_the_flow_is_a_kernel():
    check_kernel(FLOW)


def test_the_method_obeys_the_laws():
    check_method(NOISE(neighbours=14, initial=3, rounds=3), BEDS["gaussian"], linear(1.2))


def test_runs_on_a_flow_survive(tmp_path):
    check_store(NOISE(neighbours=9, rounds=4), FLOW, first, tmp_path, cuts=3)


def test_budgets_are_spent_at_odd_numbers_of_steps():
    check_budget(NOISE(neighbours=7, initial=4, rounds=2), LinearGaussian(num_steps=7), R)


@pytest.mark.parametrize("less", [1, 4, 5, 7, 23])
def test_more_budget_goes_on_in_mid_round(tmp_path, less):
    """Resumed or straight: which round a sample belongs to does not depend on where the budget ended."""
    method, more = NOISE(neighbours=4, initial=3, rounds=4), ts.Budget(iterations=37)
    straight = ts.search(FLOW, R, method, budget=more)
    ts.search(FLOW, R, method, budget=ts.Budget(iterations=less), store=tmp_path / "run")
    same_result(ts.resume(tmp_path / "run", FLOW, R, budget=more), straight)


@pytest.mark.parametrize("keep", ["frontier", "none"])
def test_nothing_is_computed_again_for_states_that_are_not_kept(tmp_path, keep):
    """A neighbour is made from the keys of its lineage, so no state above x_0 is needed."""
    kernel, method, budget = BEDS["gaussian"], NOISE(theta=0.4), ts.Budget(nfe=600)
    want = ts.search(kernel, R, method, budget=budget)
    found = ts.search(kernel, R, method, budget=budget, keep_states=keep, store=tmp_path / "run", batch_size=3)
    same_result(found, want)
    assert found.cost.repeated_nfe == 0
    assert (found.tree.slot[found.tree.t == 5] == NONE).all()
    deep = max(found.leaves, key=lambda leaf: len(found.tree.lineage(found.tree.parent[leaf])))
    assert leg(found.tree, int(deep) - 1, 5).level == 6
    with closing(open_session(tmp_path / "run", kernel, R)) as session:
        assert torch.equal(session.engine.path(0, int(deep), ROOT), found.samples[deep // 2 - 1])


def test_a_kernel_without_a_fingerprint_is_verified_below_a_neighbour(tmp_path):
    kernel = Flow()
    kernel.fingerprint = None
    ts.search(kernel, R, NOISE(), budget=ts.Budget(nfe=80), store=tmp_path / "run")
    assert ts.resume(tmp_path / "run", kernel, R, budget=ts.Budget(nfe=160)).cost.nfe == 160
    other = Flow()
    other.fingerprint, other.base = None, LinearGaussian(dim=3, num_steps=4, mean=2.0)
    with pytest.raises(ts.StoreError, match="does not reproduce"):
        ts.resume(tmp_path / "run", other, R, budget=ts.Budget(nfe=240))


# The tree for people.


def test_such_a_tree_is_drawn_and_exported(tmp_path, capsys):
    words = ["--kernel", "gaussian(dim=2)", "--reward", "linear", "--nfe", "300", "--store", str(tmp_path / "run")]
    assert main(["run", "noise-search", *words]) == 0
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "greedy" in capsys.readouterr().out
    tree = run(BEDS["gaussian"], NOISE(), nfe=300).tree
    assert nx.is_arborescence(to_networkx(tree))
    data = trees.layout(tree)
    assert (data.levels[data.row[1::2]] == 5).all()
    assert trees.draw_tree(data, tmp_path / "tree.png").stat().st_size > 1000


# Settings and names.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NOISE(theta=-0.1), r"theta is -0\.1, expected an angle of 0\.\.π/2"),
        (lambda: NOISE(theta=2.0), r"theta is 2\.0"),
        (lambda: NOISE(theta=math.nan), "theta is nan"),
        (lambda: NOISE(neighbours=0), "neighbours is 0"),
        (lambda: NOISE(initial=0), "initial is 0"),
        (lambda: NOISE(rounds=0), "rounds is 0"),
        (lambda: run(BEDS["masked"], NOISE(), first, nfe=100), "prior is deterministic.*no initial noise to search"),
    ],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rounds_follow_from_the_number_of_a_sample():
    method = NOISE(neighbours=2, initial=3, rounds=2)
    found = [method.round_of(i) for i in range(9)]
    assert [(r.climb, r.begin, r.end) for r in found] == [(0, 0, 3)] * 3 + [(0, 3, 5)] * 2 + [(0, 5, 7)] * 2 + [
        (1, 7, 10)
    ] * 2
    assert [r.fresh for r in found] == [True] * 3 + [False] * 4 + [True] * 2


def test_it_has_a_name_and_a_paper():
    assert METHODS["NoiseSearch"] is NOISE
    assert specs.method("noise-search(theta=0.5)") == NOISE(theta=0.5)
    assert "2501.09732" in bibtex(NOISE.papers)


def test_the_tree_says_its_angle():
    problem = SimpleNamespace(num_steps=3, key=1, share=None)
    assert NOISE(theta=0.7).start(problem).tree.angle == 0.7
