"""Sampling with drafts on a chain: a small cell, and the page of its rows."""

import pytest

from experiments.drafts import sampling
from experiments.shared.cells import Cells


def test_cells_and_page(tmp_path):
    cells = Cells(tmp_path / "rows.jsonl", sampling.KEY)
    for method in ("best_of_n", "best_of_n(draft)"):
        cells.add(sampling.measured(sampling.Job(method, 0.4, 4, 70, 0)))
    assert all(abs(row["bias"]) < 4 * row["se"] + 0.2 for row in cells.rows)
    assert cells.rows[1]["draft_share"] > 0 == cells.rows[0]["draft_share"]
    page = sampling.report(cells.rows)
    assert "| best_of_n(draft) | 4 |" in page
    assert "log Z = 0.4" in page
    with pytest.raises(ValueError, match="run the experiment first"):
        sampling.report([])
