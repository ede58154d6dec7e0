"""A model asked as engines ask it: padding, counting, conditioning by task, samples and rewards."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from treesearch.backends.base import Gaussian, Shared, describe
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.budget import Cost
from treesearch.engine.flight import Held, Transitions
from treesearch.engine.model import Model
from treesearch.engine.retrace import retrace
from treesearch.engine.segments import Leg
from treesearch.errors import KernelError
from treesearch.rewards.base import as_reward

KERNEL = LinearGaussian(num_steps=3, dim=2)
TASK = np.array([1, 0, 1])


@dataclass(frozen=True, kw_only=True)
class Seeing(LinearGaussian):
    """Notes the rows and the conditioning that it is called with; draws previews of endpoints."""

    seen: list = field(default_factory=list, compare=False)

    def transition(self, x, t, cond=None):
        self.seen.append((len(x), cond))
        return super().transition(x, t, cond)

    def preview(self, endpoint):
        return endpoint + 100


def of(kernel=KERNEL, reward=lambda x: x[:, 0], **how):
    return Model(kernel, describe(kernel), as_reward(reward), **how)


def at(*levels):
    return torch.zeros(len(levels), 2, dtype=torch.float64), np.array(levels)


def test_padding_reaches_the_kernel_and_nothing_else():
    kernel, cost = Seeing(num_steps=3, dim=2), Cost()
    model = of(kernel, batch_size=8, batch_invariant=True)
    x, t = at(3, 2, 1)
    law, padding = model.evaluate(x, t, TASK)
    model.charge(cost, t, np.array([False, True, False]), padding)
    assert (kernel.seen[0][0], padding, len(law.endpoint)) == (8, 5, 3)
    assert (model.passes, model.evaluated) == (1, 3)
    assert (cost.nfe, cost.repeated_nfe, cost.rows) == (2, 1, 8)
    want = of().evaluate(x, t, TASK)[0]
    assert torch.equal(law.endpoint, want.endpoint)


def test_rows_are_conditioned_by_their_task():
    kernel = Seeing(num_steps=3, dim=2)
    model = of(kernel, encoded={"text": torch.tensor([[1.0], [2.0]]), "all": Shared("as it is")})
    model.evaluate(*at(3, 2, 1), TASK)
    model.evaluate(*at(3, 2, 1), TASK)
    model.evaluate(*at(3, 2, 1), np.array([0, 0, 0]))
    first, again, other = (cond for _, cond in kernel.seen)
    assert first["text"].flatten().tolist() == [2.0, 1.0, 2.0]
    assert (first["all"], first["task"].tolist()) == ("as it is", TASK.tolist())
    assert again["text"] is first["text"]
    assert other["text"].flatten().tolist() == [1.0, 1.0, 1.0]


def test_a_reward_sees_states_samples_or_previews():
    x = torch.zeros(3, 2, dtype=torch.float64)
    model = of(Seeing(num_steps=3, dim=2))
    assert not model.samples(x).any()
    assert (model.samples(x, endpoints=True) == 100).all()
    assert of().samples(x, endpoints=True) is not None  # it has no preview: endpoints are decoded
    seen = Model(KERNEL, describe(KERNEL), as_reward(lambda x: x[:, 0], input="state"))
    assert seen.samples(x) is x


def test_prompts_go_with_their_rows_and_a_cache_says_what_was_scored():
    def length(samples, prompts=None):
        return torch.tensor([float(len(p)) for p in prompts])

    reward, known = as_reward(length), iter([5, 7])
    for calls, scored in ((None, None), (lambda: next(known), 2)):
        model = of(reward=replace(reward, calls=calls), prompts=["a", "bcd"])
        values, found = model.score(torch.zeros(3, 2), TASK)
        assert (values.tolist(), found) == ([3.0, 1.0, 3.0], scored)


def test_a_decoder_that_loses_samples_is_named():
    class Short(LinearGaussian):
        def decode(self, x0):
            return x0[1:]

    with pytest.raises(KernelError, match="returned 2 samples for 3 states"):
        of(Short(num_steps=3, dim=2)).samples(torch.zeros(3, 2, dtype=torch.float64))


def test_a_walk_is_what_the_kernel_does_from_the_same_keys_and_counts_as_done_again():
    model, cost, key = of(), Cost(), np.array([7], np.uint64)
    x = model.prior(np.array([0]), model.prior_noise(key))[0]
    for t in (3, 2):
        x = KERNEL.transition(x, torch.tensor([t])).sample(model.noise(key, np.array([t])))
    assert torch.equal(retrace(model, 0, Leg((7,), 4, 1), None, cost), x[0])
    assert (cost.nfe, cost.repeated_nfe) == (0, 2)


def test_transitions_are_left_by_the_rows_whose_nodes_hold_them():
    def law(*nodes):
        means = torch.tensor(nodes, dtype=torch.float64)[:, None]
        return Held(Gaussian(means, torch.ones_like(means), means), np.array(nodes))

    held = Transitions({0: [law(2, 5), law(3)], 1: [law(4)]})
    task, source = np.array([0, 0, 0, 1, 1]), np.array([5, 9, 3, 4, 4])
    beside = np.array([False, False, False, False, True])
    found = [(rows.tolist(), of.mean.flatten().tolist()) for rows, of in held.leaving(task, source, beside)]
    assert found == [([0], [5.0]), ([2], [3.0]), ([3], [4.0])]
    held.keep_only(0, np.array([3]))
    assert [rows.tolist() for rows, _ in held.leaving(task, source, beside)] == [[2], [3]]
