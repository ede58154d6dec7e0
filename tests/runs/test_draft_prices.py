"""A run goes on with drafts at the price that they had when it began."""

import pytest

import treesearch as ts
from tests.engine.test_drafting import REWARD, Bed
from treesearch.backends.wrappers.drafted import Drafted
from treesearch.errors import StoreError


class Nameless(Bed):
    fingerprint = None


def drafted(ratio):
    return Drafted(Nameless(), Nameless(0.5), ratio)


@pytest.mark.parametrize(("began", "goes_on"), [(1.0, 0.25), (0.25, 1.0)])
def test_another_price_is_refused(tmp_path, began, goes_on):
    method, budget = ts.BestOfN(draft=3), ts.Budget(nfe=300)
    ts.search(drafted(began), REWARD, method, budget=budget, store=tmp_path / "run")
    with pytest.raises(StoreError, match="draft_ratio"):
        ts.resume(tmp_path / "run", drafted(goes_on), REWARD, budget=ts.Budget(nfe=600))
    found = ts.resume(tmp_path / "run", drafted(began), REWARD, budget=ts.Budget(nfe=600))
    assert 300 < found.cost.nfe <= 600
