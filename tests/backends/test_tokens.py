"""The law of tokens of a large vocabulary, beside tables of all positions and tokens."""

import math

import pytest
import torch

from treesearch.backends.base import Categorical, Tokens, tokens
from treesearch.backends.base.tokens import NOWHERE

F64 = torch.float64
MASK = 3


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def bed(n=5, length=4, spread=False, seed=0, base=False, dtype=F64):
    """Rows of some positions that may change: masks, or (with a spread) any tokens."""
    draw = torch.Generator().manual_seed(seed)
    moves = torch.rand(n, length, generator=draw) < 0.6
    x = torch.randint(MASK, (n, length), generator=draw)
    x = x if spread else torch.where(moves, MASK, x)
    count = int(moves.sum())
    at = torch.full_like(x, NOWHERE)
    at[moves] = torch.randperm(count, generator=draw)
    jump, share = torch.rand(2, count, generator=draw, dtype=F64)
    logits = make(count, MASK + (0 if spread else 1), seed=seed + 1).to(dtype)
    law = Tokens(x, at, logits, 0.7 * jump, x.clamp(max=2), 0.3 * share if spread else None, temperature=0.7)
    if not base:
        return law
    other = Tokens(x, at, make(*logits.shape, seed=seed + 2), jump, law.endpoint, None, 1.3)
    return Tokens(x, at, logits, law.jump, law.endpoint, law.spread, 0.7, other)


def table(law):
    """The same law as probabilities of all positions and tokens, (n, L, V + 1)."""
    probs = torch.zeros(*law.x.shape, MASK + 1, dtype=F64)
    for i, j in torch.cartesian_prod(*map(torch.arange, law.x.shape)):
        now, row = int(law.x[i, j]), int(law.at[i, j])
        if row == NOWHERE:
            probs[i, j, now] = 1
            continue
        size = law.logits.shape[1]
        p = (law.logits[row].double() / law.temperature).exp()
        p[now : now + 1] = 0
        spread = 0.0 if law.spread is None else float(law.spread[row])
        probs[i, j, :size] = law.jump[row] * p / p.sum() + spread / (size - 1)
        probs[i, j, now] = 1 - law.jump[row] - spread
    return probs


@pytest.mark.parametrize("spread", [False, True])
def test_densities_are_those_of_the_table(spread):
    law, every = bed(spread=spread), torch.cartesian_prod(*[torch.arange(MASK + 1)] * 4)
    reference = Categorical(table(law), law.endpoint)
    for row in range(5):
        rows = torch.full((len(every),), row)
        found, want = law.take(rows).log_prob(every), reference.take(rows).log_prob(every)
        torch.testing.assert_close(found.exp(), want.exp(), atol=1e-14, rtol=1e-10)
        assert float(found.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_masked_draws_are_those_of_the_table_on_the_same_noise():
    law = bed(n=400, seed=3)
    z = make(400, 4, seed=9)
    assert torch.equal(law.sample(z), Categorical(table(law), law.endpoint).sample(z))


def test_draws_with_a_spread_have_the_frequencies_of_the_table():
    from scipy import stats

    now = torch.arange(MASK)[None]  # each token moves
    law = Tokens(now, now, make(3, MASK), torch.tensor([0.1, 0.2, 0.0]).double(), now, torch.full((3,), 0.6).double())
    drawn = law.take(torch.zeros(20_000, dtype=torch.int64)).sample(make(20_000, 3, seed=4))
    for j, probs in enumerate(table(law)[0]):
        counts = drawn[:, j].bincount(minlength=MASK + 1)
        seen = probs > 0
        assert not counts[~seen].any()
        assert stats.chisquare(counts[seen], 20_000 * probs[seen]).pvalue > 1e-3


def test_a_token_that_the_network_leaves_alone_has_a_density():
    """Of one token alone, the one that stands there, nothing is left to go to by the network."""
    logits = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=F64)
    now, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=F64)
    law = Tokens(now, now, logits, none, now, none + 0.3)
    every = torch.arange(3)[:, None]
    found = law.take(torch.zeros(3, dtype=torch.int64)).log_prob(every).exp()
    torch.testing.assert_close(found, torch.tensor([0.7, 0.15, 0.15], dtype=F64))


def test_a_proposal_is_weighed_by_p_over_q():
    law, every = bed(base=True), torch.cartesian_prod(*[torch.arange(MASK + 1)] * 4)
    for row in range(5):
        one = law.take(torch.full((len(every),), row))
        q, w = one.log_prob(every).exp(), one.log_weight(every)
        assert float((q * w.exp())[q > 0].sum()) == pytest.approx(1, abs=1e-12)
    assert not bed().log_weight(bed().sample(make(5, 4))).any()


@pytest.mark.parametrize("options", [{}, {"spread": True}, {"base": True}], ids=["masked", "spread", "proposal"])
def test_cat_and_take_move_whole_rows(options):
    law, rows, z = bed(**options), torch.tensor([4, 0, 0, 1]), make(4, 4, seed=4)
    taken = law.take(rows)
    x = taken.sample(z)
    both = Tokens.cat([law.take(rows[:1]), law.take(rows[1:])])
    assert torch.equal(both.sample(z), x)
    for i, row in enumerate(rows):
        alone = law.take(row[None])
        assert torch.equal(alone.sample(z[[i]]), x[[i]])
        for name in ("log_prob", "log_weight"):
            assert torch.equal(getattr(alone, name)(x[[i]]), getattr(taken, name)(x)[[i]])
            assert torch.equal(getattr(both, name)(x), getattr(taken, name)(x))
    assert torch.equal(both.endpoint, taken.endpoint)
    assert torch.equal(both.endpoints(z), taken.endpoints(z))


def test_rows_share_their_logits_and_a_few_let_go_of_the_others():
    law = bed(n=50)
    assert law.take(torch.arange(40).repeat(20)).logits.data_ptr() == law.logits.data_ptr()
    assert len(law.take(torch.zeros(30, dtype=torch.int64)).logits) == int((law.at[0] != NOWHERE).sum())


def test_the_last_step_leaves_no_mask_whatever_the_noise():
    law = bed(n=3)
    last = Tokens(law.x, law.at, law.logits, torch.ones(len(law.logits), dtype=F64), law.endpoint)
    for z in (-40.0, 0.0, 40.0):
        x = last.sample(torch.full((3, 4), z, dtype=F64))
        assert not (x == MASK).any()
        assert torch.isfinite(last.log_prob(x)).all()
    assert last.log_prob(law.x)[(law.x == MASK).any(1)].tolist() == [-math.inf] * int((law.x == MASK).any(1).sum())


def test_endpoints_are_draws_of_the_network():
    law = bed(n=1, length=2, seed=5)
    drawn = law.take(torch.zeros(20_000, dtype=torch.int64)).endpoints(make(20_000, 2))
    for j in range(2):
        if law.at[0, j] == NOWHERE:
            assert (drawn[:, j] == law.x[0, j]).all()
            continue
        want = (law.logits[law.at[0, j]] / law.temperature).softmax(0)
        torch.testing.assert_close(drawn[:, j].bincount(minlength=4) / 20_000, want.float(), atol=0.02, rtol=0)


def test_work_is_done_a_few_positions_at_a_time_and_comes_out_the_same(monkeypatch):
    law, z = bed(n=30, spread=True), make(30, 4)
    x, log_q = law.sample(z), law.log_prob(law.x)
    monkeypatch.setattr(tokens, "ENTRIES", 7)
    assert torch.equal(law.sample(z), x)
    assert torch.equal(law.log_prob(law.x), log_q)


def test_bfloat16_logits_are_read_as_they_stand_in_float64():
    law = bed(dtype=torch.bfloat16)
    assert law.logits.dtype == torch.bfloat16
    torch.testing.assert_close(law.log_prob(law.x), Categorical(table(law), law.endpoint).log_prob(law.x))
