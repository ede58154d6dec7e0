"""The table of what drafts know of rollouts: cells are whole, agreement is what it says, the page holds them."""

import numpy as np
import pytest

from experiments.drafts import correlation


def test_a_cell_says_how_drafts_of_each_kind_agree_with_rollouts(tmp_path):
    row = correlation.measured(correlation.Job("mix16_hard", 30, 12, 0))
    found = row["rewards"]["tilt"]
    assert {kind: list(of) for kind, of in found.items()} == {
        k: list(map(str, m)) for k, m in correlation.KINDS.items()
    }
    left, rho, low, high, _ = found["draft"]["25"]
    assert left < 25
    assert low <= rho <= high
    assert rho > 0.8
    assert found["even"]["10"][0] == 3
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    correlation.Cells(rows, correlation.KEY).add(row)
    assert correlation.main(["report", "--rows", str(rows), "--out", str(page)]) == 0
    assert "mix16_hard, tilt, from t = 30, 12 paths" in page.read_text("utf-8")


def test_ranks_agree_as_ranks():
    a = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert correlation.spearman(a, np.exp(a)) == pytest.approx(1)
    assert correlation.spearman(a, -a) == pytest.approx(-1)
    assert correlation.spearman(a, np.ones((1, 4))) == 0
    assert correlation.spearman(a, np.array([[1.0, 1.0, 2.0, 2.0]])) == pytest.approx(4 / np.sqrt(20))
    rho, low, high, best = correlation.agreement(np.arange(40.0), np.arange(40.0))
    assert (rho, low, high, best) == pytest.approx((1, 1, 1, 1))


def test_no_rows_make_no_page(tmp_path):
    assert correlation.main(["report", "--rows", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "x.md")]) == 1
