"""Plans of several chunks in a maze: the shipped model through the whole script, figures from rows by hand."""

import json

import pytest

from experiments.planning import long_horizon

pytest.importorskip("gymnasium_robotics")


def test_the_script_fills_its_rows_and_reports(tmp_path, capsys):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    words = ["run", "--out", str(rows), "--horizon", "8", "--chunks", "2", "--num-steps", "3", "--pairs", "2"]
    words += ["--nfe", "12", "--seeds", "0", "--methods", "base", "best_of_n", "fk", "tree_search"]
    assert long_horizon.main(words) == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert not [row for row in found if "error" in row]
    assert {(row["chunks"], row["method"], row["spent"]) for row in found if row["split"] == "test"} == {
        (1, "base", 3), (2, "base", 6), (1, "best_of_n", 12), (2, "best_of_n", 12), (2, "fk", 12),
        (2, "tree_search", 12),
    }  # fmt: skip
    before = rows.read_bytes()
    assert long_horizon.main(words) == 0
    assert rows.read_bytes() == before
    assert long_horizon.main(["report", "--rows", str(rows), "--out", str(page)]) == 0
    assert "2 pairs, 8 or more cells apart, 1 seeds" in page.read_text()
    assert long_horizon.main(["run", "--seeds", "100", "--out", str(rows)]) == 1
    assert "seeds overlap" in capsys.readouterr().err


def row(method, chunks, success, nfe=12, seed=0):
    asked = {"pairs": 2, "min_cells": 8, "num_steps": 3}
    made = {"maze": "medium", "horizon": 8, "chunks": chunks, "split": "test", "method": method, "nfe": nfe}
    return made | {"seed": seed, "success": success, "reward": [-0.5, 0.0], "asked": asked}


def test_the_page_pairs_the_same_pairs():
    rows = [row("best_of_n", 2, [0, 0]), row("best_of_n", 2, [1, 0], seed=1), row("fk", 2, [1, 1])]
    rows += [row("fk", 2, [1, 1], seed=1), row("best_of_n", 1, [0, 0]), row("base", 2, [0, 1], nfe=6)]
    page = long_horizon.page(rows)
    assert "| best_of_n, 1 chunk | 0 (0 to 0) |" in page
    assert "| best_of_n, 2 chunks | 25 (0 to 50) |" in page
    assert "| fk, 2 chunks | 75 (50 to 100) |" in page  # less best-of-N's
    assert "| base, 2 chunks | 50 (0 to 100) |" in page
    assert "| fk, 2 chunks | 25 (0 to 50) |" in page  # of the way


def test_settings_are_those_of_the_highest_reward():
    grid = long_horizon.METHODS["fk"].grid
    made = [row("fk", 2, [0]) | {"split": "tune", "settings": how, "reward": [-i]} for i, how in enumerate(grid)]
    assert long_horizon.chosen("fk", made) == grid[0]
    assert long_horizon.chosen("fk", made[1:]) == grid[1]
