"""Rows of waves as bundles: functions of trees and columns, without Ray and without an engine."""

from pathlib import Path

import numpy as np
import pytest
import torch

from treesearch.backends.base import Spec
from treesearch.budget import Cost
from treesearch.core.tree import NONE, ROOT, Tree
from treesearch.distributed.bundling import (
    Kept,
    charge,
    chosen,
    column,
    halves,
    inputs,
    job_of,
    legs_between,
    nearest,
    nfe_of,
    nodes_of,
    pack,
)
from treesearch.engine.segments import Leg, Segments
from treesearch.engine.states import LostStates, MemoryStates

T = 6
SPEC = Spec(T, (1,), (1,), (True,) * (T + 1), torch.device("cpu"), torch.float64, None)._replace(
    draft_times=tuple(t / T for t in range(T + 1))
)


def ids(*values):
    return np.array(values, np.int64)


@pytest.fixture
def trees():
    """Two trees of one shape: 1 and 2 below the root at t = 4, 3 below 1 at t = 2, 4 below 3; 1 and 3 have rewards."""
    made = []
    for task in range(2):
        tree = Tree(T, 100 * (task + 1))
        tree.append(ids(ROOT, ROOT, 1, 3), ids(4, 4, 2, 0), 100 * (task + 1) + np.arange(1, 5, dtype=np.uint64))
        tree.reward[[1, 3]] = 0.5
        made.append(tree)
    return made


@pytest.fixture
def states(trees):
    """States of nodes 1 and 3 of task 0, and of node 1 of task 1: their value is 10 · task + node."""
    store = MemoryStates((1,), torch.float64)
    for task, node in ((0, 1), (1, 1), (0, 3)):
        trees[task].slot[node] = store.put(torch.full((1, 1), 10.0 * task + node, dtype=torch.float64))[0]
    return store


def grown(tree, parents, levels):
    """New children, one for each parent."""
    return tree.append(np.array(parents), np.array(levels), np.arange(50, 50 + len(parents), dtype=np.uint64))


def wave(trees, source, levels, kept=None, number=0, **how):
    """A wave whose rows leave the nodes `source[task]` for new ones."""
    work = []
    for task, nodes in source.items():
        new = grown(trees[task], nodes, [levels] * len(nodes))
        work.append((task, Segments(np.array(nodes), new, new, **how)))
    return job_of(number, work, trees, SPEC, kept or Kept())


def whole(job):
    return [(job, np.arange(len(job.task)))]


def packed(parts, trees, states, worker=7, settle=lambda: None, **how):
    return pack(parts, worker, trees, states, T, number=3, settle=settle, **how)


def test_what_a_row_costs(trees):
    """From the prior T, below a node its level, one less where its transition was evaluated; holding costs one."""
    job = wave(trees, {0: [ROOT, 1, 2]}, 0)
    assert job.nfe.tolist() == [6, 3, 4]
    assert job.t.tolist() == [T + 1, 4, 4]
    assert nfe_of(whole(job)) == 13
    held = wave(trees, {0: [ROOT, 1]}, 2, hold=True)
    assert held.nfe.tolist() == [5, 2]


def test_what_a_draft_costs(trees, states):
    """Its price beside the walk to where it begins; a node that was drafted was not evaluated, and is paid for."""
    price = SPEC.draft_prices(3)
    assert price[4] < price[T]
    free = wave(trees, {0: [ROOT]}, T, draft=3)
    assert (free.nfe.tolist(), free.draft_nfe.tolist(), free.draft.tolist()) == ([price[T]], [price[T]], [3])
    held = wave(trees, {0: [ROOT, 1]}, 2, draft=3, hold=True)
    rest = SPEC.draft_prices(3, held=True)[2]
    assert rest == price[2] - 1
    assert held.nfe.tolist() == [5 + rest, 2 + rest]
    assert held.draft_nfe.tolist() == [rest] * 2
    finished = wave(trees, {0: [1]}, 0, paid=False)
    assert finished.nfe.tolist() == [4]
    assert packed(whole(finished), trees, states).again.tolist() == [False]
    assert packed(whole(held), trees, states).draft.tolist() == [3, 3]


def test_drafts_are_charged_to_those_who_made_them(trees):
    plain, drafted = wave(trees, {0: [ROOT]}, 0, number=1), wave(trees, {0: [ROOT] * 2}, T, draft=3, number=2)
    price = SPEC.draft_prices(3)[T]
    charge(whole(plain) + whole(drafted), Cost(nfe=T + 2 * price, draft_nfe=2 * price, reward_calls=3))
    assert (plain.cost.nfe, plain.cost.draft_nfe, plain.cost.reward_calls) == (T, 0, 1)
    assert (drafted.cost.nfe, drafted.cost.draft_nfe, drafted.cost.reward_calls) == (2 * price, 2 * price, 2)


def test_rows_travel_with_the_states_that_they_start_from(trees, states):
    job = wave(trees, {0: [ROOT, 1, 3, 1], 1: [1]}, 0)
    found = packed(whole(job), trees, states, forget=(4,))
    assert found.task.tolist() == [0, 0, 0, 0, 1]
    assert found.t.tolist() == [T + 1, 4, 2, 4, 4]
    assert found.again.tolist() == [False, True, True, True, True]
    assert found.key.tolist() == [50, 51, 52, 53, 50]
    assert found.levels.tolist() == [0] * 5
    assert found.name.tolist() == job.last.tolist()
    assert (found.start == NONE).tolist() == [True, False, False, False, False]
    assert found.states[found.start[1:]].ravel().tolist() == [1, 3, 1, 11]
    assert len(found.states) == 3  # each once
    assert (found.kept == NONE).all()
    assert (found.number, found.forget) == (3, (4,))


def test_rows_stay_where_their_transition_is(trees, states):
    """The worker that keeps a transition gets no state; another one does, and is told of no transition."""
    kept = Kept()
    kept.add(0, ids(3, 1), np.array([[8, 2, 5], [7, 1, 9]]))
    job = wave(trees, {0: [1, 3]}, 0, kept)
    assert job.kept.tolist() == [[7, 1, 9], [8, 2, 5]]
    found = packed(whole(job), trees, states, worker=7)
    assert found.kept.tolist() == [[1, 9], [NONE, NONE]]
    assert found.start.tolist() == [NONE, 0]
    assert found.states.ravel().tolist() == [3]


def test_a_state_that_is_not_stored_is_walked_to(trees, states):
    trees[0].slot[3] = NONE
    job = wave(trees, {0: [3]}, 0)
    settled = []
    found = packed(whole(job), trees, states, settle=lambda: settled.append(1))
    assert settled == [1]
    assert found.legs == {0: [Leg((103,), 4, 2)]}
    assert found.states.ravel().tolist() == [1]
    trees[0].slot[1] = NONE
    found = packed(whole(job), trees, states)
    assert found.legs == {0: [Leg((101,), T + 1, 4), Leg((103,), 4, 2)]}
    assert found.states is None


def test_a_state_that_arrives_meanwhile_is_taken(trees, states):
    slot, trees[0].slot[3] = trees[0].slot[3], NONE
    job = wave(trees, {0: [3]}, 0)

    def settle():
        trees[0].slot[3] = slot

    found = packed(whole(job), trees, states, settle=settle)
    assert found.legs == {}
    assert found.states.ravel().tolist() == [3]


def test_a_lost_state_is_an_error(trees):
    class Gone(MemoryStates):
        def get(self, slots):
            raise LostStates(Path("run"), "shard", slots)

    trees[0].slot[1] = 0
    with pytest.raises(LostStates):
        packed(whole(wave(trees, {0: [1]}, 0)), trees, Gone((1,), torch.float64))


def test_a_row_beside_its_source_needs_its_lineage(trees, states):
    """A neighbour of a draw of the prior: nothing was evaluated, and its state is made from keys."""
    top = grown(trees[0], [ROOT], [T])
    trees[0].reward[top] = 1.0
    kept = Kept()
    kept.add(0, top, np.array([[7, 1, 0]]))
    job = wave(trees, {0: top.tolist()}, T, kept)
    assert job.nfe.tolist() == [0]
    assert (job.kept == NONE).all()
    found = packed(whole(job), trees, states)
    assert {row: keys.tolist() for row, keys in found.lineages.items()} == {0: [50]}
    assert found.start.tolist() == [NONE]
    assert found.legs == {}


def test_transitions_are_known_until_nothing_needs_them(trees):
    kept = Kept()
    kept.add(0, ids(1, 3), np.array([[7, 1, 0], [7, 1, 1]]))
    kept.add(0, ids(2), np.array([[8, 2, 0]]))
    kept.add(1, ids(1), np.array([[9, 3, 0]]))
    assert kept.bundles() == {(7, 1), (8, 2), (9, 3)}
    assert kept.bundles([1]) == {(9, 3)}
    job = wave(trees, {0: [3]}, 0, kept, keep=ids(1))
    assert job.kept.tolist() == [[7, 1, 1]]
    assert job.uses == {(8, 2)}  # nothing draws from it: its lineage died out
    assert kept.bundles() == {(7, 1), (9, 3)}
    assert wave(trees, {0: [3]}, 0, kept).uses == {(7, 1)}
    assert kept.bundles() == {(9, 3)}


def test_nearest_and_legs(trees, states):
    assert nearest(trees[0], 4) == 3
    assert nearest(trees[1], 4) == 1
    assert nearest(trees[1], 2) == ROOT
    assert legs_between(trees[1], 4, 1, T) == [Leg((203,), 4, 2), Leg((204,), 2, 0)]


def test_nodes_that_rows_pass():
    tree = Tree(T, 0)
    tree.append(ids(ROOT, 1, 2, ROOT), ids(4, 2, 0, 0), np.arange(4, dtype=np.uint64))
    job = job_of(0, [(0, Segments(ids(ROOT, ROOT), ids(4, 1), ids(4, 3)))], [tree], SPEC, Kept())
    owner, nodes = nodes_of(whole(job))
    assert nodes.tolist() == [4, 1, 2, 3]
    assert owner.tolist() == [0] * 4
    assert nodes_of([(job, ids(1))])[1].tolist() == [1, 2, 3]


def test_parts_of_parts(trees):
    one, other = wave(trees, {0: [ROOT] * 3}, 0, number=1), wave(trees, {0: [ROOT] * 4}, 0, number=2)
    parts = [(one, ids(0, 2)), (other, ids(1, 2, 3))]
    marked = chosen(parts, np.array([False, False, True, False, True]))
    assert [(job.wave, rows.tolist()) for job, rows in marked] == [(2, [1, 3])]
    split = [[(job.wave, rows.tolist()) for job, rows in half] for half in halves(parts, 3)]
    assert split == [[(1, [0, 2]), (2, [1])], [(2, [2, 3])]]
    assert column(parts, "last").tolist() == [*one.last[[0, 2]], *other.last[1:]]


def test_a_cost_is_charged_to_the_waves_in_full(trees):
    one, other = wave(trees, {0: [ROOT] * 3}, 0), wave(trees, {0: [1] * 4}, 0)
    cost = Cost(nfe=24, rows=25, repeated_nfe=1, reward_calls=7, decodes=7)
    charge([(one, ids(0, 1)), (other, ids(0, 1, 2, 3))], cost)
    assert (one.cost.nfe, other.cost.nfe) == (12, 12)
    assert (one.cost.reward_calls, other.cost.reward_calls) == (2, 5)
    for name in ("nfe", "rows", "repeated_nfe", "reward_calls", "decodes"):
        assert getattr(one.cost, name) + getattr(other.cost, name) == getattr(cost, name)


def test_a_bundle_is_named_by_its_rows(trees):
    job = wave(trees, {0: [ROOT], 1: [1]}, 0)
    assert inputs(whole(job), trees, ["a", "b"]) == (
        "2 rows of tasks [0, 1], prompts ['a', 'b']; the first from node 0 (t = 7) to node 5 of task 0, noise key 50"
    )
    assert job.name(1, trees) == "node 5 (t = 0) of task 1"
