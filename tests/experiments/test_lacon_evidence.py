"""What the page of aligners says of rows whose answer is known; one cell of each arm, small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.observations import lacon, train_aligner
from experiments.shared.cells import Cells
from treesearch.backends.models.aligner import Aligner


def rows():
    found = []
    for seed in range(3):
        for arm, share in (("unguided", 1.0), ("value", 0.25)):
            row = {"arm": arm, "tolerance": 0.2, "work": 100, "seed": seed, "k": 4, "iou": 0.5}
            row["error_of_draws"] = (1 + seed) * 0.01 * share
            found.append(
                row
                | (
                    {"ess": 3.0, "ess_levels": [4.0, 2.0], "roots": 2, "log_z": -1.0}
                    if seed >= 0 and arm == "value"
                    else {}
                )
            )
    return found


def test_the_page_says_what_the_rows_hold():
    page = lacon.report([*rows(), {"arm": "tds", "tolerance": 0.2, "work": 100, "seed": 0, "error": "it failed"}])
    assert "1 cells failed" in page
    assert (
        "| value | 4 | 5 (-1.21 to 11.2) | 0.25 (0.25 to 0.25) | 0.5 (0.5 to 0.5) | 3 (3 to 3) | 2 (2 to 2) |" in page
    )
    assert "| unguided | 4 | 20 (-4.84 to 44.8) | 1 (1 to 1) | 0.5 (0.5 to 0.5) | - | - | - | - | 3 |" in page
    with pytest.raises(ValueError, match="run the experiment first"):
        lacon.report([])


def test_the_committed_page_is_that_of_the_committed_rows():
    folder = Path(lacon.__file__).parents[1] / "results" / "observations"
    assert lacon.report(Cells(folder / "lacon.jsonl", lacon.KEY).rows) == (folder / "lacon.md").read_text("utf-8")


def test_a_cell_of_an_arm_is_paid_for_by_its_work():
    row = lacon.run_cell(lacon.Job("tds", 0.3, 150, 0), "edges.safetensors")
    assert (row["k"], row["nfe"], row["backward"]) == (2, 50, 48)
    assert len(row["ess_levels"]) == 24


def test_training_measures_the_error_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(train_aligner, "ROWS", 8)
    args = train_aligner.Args(out=tmp_path, rollouts=2, levels=2, held=2, steps=2, batch_size=2)
    train_aligner.main(args)
    made = lacon.load_aligner(tmp_path / "weights.safetensors")
    assert isinstance(made, Aligner)
    gram = made.basis.double() @ made.basis.double().T
    assert (gram - torch.eye(196, dtype=torch.float64)).abs().max() < 0.01
    assert (made.variances[-1].sum() > 0).item()
