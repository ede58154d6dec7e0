"""A comparison by hand: who reached best-of-N's best, and whom to take."""

from __future__ import annotations

import pytest
import torch

import treesearch as ts
from treesearch.backends import gaussian
from treesearch.comparing import name_methods
from treesearch.results.comparison import Compared, Comparison
from treesearch.rewards import linear

KERNEL, BUDGET = gaussian(dim=2), ts.Budget(nfe=300)


@pytest.fixture(scope="module")
def found():
    methods = ["best-of-n", ts.TreeSearch(), "fk(num_particles=8)", "fk(num_particles=500)"]
    return ts.compare(KERNEL, linear(1.0), methods, budget=BUDGET, seed=1, also=lambda x: -x.sum(1))


def waves(*bests, step=100):
    return [{"nfe": step * (i + 1), "best_reward": best} for i, best in enumerate(bests)]


class Known:
    """A result with these waves, and a last best."""

    def __init__(self, *bests):
        self.history, self.cost = waves(*bests), ts.Cost(nfe=100 * len(bests))
        self.tasks = [self]
        self.leaves, self.rewards = [0], torch.tensor([-1e9 if bests[-1] is None else bests[-1]])
        self.diagnostics = {"ess": 1.0}

    def certificate(self):
        return ts.search(KERNEL, linear(1.0), ts.TreeSearch(), budget=BUDGET).certificate()


def comparison(**bests):
    return Comparison(
        entries={
            name: Compared(name=name, method=ts.BestOfN() if name == "base" else ts.TreeSearch(), result=Known(*found))
            for name, found in bests.items()
        }
    )


def test_callbacks_are_made_for_each_method():
    told = {}
    found = ts.compare(
        KERNEL,
        linear(1.0),
        ["best_of_n", "fk"],
        budget=BUDGET,
        callbacks=lambda name: [told.setdefault(name, []).append],
    )
    assert {name: len(snapshots) for name, snapshots in told.items()} == {
        name: len(found[name].result.history) for name in ("best_of_n", "fk")
    }
    with pytest.raises(TypeError, match="expected a function of a method's name"):
        ts.compare(KERNEL, linear(1.0), ["fk"], budget=BUDGET, callbacks=[print])


def test_the_headline_counts_evaluations_until_best_of_n_s_best():
    found = comparison(
        base=(None, 1.0, 2.0, 2.0), soon=(1.0, 2.0, 2.5, 3.0), late=(0.0, 0.0, 0.0, 2.0), never=(1, 1, 1, 1)
    )
    assert found.savings() == {"soon": (200, 2.0), "late": (400, 1.0), "never": (None, None)}
    assert found.headline() == [
        "base's best of 400 NFE is 2.000, which it had after 300",
        "soon reached it after 200: 2.0 x fewer",
        "late reached it after 400: 1.0 x fewer",
        "never did not reach it: its own is 1.000",
    ]
    assert found.advised()["best"].name == "soon"


def test_of_equal_rewards_the_sooner_one_is_advised():
    found = comparison(base=(1.0, 1.0), late=(0.0, 1.0), soon=(1.0, 1.0))
    assert found.advised()["best"].name == "soon"


def test_without_best_of_n_there_is_no_headline():
    assert comparison(one=(1.0,), two=(2.0,)).headline() == []


def test_a_comparison_has_the_results_of_its_searches(found):
    assert list(found.entries) == ["best_of_n", "tree_search", "fk_num_particles_8", "fk_num_particles_500"]
    alone = ts.search(KERNEL, linear(1.0), ts.TreeSearch(), budget=BUDGET, seed=1)
    assert torch.equal(found["tree_search"].found.rewards, alone.rewards)
    assert found["tree_search"].best == float(alone.rewards.max())
    assert found["best_of_n"].cost.nfe == 300
    assert found["best_of_n"].log_z == found["best_of_n"].found.log_z
    assert found["best_of_n"].also[0]["also_best"] == pytest.approx(-float(found["best_of_n"].found.best(16)[1].mean()))
    assert "population" in found.refused["fk_num_particles_500"]
    with pytest.raises(ts.TreeSearchError, match="below one population"):
        found["fk_num_particles_500"].best  # noqa: B018
    assert "best_of_n's best of 300 NFE" in str(found)


def test_draws_are_advised_by_weights_that_can_be_relied_on(found):
    sizes = {name: entry.ess for name, entry in found.ran.items() if entry.reliable}
    assert "tree_search" not in sizes
    assert found.advised()["draws"].name == (max(sizes, key=sizes.get) if sizes else None)


def test_a_recorded_comparison_goes_on_and_is_not_written_over(tmp_path):
    how = {"budget": BUDGET, "store": tmp_path / "c"}
    ts.search(KERNEL, linear(1.0), ts.BestOfN(), budget=ts.Budget(nfe=100), store=tmp_path / "c" / "best_of_n")
    done = ts.compare(KERNEL, linear(1.0), ["best_of_n"], **how)
    assert done["best_of_n"].cost.nfe == 300
    assert "| best_of_n |" in (tmp_path / "c" / "README.md").read_text()
    with pytest.raises(ts.StoreError, match="holds a comparison already"):
        ts.compare(KERNEL, linear(1.0), ["best_of_n"], **how)
    (tmp_path / "c" / "summary.json").unlink()
    with pytest.raises(ts.TreeSearchError, match="holds another run"):
        ts.compare(KERNEL, linear(1.0), ["best_of_n"], seed=5, **how)


def test_names_of_methods():
    assert list(name_methods(["tree-search(draft=3)", ts.FeynmanKac()])) == ["tree_search", "fk"]
    given = [ts.BestOfN(draft=(2, 4)), "best-of-n(draft=3, floor=0.5)", "best_of_n", ts.BestOfN(), "dts-star"]
    assert list(name_methods(given)) == [
        "best_of_n_draft_2_4", "best_of_n_draft_3_floor_0.5", "best_of_n", "best_of_n_1", "dts_star"
    ]  # fmt: skip
    assert list(name_methods({"mine": ts.BestOfN()})) == ["mine"]
