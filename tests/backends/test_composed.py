"""Plans of several chunks: the law is the product of the chunks' laws, at every level, for every method."""

import math
from dataclasses import replace

import pytest
import torch

import treesearch as ts
from tests.support.told import F64, Told
from treesearch.backends.base import Guided, describe, shift_mean
from treesearch.backends.exact.gaussian_states import carried
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import TDS
from treesearch.backends.models.trajectory import maze_kernel
from treesearch.backends.wrappers.composed import Composed
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards import Reward
from treesearch.rewards.channels import Channels, known
from treesearch.testing import Counting, check_kernel

SYSTEM = {"noise": 0.3, "behaviour": 0.5, "start": 1.0}
A, B, K = torch.tensor([[0.9]]), torch.tensor([[0.5]]), torch.tensor([[-0.4]])
T, ROWS, SIZE = 5, 3, 2


def told(kind=Told):
    made = GaussianTrajectories.of_system(A, B, K, horizon=ROWS, **SYSTEM)
    return kind(made.mean + 0.2, made.cov, channels=Channels(1, 1), num_steps=T)


class Restless(Told):
    """With noise in the last step too."""

    @property
    def stochastic(self):
        return (True,) * (T + 1)

    @stochastic.setter
    def stochastic(self, _):
        pass

    def transition(self, x, t, cond=None):
        law = super().transition(x, t, cond)
        free = torch.ones_like(x, dtype=torch.bool) if cond is None else ~cond["mask"]
        return replace(law, std=torch.where(free & (t == 1)[:, None, None], 0.2, law.std))


class Knowing:
    """A kernel that is always told the same."""

    def __init__(self, kernel, prompt):
        self.kernel, self.cond = kernel, kernel.encode([prompt])
        self.num_steps, self.state_shape = kernel.num_steps, kernel.state_shape

    def _rows(self, n):
        return {name: rows.expand(n, *rows.shape[1:]) for name, rows in self.cond.items()}

    def prior(self, noise):
        return self.kernel.prior(noise, self._rows(len(noise)))

    def transition(self, x, t):
        return self.kernel.transition(x, t, self._rows(len(x)))


def chunk_law(kernel, start, goal):
    """Mean and covariance of a chunk, by the kernel alone."""
    return carried(Knowing(kernel, known(start=start, goal=goal)))


def composed_law(kernel, chunks, start=None, goal=None):
    """The product of the chunks' laws, by conditioning on the observation that neighbours share."""
    mean, cov = chunk_law(kernel, start, goal if chunks == 1 else None)
    for chunk in range(1, chunks):
        end = goal if chunk == chunks - 1 else None
        at, spread = chunk_law(kernel, [0.0], end)
        slope = (chunk_law(kernel, [1.0], end)[0] - at)[:, None]  # of the chunk in its first observation
        meet = len(mean) - SIZE  # the last observation
        mean = torch.cat([mean[:meet], at + slope[:, 0] * mean[meet]])
        cross = cov[:meet, meet : meet + 1] @ slope.T
        later = spread + slope @ cov[meet : meet + 1, meet : meet + 1] @ slope.T
        cov = torch.cat([torch.cat([cov[:meet, :meet], cross], 1), torch.cat([cross.T, later], 1)])
    return mean, cov


@pytest.mark.parametrize("kind", [Told, Restless])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("start", "goal"), [(None, None), ([0.7], None), ([0.7], [-1.0])])
def test_the_law_is_the_product_of_the_laws_of_the_chunks(kind, chunks, start, goal):
    kernel = Composed(told(kind), chunks)
    mean, cov = carried(Knowing(kernel, known(start=start, goal=goal)))
    want = composed_law(told(kind), chunks, start, goal)
    assert kernel.horizon * SIZE == len(mean)
    assert torch.allclose(mean, want[0], atol=1e-9)
    assert torch.allclose(cov, want[1], atol=1e-9)


def test_chunks_of_a_markov_process_make_its_longer_trajectories():
    longer = GaussianTrajectories.of_system(A, B, K, horizon=5, **SYSTEM).cov
    errors = []
    for steps in (10, 80):
        made = GaussianTrajectories.of_system(A, B, K, horizon=ROWS, num_steps=steps, **SYSTEM)
        kernel = Told(made.mean, made.cov, channels=Channels(1, 1), num_steps=steps)
        errors.append(float((carried(Composed(kernel, 2))[1] - longer).norm() / longer.norm()))
    assert errors[1] < errors[0] / 4  # that of the steps, which are too few, and nothing else


def test_a_plan_of_one_chunk_is_the_kernel_bit_for_bit():
    inner = maze_kernel(num_steps=3, horizon=16)
    prompts = [known([-2.5, -2.5, 0, 0], [2.5, 2.5])] * 2
    one, other = (
        ts.search(kernel, corner, ts.FeynmanKac(num_particles=3), prompts=prompts, seed=4, progress=False)
        for kernel in (inner, Composed(inner, 1))
    )
    for task in range(2):
        assert torch.equal(one.tasks[task].samples, other.tasks[task].samples)
        assert one.tasks[task].log_z == other.tasks[task].log_z


def corner(plans, prompts=None):
    return plans[:, -1, 0] + plans[:, -1, 1]


def test_rows_of_different_chunks_and_levels_do_not_mind_each_other():
    kernel = Composed(told(), 3)
    n = kernel.num_steps
    x = torch.randn(n, *kernel.state_shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.randperm(n, generator=torch.Generator().manual_seed(1)) + 1
    cond = kernel.encode([known([float(i)], [1.0]) for i in range(n)])
    together, noise = kernel.transition(x, t, cond), x.flip(0)
    for i in range(n):
        alone = kernel.transition(x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()})
        assert torch.allclose(alone.sample(noise[i : i + 1])[0], together.sample(noise)[i], atol=1e-12)
        assert torch.allclose(alone.endpoint[0], together.endpoint[i], atol=1e-12)


def test_what_is_done_stays_and_what_is_to_come_is_drawn_when_its_turn_comes():
    kernel = Composed(told(), 3)
    ends = T * 2 + 1  # the last step of the first chunk
    x = kernel.prior(torch.randn(2, *kernel.state_shape, dtype=F64))
    assert not x[:, ROWS:].any()
    law = kernel.transition(x, torch.full((2,), ends))
    assert (law.std[:, ROWS:5] == 1).all()  # x_T of the second chunk
    assert (law.std[:, ROWS - 1] == torch.tensor([0.0, 1.0])).all()  # they meet in an observation
    assert not law.std[:, 5:].any()
    after = kernel.transition(law.sample(x), torch.full((2,), ends - 1))
    assert not after.std[:, : ROWS - 1].any()
    assert torch.equal(after.mean[:, : ROWS - 1], law.sample(x)[:, : ROWS - 1])
    assert describe(kernel).stochastic == (True, *[False, True, True, True, True], *[True] * 5, *[True] * 5)


def test_an_endpoint_of_a_plan_that_is_not_whole_stands_still_where_it_has_come_to():
    kernel = Composed(maze_kernel(num_steps=4, horizon=16), 3)
    cond = kernel.encode([known([-2.5, -2.5, 0.0, 0.0], [2.5, 2.5])])
    x = kernel.prior(torch.randn(1, *kernel.state_shape, generator=torch.Generator().manual_seed(0)), cond)
    found = kernel.transition(x, torch.tensor([12]), cond).endpoint
    chunk = kernel.kernel.transition(x[:, :16], torch.tensor([4]), {k: v[:, :16] for k, v in cond.items()})
    assert torch.equal(found[:, :16], chunk.endpoint)
    plan = kernel.decode(found)[0]
    assert plan.shape == (46, 6)
    assert torch.allclose(plan[0, :4], torch.tensor([-2.5, -2.5, 0.0, 0.0]), atol=1e-5)
    assert torch.equal(plan[16:, :4], plan[15:16, :4].expand(30, 4))
    assert torch.allclose(plan[16:, 4:], torch.zeros(30, 2), atol=1e-6)


def test_plans_of_a_model_begin_at_the_start_end_at_the_goal_and_cost_their_chunks():
    kernel = Counting(Composed(maze_kernel(num_steps=3, horizon=16), 2))
    prompt = known([-2.5, -2.5, 0.0, 0.0], [2.5, 2.5])
    result = ts.search(kernel, corner, ts.BestOfN(n=3), prompts=[prompt], progress=False)
    assert result.cost.nfe == 3 * 2 * 3 == kernel.rows
    assert torch.allclose(result.samples[:, 0, :4], torch.tensor([-2.5, -2.5, 0.0, 0.0]).expand(3, 4), atol=1e-5)
    assert torch.allclose(result.samples[:, -1, :2], torch.tensor([2.5, 2.5]).expand(3, 2), atol=1e-5)
    assert len({tuple(row.tolist()) for row in result.samples[:, 15, :2]}) == 3


LINEAR = torch.linspace(-0.5, 0.5, 10, dtype=F64)
REWARD = Reward(lambda samples, _: samples.flatten(1).double() @ LINEAR, "linear")


def evidence(lam, **ends):
    """log E[exp(λ w·τ)] of plans of two chunks."""
    mean, cov = composed_law(told(), 2, **ends)
    return float(lam * LINEAR @ mean + lam**2 / 2 * LINEAR @ cov @ LINEAR)


@pytest.mark.parametrize(
    "method",
    [ts.BestOfN(n=600), ts.FeynmanKac(num_particles=600), ts.TreeSampling()],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("guided", [False, True])
def test_estimates_over_the_composed_tree_are_those_of_its_law(method, guided):
    kernel = Composed(told(), 2)
    if guided:
        kernel = TDS(kernel, REWARD, lam=0.5)
    result = ts.search(kernel, REWARD, method, budget=ts.Budget(nfe=6_000), seed=3, progress=False)
    assert result.log_z_se < 0.2
    assert abs(math.exp(result.log_z - evidence(1.0)) - 1) < 4 * result.log_z_se


@pytest.mark.parametrize("method", [ts.DiffusionTreeSearch(), ts.DiffusionTreeSampling(), ts.TreeSearch(), ts.SVDD()])
def test_every_tree_grows_over_chunks(method):
    result = ts.search(Composed(told(), 2), REWARD, method, budget=ts.Budget(nfe=400), seed=0, progress=False)
    assert result.cost.nfe <= 400
    assert torch.allclose(REWARD(result.samples), result.rewards, atol=1e-12)


@pytest.mark.parametrize("ends", [{}, {"start": [0.7], "goal": [-1.0]}])
def test_a_proposal_inside_keeps_its_weights(ends):
    kernel = Composed(Guided(told(), shift_mean(lambda x, t, law, cond: 0.3 * law.std), "drift"), 2)
    result = ts.search(kernel, REWARD, ts.BestOfN(n=1000), prompts=[known(**ends)], seed=0, progress=False)
    assert abs(math.exp(result.log_z - evidence(1.0, **ends)) - 1) < 4 * result.log_z_se < 1


def test_it_is_a_kernel_of_a_law_of_its_own():
    check_kernel(Composed(told(), 2))
    assert "2 plans of the model in a row" in describe(Composed(told(), 2)).base_law
    assert describe(Composed(told(), 1)).base_law is None


def test_what_cannot_be_composed_says_why():
    for chunks in (0, 1.5, True):
        with pytest.raises(ValueError, match="chunks is"):
            Composed(told(), chunks)
    plain = GaussianTrajectories.of_system(A, B, K, horizon=3, **SYSTEM)
    with pytest.raises(TypeError, match="cannot be told where a chunk starts"):
        Composed(plain, 2)
    with pytest.raises(ValueError, match="put the guide around"):
        Composed(TDS(told(), REWARD), 2)
    with pytest.raises(TypeError, match="no kernel of trajectories"):
        Composed(ts.backends.gaussian(), 2)
    with pytest.raises(TypeError, match="Chain"):
        Clamp(Composed(told(), 2), torch.ones(5, 2, dtype=torch.bool), torch.zeros(5, 2))
