"""Fields that are written in turn: which comes first, what a step then reveals, and the law of both."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import treesearch as ts
from tests.backends.test_scaffold import LENGTH, SPOKEN, kernel
from treesearch.backends.text.kernel import FREE, KNOWN
from treesearch.backends.text.scaffold import scaffold
from treesearch.backends.text.turns import FieldOrder, firsts, numbered
from treesearch.backends.text.words import Words
from treesearch.rewards import json_schema
from treesearch.testing import bare_chain, check_kernel

PAIR = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}


def turns(blanks=1, num_steps=2, schema=PAIR):
    return FieldOrder(scaffold(kernel(num_steps=num_steps), schema, blanks=blanks))


def test_a_step_writes_on_at_one_field_then_at_the_others_from_the_left():
    masked = torch.tensor([[1, 1, 1, 0, 1]]).bool()
    field = torch.tensor([[0, 0, 1, -1, 2]])
    for t, want in (
        (4, [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]),
        (2, [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 0, 1]]),
        (1, [[1, 1, 1, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 0, 1]]),
    ):
        found = firsts(masked, field, torch.tensor([t]), 3)
        assert torch.equal(found[0], torch.tensor(want).bool())


def test_a_field_that_is_begun_is_finished_before_another_begins():
    masked = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0]]).bool()
    field = torch.tensor([0, 0, 1, 1, -1, 2]).expand(2, -1)
    found = firsts(masked, field, torch.tensor([5, 2]), 3)
    assert found[0].tolist() == [[False] * 6, [False, False, False, True, False, False], [False] * 6]
    assert found[1].any(1).tolist() == [True, True, False]
    free = torch.tensor([[1, 1, 0, 1, 0, 0, 1]]).bool()
    assert numbered(free).tolist() == [[0, 0, -1, 1, -1, -1, 2]]


def test_the_law_of_a_step_is_the_network_s_at_a_field_drawn_uniformly():
    made = turns()
    cond = made.encode(["the"])
    x = made.prior(torch.zeros(1, LENGTH + 1), cond)
    (a, b), inner = (cond[KNOWN][0] == FREE).nonzero().flatten().tolist(), made.kernel.kernel
    logits = inner.model(x).double()[0]
    logits[:, inner.mask] = -math.inf
    law, total = made.transition(x, torch.tensor([2]), cond), 0.0
    for place in (a, b):
        y = x.repeat(logits.shape[1], 1)
        y[:, place] = torch.arange(logits.shape[1])
        found = law.take(torch.zeros(len(y), dtype=torch.int64)).log_prob(y).exp()
        torch.testing.assert_close(found, logits[place].softmax(-1) / 2)
        total += float(found.sum())
    assert total == pytest.approx(1, abs=1e-12)
    assert law.log_prob(x) == -math.inf
    both = y[:1].clone()
    both[0, a] = y[0, b]
    assert law.log_prob(both) == -math.inf
    last = made.transition(x, torch.tensor([1]), cond)
    want = logits[a].log_softmax(-1)[both[0, a]] + logits[b].log_softmax(-1)[both[0, b]]
    torch.testing.assert_close(last.log_prob(both)[0], want)
    done = made.transition(both, torch.tensor([1]), cond)
    assert done.log_prob(both) == 0
    assert torch.equal(done.sample(torch.zeros(1, LENGTH + 1)), both)


def test_each_field_comes_first_as_often():
    three = {"type": "object", "properties": {name: {"type": "string"} for name in "abc"}}
    made = turns(blanks=2, num_steps=3, schema=three)
    path = bare_chain(made, 3000, prompts=["the"])
    assert not (path[-1] == SPOKEN.mask).any()
    cond = made.encode(["the"])
    x = made.prior(torch.zeros(3000, LENGTH + 1), {KNOWN: cond[KNOWN].expand(3000, -1)})
    noise = torch.randn(3000, LENGTH + 1, generator=torch.Generator().manual_seed(0))
    y = made.transition(x, torch.full((3000,), 3), {KNOWN: cond[KNOWN].expand(3000, -1)}).sample(noise)
    changed = (x != y)[:, cond[KNOWN][0] == FREE].view(3000, 3, 2)
    assert (changed.all(2).sum(1) == 1).all()
    assert (changed.any(2).sum(1) == 1).all()
    assert stats.chisquare(changed.any(2).sum(0)).pvalue > 1e-3


class Endless(Words):
    """Of a tokenizer that has nothing to fill up with behind a record."""

    filler = None  # pyright: ignore


def test_what_is_behind_a_record_is_revealed_too():
    made = FieldOrder(scaffold(kernel(num_steps=8, words=Endless(SPOKEN.tokenizer)), PAIR, blanks=1))
    path = bare_chain(made, 5, prompts=["the"])
    assert (path[0] == SPOKEN.mask).sum(1).min() > 8
    assert not (path[-1] == SPOKEN.mask).any()


def test_it_is_a_kernel_and_siblings_begin_at_different_fields():
    made = turns(blanks=2, num_steps=4)
    check_kernel(made, prompts=["the film", "a"], rows=6)
    check_kernel(made, rows=6)
    assert "in turn" in made.departs
    method = ts.DiffusionTreeSearch(branch_at=(4, 2), widening_c=1.0, widening_alpha=0.5)
    found = ts.search(made, json_schema(PAIR), method, prompts=["the"], budget=ts.Budget(nfe=80))
    tree = found.tree
    halfway = np.flatnonzero(np.array([int(tree.t[i]) for i in range(len(tree))]) == 2)
    open_ = made.encode(["the"])[KNOWN][0] == FREE
    states = found.tasks[0].fetch.raw(halfway)[:, open_]
    begun = (states != SPOKEN.mask).view(len(halfway), 2, 2).all(2)
    assert (begun.sum(1) == 1).all()
    assert begun.any(0).all()
    with pytest.raises(TypeError, match="field_order is for a scaffold"):
        FieldOrder(kernel())
