"""Drafts: what they are by hand, whose noise they take, what they cost, and that batches change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from treesearch.backends.base import describe
from treesearch.backends.base.grids import prices, subgrid, time_of
from treesearch.backends.chains.coarse import Coarse
from treesearch.backends.chains.diffusion import Chain, DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.wrappers.drafted import Drafted, operations
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.budget import Cost
from treesearch.core.noise import child_keys, draft_keys, normals, sums_of_normals
from treesearch.core.tree import ROOT, Tree
from treesearch.engine.drafting import Leaps
from treesearch.engine.engine import Engine
from treesearch.engine.model import Model
from treesearch.engine.segments import Segments
from treesearch.engine.states import MemoryStates
from treesearch.errors import KernelError
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels

T, N = 12, 7
ROUNDING = 6 * T * 8 * 2.0**-24  # of sums of 6 entries after T float32 steps of numbers below 8
EVEN = [t / 10 for t in range(11)]


def total(x, prompts):
    return x.double().flatten(1).sum(1)


REWARD = Reward(total, "total", "state")


class Bed(GaussianTrajectories):
    """A chain whose endpoints bend, so that a draft is not the rollout."""

    def __init__(self, scale=1.0, eta=1.0):
        super().__init__(
            torch.zeros(3, 2).double(), torch.eye(6).double(), channels=Channels(1, 1), num_steps=T, eta=eta
        )
        self.scale, self.calls = scale, []

    def transition(self, x, t, cond=None):
        self.calls.append(len(x))
        law = super().transition(x, t, cond)
        bent = self.scale * torch.sin(2 * law.endpoint)
        alpha_s = self.chain.at("alpha_s", t, x)
        return type(law)(law.mean + alpha_s * (bent - law.endpoint), law.std, bent)


def engine(kernel=None, batch_size=4, reward=REWARD, **options):
    kernel = kernel or Bed()
    spec = describe(kernel)
    tree = Tree(spec.num_steps, 7)
    model = Model(kernel, spec, reward, batch_size=batch_size, **options)
    return Engine(model, [tree], MemoryStates(spec.state_shape, spec.dtype), Cost()), tree


def candidates(tree, level=T, n=N):
    """Children of the root, and the walks to them."""
    keys = child_keys(tree.key[:1], int(tree.t[ROOT]), np.arange(n), at_root=True)
    new = tree.append(np.full(n, ROOT), np.full(n, level), keys)
    return Segments(np.full(n, ROOT), new, new)


def finish(tree, nodes):
    """Their first children at x_0, on the path's own noise."""
    new = tree.append(nodes, np.zeros(len(nodes)), tree.key[nodes])
    return Segments(nodes, new, new, paid=False)


def ran(runner, segments, wave=0):
    runner.submit(wave, [(0, segments)])
    return runner.finish(wave)


def drafted(evaluations, level=T, **how):
    runner, tree = engine(**how)
    walks = candidates(tree, level)
    walks.draft = evaluations
    return runner, tree, walks.last, ran(runner, walks)


@pytest.mark.parametrize("level", [T, 8])
def test_a_draft_of_every_step_is_the_rollout(level):
    runner, tree, nodes, _ = drafted(T, level)
    ran(runner, finish(tree, nodes), 1)
    assert np.array_equal(tree.reward[nodes], tree.reward[nodes + N])


@pytest.mark.parametrize("level", [T, 8, 1])
def test_a_draft_by_hand(level):
    runner, tree, nodes, _ = drafted(4, level)
    kernel, spec = Bed(), runner.model.spec
    coarse = Coarse(kernel.chain, spec.draft_levels(4))
    assert (coarse.levels, coarse.probed[10]) == ((12, 10, 8, 6, 0), 9)
    x, key, end = runner.path(0, int(nodes[2]), ROOT)[None], tree.key[nodes[[2]]], None

    def noise(weights):
        z = sum(float(w) * normals(key, np.array([u]), 6) for u, w in enumerate(weights))
        return torch.from_numpy(z).reshape(1, *spec.noise_shape)

    t = level
    while t:
        e = t if end is None else int(coarse.probed[t])
        at, where = torch.tensor([e]), torch.tensor([t])
        seen = x if e == t else coarse.probe(x, where, at, end).sample(noise(coarse.probes[t]))
        law = coarse.law(x, where, at, kernel.transition(seen, at))
        x, end, t = law.sample(noise(coarse.weights[t])), law.endpoint, int(coarse.below[t])
    assert tree.reward[nodes[2]] == pytest.approx(float(x.sum()), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_change_no_draft(batch_size):
    alike = drafted(4, batch_size=batch_size)[1].reward
    assert np.allclose(alike, drafted(4)[1].reward, rtol=0, atol=1e-12, equal_nan=True)


def test_held_nodes_draft_on_noise_of_their_own():
    _, tree, nodes, _ = drafted(T, 8)
    runner, other = engine()
    walks = candidates(other, 8)
    walks.draft, walks.hold = T, True
    cost = ran(runner, walks)
    assert np.array_equal(tree.key, other.key)
    apart = np.abs(tree.reward[nodes] - other.reward[nodes])
    assert (apart > 1e-3).all()
    # The walk and the held evaluation, with which the draft begins.
    assert (cost.nfe, cost.draft_nfe, cost.reward_calls) == (N * (4 + 1 + 7), N * 7, N)
    assert ran(runner, finish_held(other, walks.last), 1).nfe == N * 7


@pytest.mark.parametrize("level", [T, 8, 2])
def test_a_held_draft_is_the_one_that_evaluates_its_state_again(level):
    kernel = Bed()
    runner, tree = engine(kernel)
    walks = candidates(tree, level)
    walks.draft, walks.hold = 4, True
    cost, task, t = ran(runner, walks), np.zeros(N, np.int64), level
    leaps = Leaps(runner.model, 4)
    assert sum(kernel.calls) == N * (T - level + leaps.left[level]) == cost.nfe == cost.rows
    x = torch.stack([runner.path(0, int(node), ROOT) for node in walks.last])
    key, end = draft_keys(tree.key[walks.last], np.full(N, level)), torch.zeros_like(x)
    while t:
        x, end, *_ = leaps.leap(x, np.full(N, t), task, key, end, np.full(N, t < level))
        t = int(leaps.below[t])
    assert np.allclose(tree.reward[walks.last], total(x, None).numpy(), rtol=0, atol=ROUNDING)


def test_held_nodes_of_drafts_of_two_kinds_begin_with_their_own_transitions():
    """Two walks of a pass, each with another number of evaluations: as each alone."""
    runner, tree = engine(batch_size=2 * N)
    both = [candidates(tree), candidates(tree)]
    for walks, evaluations in zip(both, (5, 3), strict=True):
        walks.draft, walks.hold = evaluations, True
    runner.submit(0, [(0, walks) for walks in both])
    runner.finish(0)
    alone, other = engine(batch_size=2 * N)
    for number, (walks, evaluations) in enumerate(zip(both, (5, 3), strict=True)):
        new = other.append(walks.source, tree.t[walks.last], tree.key[walks.last])
        ran(alone, Segments(walks.source, new, new, draft=evaluations, hold=True), number)
        assert np.array_equal(other.reward[new], tree.reward[walks.last])


def finish_held(tree, nodes):
    walks = finish(tree, nodes)
    walks.paid = True
    return walks


def test_what_drafts_cost():
    kernel = Bed()
    runner, tree, nodes, cost = drafted(3, kernel=kernel, batch_size=4)
    assert (cost.nfe, cost.draft_nfe, cost.rows, cost.reward_calls, cost.repeated_nfe) == (3 * N, 3 * N, 3 * N, N, 0)
    assert sorted(kernel.calls) == [1, 4, 4, 4, 4, 4]  # 21 evaluations in as few passes as they fit
    cost = ran(runner, finish(tree, nodes[:2]), 1)
    assert (cost.nfe, cost.draft_nfe, cost.repeated_nfe) == (2 * T, 0, 0)


def test_prices_by_level():
    assert subgrid(EVEN, 3) == (10, 7, 3, 0)
    assert prices(EVEN, 3, 1.0) == (0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    assert prices(EVEN, 3, 0.4) == (0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2)
    assert prices(EVEN, 3, 0.1)[10] == 1
    assert prices(EVEN, 3, 0.4, held=True) == (0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1)


def test_levels_of_a_draft_are_spaced_by_noise():
    bars = torch.cos(torch.linspace(0, 1.57, 51, dtype=torch.float64)) ** 2
    levels = subgrid([time_of(float(b) ** 0.5, float(1 - b) ** 0.5) for b in bars], 4)
    ratio = [float((1 - bars[t]) / bars[t]) ** 0.5 for t in levels[1:-1]]
    assert ratio == pytest.approx([2 * 3**0.75, 2, 2 / 3**0.75], rel=0.1)  # quartiles of a logistic law
    assert subgrid([0.0, *[0.999] * 6, 1.0], 7) == (7, 6, 5, 4, 3, 2, 1, 0)
    assert time_of(0.0, 1.0) == 1.0
    assert time_of(1.0, 0.0) == 0.0


def test_drafts_of_kernels_whose_entries_have_noise_levels_of_their_own():
    kernel = Bed(eta=torch.tensor([[[0.0, 1.0]] * 3]))
    with pytest.raises(ValueError, match="differ from entry to entry"):
        describe(kernel).draft_prices(3)


@pytest.mark.parametrize("evaluations", [1, 0, 11, -2])
def test_evaluations_out_of_range(evaluations):
    with pytest.raises(ValueError, match=r"expected 2\.\.T = 10"):
        subgrid(EVEN, evaluations)


def test_kernels_without_a_chain_have_no_drafts():
    with pytest.raises(ValueError, match="no `chain`"):
        describe(LinearGaussian()).draft_prices(3)


def test_padded_passes_pad_drafts():
    *_, cost = drafted(3, batch_invariant=True)
    assert (cost.nfe, cost.rows) == (3 * N, 6 * 4)


def test_a_draft_that_is_not_finite():
    class Broken(Bed):
        def transition(self, x, t, cond=None):
            law = super().transition(x, t, cond)
            return type(law)(law.mean / 0 * 0, law.std, law.endpoint)

    with pytest.raises(KernelError, match="NaN or infinite"):
        drafted(3, kernel=Broken())


def test_sums_of_normals_are_those_of_normals():
    keys = np.array([3, 2**63 + 5], np.uint64)
    weights = np.array([[0.0, 0.6, 0.0, 0.8], [0.0, 0.0, 1.0, 0.0]])
    parts = [normals(keys, np.full(2, u), 5) for u in range(4)]
    by_hand = sum(weights[:, [u]] * parts[u] for u in range(4))
    assert np.allclose(sums_of_normals(keys, weights, 5), by_hand, atol=1e-7)
    assert np.array_equal(sums_of_normals(keys, weights, 5)[1], parts[2][1])


def test_keys_of_drafts_differ_by_node_and_level():
    keys = np.array([1, 1, 2], np.uint64)
    found = draft_keys(keys, np.array([3, 4, 3]))
    assert len({*found.tolist(), *keys.tolist()}) == 5


def test_a_walk_that_nothing_scores():
    runner, tree = engine()
    with pytest.raises(ValueError, match="held or drafted"):
        ran(runner, candidates(tree))


def test_a_draft_that_begins_where_it_ends():
    runner, tree = engine()
    walks = candidates(tree, 0)
    walks.draft = 3
    with pytest.raises(ValueError, match="draft from t = 0"):
        ran(runner, walks)


# Drafts by another network.


def test_another_network_drafts_and_the_law_stays():
    mine, other = Bed(), Bed(0.5)
    wrapped = Drafted(mine, other, 0.25)
    assert (describe(wrapped).draft_ratio, describe(wrapped).num_steps) == (0.25, T)
    runner, tree, nodes, cost = drafted(4, kernel=wrapped)
    assert mine.calls == []
    assert (cost.nfe, cost.draft_nfe, cost.rows) == (N, N, 4 * N)
    assert np.allclose(tree.reward[nodes], drafted(4, kernel=Bed(0.5))[1].reward[nodes], rtol=0, atol=ROUNDING)
    ran(runner, finish(tree, nodes), 1)
    plain, again = engine()
    ran(plain, candidates(again, 0))
    assert np.array_equal(tree.reward[nodes + N], again.reward[nodes])


class Renoising(Bed):
    """Steps of its own, as a student's."""

    def __init__(self):
        super().__init__(0.5)
        self.chain = Chain(self.chain.schedule, step="renoise")


def test_only_endpoints_of_another_network_are_taken():
    one, other = (drafted(T, kernel=Drafted(Bed(), kind, 1.0))[1].reward for kind in (Renoising(), Bed(0.5)))
    assert np.allclose(one, other, rtol=0, atol=ROUNDING, equal_nan=True)


def test_wrappers_around_a_drafted_kernel_wrap_what_drafts():
    known = torch.zeros(3, 2, dtype=torch.bool)
    known[0] = True
    clamped = Clamp(Drafted(Bed(), Bed(0.5), 1.0), known, torch.full((3, 2), 2.0).double())
    assert isinstance(clamped.drafter, Clamp)
    x = clamped.prior(torch.randn(1, *describe(clamped).noise_shape, generator=torch.Generator().manual_seed(0)))
    law = clamped.drafter.transition(x, torch.tensor([1]))
    assert torch.allclose(law.sample(torch.zeros_like(x))[0, 0], torch.full((2,), 2.0).double(), atol=1e-6)


class Deeper(Bed):
    def __init__(self):
        super().__init__()
        self.num_steps = T + 1


class Noisier(Bed):
    def __init__(self):
        super().__init__()
        self.chain = self.chain.on(Schedule.flow(torch.linspace(0, 1, T + 1)))


@pytest.mark.parametrize(
    ("other", "ratio", "what"),
    [
        (Deeper(), None, "num_steps"),
        (Noisier(), None, "noise levels"),
        (Bed(), 0.0, "ratio"),
        (Bed(), float("nan"), "ratio"),
        (Bed(), True, "ratio"),
    ],
)
def test_kernels_that_cannot_draft_for_another(other, ratio, what):
    with pytest.raises(ValueError, match=what):
        Drafted(Bed(), other, ratio)


def test_ratio_is_counted_in_operations():
    def network(width):
        layer = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 4))
        return lambda x, t: layer(x)

    schedule = Schedule.flow(torch.linspace(0, 1, T + 1))
    wide, narrow = (DiffusionKernel(network(w), state_shape=(4,), schedule=schedule) for w in (64, 16))
    assert operations(narrow) == 2 * 2 * 4 * 16
    assert Drafted(wide, narrow).draft_ratio == pytest.approx(0.25)
