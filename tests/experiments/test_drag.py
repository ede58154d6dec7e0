"""Things that are to go elsewhere: where they are, who judges, and the page of what became of them."""

from pathlib import Path

import torch

import experiments.roots.drag as script
import treesearch as ts
from experiments.roots.drag import ARMS, edit, jobs, report, spread
from experiments.roots.drags import CASES, Case, guided, noisy
from experiments.shared.cells import read

RESULTS = Path(__file__).parents[2] / "experiments/results/roots"
CASE = Case("scenes", 0)


def test_what_has_arrived_is_told_from_what_has_not():
    went = CASE.picture.clone()
    sky = CASE.picture[:, :1, :1]
    went[:, CASE.mask] = sky[:, 0]
    went[:, CASE.region.target] = CASE.picture[:, CASE.mask]
    seen = torch.stack([CASE.picture, went, went.roll(1, 2)])
    assert (CASE.away(seen) - torch.tensor([3.0, 0.0, 1.0])).abs().max() < 1e-5
    assert torch.equal(CASE.overlap(seen), torch.tensor([0.25, 1.0, 2 / 3]))  # of 5 columns, 2 overlap at first
    assert CASE.background(seen)[:2].tolist() == [0.0, 0.0]
    assert CASE.reward(seen)[1] > CASE.reward(seen)[2] > CASE.reward(seen)[0]


def test_cases_stay_in_their_pictures_and_differ():
    cases = [Case("scenes", number) for number in CASES]
    assert all(case.region.target.sum() == case.mask.sum() for case in cases)
    assert len({case.picture.numpy().tobytes() for case in cases}) == len(cases)


def test_noise_is_where_the_paper_has_it_and_everywhere():
    kernel = guided(CASE, 25, weights=False)
    assert kernel.departs is not None
    assert [t for t, s in enumerate(kernel.kernel.stochastic) if s] == [16, 17, 18, 19]  # 10 < i < 20 of 50
    assert [t for t, s in enumerate(noisy(CASE, 25, published=False).stochastic) if s] == [*range(2, 26)]
    assert len({job.row.values().__str__() for job in jobs((0, 1))}) == len(jobs((0, 1)))


def test_kinds_of_cells_have_their_figures(monkeypatch):
    few = ts.FeynmanKac(num_particles=4, lam=2.0)
    for name, value in (("T", 5), ("NFE", 20), ("FK", few), ("PARTICLES", 4)):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setitem(ARMS, "weights, FK", ("weights", few, 5, 20))
    assert set(edit(CASE, "weights, FK", 0)) == {"away", "background", "overlap", "nfe"}
    assert 0 < spread(CASE, "region, κ = 40", 0)["ess"] <= 1


def test_the_page_is_that_of_its_rows():
    rows = read(RESULTS / "drag.jsonl")
    assert report(rows) == (RESULTS / "drag.md").read_text("utf-8")
    assert {row["arm"] for row in rows if row["kind"] == "edit"} == set(ARMS)
    assert not any("error" in row for row in rows)
