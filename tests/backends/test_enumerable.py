import itertools
import math

import pytest
import torch
from scipy import stats

from treesearch.backends.exact.enumerable import DiscreteChain, MaskedChain
from treesearch.testing import bare_chain

F64 = torch.float64
LAM = 0.8


def rewards(n):
    return torch.linspace(-1, 2, n, dtype=F64).sin() * 2


def by_hand(states, prior, step, reward, steps):
    """Z, π(x_0) and V at every level from all paths; `step(t)[x, y]`."""
    n = len(states)
    matrices = {t: step(t) for t in range(1, steps + 1)}
    weight, total = torch.zeros(n, dtype=F64), 0.0
    above = {(t, x): 0.0 for t in range(1, steps + 1) for x in range(n)}
    for path in itertools.product(range(n), repeat=steps + 1):  # x_T, ..., x_0
        tail = float((LAM * reward[path[-1]]).exp())
        for k in range(steps - 1, -1, -1):
            tail *= float(matrices[steps - k][path[k], path[k + 1]])
            head = steps - k
            if path[:k] == (0,) * k:  # each tail once
                above[head, path[k]] += tail
        total += float(prior[path[0]]) * tail
        weight[path[-1]] += float(prior[path[0]]) * tail
    return total, weight / total, above


def law_matrix(kernel, states, t):
    n = len(states)
    law = kernel.transition(states, torch.full((n,), t)).take(torch.arange(n).repeat_interleave(n))
    return law.log_prob(states.repeat(n, 1)).exp().reshape(n, n)


def check(kernel, states, prior):
    reward = rewards(len(states))
    total, posterior, above = by_hand(states, prior, lambda t: law_matrix(kernel, states, t), reward, kernel.num_steps)
    exact = kernel.tilted(reward, LAM)
    assert exact.log_z == pytest.approx(math.log(total), abs=1e-10)
    torch.testing.assert_close(exact.posterior, posterior, atol=1e-12, rtol=0)
    for (t, x), value in above.items():
        assert float((LAM * exact.values[t, x]).exp()) == pytest.approx(value, rel=1e-10)


def test_recursion_of_the_discrete_chain_is_the_sum_over_paths():
    kernel = DiscreteChain.random(num_steps=3, states=4)
    check(kernel, torch.arange(4)[:, None], torch.tensor(kernel.prior_probs, dtype=F64))


def test_recursion_of_the_masked_chain_is_the_sum_over_paths():
    kernel = MaskedChain.random(length=2, vocabulary=2, num_steps=3)
    prior = (kernel.states == 2).all(1).double()
    check(kernel, kernel.states, prior)


@pytest.mark.parametrize("kernel", [DiscreteChain.random(), MaskedChain.random(length=2)], ids=["discrete", "masked"])
def test_every_step_is_a_law(kernel):
    states = torch.arange(4)[:, None] if isinstance(kernel, DiscreteChain) else kernel.states
    for t in range(1, kernel.num_steps + 1):
        rows = law_matrix(kernel, states, t).sum(1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_the_masked_chain_leaves_no_mask_and_never_changes_a_token():
    path = bare_chain(MaskedChain.random(length=4, vocabulary=3, num_steps=5), 300)
    assert (path[0] == 3).all()
    assert (path[-1] < 3).all()
    for before, after in itertools.pairwise(path):
        assert ((before == 3) | (before == after)).all()


def test_one_token_is_revealed_from_the_data_and_uniformly_in_time():
    kernel = MaskedChain(data=(0.2, 0.5, 0.3), length=1, vocabulary=3, num_steps=4)
    path = bare_chain(kernel, 8000)
    assert stats.chisquare(path[-1][:, 0].bincount().numpy(), [1600, 4000, 2400]).pvalue > 1e-3
    revealed = torch.stack(path).eq(3).sum(0).flatten().bincount(minlength=5)[1:]
    assert stats.chisquare(revealed.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("kernel", [DiscreteChain.random(), MaskedChain.random()], ids=["discrete", "masked"])
def test_samples_follow_the_enumerated_law(kernel):
    samples = bare_chain(kernel, 20_000)[-1]
    index = samples[:, 0] if isinstance(kernel, DiscreteChain) else kernel.index(samples)
    law = kernel.tilted(torch.zeros(4 if isinstance(kernel, DiscreteChain) else len(kernel.states))).posterior
    seen = law > 1e-12
    counts = index.bincount(minlength=len(law))
    assert not counts[~seen].any()
    assert stats.chisquare(counts[seen].numpy(), (law[seen] * 20_000).numpy()).pvalue > 1e-3


def test_probabilities_that_are_none_are_refused():
    with pytest.raises(ValueError, match="sum to one"):
        DiscreteChain((0.5, 0.6), (((1.0, 0.0), (0.0, 1.0)),))
    with pytest.raises(ValueError, match="sum to one"):
        MaskedChain((0.5, 0.1), 1, 2, 3)
