"""TreeSearch with drafts: what a draft says of the path, indices against simulations, costs and laws."""

import math

import numpy as np
import pytest

import treesearch as ts
from tests.engine.test_drafting import Bed
from treesearch.core.drafted import draft_index, finish_index, read_drafts, slope
from treesearch.core.looks import UNREAD
from treesearch.core.nested_effects import Law
from treesearch.core.tree import ROOT
from treesearch.rewards.analytic import linear
from treesearch.testing import check_method

LAW = Law(np.array([0.0, 0.1, 0.3, 0.6]), np.array([1.0, 0.9, 0.6, 0.0]), np.array([1.0, 1.1, 1.2, 1.9]),
          np.array([10.0, 10.0, 5.0]))  # fmt: skip
NOISE = np.array([UNREAD, 0.4, 0.2, UNREAD])


def test_finishing_is_the_largest_expected_gain_given_the_draft():
    """V_1, V_2, y and o = y + e drawn together; the posterior of each V_k by regression on o."""
    rng = np.random.default_rng(0)
    prior, var, n = 0.3, 0.25, 200_000
    v1 = prior + var**0.5 * rng.standard_normal(n)
    v2 = v1 + 0.3**0.5 * rng.standard_normal(n)
    y = v2 + 0.6**0.5 * rng.standard_normal(n)
    o = y + 0.4**0.5 * rng.standard_normal(n)
    seen, precision = 2.2, 1 / (0.9 + 0.4)
    after = 1 / (1 / var + precision)
    index = finish_index(1, after * (prior / var + precision * seen), after, seen, precision, LAW, NOISE)
    near = np.abs(o - seen) < 0.02
    gains = [np.maximum(v[near] - LAW.target[k], 0) for k, v in ((2, v2), (3, y))]
    best = max(gains, key=lambda g: g.mean())
    assert abs(10 * index - best.mean()) < 4 * best.std() / near.sum() ** 0.5 + 0.01


def test_the_index_of_a_draft():
    """E max(E[V_k | o] - target, 0) at the best k, for the price of the draft and of finishing where that is hoped."""
    rng = np.random.default_rng(1)
    o = rng.standard_normal(400_000)
    known, whole = 0.2 + 0.1, 0.2 + 0.1 + 0.9 + 0.4
    wants = []
    for k, below in ((1, 0.9), (2, 0.6), (3, 0.0)):
        shown = 0.5 + (known + 0.9 - below) / whole**0.5 * o
        hope = (shown > LAW.target[k]).mean()
        wants.append(np.maximum(shown - LAW.target[k], 0).mean() / (1 + 2 * hope) / (3.0 + 10.0 * hope))
    price = np.array([3.0, 3.0, 3.0])
    found = draft_index(0, 2.0, 0.0, 0.5, 0.2, LAW, NOISE, price)
    assert found == pytest.approx(max(wants), rel=0.03)
    assert draft_index(0, 2.0, 0.0, 0.5, 0.2, LAW, np.full(4, UNREAD), price) == -1
    assert draft_index(0, 2.0, 0.0, 0.5, 0.2, LAW, np.full(4, 1e4), price) < 1e-6  # drafts that tell nothing


def test_what_is_finished_because_of_its_draft_teaches_the_same():
    rng = np.random.default_rng(2)
    z = rng.standard_normal(40_000)
    y = 1.5 * (0.8 * z + 0.6 * rng.standard_normal(40_000))
    good = z > 0.5
    for rows in (good, ~good, slice(None)):
        c, count = slope(z[rows], y[rows], 2.25)
        assert c == pytest.approx(0.8, abs=4 / count**0.5)
    depth, tau2 = np.array([0, *[1] * 400, *[2] * 400]), np.array([0.0, 1.25, 1.0])
    reward = np.concatenate([[np.nan], z[:400], np.full(400, np.nan)])
    known = np.concatenate([[np.nan], y[:400], np.full(400, np.nan)])
    reward[1] = -math.inf
    found = read_drafts(depth, reward, np.ones(801), 400, tau2, 0.0, known)
    assert found.c[1] == pytest.approx(0.8, abs=0.15)
    assert found.seen.precision[1] == 0
    assert found.seen.precision[2:401].min() == pytest.approx(1 / (found.noise[1] + 1.0))


def test_what_it_counts_is_what_it_costs():
    for nfe in (100, 900):
        result = ts.search(Bed(), linear(1.0), ts.TreeSearch(draft=3), budget=ts.Budget(nfe=nfe))
        tree, cost = result.tree, result.cost
        assert cost.nfe <= nfe
        assert cost.nfe > nfe - 13
        assert cost.repeated_nfe == 0
        assert cost.reward_calls == (~np.isnan(tree.reward)).sum()
        drafted = (tree.t > 0) & ~np.isnan(tree.reward)
        assert result.diagnostics["drafts"] == drafted.sum() > 0
        assert cost.draft_nfe > 0
    firsts = tree.children_of(ROOT)[:16]
    assert drafted[firsts].all()
    assert (tree.children[firsts] > 0).all()


def test_it_obeys_the_laws():
    check_method(ts.TreeSearch(draft=3, branch_at=(12, 4)), Bed(), linear(1.0))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="draft is 1, expected one number"):
        ts.TreeSearch(draft=1)
    with pytest.raises(ValueError, match="choose one of the two"):
        ts.TreeSearch(draft=3, looks="endpoints")
