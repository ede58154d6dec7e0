"""The engine fills its batches, shares evaluations, counts what runs, and changes no draw."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import treesearch as ts
from treesearch.backends.base import Gaussian, Shared
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.analytic import linear


class Recorder:
    """A chain that remembers the batches it saw; conditioning is checked against the task."""

    state_shape, dtype = (2,), torch.float64

    def __init__(self, num_steps=10, stochastic=None):
        self.num_steps, self.batches, self.encoded = num_steps, [], 0
        self.stochastic = stochastic or [True] * (num_steps + 1)

    def prior(self, noise, cond=None):
        return noise.double()

    def transition(self, x, t, cond=None):
        self.batches.append(t.clone())
        if "shift" in cond:
            assert torch.equal(cond["shift"], 10.0 * cond["task"])
            assert cond["table"].shape == (3,)
        return Gaussian(0.9 * x, torch.full((len(x), 1), 0.4, dtype=torch.float64), x)

    def encode(self, prompts):
        self.encoded += 1
        return {"shift": 10.0 * torch.arange(len(prompts)), "table": Shared(torch.ones(3))}

    def decode(self, x0):
        return x0


def run(method, nfe, kernel=None, batch_size=16, **settings):
    kernel = kernel or Recorder()
    result = ts.search(kernel, linear(0.5), method, budget=ts.Budget(nfe=nfe), batch_size=batch_size, **settings)
    return kernel, result


@pytest.mark.parametrize(("method", "particles"), [(ts.BestOfN(), 40), (ts.FeynmanKac(), 40)])
def test_passes_are_the_fewest_that_fit(method, particles):
    kernel, result = run(method, particles * 10)
    # best-of-N asks for what the engine has room for (16, 16, 8); a population of 40 has 8 + 3·5 + 3 passes
    assert result.cost.nfe == particles * 10
    assert len(kernel.batches) == (30 if isinstance(method, ts.BestOfN) else 26)


def test_tree_waves_fill_batches_across_levels():
    kernel, _ = run(ts.DiffusionTreeSampling(wave=64, widening_c=1, widening_alpha=0.4), 6_000)
    sizes = np.array([len(t) for t in kernel.batches])
    assert sizes.mean() > 0.9 * 16
    assert any(len(t.unique()) > 1 for t in kernel.batches)


def test_lag_leaves_fewer_bubbles():
    fills = []
    for lag in (0, 1):
        kernel, result = run(ts.DiffusionTreeSampling(wave=20, lag=lag, widening_c=1, widening_alpha=0.4), 4_000)
        fills.append(np.mean([len(t) for t in kernel.batches]))
        assert result.cost.nfe == sum(len(t) for t in kernel.batches)
    assert fills[1] > 1.05 * fills[0]


def test_small_tasks_share_batches():
    kernel, result = run(ts.FeynmanKac(num_particles=4), 32 * 40, prompts=list(range(32)), batch_size=64)
    assert result.cost.nfe == 32 * 40
    assert len(kernel.batches) == 20
    assert kernel.encoded == 1


def test_an_offspring_draws_from_its_parents_evaluation():
    kernel, result = run(ts.FeynmanKac(num_particles=32, ess_threshold=1.0), 320)
    assert result.cost.nfe == sum(len(t) for t in kernel.batches) == 320
    assert len(np.unique(result.tree.parent[result.leaves])) < 32


def test_padding_is_counted_as_rows_only():
    kernel, result = run(ts.BestOfN(n=5), 50, batch_invariant=True)
    assert {len(t) for t in kernel.batches} == {16}
    assert (result.cost.nfe, result.cost.rows) == (50, 160)


def test_guided_rows_and_backwards_are_counted():
    kernel = Recorder()
    kernel.rows_per_nfe, kernel.backward_per_nfe = 2, 1
    _, result = run(ts.BestOfN(n=5), 50, kernel)
    assert (result.cost.nfe, result.cost.rows, result.cost.backward_nfe) == (50, 100, 50)


def test_rows_of_an_evaluation_may_differ_by_level():
    kernel = Recorder()
    kernel.rows_per_nfe = (0, 1, *(3,) * (kernel.num_steps - 1))  # x_1 alone is evaluated by one row
    _, result = run(ts.BestOfN(n=5), 5 * kernel.num_steps, kernel, batch_invariant=True)
    assert result.cost.rows == 16 * (3 * (kernel.num_steps - 1) + 1)


def test_nfe_do_not_depend_on_the_batch_size():
    costs = {run(ts.DiffusionTreeSampling(wave=8), 777, batch_size=b)[1].cost.nfe for b in (1, 5, 64)}
    assert len(costs) == 1


def test_conditioning_is_gathered_when_the_tasks_of_a_batch_change():
    """Rows of large models weigh megabytes."""
    seen = []

    class Heavy(Recorder):
        def encode(self, prompts):
            return {"text": torch.arange(len(prompts))[:, None], "shared": Shared(7)}

        def transition(self, x, t, cond=None):
            seen.append((cond["text"], cond["task"]))
            assert torch.equal(cond["text"][:, 0], cond["task"])
            assert cond["shared"] == 7
            return super().transition(x, t, cond)

    ts.search(Heavy(), reward_of_nothing, ts.BestOfN(n=8), prompts=["a", "b"], batch_size=16)
    assert len(seen) > 1
    assert len({id(text) for text, _ in seen}) == 1
    seen.clear()
    ts.search(Heavy(), reward_of_nothing, ts.BestOfN(n=8), prompts=["a", "b"], batch_size=5)
    for (text, task), (next_text, next_task) in itertools.pairwise(seen):
        assert (text is next_text) == torch.equal(task, next_task)


def reward_of_nothing(samples):
    return torch.zeros(len(samples))


def test_tasks_are_told_apart_by_reward_and_conditioning():
    seen = []

    def reward(samples, prompts=None):
        seen.append(prompts)
        return samples[:, 0] * torch.tensor([1.0 if p == "up" else -1.0 for p in prompts])

    result = ts.search(Recorder(), reward, ts.BestOfN(n=50), prompts=["up", "down"], batch_size=7)
    up, down = result.tasks
    assert torch.allclose(up.rewards, up.samples[:, 0])
    assert torch.allclose(down.rewards, -down.samples[:, 0])
    assert set().union(*seen) == {"up", "down"}


def test_a_reward_can_read_the_state():
    from treesearch.rewards.base import as_reward

    kernel = Recorder()
    kernel.decode = lambda x0: [f"sample {i}" for i in range(len(x0))]
    result = ts.search(kernel, as_reward(lambda x: x.sum(1), input="state"), ts.BestOfN(n=6))
    assert result.cost.decodes == 0
    assert len(result.samples) == 6
    assert isinstance(result.samples, list)
    assert result.best(2)[0][0].startswith("sample")
    assert len(result.draw(9)) == 9


def test_kernel_errors_say_at_which_levels():
    kernel = Recorder()

    def broken(x, t, cond=None):
        raise RuntimeError("no")

    kernel.transition = broken
    with pytest.raises(RuntimeError) as caught:
        ts.search(kernel, linear(), ts.BestOfN(n=2))
    assert "t = [10]" in "".join(caught.value.__notes__)


def test_reward_calls_and_iterations_are_limits_too():
    for limit in ("reward_calls", "iterations"):
        for method in (ts.BestOfN(), ts.DiffusionTreeSampling(wave=7), ts.DiffusionTreeSearch()):
            result = ts.search(LinearGaussian(), linear(), method, budget=ts.Budget(**{limit: 101}))
            assert result.cost.reward_calls == 101 or (limit == "iterations" and result.cost.reward_calls <= 101)
    fk = ts.search(LinearGaussian(), linear(), ts.FeynmanKac(num_particles=4), budget=ts.Budget(iterations=3))
    assert len(fk.samples) == 12
    fk = ts.search(LinearGaussian(), linear(), ts.FeynmanKac(num_particles=4), budget=ts.Budget(reward_calls=50))
    assert fk.cost.reward_calls == 50


def test_draws_depend_on_the_seed_of_draw_only():
    _, result = run(ts.BestOfN(), 1_000)
    assert torch.equal(result.draw(50, seed=1), result.draw(50, seed=1))
    assert not torch.equal(result.draw(50, seed=1), result.draw(50, seed=2))


def test_prompts_are_encoded_once_even_with_a_pilot():
    kernel, result = run(ts.BestOfN(lam="auto"), 6_000, prompts=["a", "b"])
    assert kernel.encoded == 1
    assert result.tasks[0].diagnostics["pilot"]["rollouts"] >= 16
    assert result.cost.nfe <= 6_000
