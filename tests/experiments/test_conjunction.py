"""Values learnt from rollouts: the closed form, the regression, and what the page says of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.observations import conjunction as of
from experiments.observations.conjunction import KAPPA, Learnt, Parts, T, fit, left, near, report
from experiments.shared.cells import Cells


def test_the_mean_of_a_peak_is_in_closed_form():
    mu, s = torch.tensor([0.0, 0.01, -0.05, 0.1], dtype=torch.float64), torch.tensor([0.02, 0.005, 0.03, 0.02])
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    x = mu[:, None] + s[:, None].double() * z
    want = torch.trapezoid(torch.exp(-KAPPA * x.abs() - 0.5 * z**2), z) / (2 * torch.pi) ** 0.5
    assert (near(mu, s.double()) - want.log()).abs().max() < 1e-6
    sharp = near(torch.tensor([0.3], dtype=torch.float64), torch.tensor([1e-6], dtype=torch.float64))
    assert (sharp + 0.3 * KAPPA).abs() < 1e-6  # known exactly, it is the reward


def test_the_regression_finds_how_much_is_known():
    rng = np.random.default_rng(0)
    n, later = 1000, 0.2 + 0.03 * rng.standard_normal(1000)
    eight = rng.random(n) < 0.3
    odds = np.where(eight, 2.0, -2.0) + 2.0 * rng.standard_normal((T + 1, n))  # logit p(8 | odds) = odds + logit .3
    odds[0] = np.where(eight, 30.0, -30.0)
    mean = (later - 0.02 * rng.standard_normal((T + 1, n)) - 0.01) / 2
    mean[0] = later
    table = fit(Parts(odds, mean)).table
    assert (table[1:, 0] - 1.0).abs().max() < 0.25
    assert (table[1:, 1] - np.log(0.3 / 0.7)).abs().max() < 0.35
    assert (table[1:, 4] - later.std() * np.sqrt(4 / (9 + 4))).abs().max() < 0.003


def test_what_is_left_of_weights():
    assert left(np.zeros(4), np.full(4, -3.0)) == pytest.approx(1.0)
    assert left(np.zeros(4), np.array([0.0, -99.0, -99.0, -99.0])) == pytest.approx(0.25)
    assert left(np.array([0.0, -9.0]), np.array([5.0, -4.0])) == pytest.approx(1.0)


def test_a_value_is_of_the_state_and_differentiable():
    table = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.01], dtype=torch.float64).expand(T + 1, 5)
    x = torch.zeros(2, 1, 28, 28).requires_grad_()

    class Law:
        endpoint = x

    values = Learnt(table)(x, torch.tensor([3, 9]), Law, None)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert values.shape == (2,)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_the_page_says_what_the_rows_hold():
    flat = [0.5] * (T + 1)
    shares = {f"{name} {what}": flat[1:] for name in ("endpoints", "learnt") for what in ("step", "rest")}
    rows = [{"part": "levels", "n": 10, "spread": flat} | shares]
    for seed, arm in ((0, "das"), (1, "das"), (0, "learnt")):
        row = {"part": "search", "arm": arm, "work": 100, "seed": seed, "k": 10, "pilot": 2, "log_z": -5.0 - seed}
        rows.append(row | {"ess": 5.0, "ess_levels": [4.0, 2.0], "roots": 3, "nfe": 90, "mmd2_model": 0.01})
    page = report(rows)
    assert "| 50 | 0.5000 | 0.500 | 0.500 | 0.500 | 0.500 |" in page
    assert "| das | 10 | 2 | 90 | 10 | - | -5.50 ± 0.50 | 0.5 | 0.2 | 3 | 2 |" in page
    assert "10,000 rollouts" in page
    with pytest.raises(ValueError, match="run the experiment first"):
        report([])
    assert "Not run." in report(rows[:1])


def test_the_committed_page_is_that_of_the_committed_rows():
    folder = Path(of.__file__).parents[1] / "results" / "observations"
    rows = Cells(folder / "conjunction.jsonl", of.KEY).rows
    assert report(rows) == (folder / "conjunction.md").read_text("utf-8")
