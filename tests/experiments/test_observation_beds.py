"""The exact beds: what is true of them, scripts at a small size, and a page that its rows make."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.observations import beds_report, elucd, evidence, posteriors
from experiments.observations.beds import BEDS, KNOWN, bed
from experiments.observations.posteriors import w2
from treesearch.backends.guidance import FlowChef
from treesearch.rewards.observation import check_adjoint
from treesearch.testing import check_kernel

RESULTS = Path(__file__).parents[2] / "experiments/results/observations"
F64 = torch.float64


@pytest.mark.parametrize("operator", BEDS["linear"])
def test_operators_are_the_matrices_that_the_truth_is_of(operator):
    of = bed("linear", operator)
    check_adjoint(of.operator, of.kernel.state_shape)
    x = torch.randn(2, *of.kernel.state_shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert (of.operator(x).flatten(1) - x.flatten(1) @ of.rows.T).abs().max() < 1e-12


def test_observations_are_of_the_same_draw_at_every_tolerance():
    of = bed("process", "mask")
    one, other = of.seen(0.3, 4), of.seen(0.03, 4)
    assert torch.equal(one.x0, other.x0)
    noise = (one.reward.fn.observed - one.x0[KNOWN]) / 0.3
    assert torch.allclose(noise, (other.reward.fn.observed - one.x0[KNOWN]) / 0.03)
    assert not torch.equal(one.x0, of.seen(0.3, 5).x0)


def test_projected_steps_obey_the_laws():
    of = bed("linear", "grey")
    check_kernel(evidence.projected(of, of.seen(0.3, 0)), rows=4, proposal=True)


def test_distances_of_gaussians():
    one, four = torch.eye(3, dtype=F64), 4 * torch.eye(3, dtype=F64)
    zero = torch.zeros(3, dtype=F64)
    assert math.isclose(w2(zero, one, zero + 2.0, four), math.sqrt(12 + 3), rel_tol=1e-12)
    assert w2(zero, one, zero, one) < 1e-7


def test_draws_of_an_affine_chain_are_those_of_its_law():
    truth = posteriors.Truth.of(bed("process", "mask"), 0)
    kernel = posteriors.AFFINE["COW, inverted, 3 cycles"](truth)
    mean, cov = posteriors.carried(kernel)
    x = posteriors.draws(kernel, 4_000, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, KNOWN], truth.seen.x0[KNOWN].expand(4_000, -1))
    assert ((x.mean(0) - mean).abs() <= 5 * (cov.diagonal() / 4_000).sqrt() + 1e-12).all()
    assert abs(truth.apart(x.mean(0), torch.cov(x.T)) - truth.apart(mean, cov)) < 0.1


def test_scripts_fill_their_rows_and_the_page_is_made_of_them(tmp_path):
    arms = ("Steered, FK", "projection, FK")
    few = {"observations": 1, "few": 1, "searches": 1, "beside": 1, "beds": ("process",), "tolerances": (0.3,)}
    run = evidence.Run(**few, arms=arms, nfe=1_600, out=tmp_path / "evidence.jsonl")
    run.run()
    before = (tmp_path / "evidence.jsonl").read_text()
    run.run()  # every cell is there
    assert (tmp_path / "evidence.jsonl").read_text() == before
    posteriors.Run(arms=("nothing seen", "floor"), seeds=(0,), out=tmp_path / "posteriors.jsonl").run()
    beds_report.main(beds_report.Args(rows=tmp_path, out=tmp_path / "beds.md"))
    page = (tmp_path / "beds.md").read_text()
    assert "| process | 0.3 | Steered, FK |" in page
    assert "| process | 0.3 | projection, FK |" in page
    assert "| floor |" in page


def rows(log_z, low, high):
    return [{"truth": 0.0, "log_z": log_z, "low": low, "high": high, "standing": ["ok"] * len(log_z)}]


def seen(n, *figures):
    """Rows of n draws of x_0."""
    return [row | {"observation": i} for i in range(n) for row in rows(*figures)]


def test_operators_on_one_draw_are_one_observation():
    several = [row | {"observation": i} for i in range(3) for z in (0.0, 0.2 * i) for row in rows([z], [None], [None])]
    alone = seen(1, [0.0], [None], [None]) + [
        r | {"observation": i} for i in (1, 2) for r in rows([0.1 * i], [None], [None])
    ]
    assert beds_report.line(several, asked=False)[0] == beds_report.line(alone, asked=False)[0]


def test_what_was_asked_and_missed_says_so():
    found = beds_report.line(seen(3, [0.2, 0.2], [0.1, -1.0], [0.3, 1.0]), asked=True)
    assert found[0] == "**+0.200 (+0.200 to +0.200), missed**"
    assert found[2].startswith("**0.500")
    every = beds_report.line(seen(3, [0.0, 0.0], [-1.0, -1.0], [1.0, 1.0]), asked=True)
    assert every[2] == "1.000 (0.610 to 1.000) of 6"  # six intervals do not say that it is more than .99
    assert beds_report.line(seen(3, [-1e6], [None], [None]), asked=False)[0] == "diverges: median -1e+06"
    assert found[3] == "3 of 6"
    assert beds_report.line(seen(1, [None, 0.1], [None, 0.0], [None, 0.2]), asked=False)[0].startswith("-∞ (1 searches")


def test_the_scale_is_chosen_by_ess_alone():
    made = [
        {"kind": "choose", "scale": s, "seed": n, "ess": e, "log_z": 0.0}
        for s, e in ((0.0, 8.0), (0.03, 32.0), (1.0, 16.0))
        for n in (100, 101)
    ]
    draw = np.random.default_rng(0)
    made += [
        {"kind": "judge", "scale": s, "seed": n, "ess": 1.0, "log_z": float(sd * draw.normal())}
        for s, sd in ((0.0, 1.0), (0.03, 0.1), (1.0, 1.0))
        for n in range(10)
    ]
    assert elucd.chosen(made)[0] == 0.03
    page = beds_report.elucd_part(made)
    line = next(text for text in page.splitlines() if "chosen" in text and text.startswith("|"))
    assert line.startswith("| 0.03 | chosen | 0.500 |")
    assert set(elucd.SCALES) >= {0.0, elucd.DEFAULT}


def test_the_committed_page_is_what_the_rows_make():
    assert beds_report.page(RESULTS) == (RESULTS / "beds.md").read_text("utf-8"), "run beds_report"


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="run the experiments first"):
        beds_report.page(tmp_path)


def test_flowchef_with_noise_is_a_proposal_that_holds_log_z(monkeypatch):
    """A cautious one: its moves do not shrink with the noise of a step, and a tenth of the gap is too far."""
    arm = (lambda of, seen, tolerance: FlowChef(of.kernel, seen.reward, scale=0.02 * tolerance**2), evidence.FK)
    monkeypatch.setitem(evidence.ARMS, "cautious", arm)
    row = evidence.cell(evidence.Job("linear", "matrix", 1.0, 0, "cautious"), 5, nfe=10_000)
    assert row["backward_nfe"] == 0
    held = [low <= row["truth"] <= high for low, high in zip(row["low"], row["high"], strict=True)]
    assert sum(held) >= 4
    assert max(abs(z - row["truth"]) for z in row["log_z"]) < 1
