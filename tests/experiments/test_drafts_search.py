"""Search with drafts on MNIST: what is looked up is what a search finds, and the page says what the rows hold."""

import numpy as np
import pytest

import treesearch as ts
from experiments.drafts import search
from experiments.mnist.targets import SEARCHED, kernel_on
from experiments.shared.cells import Cells

ARM = "best_of_n(draft=5)"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    pool = search.Pool(folder, 5)
    made = [search.searched(search.Job("search", target, ARM, 150, 5), pool) for target in SEARCHED]
    return folder, made


def test_a_search_of_the_pool_is_the_search(rows):
    _, made = rows
    method, budget = search.ARMS[ARM], ts.Budget(nfe=150)
    found = ts.search(kernel_on("cpu"), SEARCHED["conjunction"](), method, budget=budget, seed=5)
    assert (made[0]["nfe"], made[0]["draft_nfe"]) == (found.cost.nfe, found.cost.draft_nfe)
    assert made[0]["reward_calls"] == found.cost.reward_calls
    assert made[0]["best"] == pytest.approx(float(found.rewards.max()), rel=1e-3)


def test_the_pool_is_kept_and_the_page_is_written(rows, capsys):
    folder, made = rows
    again = search.Pool(folder, 5)
    assert len(again.known) == 8
    assert again.known.keys() == search.Pool(folder, 5).known.keys()
    beside = [
        {"kind": "search", "target": t, "method": "best_of_n", "settings": {}, "budget": 5000, "seed": 5, "nfe": 5000}
        | {"reward_calls": 100, "best": 0.0, "rewards": np.linspace(-2000, made[0]["best"], 100).tolist()}
        for t in SEARCHED
    ]
    cells = Cells(folder / "rows.jsonl", search.KEY)
    for row in made:
        cells.add(row)
    page = search.report(cells.rows, beside)
    assert "## conjunction" in page
    assert f"| {ARM} | 1 |" in page
    with pytest.raises(ValueError, match="run the experiment first"):
        search.report([], beside)
    assert search.main(["report", "--rows", str(folder / "none.jsonl")]) == 1
    assert "run the experiment first" in capsys.readouterr().err
