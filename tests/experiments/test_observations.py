"""Inverse problems on MNIST: the judge of calibration, the demo, the rows and their report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.observations import calibration, demo_restore, restore, samplers
from experiments.observations.report import report
from experiments.shared.cells import read

F64 = torch.float64
RESULTS = Path(restore.__file__).parents[1] / "results" / "observations"


def gaussian_ranks(spread: float, truths: int = 40, draws: int = 100) -> list[list[float]]:
    """Ranks of x* ~ N(0, I) among draws of N(y/2, spread²/2), the posterior given y = x* + noise where spread is 1."""
    chance, found = torch.Generator().manual_seed(0), []
    for seed in range(truths):
        truth = torch.randn(8, dtype=F64, generator=chance)
        y = truth + torch.randn(8, dtype=F64, generator=chance)
        values = y / 2 + spread * 0.5**0.5 * torch.randn(draws, 8, dtype=F64, generator=chance)
        found.append(calibration.ranks(values, torch.full((draws,), 1 / draws, dtype=F64), truth, seed).tolist())
    return found


def test_ranks_of_a_posterior_are_uniform_and_those_of_sure_draws_are_not():
    exact = np.array(gaussian_ranks(1.0))
    counts = np.histogram(exact, bins=5, range=(0, 1))[0]
    expected = exact.size / 5
    assert (((counts - expected) ** 2) / expected).sum() < 18.5  # χ² of four degrees of freedom: one in a thousand
    share = calibration.coverage(exact.tolist())
    assert share.low <= 0.9 <= share.high
    for spread, holds in ((0.5, False), (2.0, False)):
        share = calibration.coverage(gaussian_ranks(spread))
        assert (share.low <= 0.9 <= share.high) is holds


def test_ranks_weigh_draws_and_split_ties():
    values, truth = torch.tensor([[0.0], [1.0], [1.0], [2.0]], dtype=F64), torch.tensor([1.0], dtype=F64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    found = [float(calibration.ranks(values, weights, truth, seed)[0]) for seed in range(50)]
    assert 0.1 <= min(found) < 0.2
    assert 0.5 < max(found) <= 0.6
    assert calibration.covered(np.array([0.04, 0.051, 0.949, 0.96])).tolist() == [False, True, True, False]


def test_functionals_are_pixels_and_logits():
    images = torch.zeros(2, 1, 28, 28)
    images[1, 0, 6, 8] = 1.0
    found = calibration.functionals(images)
    assert found.shape == (2, calibration.PIXELS + 10)
    assert (found[1] - found[0])[: calibration.PIXELS].tolist() == [1.0] + [0.0] * 15
    assert pytest.approx(0) != float((found[1] - found[0])[-10:].abs().sum())


@pytest.fixture
def few(monkeypatch):
    """Pilots that say nothing."""
    monkeypatch.setattr(samplers, "PILOT", 4)
    samplers.bed.cache_clear()
    yield
    samplers.bed.cache_clear()


def test_the_demo_writes_what_it_says(tmp_path, few, capsys):
    tasks = ("inpainting",)
    demo_restore.main(demo_restore.Args(tasks=tasks, num_steps=3, particles=6, published=2, threads=1, out=tmp_path))
    told = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert [(row["task"], row["sampler"]) for row in told["rows"]] == [
        (task, samplers.SAMPLERS[name].title) for task in tasks for name in demo_restore.SHOWN
    ]
    for row in told["rows"]:
        assert np.isfinite([row["psnr"], row["misfit"]]).all()
        assert ("log_evidence" in row) == ("published" not in row["sampler"])
    assert (tmp_path / "table.md").read_text("utf-8").count("\n") == 2 + len(told["rows"])
    assert (tmp_path / "restore.png").read_bytes()[:4] == b"\x89PNG"
    kept = np.load(tmp_path / "draws.npz")
    assert np.isnan(kept["inpainting/observed"][14:]).all()
    assert not np.isnan(kept["inpainting/observed"][:14]).any()
    assert "1/1 inpainting" in capsys.readouterr().out


def test_the_sweep_fills_what_is_not_there(tmp_path, few):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    names, settings = ("fk correlated", "tds", "dps"), {"num_steps": 3, "particles": 6, "out": rows}
    sweep = restore.Run(problems=("super-resolution",), samplers=names, seeds=(0,), digits=(3,), **settings)
    sweep.run()
    before = rows.read_bytes()
    sweep.run()
    assert rows.read_bytes() == before
    found = {(row["sampler"], row["truth"], row["seed"]): row for row in read(rows)}
    assert len(found) == 2 * len(sweep.samplers)
    assert found["tds", "model", 0]["samples"] == 2
    assert found["tds", "model", 0]["work"] == 14  # three steps, the last one without noise and gradient
    assert found["fk correlated", "model", 0]["work"] == 18
    assert len(found["fk correlated", "model", 0]["ranks"]) == calibration.PIXELS + 10
    assert "ranks" not in found["fk correlated", "digit 3", 0]
    assert "ess" not in found["dps", "model", 0]
    assert restore.main(["report", "--rows", str(rows), "--out", str(page)]) == 0
    assert report(read(rows)) == page.read_text("utf-8")


def test_the_report_says_what_the_rows_hold():
    base = {"task": "inpainting", "tolerance": 0.1, "num_steps": 9, "work": 90, "samples": 10, "seconds": 1.0}
    rows = []
    for seed in range(3):
        for name, log_z in (("fk correlated", -3.0), ("fk steered", -5.0)):
            ess = {"ess": 2.0 + seed, "roots": 1, "log_z": log_z + seed, "ess_levels": [1.0, 2.0 + seed]}
            ranks = {"ranks": [0.5] * 16 + [0.99] * 10}
            row = {"truth": "model", "sampler": name, "seed": seed, "psnr": 10.0 + seed, "misfit": 1.0}
            rows.append(base | row | ess | ranks)
    page = report(rows)
    assert "| FK on Steered, correlated | 10 | 3 (2) | 1 (1) | 2 | 11.00 ± 0.58 | - | 1 | 1 3 | 1 |" in page
    assert (
        "| FK on Steered, correlated | 3 | 1.00 (1.00 to 1.00) | 0.00 (0.00 to 0.00) | 0.00 0.00 0.62 0.00 0.38 |"
        in page
    )
    assert "Most roots: FK on Steered, r_t, 1 at an ESS of 3 in the median." in page
    assert "each run ends with one draw" in report([row | {"ess": 1.5} for row in rows])
    with pytest.raises(ValueError, match="run the experiment first"):
        report([])


def test_the_committed_page_is_what_the_rows_say():
    assert report(read(RESULTS / "restore.jsonl")) == (RESULTS / "restore.md").read_text("utf-8"), "run make pages"
