"""The mixtures experiment: its beds, references, metrics, resumption, tuning, and what it reports."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

import treesearch as ts
from experiments.mixtures import beds as mixture_beds
from experiments.mixtures import evidence as mixtures
from experiments.mixtures import report as mixtures_report
from experiments.mixtures.evidence import Job
from experiments.shared import cells as files
from experiments.shared import distances, evidence_duels, evidence_report, stats
from experiments.shared.baselines import Setup
from experiments.shared.cells import Cells
from experiments.shared.distances import Reference
from experiments.shared.stats import Mean
from treesearch.core.weights import ess
from treesearch.errors import StoreError

NAMES = tuple(mixture_beds.BEDS)


@pytest.fixture(scope="module")
def beds():
    return {name: make() for name, make in mixture_beds.BEDS.items()}


def normal(n, dim, seed, mean=0.0):
    return mean + torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# beds


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_the_endpoint_of_the_mixture(beds, name):
    bed, t = beds[name], torch.tensor([1, 3, 20, 50, 99, 100])
    x = 2 * normal(6, bed.kernel().state_shape[0], 0)
    exact = bed.mixture.transition(x, t).endpoint
    assert torch.allclose(bed.kernel().model(x, t), exact, atol=1e-9)
    assert torch.allclose(bed.kernel().transition(x.float(), t).endpoint.double(), exact, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_importance_sampling_has_the_fraction_asked_for(beds, name):
    bed = beds[name]
    if bed.tilt is None or name == "checkerboard":
        return
    fraction = mixture_beds.ess_fraction(bed.mixture, bed.tilt, bed.lam)
    assert fraction == pytest.approx(0.15 if name.endswith("mild") else 0.005, rel=1e-4)
    means, std = torch.tensor(bed.mixture.means, dtype=torch.float64), bed.mixture.stds[0]
    chance = torch.Generator().manual_seed(0)
    pick = torch.multinomial(bed.mixture.log_mix.exp(), 40_000, replacement=True, generator=chance)
    x = means[pick] + std * normal(40_000, means.shape[1], 1)
    assert ess(bed.lam * bed.reward(x).numpy()) / 40_000 == pytest.approx(fraction, rel=0.1 if fraction > 0.1 else 0.6)
    c, k, y = (torch.as_tensor(v, dtype=torch.float64) for v in bed.tilt)
    assert torch.allclose(bed.reward(x), ((c * x) - 0.5 * k * (x - y) ** 2).sum(1))


def test_bounds_hold_and_are_tight(beds):
    tops = {"ring": torch.tensor([beds["ring"].mixture.means[7]]), "checkerboard": torch.zeros(1, 2)}
    for name, top in tops.items():
        bed = beds[name]
        close = bed.reward(torch.cat([top, top + 0.5 * normal(500, 2, 2)]))
        assert bed.r_max - 1e-3 < close.max() <= bed.r_max
    assert [name for name in NAMES if beds[name].r_max is None] == ["mix16_mild", "mix16_hard"]


def test_modes(beds):
    board = beds["checkerboard"]
    centres = torch.tensor([[-2.6, -3.3], [-0.4, -1.6], [2.9, 3.2]], dtype=torch.float64)
    assert board.modes(centres).tolist() == [0, 2, 7]
    weights = torch.tensor([1.0, 2.0, 1.0])
    assert board.masses(centres, weights).tolist() == [0.25, 0, 0.5, 0, 0, 0, 0, 0.25]


def test_the_chain_is_close_to_the_mixture(beds):
    bed = beds["mix16_mild"]
    found = ts.search(bed.kernel(), bed.reward, ts.BestOfN(lam=bed.lam, n=2_000), batch_size=2_000)
    assert abs(found.log_z - bed.mixture.tilted(bed.tilt, bed.lam).log_z) < 0.05 + 3 * found.log_z_se < 0.3
    assert np.abs(bed.masses(found.samples) - bed.mixture.log_mix.exp().numpy()).max() < 0.04


def test_references_by_rejection_and_by_resampling_agree(beds, monkeypatch):
    monkeypatch.setattr(mixtures, "REFERENCE", 400)
    bed = replace(beds["ring"], pool=6_000)
    one, other = (mixtures.draw_reference(b, 1.0) for b in (bed, replace(bed, r_max=None)))
    assert (one["how"], other["how"]) == ("rejection", "resampling")
    assert one["log_z"] == other["log_z"]
    for found in (one, other):
        rewards = bed.reward(torch.from_numpy(found["draws"]))
        assert abs(rewards.mean() - found["mean_reward"]) < 4 * rewards.std() / 20 < 0.7
        assert distances.total_variation(bed.masses(torch.from_numpy(found["draws"])), found["masses"]) < 0.08
    assert one["prior_reward"] < one["mean_reward"] - 4


# distances


def brute(x, y, width):
    """Unbiased MMD² from its definition."""

    def k(a, b):
        square = torch.cdist(a, b) ** 2
        return sum(torch.exp(-square / (2 * (f * width) ** 2)) for f in (0.25, 0.5, 1, 2, 4)) / 5

    n, m = len(x), len(y)
    inner = (k(x, x).sum() - n) / (n * (n - 1)) + (k(y, y).sum() - m) / (m * (m - 1))
    return float(inner - 2 * k(x, y).mean())


def test_mmd_is_its_definition_and_unbiased():
    x, y = normal(30, 3, 1), normal(50, 3, 2, mean=0.5)
    reference = Reference(y)
    assert reference.width == pytest.approx(float(torch.pdist(y).median()))
    assert reference.mmd2(x) == pytest.approx(brute(x, y, reference.width), abs=1e-6)
    same = np.array([Reference(normal(60, 3, 2 * i)).mmd2(normal(40, 3, 2 * i + 1)) for i in range(200)])
    assert abs(same.mean()) < 4 * same.std() / 200**0.5 < 3e-3


def test_biased_mmd_keeps_the_diagonals():
    x, y = normal(30, 3, 1), normal(50, 3, 2, mean=0.5)

    def mean(a, b):
        return float(torch.exp(-((torch.cdist(a, b) / 1.7) ** 2) / 2).mean())

    assert distances.biased_mmd2(x, y, 1.7) == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y), abs=1e-6)
    assert distances.biased_mmd2(x, x, 1.7) == pytest.approx(0, abs=1e-6)


def test_few_leaves_drawn_often_are_far_from_the_target():
    reference = Reference(normal(500, 2, 0))
    pick = torch.randint(0, 5, (500,), generator=torch.Generator().manual_seed(3))
    few, many = normal(5, 2, 1)[pick], normal(500, 2, 1)
    assert reference.mmd2(few) > 0.03 > 0.01 > abs(reference.mmd2(many))
    assert reference.floor().mmd2 < 0.01


def test_w1_of_any_sizes():
    x, y = normal(37, 1, 0), normal(90, 1, 1, mean=1.0)
    line = torch.ones(1, 1, dtype=torch.float64)
    assert distances.sliced_w1(x, y, line) == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]))
    shift = torch.tensor([3.0, 4.0], dtype=torch.float64)
    cloud, reference = normal(200, 2, 3), Reference(normal(200, 2, 3))
    assert reference.w1(cloud + shift) == pytest.approx(float((shift @ reference.lines).abs().mean()))


def test_means_and_intervals():
    values = [1.0, 2.0, 3.0, 6.0]
    mean = stats.mean_se(values)
    assert mean == (3.0, pytest.approx(np.std(values, ddof=1) / 2))
    assert mean.text() == "3.0 ± 1.1"
    assert Mean(0.012345, 0.00023).text(1e3) == "12.35 ± 0.23"


# cells


def test_cells(tmp_path):
    file = tmp_path / "cells.jsonl"
    cells = Cells(file, ("kind", "settings"))
    cells.add({"kind": "a", "settings": {"x": 1, "y": 2}, "value": 1 / 3, "none": math.inf, "nested": [math.nan]})
    with open(file, "a", encoding="utf-8") as opened:
        opened.write('{"kind": "b", "sett')  # killed
    again = Cells(file, ("kind", "settings"))
    assert {"kind": "a", "settings": {"y": 2, "x": 1}} in again
    assert {"kind": "b"} not in again
    again.add({"kind": "b", "settings": None})
    assert [row["kind"] for row in files.read(file)] == ["a", "b"]
    assert again.where(kind="a")[0] | {"settings": 0} == {
        "kind": "a",
        "settings": 0,
        "value": 0.333333,
        "none": None,
        "nested": [None],
    }
    file.write_text("no json\n")
    with pytest.raises(StoreError, match="damaged"):
        files.read(file)
    with files.locked(tmp_path), pytest.raises(StoreError, match="in use"), files.locked(tmp_path):
        pass


def test_metrics_are_of_the_weighted_draws(beds, tmp_path, monkeypatch):
    monkeypatch.setattr(mixtures, "REFERENCE", 1_000)
    bed = beds["ring"]
    cells = Cells(tmp_path / "cells.jsonl", mixtures.KEY)
    target = mixtures.target_of(bed, cells, tmp_path, 0.1)
    rows = {
        name: mixtures.cell(Job("cell", "ring", name, {}, 200_000, 7), bed, target, 2_000)
        for name in ("importance", "rejection")
    }
    mixed = mixtures.cell(
        Job("cell", "ring", "dps", {"normalise": "gradient", "scale": 0.0}, 20_000, 7), bed, target, 200
    )
    for row in rows.values():
        assert abs(row["mean_reward"] - target_row(cells)["mean_reward"]) < 0.3
        assert row["mode_error"] < 0.12
        assert row["mmd2"] < 0.02
        assert row["log_z_error"] < 0.2
        assert row["nfe"] == row["work"] == 200_000
        assert row["reward_calls"] == row["samples"] == row["nodes"] - 1 == 2_000
        assert row["roots"] == row["distinct"] < 1_000
    assert rows["importance"]["distinct"] > rows["rejection"]["distinct"] > 100
    assert mixed["mean_reward"] == pytest.approx(target_row(cells)["prior_reward"], abs=15)  # p, not π
    assert mixed["mmd2"] > 0.2
    assert mixed["work"] > mixed["nfe"] == 20_000
    assert mixed["ess"] == 200


def target_row(cells):
    return cells.where(kind="reference")[0]


def test_a_cell_that_fails_says_why(beds, tmp_path):
    bed = beds["ring"]
    target = mixtures.Target(Reference(normal(10, 2, 0)), np.full(8, 1 / 8), 0.0)
    row = mixtures.cell(Job("cell", "ring", "dps", {"normalise": "residual"}, 1_000, 7), bed, target, 64)
    assert "minus a squared residual" in row["error"]
    assert "mmd2" not in row
    row = mixtures.cell(Job("cell", "ring", "importance", {}, 99, 7), bed, target, 64)
    assert "BudgetError" in row["error"]


def test_a_tree_that_visits_the_same_leaves_ends(beds, monkeypatch):
    monkeypatch.setattr(mixtures, "ITERATIONS", 1)
    bed = beds["mix2_hard"]
    target = mixtures.Target(Reference(normal(100, 2, 0)), np.full(12, 1 / 12), 0.0)
    narrow = {"widening_c": 1.0, "widening_alpha": 0.1}
    row = mixtures.cell(Job("cell", "mix2_hard", "dts", narrow, 3_000, 7), bed, target, 64)
    assert 500 < row["nfe"] < 2_500
    assert evidence_report.below(evidence_report.gather([row], "bed")).endswith(f": {row['nfe']:,} of 3,000 NFE")


def test_settings_reach_the_methods(beds):
    bed = beds["mix64_mild"]
    for name, entry in mixtures.METHODS.items():
        assert 1 <= len(entry.grid) <= 6
        assert len({json.dumps(how) for how in entry.grid}) == len(entry.grid)
        for how in entry.grid:
            setup = entry.make(bed, **how)
            assert isinstance(setup, Setup)
            assert setup.method.lam == (math.inf if how.get("greedy") else bed.lam)
            if "schedule" in how and name != "das":
                assert setup.method.schedule == mixtures.SCHEDULES[how["schedule"]]
    published = mixtures.METHODS["dts"].make(bed, **mixtures.METHODS["dts"].grid[0]).method
    assert (published.widening_c, published.widening_alpha, published.branch_at) == (2.0, 0.8, (100, 80, 60, 40, 20))
    assert mixtures.METHODS["fk_difference"].make(bed).method.schedule == (80, 60, 40, 20, 0)
    with pytest.raises(TypeError, match="widening"):
        mixtures.METHODS["dts"].make(bed, widening=2)


# the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, tiny; the sizes stay small as long as it is used."""
    out = tmp_path_factory.mktemp("mixtures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtures, "REFERENCE", 400)
        patch.setattr(mixtures, "DRAWS", 300)
        assert command(out) == 0
        yield out


def command(out, *words):
    words = ["--nfe", "1k", "3k", "--seeds", "100", "101", "--tuning-nfe", "1k", "--pool-scale", "0.004", *words]
    words = ["--beds", "checkerboard", "mix16_mild", "--methods", "importance", "rejection", "dps", "dts", *words]
    return mixtures.main(["run", *words, "--out", str(out / "cells.jsonl"), "--work", str(out / "work")])


def test_every_cell_is_run_once(finished):
    rows = files.read(finished / "cells.jsonl")
    found = [json.dumps([r[name] for name in mixtures.KEY], sort_keys=True) for r in rows if "settings" in r]
    assert len(found) == len(set(found))
    cells = [r for r in rows if r["kind"] == "cell"]
    assert {r["bed"] for r in cells if r["method"] == "rejection"} == {"checkerboard"}
    assert {(r["budget"], r["seed"]) for r in cells} == {(1_000, 100), (1_000, 101), (3_000, 100), (3_000, 101)}
    assert {r["seed"] for r in rows if r["kind"] == "tuning"} == {0, 1}
    assert {r["method"] for r in rows if r["kind"] == "tuning"} == {"dps", "dts"}
    assert all({"machine", "versions", "seconds"} <= set(r) for r in rows if r["kind"] != "choice")
    before = (finished / "cells.jsonl").read_bytes()
    assert command(finished) == 0
    assert (finished / "cells.jsonl").read_bytes() == before


def test_the_lowest_mmd_is_chosen(finished):
    rows = files.read(finished / "cells.jsonl")
    choices = [r for r in rows if r["kind"] == "choice" and len(r["grid"]) > 1]
    assert len(choices) == 4
    for choice in choices:
        scores = {}
        for r in rows:
            if (r["kind"], r["bed"], r.get("method")) == ("tuning", choice["bed"], choice["method"]):
                scores.setdefault(json.dumps(r["settings"]), []).append(r.get("mmd2", math.inf))
        assert len(scores) == 6
        best = min(scores, key=lambda how: np.mean(scores[how]))
        assert choice["picked"] == json.loads(best)
        assert choice["published"] == mixtures.METHODS[choice["method"]].grid[0]
        run = {
            json.dumps(r["settings"])
            for r in rows
            if r["kind"] == "cell" and r["method"] == choice["method"] and r["bed"] == choice["bed"]
        }
        assert run == {json.dumps(choice["picked"]), json.dumps(choice["published"])}


def test_a_cell_is_the_same_when_it_is_run_again(finished, tmp_path):
    rows = files.read(finished / "cells.jsonl")
    kept = [r for r in rows if not (r["kind"] == "cell" and r["method"] == "dts")]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert command(tmp_path) == 0
    again = files.read(tmp_path / "cells.jsonl")

    def plain(found):
        cells = [{k: v for k, v in r.items() if k != "seconds"} for r in found if r["kind"] == "cell"]
        return sorted(cells, key=lambda r: json.dumps([r[k] for k in mixtures.KEY]))

    assert plain(again) == plain(rows)


def test_report(finished, monkeypatch):
    file, out = finished / "cells.jsonl", finished / "report.md"
    monkeypatch.setattr(mixtures, "BEDS", {name: mixture_beds.BEDS[name] for name in ("checkerboard", "mix16_mild")})
    assert mixtures.main(["report", "--rows", str(file), str(finished / "none.jsonl"), "--out", str(out)]) == 0
    text, found = out.read_text(), evidence_report.gather(files.read(file), "bed")
    assert (finished / "report.png").stat().st_size > 10_000
    assert "## mix16_mild, 3,000 NFE" in text
    values = [r["mmd2"] for r in found.cells["checkerboard", "importance", "{}", 3_000]]
    assert f"| importance | {stats.mean_se(values).text(1e3)} |" in text
    assert "| dps, published | failed |" in text  # on mix16, whose reward is no residual
    assert 'mix16_mild, dps, `{"normalise": "residual"}`, 1,000 NFE, 2 of 2 seeds: ValueError' in text
    assert "| tds | not run |" in text
    spent = sum(row.get("seconds") or 0 for row in files.read(file))
    assert f"{spent:,.0f} s = " in text
    for which in ("published", "tuned"):
        gap = evidence_duels.duel(found, "checkerboard", ("dts", "importance"), which, 3_000, "mmd2")
        assert gap.text(1e3) in text


def test_what_was_not_run_says_so(finished):
    rows = [r for r in files.read(finished / "cells.jsonl") if r["kind"] == "reference"]
    text = mixtures_report.compose(rows, "f.png", {"checkerboard": ["importance", "dts"]})
    assert "| checkerboard | not run | not run | not run |" in text


def test_tree_memory_is_that_of_its_nodes():
    tree = ts.search(mixture_beds.BEDS["ring"]().kernel(), lambda x: x[:, 0], ts.BestOfN(n=7), batch_size=7).tree
    row = mixtures_report.with_trees([{"nodes": len(tree)}])[0]
    assert row["tree_bytes"] == sum(getattr(tree, name).nbytes for name in tree.COLUMNS)


def test_what_is_refused(tmp_path, capsys, monkeypatch):
    assert command(tmp_path, "--seeds", "1", "5") == 1
    assert "overlap" in capsys.readouterr().err
    assert command(tmp_path, "--beds", "cube") == 1
    assert "unknown bed 'cube'" in capsys.readouterr().err
    assert mixtures.main(["report", "--rows", str(tmp_path / "none.jsonl")]) == 1
    assert "run the experiment first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="one std"):
        mixture_beds.Denoiser(replace(mixture_beds.ring().mixture, stds=(0.3,) * 7 + (0.2,)))
