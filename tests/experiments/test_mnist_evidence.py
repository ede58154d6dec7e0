"""The MNIST experiment: distances, references, resumption, choices, curves and ratios, and what it reports."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from experiments.mnist import evidence as mnist_evidence
from experiments.mnist import references, report, searches
from experiments.mnist.searches import Job
from experiments.mnist.targets import METHODS, SCHEDULES, SEARCHERS, TARGETS, T
from experiments.shared import cells as rows_of
from experiments.shared import distances, stats
from experiments.shared.curves import match
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.models.mnist import STATE_SHAPE, cosine_alphas_cumprod, to_images
from treesearch.errors import StoreError


def features(n, seed, shift=0.0):
    return shift + torch.rand(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Smooth(torch.nn.Module):
    """v = -blurred x."""

    def forward(self, x, t):
        return -torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)


@pytest.fixture(scope="module")
def tiny():
    """The same chain with a network without weights."""
    network = Smooth().eval().requires_grad_(False)
    schedule = Schedule.variance_preserving(cosine_alphas_cumprod(), T, prediction="v")
    return DiffusionKernel(
        network, state_shape=STATE_SHAPE, schedule=schedule, eta=1.0, clip_sample=1.0, decode=to_images, name="tiny"
    )


# distances and references


def test_frechet_is_its_definition():
    x, y = features(80, 0), 2 * features(90, 1, shift=0.5)
    left, right = np.cov(x.T), np.cov(y.T)
    cross = scipy.linalg.sqrtm(left @ right).real
    exact = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(left + right - 2 * cross)
    assert distances.frechet(x, y) == pytest.approx(exact, rel=1e-6)
    assert distances.frechet(x, x + 1.5) == pytest.approx(6 * 1.5**2, rel=1e-6)


def test_diversity_is_the_mean_over_pairs():
    x = features(20, 2)
    pairs = [1 - torch.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(x, 2)]
    assert distances.diversity(x) == pytest.approx(float(torch.stack(pairs).mean()))
    assert distances.diversity(x[:1].repeat(5, 1)) == pytest.approx(0, abs=1e-9)


def test_draws_of_the_model_follow_the_reward():
    images = torch.arange(4000).reshape(-1, 1, 1, 1).float()

    def reward(gap):
        return lambda x: torch.where(x.flatten() < 2000, 0.0, -gap).double()

    draws, facts = references.model_draws(images, reward(math.log(3)))
    assert (facts["how"], len(draws)) == ("rejection", 2000)
    assert abs(facts["log_z"] - math.log(2 / 3)) < 1e-6
    shares = (references.model_draws(images[1900:2100], reward(math.log(3)))[0] < 2000).float().mean()
    assert abs(float(shares) - 0.75) < 0.01
    assert references.model_draws(images[1900:2100], reward(1.0))[1]["how"] == "resampling"


def test_a_resampled_pool_says_how_far_off_it_is_itself(monkeypatch):
    """Exact draws of N(1, 1) against pools of N(0, 1) weighed by exp(x), whose 150 rows are worth about 55."""
    monkeypatch.setattr(references, "DRAWS", 400)
    g, gaps, errors = torch.Generator().manual_seed(3), [], []
    for _ in range(100):
        pool, truth = (torch.randn(n, generator=g, dtype=torch.float64) for n in (150, 400))
        draws, facts = references.model_draws(pool[:, None, None, None], lambda x: x.flatten() - 4)
        assert facts["how"] == "resampling"
        known = distances.Reference(draws)
        gaps.append(known.mmd2(1 + truth[:, None]))
        errors.append(known.error(facts["repeats"]))
    assert abs(np.mean(gaps) - np.mean(errors)) < 4 * np.std(np.subtract(gaps, errors)) / len(gaps) ** 0.5
    assert np.mean(errors) > 0.004
    assert distances.Reference(pool[:, None]).error(0.0) == 0


def test_rewards_are_bounded_by_zero_and_real_images_obey_them(tmp_path):
    labels = np.tile(np.arange(10), 40)
    pixels = np.full((400, 28, 28), 51, np.uint8)  # a mean of .2
    pixels[200:] = 255
    arrays = {"train_x": pixels, "train_y": labels, "test_x": pixels, "test_y": labels}
    np.savez(tmp_path / "m.npz", **arrays)
    counts = {name: len(references.real_images(tmp_path / "m.npz", each)) for name, each in TARGETS.items()}
    assert counts == {"digit": 80, "even": 400, "conjunction": 40}
    noise = torch.rand(50, 1, 28, 28)
    assert all((each.reward()(noise) <= 0).all() for each in TARGETS.values())


def test_settings_reach_the_methods(tiny):
    reward = TARGETS["conjunction"].reward()
    for name, entry in (METHODS | SEARCHERS).items():
        assert 1 <= len(entry.grid) <= 6
        assert len({json.dumps(how) for how in entry.grid}) == len(entry.grid), name
        for how in entry.grid:
            setup = entry.make(tiny, reward, **how)
            if "schedule" in how and name != "das":
                assert setup.method.schedule == SCHEDULES[how["schedule"]]
            if "lam" in how:
                assert setup.method.lam == float(how["lam"])
    trees = [METHODS["dts"].make(tiny, reward, **METHODS["dts"].grid[i]).method for i in (0, 3)]
    assert [(t.widening_c, t.widening_alpha, t.branch_at) for t in trees] == [
        (2.0, 0.8, (50, 40, 30, 20, 10)),
        (1.0, 0.5, (50, 40, 30, 20, 10)),
    ]


# curves


def test_expected_best_is_the_mean_over_subsets():
    x = np.array([0.3, -1.0, 2.0, 5.0, 4.0])
    exact = [np.mean([max(subset) for subset in itertools.combinations(x, k)]) for k in range(1, 6)]
    assert report.expected_best(x, range(1, 6)) == pytest.approx(exact)
    with pytest.raises(ValueError, match="subsets"):
        report.expected_best(x, [6])


def test_a_curve_says_where_it_rose():
    history = [{"nfe": n, "best_reward": r} for n, r in ((1, None), (2, 0.5), (3, 0.5), (4, 0.9))]
    assert searches.improvements(history) == [[2, 0.5], [4, 0.9]]
    assert report._steps([[2, 0.5], [4, 0.9]], np.array([1.0, 2, 3, 4, 9])).tolist() == [0.5, 0.5, 0.5, 0.9, 0.9]


# the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """Both parts, tiny."""
    out = tmp_path_factory.mktemp("mnist")
    draw = np.random.default_rng(0)
    arrays = {f"{part}_x": draw.integers(0, 256, (60, 28, 28), dtype=np.uint8) for part in ("train", "test")}
    np.savez(out / "mnist.npz", **arrays, train_y=np.arange(60) % 10, test_y=np.arange(60) % 10)
    with pytest.MonkeyPatch.context() as patch:
        for module in (references, searches):
            patch.setattr(module, "kernel_on", lambda device: tiny)
            patch.setattr(module, "PART", 20)
            patch.setattr(module, "DRAWS", 30)
        patch.setattr(mnist_evidence, "PART", 20)
        assert command(out) == 0
        assert search(out) == 0
        yield out


def command(out, *words):
    words = ["--targets", "even", "--methods", "importance", "dps", "dts", "--nfe", "250", "500", *words]
    words = ["--seeds", "100", "101", "--tuning-nfe", "150", "--pool", "40", "--data", str(out / "mnist.npz"), *words]
    return mnist_evidence.main(["run", *words, "--out", str(out / "cells.jsonl"), "--work", str(out / "work")])


def search(out):
    words = ["--part", "search", "--rewards", "composite", "--searchers", "best_of_n", "dts_star", "fk_max"]
    words += ["--levels", "300", "900", "--seeds", "100", "101"]
    return mnist_evidence.main(["run", *words, "--out", str(out / "cells.jsonl"), "--work", str(out / "work")])


def test_every_cell_is_run_once_and_measured(finished):
    rows = rows_of.read(finished / "cells.jsonl")
    cells = [row for row in rows if row["kind"] == "cell"]
    assert {(row["budget"], row["seed"]) for row in cells} == {(250, 100), (250, 101), (500, 100), (500, 101)}
    tuned = {m: [r["settings"] for r in rows if r["kind"] == "tuning" and r["method"] == m] for m in METHODS}
    assert {m: how for m, how in tuned.items() if how} == {m: list(METHODS[m].grid) for m in ("dps", "dts")}
    assert len([row for row in rows if row["kind"] == "cell distances"]) == len([r for r in cells if "error" not in r])
    for row in cells:
        if row["method"] == "dts":  # a branch costs less than a rollout, and the last one has to fit
            assert row["budget"] / 2 < row["nfe"] <= min(row["budget"], 50 * row["samples"])
        else:
            assert row["nfe"] == row["budget"] == 50 * row["samples"]
        assert row["roots"] <= row["distinct"] <= row["samples"]
        assert (row["work"] > row["nfe"]) == (row["method"] == "dps")
        assert (row["log_z"] is None) == (row["method"] == "dps")
    before = (finished / "cells.jsonl").read_bytes()
    assert command(finished) == 0
    assert search(finished) == 0
    assert (finished / "cells.jsonl").read_bytes() == before


@pytest.mark.parametrize("method", ["dps", "dts"])
def test_the_lowest_mmd_is_chosen_and_run(finished, method):
    rows = [row for row in rows_of.read(finished / "cells.jsonl") if row.get("method") == method]
    choice = next(row for row in rows if row["kind"] == "choice")
    scores = {json.dumps(row["settings"]): row["mmd2_model"] for row in rows if row["kind"] == "tuning distances"}
    assert len(scores) == 6
    assert choice["picked"] == json.loads(min(scores, key=lambda how: scores[how]))
    run = [row["settings"] for row in rows if row["kind"] == "cell" and row["budget"] == 500]
    both = [choice["picked"], choice["published"]][: 1 + (choice["picked"] != choice["published"])]
    assert run == [how for how in both for _ in (100, 101)]  # the chosen settings first


def test_distances_are_of_the_draws(finished):
    rows = rows_of.read(finished / "cells.jsonl")
    job = Job("cell", "even", "importance", {}, 250, 100)
    stored = np.load(job.file(finished / "work"))
    drawn = torch.from_numpy(stored["features"][stored["again"]])
    assert drawn.shape == (30, 128)
    row = next(r for r in rows if all(r.get(k) == v for k, v in job.row.items()))
    assert row["diversity"] == pytest.approx(distances.diversity(drawn), rel=1e-4)
    assert row["distinct"] == len(stored["features"])


def test_search_cells(finished):
    rows = [row for row in rows_of.read(finished / "cells.jsonl") if row["kind"] == "search"]
    assert len(rows) == 2 + 2 + 4
    for row in rows:
        if row["method"] == "best_of_n":
            assert row["best"] == max(row["rewards"]) == row["curve"][-1][1]
            assert len(row["rewards"]) == 900 // 50
        assert ("curve" in row) == (row["method"] != "fk_max")


def test_report(finished):
    rows = rows_of.read(finished / "cells.jsonl")
    files, out = [finished / "one.jsonl", finished / "two.jsonl"], finished / "report.md"
    for file, part in zip(files, (rows, [row for row in rows if row["kind"] == "search"]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    assert mnist_evidence.main(["report", "--rows", *map(str, files), "--out", str(out)]) == 0
    text = out.read_text()
    for figure in ("sampling", "search", "anytime"):
        assert (finished / f"report_{figure}.png").stat().st_size > 5_000
    assert "## even, 500 NFE" in text
    values = [r["fid_real"] for r in rows if r["kind"] == "cell distances" and r["method"] == "importance"]
    assert f"| importance | {stats.mean_se(values[:2]).text()} |" in text
    best = [row["best"] for row in rows if row["kind"] == "search" and row["method"] == "fk_max"]
    assert stats.mean_se([b for b, r in zip(best, [300, 300, 900, 900], strict=True) if r == 900]).text() in text
    absent = next(line for line in text.splitlines() if line.startswith("Of no target: "))
    assert "tds" in absent
    assert "importance" not in absent
    assert "| tds |" not in text
    assert "## digit, 500 NFE\n\nnot run" in text
    assert "| beam | not run |" in text
    assert "## Search: compressibility\n\nnot run" in text
    spent = [row["seconds"] for row in rows if row["kind"] == "search" and row["method"] != "best_of_n"]
    assert f"search {sum(spent):,.0f} s in 6 rows" in text  # once
    assert "| dts, published" in text or "| dts, published = tuned |" in text


def test_ratios_against_best_of_n(finished):
    rows = rows_of.read(finished / "cells.jsonl")
    seeds = {method: report.by_seed(rows, "composite", method) for method in ("best_of_n", "fk_max")}
    found = report.matched(seeds["fk_max"], seeds["best_of_n"], 300)
    curves = [report.curve_of(list(seeds[method].values()), 300) for method in ("fk_max", "best_of_n")]
    assert found.matched.startswith(("> 2", f"{match(*curves, 900).matched:.2f}"))  # two runs of best-of-N reach 2 B
    assert "(" in found.matched or found.matched.startswith(">")
    assert report.matched(seeds["fk_max"], {}, 300) is None


def test_what_is_asked_is_checked(tmp_path, capsys):
    assert mnist_evidence.main(["run", "--data", str(tmp_path / "none.npz")]) == 1
    assert "--data" in capsys.readouterr().err
    assert mnist_evidence.main(["run", "--seeds", "0"]) == 1
    assert "overlap" in capsys.readouterr().err
    assert mnist_evidence.main(["run", "--methods", "dtz"]) == 1
    assert "unknown method 'dtz'" in capsys.readouterr().err
    with pytest.raises(StoreError):
        rows_of.read(tmp_path / "none.jsonl")
