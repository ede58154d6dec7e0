"""DTS and DTS* without waves: each row is told when it arrives, another one is selected in its place."""

from collections import Counter

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.core.test_tree_reference import Plain
from tests.support import laws
from tests.support.beds import BEDS
from tests.support.laws import ROOT, trees, unbiased
from treesearch.backends.base import describe
from treesearch.backends.exact.gaussian import Tilt
from treesearch.budget import Share
from treesearch.core.noise import root_key
from treesearch.core.weights import log_mean
from treesearch.engine.segments import Segments
from treesearch.methods.base import Problem, Status
from treesearch.rewards.analytic import linear, table
from treesearch.rewards.compose import cached
from treesearch.runs.log import NODE, read_blocks
from treesearch.testing import Counting, check_budget, check_edges, check_noise, same_result

DTS, DTS_STAR = ts.DiffusionTreeSampling, ts.DiffusionTreeSearch
DEEP = {"widening_c": 1.0, "widening_alpha": 0.5, "mode": "async"}
NARROW = {"widening_c": 1.0, "widening_alpha": 0.3, "mode": "async"}
METHODS = [
    DTS(wave=16, **DEEP),
    DTS(wave=5, lam=0.3, **NARROW),
    DTS(wave=7, selection="round_robin", **NARROW),
    DTS(wave=4, branch_at=(5, 2), **DEEP),
    DTS(wave=1, **DEEP),
    DTS_STAR(wave=16, **DEEP),
    DTS_STAR(wave=6, c_uct=0.2, **NARROW),
]


def search(kernel, method, *, batch_size=64, reward=None, **budget):
    return ts.search(kernel, reward or linear(1.2), method, budget=ts.Budget(**budget), batch_size=batch_size)


def sound(task, lam=1.0):
    """A finished tree: nothing in flight, values and visits as its leaves and iterations give them."""
    tree = task.tree
    assert task.diagnostics["unobserved"] == 0
    assert not np.isnan(tree.value).any()
    laws.values_add_up(tree, lam)
    laws.visits_add_up(tree, task.diagnostics["iterations"])


def edge_costs(tree, steps):
    """Evaluations that the nodes of a tree took."""
    return int((np.minimum(tree.t[tree.parent[1:]], steps) - tree.t[1:]).sum())


# One in flight is the sequential algorithm.


@pytest.mark.parametrize("name", BEDS)
@pytest.mark.parametrize("method", [DTS, DTS_STAR])
def test_one_in_flight_is_a_wave_of_one(name, method):
    fields = {"widening_c": 1.0, "widening_alpha": 0.5, "branch_at": (3, 2, 1) if name == "masked" else None}
    reward = lambda x: x.double().flatten(1).sum(1)  # noqa: E731
    serial, lively = (
        ts.search(
            BEDS[name],
            reward,
            method(wave=1, mode=mode, **fields),
            prompts=["a", "b"],
            budget=ts.Budget(nfe=2 * 30 * BEDS[name].num_steps),
        )
        for mode in ("wave", "async")
    )
    same_result(lively, serial, where="async beside wave")
    assert lively.tasks[0].diagnostics["staleness"] == lively.tasks[1].diagnostics["staleness"]
    for a, b in zip(lively.tasks, serial.tasks, strict=True):
        for column in ("parent", "t", "visits", "value", "key", "log_w"):
            np.testing.assert_array_equal(getattr(a.tree, column), getattr(b.tree, column), column)


# Laws, whatever order rows arrive in.


@pytest.mark.parametrize("batch_size", [4, laws.WIDE])
@pytest.mark.parametrize("method", METHODS, ids=range(len(METHODS)))
def test_values_and_visits_add_up(gaussian, drifting, method, batch_size):
    for kernel in (gaussian, drifting):
        found = ts.search(
            kernel,
            linear(1.2),
            method,
            prompts=["a", "b", "c"],
            budget=ts.Budget(iterations=3 * 60),
            batch_size=batch_size,
        )
        assert [task.diagnostics["iterations"] for task in found.tasks] == [60] * 3
        for task in found.tasks:
            sound(task, method.lam)
        check_noise([task.tree for task in found.tasks], 5)
        assert found.cost.nfe == sum(edge_costs(task.tree, 5) for task in found.tasks)
    check_edges(drifting, found.tasks[1], seed=0, number=1)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[6]], ids=["dts", "dts star"])
def test_the_budget_is_kept_and_hardly_left_unspent(gaussian, method):
    check_budget(method, gaussian)


@pytest.mark.parametrize("limit", [{"nfe": 4 * 333}, {"reward_calls": 4 * 41}, {"iterations": 4 * 50}])
def test_several_tasks_each_have_their_share(gaussian, limit):
    kernel = Counting(gaussian)
    method = DTS(wave=16, **NARROW)
    found = ts.search(kernel, linear(1.2), method, prompts=list("abcd"), budget=ts.Budget(**limit), batch_size=6)
    assert kernel.rows == found.cost.nfe
    for task in found.tasks:
        sound(task)
        extra, spent = task.diagnostics, edge_costs(task.tree, 5)
        assert task.status == Status.BUDGET
        assert 333 - 5 < spent <= 333 or "nfe" not in limit
        assert extra["rollouts"] == len(task.leaves)
        assert extra["rollouts"] == 41 or "reward_calls" not in limit
        assert extra["iterations"] == 50 or "iterations" not in limit


def test_a_clock_lets_what_is_in_flight_arrive(gaussian):
    result = search(gaussian, DTS(wave=16, **DEEP), seconds=0.1, batch_size=2)
    sound(result.tasks[0])
    assert len(result.leaves) > 0


def test_a_chosen_lambda_works_without_waves(gaussian):
    result = search(gaussian, DTS(lam="auto", wave=8, **DEEP), nfe=900)
    sound(result.tasks[0], float(result.tasks[0].lam))
    assert result.cost.nfe <= 900


@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_batch_size_gives_one_result(gaussian, batch_size):
    one, other = (search(gaussian, DTS(wave=16, **DEEP), nfe=700, batch_size=batch_size) for _ in range(2))
    same_result(one, other)
    assert np.array_equal(one.tree.parent, other.tree.parent)


# Rows in flight: counted in N, without a value, never selected.

CASES = [
    (DTS(wave=8, **DEEP), "boltzmann"),
    (DTS(wave=5, lam=0.4, **NARROW), "boltzmann"),
    (DTS(wave=6, selection="round_robin", **DEEP), "round_robin"),
    (DTS_STAR(wave=7, **DEEP), "uct"),
    (DTS_STAR(wave=3, c_uct=8.0, widening_c=2.0, widening_alpha=0.6, mode="async"), "uct"),
]


def started(method, kernel, seed=0, **limits):
    return method.start(Problem(0, describe(kernel), root_key(seed, 0), Share(**limits)))


def under(tree, ends):
    """How many of `ends` lie below each node, itself included."""
    count = np.zeros(len(tree), int)
    for end in ends:
        node = int(end)
        while node >= 0:
            count[node] += 1
            node = int(tree.parent[node])
    return count


@pytest.mark.parametrize("order", range(2))
@pytest.mark.parametrize(("method", "rule"), CASES, ids=range(len(CASES)))
def test_a_tree_told_in_any_order_is_the_plain_one(gaussian, method, rule, order):
    """By hand: as many rows as have room are selected, any part of them told; a tree of lists keeps the books."""
    search, draw = started(method, gaussian), np.random.default_rng(order)
    plain = Plain(gaussian, linear(1.2), method, rule, getattr(method, "c_uct", 1.0))
    flying, ends = [], []

    def told(leaves):
        search.tree.reward[leaves] = [float(plain.reward(plain.x[leaf])) for leaf in leaves]
        search.tell(Segments(search.tree.parent[leaves].astype(np.int64), leaves, leaves))
        plain.tell(leaves.tolist())
        for leaf in leaves.tolist():
            flying.remove(leaf)

    for _ in range(40):
        valued, room = ~np.isnan(search.tree.value), method.wave - len(flying)
        assert search.pending == len(flying)
        assert search.full == (room == 0)
        if room:
            segments, new = search.ask(64), []
            while not new:  # iterations that end at a sample fly nowhere
                for _ in range(room):
                    new += plain.iterate()
            # The plain tree enters a rollout node by node, too: the numbers agree, hence everything that led to them.
            assert segments.last.tolist() == [_leaf_below(search.tree, node) for node in segments.first] != []
            assert ((segments.source == ROOT) | valued[segments.source.clip(max=len(valued) - 1)]).all()
            assert (segments.source < len(valued)).all()
            assert valued[search.hits].all()
            flying += segments.last.tolist()
            ends += [*segments.last.tolist(), *search.hits.tolist()]
        tree = search.tree
        assert tree.parent.tolist() == plain.parent
        assert tree.visits.tolist() == plain.visits
        assert len(ends) == search.iterations == plain.iteration
        np.testing.assert_array_equal(tree.visits, 1 + under(tree, ends))
        np.testing.assert_array_equal(np.isnan(tree.value) & (tree.t == 0), np.isin(np.arange(len(tree)), flying))
        unobserved = under(tree, flying)
        assert unobserved[ROOT] == search.pending == len(flying)
        told(draw.permutation(flying)[: draw.integers(0, len(flying) + 1)].astype(np.int64))
        np.testing.assert_allclose(search.tree.value, plain.value, atol=1e-9)
        assert len(flying) == len(ends) or search.readout().extra["unobserved"] == len(flying)
    told(np.array(flying, np.int64))
    assert search.pending == search.readout().extra["unobserved"] == 0
    laws.values_add_up(search.tree, method.lam)
    laws.visits_add_up(search.tree, search.iterations)


def _leaf_below(tree, node):
    """The sample at the end of a rollout that has not branched."""
    while tree.t[node] > 0:
        node = int(tree.children_of(int(node))[0])
    return int(node)


def test_what_is_in_flight_widens_and_lowers_the_bonus(gaussian):
    """Two samples are there. UCT under a large bonus alternates, for a row in flight counts as a visit at once."""
    method = DTS_STAR(wave=4, c_uct=1e3, widening_c=2.0, widening_alpha=0.0, mode="async", branch_at=(5, 3))
    search = started(method, gaussian)
    first = search.ask(64)
    search.tree.reward[first.last] = 0.0
    search.tell(first)
    tops = laws.children(search.tree, ROOT)
    assert len(tops) == 4  # nothing had a value yet, so the root expanded beyond its two
    again = search.ask(64)
    assert Counter(search.tree.roots(again.first).tolist()) == Counter(tops.tolist())
    assert search.full


def test_a_snapshot_reads_out_what_has_arrived(gaussian):
    method, seen = DTS(wave=16, **DEEP), set()
    for snapshot in ts.stream(gaussian, linear(1.2), method, budget=ts.Budget(nfe=700), batch_size=6):
        result = snapshot.result()
        tree, flying = result.tree, result.diagnostics["unobserved"]
        assert flying == int(np.isnan(tree.value[tree.t == 0]).sum()) <= 16
        assert len(result.leaves) + flying == int((tree.t == 0).sum())
        assert result.log_z == pytest.approx(log_mean(result.log_weights.numpy()), abs=1e-9)
        want = laws.descent_probabilities(_told(tree), result.leaves, 1.0)
        np.testing.assert_allclose(result.log_weights.softmax(0), want, atol=1e-12)
        assert snapshot.cost.nfe <= 700
        seen.add(flying)
    assert flying == 0
    assert max(seen) > 0


def _told(tree):
    """The tree with the nodes in flight cut off: no descent takes them."""
    orphan = type("Orphaned", (), {"value": tree.value, "log_w": tree.log_w, "__len__": lambda self: len(tree)})()
    orphan.parent = np.where(np.isnan(tree.value), -2, tree.parent)
    return orphan


# Staleness: each time a row is told, at most wave - 1 others are in flight and did not know of it.


@pytest.mark.parametrize("wave", [1, 4, 16])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_staleness_is_at_most_what_flies_beside(gaussian, wave, batch_size):
    result = search(gaussian, DTS(wave=wave, **DEEP), nfe=900, batch_size=batch_size)
    found = result.diagnostics["staleness"]
    assert (wave > 1) * 0.2 * (wave - 1) <= found["mean"] <= wave - 1
    assert found["mean"] <= found["max"]
    assert result.history[-1]["staleness"] == found["mean"]


# Round robin: E[exp(λ v_root)] = Z.
#
# Out-of-order arrival looks dangerous: rows from deep nodes are short and overtake those from the prior, so which
# children have a value when a node is visited depends on how long their segments are. It is not. Round robin asks
# whether a child has a value and how often it was visited, never for the value; what arrives when follows from segment
# lengths, hence from the shape so far. So the shape of the tree is a fixed function of budget and batch size, the
# same for every seed (the first test), and given the shape each node's children are independent draws from
# p(·|x): the mean over them of exp(λ v_c) is unbiased for exp(λ V(x)) by induction from the leaves, and at the end all
# have been told. The argument needs no order, only that the order does not know the rewards: a reward service that
# answers good samples faster would break it (nodes whose early children arrive stop widening), and so would a snapshot
# taken when some reward is seen. Several tasks in one batch delay one another, by their shapes alone.


@pytest.mark.parametrize("batch_size", [3, 29, laws.WIDE])
def test_round_robin_builds_one_shape_whatever_the_noise(gaussian, batch_size):
    method = DTS(selection="round_robin", wave=8, **DEEP)
    one, other = (
        ts.search(gaussian, linear(1.2), method, budget=ts.Budget(nfe=600), seed=seed, batch_size=batch_size)
        for seed in (1, 2)
    )
    assert np.array_equal(one.tree.parent, other.tree.parent)
    assert np.array_equal(one.tree.visits, other.tree.visits)
    assert not np.isin(one.tree.key[1:], other.tree.key).any()


CELLS = [
    (DTS(selection="round_robin", wave=8, **DEEP), 64, 120),
    (DTS(selection="round_robin", wave=16, **NARROW), 110, 140),
    (DTS(selection="round_robin", wave=6, branch_at=(5, 1), **DEEP), 60, 160),
]


@pytest.mark.parametrize(("method", "iterations", "n"), CELLS, ids=range(len(CELLS)))
def test_round_robin_root_values_are_unbiased(gaussian, method, iterations, n):
    unbiased(trees(gaussian, linear(0.5), method, gaussian.tilted(Tilt(c=0.5)).log_z, n, iterations))


def test_round_robin_root_values_are_unbiased_in_batches_that_reorder(gaussian, monkeypatch):
    """At batch size 60, 150 tasks with 8 in flight each queue for twenty passes and overtake one another."""
    monkeypatch.setattr(laws, "WIDE", 60)
    method = DTS(selection="round_robin", wave=8, **DEEP)
    unbiased(trees(gaussian, linear(0.5), method, gaussian.tilted(Tilt(c=0.5)).log_z, 150, 48))


# Run folders: what is recorded stays, what was in flight is done again or replaced.


def same_start(tree, blocks):
    """The nodes of recorded blocks are the tree's first nodes; every recorded sample has its reward."""
    nodes = np.concatenate([b.nodes for b in blocks]) if blocks else np.empty(0, NODE)
    end = 1 + len(nodes)
    for name in ("parent", "t", "key", "log_w", "reward"):
        np.testing.assert_array_equal(getattr(tree, name)[1:end], nodes[name], name)
    assert not np.isnan(nodes["reward"][nodes["t"] == 0]).any()
    assert (nodes["parent"] < np.arange(1, end)).all()
    return end


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2], METHODS[5]], ids=["dts", "round robin", "dts star"])
@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_stopped_run_goes_on(tmp_path, gaussian, method, keep):
    reward, budget = linear(0.7), ts.Budget(nfe=603)
    flow = ts.stream(gaussian, reward, method, budget=budget, store=tmp_path / "run", batch_size=5, keep_states=keep)
    for snapshot in flow:
        if snapshot.wave == 3:
            break
    flow.close()
    recorded = [block for block, _ in read_blocks(tmp_path / "run")]
    assert len(recorded) == 4
    again = ts.resume(tmp_path / "run", gaussian, reward, batch_size=7)
    assert len(again.tree) > same_start(again.tree, recorded) > 20
    sound(again.tasks[0])
    check_edges(gaussian, again.tasks[0], seed=0)
    assert edge_costs(again.tree, 5) == again.cost.nfe <= 603
    assert again.cost.nfe > 603 - 5
    grown = ts.resume(tmp_path / "run", gaussian, reward, budget=ts.Budget(nfe=900))
    same_start(grown.tree, [block for block, _ in read_blocks(tmp_path / "run")])
    sound(grown.tasks[0])
    assert 900 - 5 < grown.cost.nfe == edge_costs(grown.tree, 5) <= 900


@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.97])
def test_a_log_cut_anywhere_is_gone_on_with(tmp_path, gaussian, fraction):
    reward, method, run = linear(0.7), DTS(wave=16, **NARROW), tmp_path / "run"
    kernel = Counting(gaussian)
    ts.search(kernel, reward, method, prompts=["x", "y"], budget=ts.Budget(nfe=800), store=run, seed=3, batch_size=6)
    with open(run / "tree.bin", "r+b") as file:
        file.truncate(max(12, int((run / "tree.bin").stat().st_size * fraction)))
    kept = [block for block, _ in read_blocks(run)]
    before = kernel.rows
    again = ts.resume(run, kernel, reward, batch_size=6)
    nodes = np.concatenate([b.nodes for b in kept]) if kept else np.empty(0, NODE)
    for i, task in enumerate(again.tasks):
        mine = nodes[nodes["task"] == i]
        for name in ("parent", "t", "key", "log_w", "reward"):
            np.testing.assert_array_equal(getattr(task.tree, name)[1 : 1 + len(mine)], mine[name], name)
        sound(task)
        assert 400 - 5 < edge_costs(task.tree, 5) <= 400
    assert again.cost.nfe == sum(edge_costs(task.tree, 5) for task in again.tasks) <= 800
    # What was recorded is not computed again.
    assert kernel.rows - before == again.cost.nfe - (kept[-1].meta["cost"]["nfe"] if kept else 0)
    whole = [block for block, _ in read_blocks(run)]
    assert [block.wave for block in whole] == list(range(len(whole)))


def test_a_recorded_run_is_the_unrecorded_one(tmp_path, gaussian):
    method, budget = DTS_STAR(wave=16, **DEEP), ts.Budget(nfe=900)
    kept = ts.search(gaussian, linear(0.7), method, budget=budget, batch_size=6, store=tmp_path / "run")
    same_result(kept, ts.search(gaussian, linear(0.7), method, budget=budget, batch_size=6))
    read = ts.resume(tmp_path / "run", gaussian, linear(0.7))
    same_result(read, kept)
    np.testing.assert_array_equal(read.tree.visits, kept.tree.visits)


# Rewards: a cache, failures, infinities.


@pytest.mark.parametrize("batch_size", [3, 64])
def test_a_cache_counts_what_was_scored(batch_size):
    kernel, reward = BEDS["discrete"], cached(table((0.0, 1.0, 2.0, -1.0)))
    found = ts.search(
        kernel,
        reward,
        DTS(wave=8, **DEEP),
        prompts=["a", "b"],
        budget=ts.Budget(iterations=2 * 60),
        batch_size=batch_size,
    )
    kinds = sum(len(torch.unique(task.samples)) for task in found.tasks)
    assert found.cost.reward_calls == reward.calls() == kinds <= 8
    for task in found.tasks:
        sound(task)


def test_forbidden_samples_have_no_weight(gaussian):
    forbid = lambda x: torch.where(x[:, 0] > 0, x[:, 0], -torch.inf)  # noqa: E731
    result = search(gaussian, DTS(wave=8, **DEEP), nfe=700, reward=forbid, batch_size=4)
    sound(result.tasks[0])
    assert (result.draw(100)[:, 0] > 0).all()


def test_a_failing_reward_leaves_a_run_to_resume(tmp_path, gaussian):
    from treesearch.rewards.base import as_reward

    calls = iter(range(1_000))

    def fails(x):
        if next(calls) == 9:
            raise RuntimeError("no answer")
        return x[:, 0]

    method, budget = DTS(wave=8, **DEEP), ts.Budget(nfe=600)
    with pytest.raises(Exception, match="no answer"):
        ts.search(gaussian, as_reward(fails, name="r"), method, budget=budget, store=tmp_path / "run", batch_size=4)
    recorded = [block for block, _ in read_blocks(tmp_path / "run")]
    again = ts.resume(tmp_path / "run", gaussian, as_reward(lambda x: x[:, 0], name="r"), batch_size=4)
    same_start(again.tree, recorded)
    sound(again.tasks[0])
    assert 600 - 5 < again.cost.nfe == edge_costs(again.tree, 5) <= 600


# What is refused.


@pytest.mark.parametrize("method", [DTS, DTS_STAR])
def test_modes_are_checked(method):
    with pytest.raises(ValueError, match="async"):
        method(mode="asynch")
    with pytest.raises(ValueError, match="no barrier"):
        method(mode="async", lag=1)
    assert method(mode="wave", lag=1).mode == "wave"
