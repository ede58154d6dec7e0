"""PIE-mini's two experiments at tiny size: what edits cost, what is the same to the bit, and pages from rows."""

from pathlib import Path

import pytest
import torch

from experiments.pie_mini import pictures, scorer, search, table
from experiments.pie_mini.bed import Bed, rooted, told, walked
from experiments.shared.cells import Cells
from treesearch.backends.roots.direct import direct

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "pie_mini"
T = 3


@pytest.fixture(scope="module")
def bed():
    return Bed(pairs=[p for p in pictures.pairs(6, 0) if p.kind in ("colour", "move")], num_steps=T)


def test_rows_of_the_network_are_those_of_the_papers(bed):
    n = len(bed.pairs)
    for method, want in (
        ("ddim", T + 2 * T),
        ("direct + kv", T + 2 * T * 2),
        ("noise .75", 2 * 2),
        ("bdia .5", (T + 1) + 2 * T),
    ):
        images, missed, counts, _ = table.edited(bed, {}, table.Job(method, "replace", 0))
        assert counts["rows"] / n == want, method
        assert counts["backward"] == 0
        assert images.shape == (n, 3, 16, 16)
        assert (missed == 0).all() == (method == "direct + kv")


def test_direct_without_control_is_the_edit_by_ddim_and_with_it_is_not(bed):
    plain = bed.shot(rooted(bed.guided, bed.path))
    assert torch.equal(bed.shot(rooted(direct(bed.guided, bed.path, bed.sources, control=None), bed.path)), plain)
    assert not torch.equal(bed.shot(rooted(direct(bed.guided, bed.path, bed.sources, control="kv"), bed.path)), plain)


def test_an_inversion_is_found_once_and_its_cost_is_that_of_every_edit(bed):
    known, jobs = {}, [table.Job(f"ddim{c}", "replace", 0) for c in ("", " + kv")]
    one, two = (table.edited(bed, known, job)[2]["rows"] / len(bed.pairs) for job in jobs)
    assert (one, two) == (3 * T, 5 * T)
    assert set(known) == {"ddim"}
    branch = known["ddim"].branch[2]
    cond = told(bed.guided, bed.sources)
    assert torch.equal(branch[-1], bed.path[-1])
    law = bed.guided.transition(branch[2], torch.full((len(bed.pairs),), 2), cond)
    assert (law.mean - branch[1]).abs().max() < 1e-4  # of states of order 1 in float32, by the step and by x̂_0 and ε̂
    assert torch.equal(walked(bed.guided, bed.path[-1], cond), branch)


def test_a_pinned_search_keeps_the_background_bitwise_and_a_free_one_does_not():
    for arm, level in search.ARMS.items():
        bed, images, nfe = search.searched(search.Job(arm, "BestOfN", level, 0), search.WEIGHTS)
        kept = ~bed.masks[:, None].expand_as(images)
        assert torch.equal(images[kept], bed.guided.decode(bed.x0)[kept]) == (arm == "pinned")
        assert nfe == level


def test_the_score_tells_targets_from_sources_and_the_reward_has_the_background_subtracted():
    pairs = search.pairs_of(0)
    truths, sources = (torch.stack([getattr(p, name) for p in pairs]) for name in ("truth", "picture"))
    words = [p.prompts[1] for p in pairs]
    score, reward = scorer.edit_score(), search.reward_of(pairs)
    assert (score(truths, words) > score(sources, words) + 0.5).all()
    assert torch.equal(reward(truths, words), score(truths, words))
    darker = torch.where(torch.stack([p.mask for p in pairs])[:, None], truths, truths - 0.1)
    assert torch.allclose(reward(darker, words) - score(darker, words), torch.full((6,), -2.0, dtype=torch.float64))


def test_a_likelihood_by_hand():
    logs = torch.log(
        torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.25, 0.25, 0.25, 0.25, *[0.5, 0.5, 0, 0], 1, 0, 0, *[0.2, 0.3, 0.5]]])
    )
    stated = torch.tensor([[2, 1, 0, 0, 2], [3, -1, -1, -1, -1], [0, 0, 3, 0, -1]])
    want = torch.tensor([0.3 * 0.25 * 0.5 * 1 * 0.5, 0.4, 0.1 * 0.25]).log() + torch.tensor([0.0, 0.0, scorer.SMALLEST])
    found = scorer.likelihood(logs.expand(3, -1), stated)
    assert torch.allclose(found, want / torch.tensor([5.0, 1.0, 4.0]), atol=1e-6)
    assert scorer.labels("nothing") == [3, -1, -1, -1, -1]
    assert scorer.labels("red disc, column 2, height 1, light right") == [1, 0, 2, 1, 2]


def row(method, seed, **values):
    n = 2
    figures = {"right": [1] * n, "psnr": [20.0] * n, "ssim": [0.5] * n, "structure": [0.01] * n, "missed": [0.0] * n}
    told_of = {
        "method": method,
        "how": "replace",
        "seed": seed,
        "kind": ["shape", "move"],
        "num_steps": 3,
        "scale": 7.5,
    }
    return told_of | {"rows": 9.0, "backward": 0.0, "seconds": 1.0} | figures | values


def test_checks_say_what_does_not_hold():
    rows = [row("ddim", 0, missed=[0.9, 0.7]), row("npi", 0, missed=[0.2, 0.2]), row("null", 0, missed=[0.1, 0.1])]
    rows += [row("direct + p2p", 0, psnr=[24.0, 24.0]), row("ddim + p2p", 0)]
    page = table.report(rows)
    assert "ddim 0.8000 > npi 0.2000 > null 0.1000 > direct 0.0000: holds." in page
    assert "+4.0 dB (+4.0 to +4.0), target rate +0 % (+0 to +0): holds." in page
    rows[2]["missed"], rows[4]["right"] = [0.3, 0.3], [1, 1]
    rows[3]["right"] = [0, 0]
    page = table.report(rows)
    assert page.count("**does not hold.**") == 2
    held = table.report([row("ddim + mask", 0, psnr=[None, None])])
    assert "| ∞ |" in held
    assert "100, ∞" in held


@pytest.mark.parametrize(("name", "module"), [("table", table), ("search", search)])
def test_committed_pages_are_what_the_rows_say(name, module):
    rows = Cells(RESULTS / f"{name}.jsonl", module.KEY).rows
    assert module.report(rows) == (RESULTS / f"{name}.md").read_text("utf-8"), "run make pie-evidence"
    with pytest.raises(ValueError, match="no rows"):
        module.report([])


def test_searches_are_put_beside_shots_that_cost_no_less(tmp_path):
    rows = Cells(RESULTS / "search.jsonl", search.KEY).rows
    groups = search.grouped([r for r in rows if "error" not in r])
    assert next(iter(groups))[0] == search.SINGLE
    search.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
