"""The station of a worker, without Ray: bundles in shared passes are what the kernel and its noise give by hand."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from tests.engine.test_drafting import REWARD, Bed, candidates, engine, ran
from tests.support import kernels
from tests.support.beds import BEDS
from tests.support.kernels import noted
from treesearch.backends.base import describe
from treesearch.backends.guidance import Valued
from treesearch.core.tree import NONE
from treesearch.distributed.bundles import Bundle, Reply, as_numpy, as_tensor
from treesearch.distributed.station import Station
from treesearch.engine.asking import encode
from treesearch.engine.segments import Leg
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import RewardError, as_reward
from treesearch.testing import conditioning, noise

PROMPTS = ["a", "b", "c"]
BED = BEDS["gaussian"]  # T = 5


class Walk:
    """A row by hand: from a state at level t (or the prior, t = None) through `levels`."""

    def __init__(self, kernel, key, task, levels, t=None, x=None, hold=False, law=None):
        spec = describe(kernel)
        key, cond = np.array([key], np.uint64), conditioning(kernel, PROMPTS, np.array([task]))
        self.states, self.log_w, total = [], [], 0.0
        if t is None:
            t, x = spec.num_steps, kernel.prior(noise(spec, key, spec.num_steps + 1), cond)
        for level in levels:
            while t > level:
                law = kernel.transition(x, torch.tensor([t]), cond) if law is None else law
                x = law.sample(noise(spec, key, t))
                total += float(law.log_weight(x))
                law, t = None, t - 1
            self.states.append(x)
            self.log_w.append(total)
            total = 0.0
        self.law = kernel.transition(x, torch.tensor([t]), cond) if hold else None
        self.reward = float(kernels.total(kernel.decode(self.law.endpoint if hold else x)))


def bundle(number, keys, task, levels, *, t=6, states=None, kept=None, hold=False, again=False, draft=0, **more):
    """Rows that all pass the same levels."""
    n, passed = len(keys), len(levels)

    def full(value, dtype=np.int64):
        return np.full(n, value, dtype)

    return Bundle(
        number=number,
        task=full(task) if np.isscalar(task) else np.array(task),
        key=np.array(keys, np.uint64),
        t=full(t),
        again=full(again, bool),
        hold=full(hold, bool),
        draft=full(draft),
        passed=full(passed),
        levels=np.tile(np.array(levels, np.int64), n),
        name=1000 * number + np.arange(n),
        start=full(NONE) if states is None else np.arange(n),
        states=None if states is None else as_numpy(torch.cat(states)),
        kept=np.full((n, 2), NONE) if kept is None else np.array(kept),
        **more,
    )


def station(kernel=BED, reward=kernels.total, batch_size=64, **options):
    return Station(
        kernel,
        None if reward is None else as_reward(reward),
        prompts=PROMPTS,
        encoded=encode(kernel, PROMPTS),
        batch_size=batch_size,
        **options,
    )


def finish(of, *bundles):
    """What a station makes of bundles, by number."""
    for one in bundles:
        of.submit(one)
    found = {}
    for _ in range(1000):
        if of.idle:
            return found
        found |= dict(of.step())
    raise AssertionError("the station does not come to an end")


def agrees(reply, walks, *, stored=True):
    """A reply is what the rows are by hand, bit for bit."""
    assert isinstance(reply, Reply), reply
    np.testing.assert_array_equal(reply.log_w, np.concatenate([w.log_w for w in walks]))
    np.testing.assert_array_equal(reply.reward, [w.reward for w in walks])
    assert reply.stored.all() == stored
    if stored:
        np.testing.assert_array_equal(reply.states, as_numpy(torch.cat([x for w in walks for x in w.states])))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
@pytest.mark.parametrize("bed", [*BEDS, "drifting"])
def test_bundles_share_passes_and_are_what_they_are_by_hand(bed, batch_size, request):
    kernel = BEDS[bed] if bed in BEDS else request.getfixturevalue("drifting")
    top, of = describe(kernel).num_steps, station(kernel, batch_size=batch_size)
    fresh = [Walk(kernel, key, 0, (2, 0)) for key in range(9)]
    starts = [w.states[0] for w in fresh[:3]]
    below = [Walk(kernel, 40 + i, 2, (0,), t=2, x=x) for i, x in enumerate(starts)]
    found = finish(
        of,
        bundle(1, range(9), 0, (2, 0), t=top + 1),
        bundle(2, range(20, 25), 1, (1,), t=top + 1, hold=True),
        bundle(3, range(40, 43), 2, (0,), t=2, states=starts),
    )
    held = [Walk(kernel, key, 1, (1,), hold=True) for key in range(20, 25)]
    for number, walks in ((1, fresh), (2, held), (3, below)):
        agrees(found[number], walks)
    nfe = [9 * top, 5 * top, 6]  # a held row evaluates its last level
    assert [found[i].cost.nfe for i in (1, 2, 3)] == nfe
    assert [found[i].cost.reward_calls for i in (1, 2, 3)] == [9, 5, 3]
    assert all(reply.cost.repeated_nfe == 0 for reply in found.values())
    passes = -(-sum(nfe) // batch_size)
    assert max(passes, top) <= of.counters.passes <= passes + top
    assert of.counters.rows == sum(nfe)
    assert of.counters.room == of.counters.passes * batch_size


def test_rows_of_several_tasks_in_one_bundle():
    found = finish(station(batch_size=4), bundle(1, range(6), [2, 0, 1, 1, 2, 0], (3, 0)))
    agrees(found[1], [Walk(BED, key, task, (3, 0)) for key, task in enumerate([2, 0, 1, 1, 2, 0])])


def test_inner_states_stay_where_they_are_not_wanted():
    reply = finish(station(keep_inner=False), bundle(1, range(4), 0, (3, 0)))[1]
    assert reply.stored.tolist() == [False, True] * 4
    np.testing.assert_array_equal(
        reply.states, as_numpy(torch.cat([Walk(BED, k, 0, (0,)).states[0] for k in range(4)]))
    )


def test_states_are_walked_to_where_they_are_not_stored():
    """A row two edges below the prior, and one below a stored state: the walks are repeated work."""
    walks = [Walk(BED, 3, 0, (2,)), Walk(BED, 4, 0, (4,))]
    inner = Walk(BED, 8, 0, (1,), t=2, x=walks[0].states[0])
    one = bundle(1, [11], 0, (0,), t=1, legs={0: [Leg((3,), 6, 2), Leg((8,), 2, 1)]})
    other = bundle(2, [12], 0, (0,), t=3, states=walks[1].states, legs={0: [Leg((5,), 4, 3)]})
    of = station()
    found = finish(of, one, other)
    agrees(found[1], [Walk(BED, 11, 0, (0,), t=1, x=inner.states[0])])
    leg = Walk(BED, 5, 0, (3,), t=4, x=walks[1].states[0])
    agrees(found[2], [Walk(BED, 12, 0, (0,), t=3, x=leg.states[0])])
    assert [(found[i].cost.nfe, found[i].cost.repeated_nfe) for i in (1, 2)] == [(1, 4), (3, 1)]
    assert of.counters.rows <= of.counters.room


def test_neighbours_are_made_from_the_keys_of_their_lineage():
    """Two rows below one node of level T, one below its neighbour; then a walk that begins at a neighbour."""
    own = {key: noise(describe(BED), np.array([key], np.uint64), 6) for key in (3, 4, 11, 12, 13)}

    def turn(z, fresh):
        return np.cos(0.7) * z + np.sin(0.7) * fresh

    z = {11: turn(own[3], own[11]), 12: turn(own[3], own[12]), 13: turn(turn(own[3], own[4]), own[13])}
    lines = [np.array(keys, np.uint64) for keys in ([3], [3], [3, 4])]
    of = station(angle=0.7)
    rows = bundle(1, list(z), [0, 1, 0], (5, 0), t=5, lineages=dict(enumerate(lines)))
    walk = bundle(2, [20], 1, (0,), t=3, legs={0: [Leg((3, 11), 6, 5), Leg((11,), 5, 3)]})
    found, tops = finish(of, rows, walk), {key: BED.prior(z[key]) for key in z}
    agrees(found[1], [Walk(BED, key, task, (5, 0), t=5, x=tops[key]) for key, task in zip(z, [0, 1, 0], strict=True)])
    inner = Walk(BED, 11, 1, (3,), t=5, x=tops[11])
    agrees(found[2], [Walk(BED, 20, 1, (0,), t=3, x=inner.states[0])])
    assert [(found[i].cost.nfe, found[i].cost.repeated_nfe) for i in (1, 2)] == [(15, 0), (3, 2)]


# Held transitions.


@pytest.mark.parametrize("batch_size", [3, 64])
def test_held_transitions_are_drawn_from_by_any_bundle(drifting, batch_size):
    """Offspring share the network call: each draws apart, and pays for its own steps only."""
    of = station(drifting, batch_size=batch_size)
    held = [Walk(drifting, key, key % 3, (3,), hold=True) for key in range(6)]
    agrees(finish(of, bundle(1, range(6), [k % 3 for k in range(6)], (3,), hold=True))[1], held)
    rows = [5, 0, 0, 2]
    found = finish(
        of,
        bundle(2, [50, 51, 52, 53], [r % 3 for r in rows], (0,), t=3, again=True, kept=[(1, r) for r in rows]),
        bundle(3, [60], 1, (1,), t=3, again=True, kept=[(1, 4)], hold=True),
    )
    agrees(found[2], [
        Walk(drifting, 50 + i, r % 3, (0,), t=3, x=held[r].states[0], law=held[r].law) for i, r in enumerate(rows)
    ])  # fmt: skip
    agrees(found[3], [Walk(drifting, 60, 1, (1,), t=3, x=held[4].states[0], law=held[4].law, hold=True)])
    assert [(found[i].cost.nfe, found[i].cost.repeated_nfe) for i in (2, 3)] == [(4 * 2, 0), (2, 0)]


def test_rows_that_end_and_rows_that_hold_draw_from_one_bundle():
    """Both kinds in one bundle of one task."""
    of = station()
    held = [Walk(BED, key, 0, (3,), hold=True) for key in range(2)]
    finish(of, bundle(1, range(2), 0, (3,), hold=True))
    both = bundle(2, [7, 8], 0, (1,), t=3, again=True, kept=[(1, 0), (1, 1)])
    both.hold = np.array([True, False])
    both.levels = np.array([1, 0])
    reply = finish(of, both)[2]
    agrees(reply, [
        Walk(BED, 7, 0, (1,), t=3, x=held[0].states[0], law=held[0].law, hold=True),
        Walk(BED, 8, 0, (0,), t=3, x=held[1].states[0], law=held[1].law),
    ])  # fmt: skip
    assert reply.cost.repeated_nfe == 0


def test_a_state_is_evaluated_again_where_its_transition_is_elsewhere():
    held = [Walk(BED, key, 0, (3,), hold=True) for key in range(4)]
    again = bundle(2, range(70, 74), 0, (0,), t=3, again=True, states=[w.states[0] for w in held])
    reply = finish(station(), again)[2]
    agrees(reply, [Walk(BED, 70 + i, 0, (0,), t=3, x=w.states[0]) for i, w in enumerate(held)])
    assert (reply.cost.nfe, reply.cost.repeated_nfe) == (4 * 2, 4)


@pytest.mark.parametrize("kind", ["sound", "hungry", "raising"])
def test_memory_does_not_grow(tmp_path, kind):
    """Transitions go when they are said to be needed no more, states when their bundle is done or has failed."""
    kernel = {"sound": BED, "hungry": kernels.Hungry(), "raising": kernels.RaisesOn(folder=tmp_path)}[kind]
    of = station(kernel, batch_size=8)
    used = []
    for step in range(30):
        number = 10 * step
        x = [Walk(BED, k, 0, (4,)).states[0] for k in range(4)]
        found = finish(
            of,
            bundle(number, range(8), 0, (3,), hold=True, forget=tuple(range(number - 10, number))),
            bundle(number + 1, range(4), 0, (2, 0), t=4, states=x),
            bundle(number + 2, range(4), 2, (3, 0)),
        )
        assert isinstance(found[number], Reply)
        assert isinstance(found[number + 2], Reply) == (kind != "raising")
        used.append(of._states._used - len(of._states._free))
    assert len(of._kept) == 1
    assert max(used) == 0
    assert of._states._used <= 256
    of.close()
    assert not of._kept
    assert of.idle


# Errors.


@pytest.mark.parametrize("batch_size", [4, 64])
def test_an_exception_is_its_bundle_s(tmp_path, batch_size):
    of = station(kernels.RaisesOn(folder=tmp_path), batch_size=batch_size)
    found = finish(of, bundle(1, range(5), 0, (0,)), bundle(2, [9], 2, (3, 0)), bundle(3, range(5), 1, (3, 0)))
    assert isinstance(found[2], RuntimeError)
    assert "no such weight" in str(found[2])
    agrees(found[1], [Walk(BED, k, 0, (0,)) for k in range(5)])
    agrees(found[3], [Walk(BED, k, 1, (3, 0)) for k in range(5)])
    assert [found[i].cost.nfe for i in (1, 3)] == [25, 25]
    assert found[1].cost.repeated_nfe + found[3].cost.repeated_nfe > 0
    assert len(noted(tmp_path / "raised")) == 2  # together, and alone
    agrees(finish(of, bundle(4, range(3), 0, (0,)))[4], [Walk(BED, k, 0, (0,)) for k in range(3)])


def test_held_transitions_outlive_another_bundle_s_exception(tmp_path):
    of = station(kernels.RaisesOn(folder=tmp_path))
    held = Walk(BED, 1, 0, (3,), hold=True)
    finish(of, bundle(1, [1], 0, (3,), hold=True))
    found = finish(of, bundle(2, [5], 0, (0,), t=3, again=True, kept=[(1, 0)]), bundle(3, [9], 2, (0,)))
    assert isinstance(found[3], RuntimeError)
    agrees(found[2], [Walk(BED, 5, 0, (0,), t=3, x=held.states[0], law=held.law)])


def test_a_reward_s_error_names_the_nodes_of_the_search():
    def reward(x, prompts=None):
        return torch.where(torch.tensor([p == "c" for p in prompts]), torch.nan, kernels.total(x))

    found = finish(station(reward=reward), bundle(1, range(2), 0, (0,)), bundle(2, range(3), [1, 2, 1], (0,)))
    assert isinstance(found[1], Reply)
    assert isinstance(found[2], RewardError)
    assert "[node 2001 (t = 0) of task 2]" in str(found[2])


def test_less_memory_smaller_batches():
    of = station(kernels.Hungry(), batch_size=64)
    found = finish(of, bundle(1, range(40), 0, (3, 0)), bundle(2, range(40), 1, (2,), hold=True))
    agrees(found[1], [Walk(BED, k, 0, (3, 0)) for k in range(40)])
    agrees(found[2], [Walk(BED, k, 1, (2,), hold=True) for k in range(40)])
    assert of.model.batch_size == 4  # room for 5
    assert [reply.cost.nfe for reply in found.values()] == [200, 160]


def test_no_memory_at_all_is_an_error():
    kernel = kernels.Hungry()
    kernel.room = 0
    of = station(kernel, batch_size=8)
    found = finish(of, bundle(1, range(4), 0, (0,)), bundle(2, range(4), 0, (0,)))
    assert all(isinstance(found[i], torch.OutOfMemoryError) for i in (1, 2))
    assert of.model.batch_size == 1


# Rewards elsewhere.


@pytest.mark.parametrize("batch_size", [2, 64])
def test_samples_are_sent_away_in_order(batch_size):
    of, kernel = station(BEDS["discrete"], None, batch_size=batch_size), BEDS["discrete"]
    found = finish(of, bundle(1, range(30), 0, (2, 0), t=4), bundle(2, range(30), 1, (1,), t=4, hold=True))
    walks = [Walk(kernel, k, 0, (2, 0)) for k in range(30)]
    held = [Walk(kernel, k, 1, (1,), hold=True) for k in range(30)]
    for reply, rows in ((found[1], walks), (found[2], held)):
        samples = as_tensor(reply.samples, reply.dtype)
        assert np.isnan(reply.reward).all()
        np.testing.assert_array_equal(kernels.total(kernel.decode(samples)), [w.reward for w in rows])
        assert reply.cost.reward_calls == 0
    a, b = (as_tensor(found[i].samples, found[i].dtype).flatten().tolist() for i in (1, 2))
    digests = found[1].digests + found[2].digests
    contents = [(0, x) for x in a] + [(1, x) for x in b]
    assert len({*zip(digests, contents, strict=True)}) == len(set(digests)) == len(set(contents)) < 60


def test_samples_are_in_order_of_rows_that_end_at_different_passes():
    above = [Walk(BED, k, 0, (3 - k % 3,)).states[0] for k in range(7)]
    one = bundle(1, range(50, 57), 0, (0,), states=above)
    one.t = np.array([3 - k % 3 for k in range(7)])
    reply = finish(station(BED, None), one)[1]
    want = [Walk(BED, 50 + k, 0, (0,), t=3 - k % 3, x=x) for k, x in enumerate(above)]
    np.testing.assert_array_equal(kernels.total(as_tensor(reply.samples, reply.dtype)), [w.reward for w in want])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_travel_losslessly(dtype):
    x = (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 3).to(dtype).t()
    sent = as_numpy(x)
    assert sent.flags.c_contiguous
    sent.setflags(write=False)
    back = as_tensor(sent, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, x)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_station_keeps_no_graph_whatever_the_mode(mode):
    kernel = kernels.Plain()
    of = station(kernel, lambda x: kernel.f(x).sum(1))
    kernel.graphs.clear()  # of its prompts, which the session encodes
    with mode():
        found = finish(of, bundle(1, range(4), 0, (2, 0), t=5), bundle(2, range(9, 12), 1, (1,), t=5, hold=True))
    assert all(isinstance(reply, Reply) for reply in found.values())
    assert len(kernel.graphs) >= 5
    assert not any(kernel.graphs)


def test_states_of_declared_values_are_not_sent_to_be_scored():
    """A bundle of both: rows that end above t = 0 have their values, samples go away and wait."""
    reward = linear(0.5)
    of = station(Valued(BED, reward, kernels.worth), None, guide_scores=True)
    reply = finish(of, joined(bundle(1, range(4), 0, (2,), hold=True), bundle(1, range(4, 7), 0, (0,))))[1]
    hold = [Walk(BED, key, 0, (2,), hold=True) for key in range(4)]
    want = [float(kernels.worth(w.states[0], torch.tensor([2]), w.law, None)) for w in hold]
    np.testing.assert_array_equal(reply.reward, [*want, math.nan, math.nan, math.nan])
    assert len(reply.samples) == len(reply.digests) == 3
    below = [Walk(BED, key, 0, (0,)) for key in range(4, 7)]
    np.testing.assert_array_equal(reply.samples, as_numpy(torch.cat([w.states[0] for w in below])))
    assert (reply.cost.reward_calls, reply.cost.decodes) == (0, 3)


def joined(one, other):
    """Two bundles as one."""
    rows = {
        f.name: np.concatenate([getattr(b, f.name) for b in (one, other)])
        for f in fields(Bundle)
        if isinstance(getattr(one, f.name), np.ndarray)
    }
    return replace(one, **rows)


# Drafts.


class Scarce(Bed):
    """Memory for two rows, once drafts are under way."""

    def transition(self, x, t, cond=None):
        if len(x) > 2 and int(t.max()) < 8:
            raise torch.OutOfMemoryError("out of memory")
        return super().transition(x, t, cond)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("kernel", [Bed(), Scarce()], ids=["bed", "scarce"])
def test_drafts_are_those_of_one_process(hold, kernel):
    """Whatever was tried again: plain ones on the path's noise, those of held nodes on their own."""
    runner, tree = engine()
    walks = candidates(tree, 8)
    walks.draft, walks.hold = 3, hold
    cost = ran(runner, walks)
    of = Station(kernel, REWARD, batch_size=8)
    found = finish(of, bundle(1, tree.key[walks.first], 0, (8,), t=13, hold=hold, draft=3))
    assert np.array_equal(found[1].reward, tree.reward[walks.last])
    assert (found[1].cost.nfe, found[1].cost.draft_nfe) == (cost.nfe, cost.draft_nfe)
    assert (found[1].cost.repeated_nfe > 0) == isinstance(kernel, Scarce)
