"""The study of actions and the demo: what their tables and pictures are made of."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.interventions import compare, demo_actions
from experiments.shared.cells import Cells
from treesearch.core.tree import Tree


def test_the_page_pairs_arms_by_seed_and_says_who_is_better():
    rows = []
    for seed in range(3):
        for arm, best in (("prior", 1.0), ("action tree", 2.0 + 0.01 * seed), ("prior + actions", 3.0 + seed)):
            row = {"reward": "brightness", "arm": arm, "budget": 400, "seed": seed, "best": best, "sure": 0.5}
            rows.append(row | {"curve": [[50, best - 1], [300, best]]})
    page = compare.report(rows)
    assert "| prior | 0 | 1 | 0.5 | 3 |" in page
    assert "| action tree less prior | better: 1.01 (0.985 to 1.03) |" in page
    assert "| action tree less prior + actions | level:" in page
    assert "heavy eight" not in page
    assert "8 of them and none corrected" in page
    with pytest.raises(ValueError, match="run the experiment first"):
        compare.report([])


def test_the_page_is_that_of_its_rows():
    folder = Path(__file__).parents[2] / "experiments/results/interventions"
    rows = Cells(folder / "compare.jsonl", compare.KEY).rows
    assert compare.report(rows) == (folder / "compare.md").read_text("utf-8")


def test_the_best_of_a_curve_is_that_by_a_cost():
    assert compare.at([[10, 1.0], [20, 2.0]], 15) == 1.0
    assert np.isnan(compare.at([[10, 1.0]], 5))


def grown():
    """Two draws of x_4, each with two children at 2 and their leaves; actions by node."""
    tree = Tree(4, 1)
    tops = tree.append(np.zeros(2, int), np.full(2, 4), np.arange(2, dtype=np.uint64))
    mids = tree.append(np.repeat(tops, 2), np.full(4, 2), np.arange(4, dtype=np.uint64))
    leaves = tree.append(mids, np.zeros(4, int), np.arange(4, dtype=np.uint64))
    tree.reward[leaves] = [0.0, 1.0, 2.0, 3.0]
    took = np.zeros(len(tree), int)
    took[mids], took[leaves] = [0, 1, 1, 1], [1, 0, 0, 1]
    return tree, leaves, took


def test_shares_are_of_the_segments_that_lead_to_leaves():
    tree, leaves, took = grown()
    found = demo_actions.shares(tree, took, leaves, 2, (4, 2))
    assert found.tolist() == [[0.25, 0.5], [0.75, 0.5]]
    assert demo_actions.shares(tree, took, leaves[3:], 2, (4, 2)).tolist() == [[0, 0], [1, 1]]
    task = SimpleNamespace(tree=tree, leaves=leaves)
    assert demo_actions.winners(task, took, ("none", "a"), (4, 2)) == [["none", "-25%", "-50%"], ["a", "+25%", "+50%"]]


def test_the_demo_tells_and_draws(tmp_path, capsys):
    demo = demo_actions.Demo(num_steps=25, levels=(15,), alphas=(2.0,), nfe=200, out=tmp_path)
    assert demo.run() == 0
    assert "Best reward by 200 evaluations" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"tree.png", "alone.png", "table.md", "summary.json"}
