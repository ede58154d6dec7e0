"""What searches on the beds of looks are worth: by the chain's own rollouts, with a page of the rows."""

import numpy as np
import pytest

from experiments.drafts import endpoints
from experiments.shared.cells import Cells


def test_worth_is_in_rollouts():
    rewards = np.arange(1000.0)
    logs = endpoints.log_worth(rewards, [0.0, 900.0, 999.0, 5000.0])
    np.testing.assert_allclose(np.exp(logs), [1001 / 1000.5, 1001 / 100.5, 1001 / 1.5, 2002.0])


def test_cells_and_page(tmp_path):
    bed, cells = endpoints.BEDS["gaussian"](), Cells(tmp_path / "rows.jsonl", endpoints.KEY)
    rewards = np.sort(np.random.default_rng(0).normal(bed.kernel.mean, bed.kernel.std, 2000))
    for method in endpoints.METHODS:
        cells.add(endpoints.cell(endpoints.Job("gaussian", method, 16, 2), bed, rewards))
    assert [row["nfe"] for row in cells.rows] == pytest.approx([1600] * 5, abs=50)
    assert min(row["worth"] for row in cells.rows) > 2
    assert cells.rows[0]["log_error"] > 0
    page = endpoints.page(cells.rows)
    assert "## 16 rollouts, 2 searches" in page
    assert page.count("not run") == 9 * 6
    looks, best = cells.rows[4]["worth"], max(row["worth"] for row in cells.rows[:4])
    assert f"| {endpoints._short(looks / best)} (" in page
