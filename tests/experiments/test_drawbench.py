"""The DrawBench experiment: protocol, resumption, what it reports, and what it refuses."""

import csv
import hashlib
import itertools
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers

import treesearch as ts
from experiments.shared.stats import bootstrap, resamples
from experiments.text_to_image import drawbench, grades, prompts
from experiments.text_to_image import report as drawbench_report
from experiments.text_to_image.grades import Graders
from experiments.text_to_image.prompts import Prompt
from experiments.text_to_image.searches import Job, anytime
from tests.support import tiny, tiny_clip
from tests.support.tolerance import float32_tolerance
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.errors import StoreError
from treesearch.methods import METHODS
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import as_reward
from treesearch.rewards.images import vision

PROMPTS = tuple(Prompt(i, f"prompt {i}", "a" if i < 2 else "b") for i in range(3))
TREES = {
    "best of n": ts.BestOfN(),
    "dts": ts.DiffusionTreeSampling(widening_c=1.0, widening_alpha=0.5, wave=4),
    "dts star": ts.DiffusionTreeSearch(widening_c=1.0, widening_alpha=0.5, wave=1),
    "dts star in waves": ts.DiffusionTreeSearch(widening_c=1.0, widening_alpha=0.5, wave=7),
}
TIMED = ("seconds", "memory_mb")


def command(out, *words, methods=("best_of_n", "fk", "dts_star"), reward="digit(8)", also="brightness()"):
    """The experiment on the shipped digits, tiny; later words win."""
    words = ["--nfe", "20", "45", "--limit", "3", "--prompts-per-batch", "2", "--top-k", "3", *words]
    words = ["--features", "pixels", "--reward", reward, "--also", also, "--methods", *methods, *words]
    return drawbench.main(["run", "--kernel", "mnist(num_steps=5)", "--out", str(out), *words])


def rows(out):
    """Rows without what differs between two runs of the same thing."""
    found = [r for r in drawbench_report.read(out) if r["kind"] == "row"]
    found = [{k: v for k, v in r.items() if k not in TIMED} for r in found]
    return sorted(found, key=lambda r: (r["method"], r["level"], r["prompt"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert command(out) == 0
    return out


# levels


@pytest.mark.parametrize("name", TREES)
def test_a_level_of_a_long_run_is_the_run_of_that_budget(name):
    kernel, method, levels = LinearGaussian(), TREES[name], (5, 23, 57, 300)
    prompts = [p.text for p in PROMPTS]
    job = Job(name, method, 0, PROMPTS, levels)

    def run(level):
        return ts.search(kernel, linear(1.2), method, prompts=prompts, budget=ts.Budget(nfe=3 * level), seed=7)

    result = run(levels[-1])
    graders = Graders({"x": linear(1.0)}, lambda x: x.double(), lambda x: torch.cdist(x, x), 4)
    assert sum(int(grades.spent(t.tree, 5)[-1]) for t in result.tasks) == result.cost.nfe
    graded = [list(grades.grade(job, result, i, graders)) for i in range(3)]
    for at, level in enumerate(levels):
        alone = run(level)
        for mine, task in zip(graded, alone.tasks, strict=True):
            assert mine[at]["samples"] == mine[at]["reward_calls"] == len(task.leaves)
            assert mine[at]["best"] == float(task.rewards.max())
            assert mine[at]["top"] == pytest.approx(float(task.best(4)[1].mean()))
        assert sum(mine[at]["nfe"] for mine in graded) == alone.cost.nfe


def test_plan():
    methods = {name: drawbench.specs.method(drawbench.PROTOCOL[name]) for name in drawbench.PROTOCOL}
    jobs = list(drawbench.plan(methods, (1000, 2510), PROMPTS, (0, 1), 2, 50))
    assert [(j.label, j.seed, len(j.prompts), j.levels) for j in jobs[:4]] == [
        ("best_of_n", 0, 2, (1000, 2510)),
        ("fk", 0, 2, (1000,)),
        ("fk", 0, 2, (2510,)),
        ("dts_star", 0, 2, (1000, 2510)),
    ]
    assert len(jobs) == 2 * 2 * 4
    fk = jobs[2].method
    assert (fk.num_particles, fk.potential, fk.lam) == (50, "max", 10.0)
    assert len({j.folder for j in jobs}) == len(jobs)
    star = METHODS["DiffusionTreeSearch"](widening_c=2.0, widening_alpha=0.8, wave=1)
    assert jobs[3].method == star
    assert not anytime(ts.DiffusionTreeSearch(mode="async"))
    with pytest.raises(ValueError, match="minimum is 50"):
        next(drawbench.plan(methods, (49, 100), PROMPTS, (0,), 2, 50))


def test_batches_draw_apart_and_methods_share_their_noise(finished):
    found = {(r["method"], r["prompt"], r["level"]): r for r in rows(finished)}
    indices = sorted({r["prompt"] for r in rows(finished)})
    assert indices == [0, 66, 133]  # evenly spaced in the file
    top = [found["best_of_n", i, 20]["top"] for i in indices]
    assert min(abs(a - b) for a, b in itertools.combinations(top, 2)) > 0.01
    for i in indices:  # nine rollouts: DTS* has not begun to branch
        assert found["dts_star", i, 45]["best"] == pytest.approx(found["best_of_n", i, 45]["best"], rel=1e-3)


# what is reported


def test_every_cell_is_reported(finished):
    found = rows(finished)
    assert len(found) == 3 * 3 * 2
    for r in found:
        assert r["nfe"] == r["level"]
        assert r["set"].startswith("NOT DrawBench")
        levels = 4 if r["method"] == "fk" else 1  # 4, 3, 2 and x_0: DDIM adds no noise below 1
        assert r["reward_calls"] == r["samples"] * levels == r["level"] // 5 * levels
        assert r["k"] == 3
        assert r["roots"] == 3 if r["method"] != "fk" else 1 <= r["roots"] <= 3
        assert r["distance"] > 0
        assert 0 < r["also_best"]["brightness()"] < 1
        assert r["backward_nfe"] == 0
    records = drawbench_report.read(finished)
    sessions = [r for r in records if r["kind"] == "session"]
    assert sessions[0]["versions"]["torch"] == torch.__version__
    assert sessions[0]["machine"]["cores"] >= 1
    runs = [r for r in records if r["kind"] == "run"]
    assert sum(r["cost"]["nfe"] for r in runs) == 3 * (45 + 20 + 45 + 45)
    assert all(r["memory_mb"] > 10 for r in runs)
    timed = {(r["method"], r["level"], r["prompt"]): r["seconds"] for r in records if r["kind"] == "row"}
    assert 0 < timed["best_of_n", 20, 0] < timed["best_of_n", 45, 0]
    assert not any((finished / "runs").iterdir())
    assert len(list((finished / "pictures").rglob("*.png"))) == 9


def test_backward_passes_come_from_the_cost():
    kernel = LinearGaussian()
    result = ts.search(kernel, linear(1.0), ts.BestOfN(), prompts=["a"], budget=ts.Budget(nfe=100))
    result.cost.backward_nfe = 300
    graders = Graders({}, lambda x: x.double(), lambda x: torch.cdist(x, x), 2)
    job = Job("b", ts.BestOfN(), 0, PROMPTS[:1], (20, 100))
    assert [r["backward_nfe"] for r in grades.grade(job, result, 0, graders)] == [60, 300]


def test_roots_distances_and_other_rewards_are_those_of_the_returned_samples():
    kernel, method = LinearGaussian(num_steps=10), ts.FeynmanKac(num_particles=24, lam=5.0, potential="max")
    result = ts.search(kernel, linear(1.0), method, prompts=["a"], budget=ts.Budget(nfe=240), seed=3)
    other = as_reward(lambda x: x[:, 0] ** 2, name="square")
    graders = Graders({"square": other}, lambda x: x.double(), lambda x: torch.cdist(x, x), 6)
    [row] = grades.grade(Job("fk", method, 3, PROMPTS[:1], (240,)), result, 0, graders)
    order = np.argsort(-result.rewards.numpy(), kind="stable")[:6]
    roots = set()
    for node in result.leaves[order]:
        while result.tree.parent[node] != 0:
            node = result.tree.parent[node]
        roots.add(int(node))
    x = result.samples[order][:, 0].double()
    assert row["roots"] == len(roots) < 6
    assert row["distance"] == pytest.approx(float((x[:, None] - x).abs().sum() / 30))
    assert row["also_best"]["square"] == pytest.approx(float(x[0] ** 2))
    assert row["also_top"]["square"] == pytest.approx(float((x**2).mean()))
    assert row["nfe"] == 240


def test_report(finished, capsys):
    assert drawbench.main(["report", str(finished)]) == 0
    text = capsys.readouterr().out
    assert text.strip() == (finished / "report.md").read_text().strip()
    assert "NOT DrawBench" in text
    assert "published" not in text
    for part in ("unique roots", "brightness() of the top k", "distance", "backward", "peak MB", "machine: "):
        assert part in text
    best = [r["best"] for r in rows(finished) if r["method"] == "best_of_n" and r["level"] == 45]
    line = next(line for line in text.splitlines() if line.startswith("| best_of_n |"))
    assert line.split("|")[3].strip().startswith(f"{np.mean(best):.3f} [".replace("-0.000", "0.000"))
    assert (finished / "curve.png").read_bytes()[:4] == b"\x89PNG"


def record(method, level, prompt, best, seed=0, kind="BestOfN"):
    row = {"kind": "row", "method": method, "kind_of_method": kind, "seed": seed, "prompt": prompt, "level": level}
    row |= {"best": best, "nfe": level, "category": "Text", "also_best": {"x": 0.5}, "also_top": {"x": 0.25}}
    return (
        row
        | {"roots": 2, "k": 4, "distance": None, "reward_calls": 1, "backward_nfe": 0, "seconds": 1.0}
        | {"memory_mb": 100.0}
    )


def header(official=True, reward="image_reward()"):
    protocol = {"kernel": "k", "reward": reward, "also": ["x"], "features": "pixels", "top_k": 4}
    prompts = {"official": official, "of": 4, "count": 4}
    protocol |= {"prompts_per_batch": 2}
    return {"kind": "header", "label": "DrawBench", "prompts": prompts, "protocol": protocol}


def records(**how):
    """Best-of-N rises by 1 a doubling; DTS* has at 1000 what it has at 4000."""
    found = [header(**how)]
    for prompt, shift in enumerate((-3.0, -1.0, 1.0, 3.0)):
        found += [record("b", 1000 * 2**i, prompt, i + shift) for i in range(3)]
        found += [record("d", n, prompt, v + shift, kind="D") for n, v in ((1000, 2.0), (2000, 1.5), (4000, 9.0))]
    return found


def test_equal_nfe_ratio():
    table = drawbench_report.tabulate(records())
    picks = resamples(4)
    found = drawbench_report.ratios(table, "d", picks)
    assert found[0] == pytest.approx((4.0, 4.0, 4.0))
    assert found[1] == pytest.approx((2**0.5,) * 3)  # 1.5 is half way between the levels 2000 and 4000
    assert found[2] == (np.inf, np.inf, np.inf)
    assert np.allclose(drawbench_report.ratios(table, "b", picks), 1.0)
    text = drawbench_report.ratio_table(table, picks)
    assert "| d | 4.00 [4.00, 4.00] | 1.41 [1.41, 1.41] | > 1.00 [> 1.00, > 1.00] |" in text
    assert drawbench_report.needed(np.array([10.0, 20.0]), np.array([0.0, 1.0]), -1.0) == 0


def test_intervals_are_over_prompts():
    values = np.random.default_rng(1).normal(2.0, 3.0, 150)
    found = bootstrap(values[None], picks=resamples(150))
    half = 1.96 * values.std() / 150**0.5
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_only_prompts_that_are_finished_everywhere_count():
    found = [
        r for r in records() if not (r["kind"] == "row" and (r["method"], r["level"], r["prompt"]) == ("d", 4000, 3))
    ]
    table = drawbench_report.tabulate(found)
    assert table.prompts == (0, 1, 2)
    assert table.values("b", 1000, lambda r: r["best"]).tolist() == [-3.0, -1.0, 1.0]
    found += [record("b", 1000, 0, 5.0, seed=1)]
    with pytest.raises(StoreError, match="no prompt is finished"):
        drawbench_report.tabulate(found)


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ({}, True),
        ({"official": False}, False),
        ({"reward": "clip_score()"}, False),
        ({"reward": "2*image_reward()"}, False),
    ],
)
def test_published_figures_only_beside_the_published_protocol(how, shown):
    table = drawbench_report.tabulate(records(**how))
    text = drawbench_report.best_table(table, resamples(4))
    assert ("published (read off a plot)" in text) == shown
    assert ("| DTS*, published (read off a plot) | 1.150 |" in text) == shown


# going on


def test_a_killed_run_does_not_repeat_finished_cells(tmp_path, finished, monkeypatch, capsys):
    search, picture, calls = drawbench.search, drawbench.picture, []

    def dying(job, *rest):
        if len(calls) == 3:
            raise RuntimeError("killed")
        calls.append(job.keys)
        return search(job, *rest)

    with monkeypatch.context() as patch:  # the first search is finished and not graded
        patch.setattr(drawbench, "picture", lambda *_: picture(None))
        with pytest.raises(TypeError):
            command(tmp_path)
    assert not rows(tmp_path)
    monkeypatch.setattr(drawbench, "search", dying)
    with pytest.raises(RuntimeError, match="killed"):
        command(tmp_path)
    assert len(rows(tmp_path)) == 2 * (2 + 1 + 1)
    with open(tmp_path / "cells.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "row", "met')
    before, calls[:] = set().union(*calls), []
    monkeypatch.setattr(drawbench, "search", lambda job, *rest: calls.append(job.keys) or search(job, *rest))
    assert command(tmp_path) == 0
    assert len(calls) == 5
    assert not before & set().union(*calls)
    calls.clear()
    assert command(tmp_path) == 0
    assert not calls
    assert rows(tmp_path) == rows(finished)


FAILING = """
from pathlib import Path
from treesearch.rewards.images.classifier import digit
from treesearch.rewards.base import Reward

plain, scored, limit = digit(8), [], Path({limit!r})

def fn(samples, prompts):
    scored.extend([0] * len(samples))
    if limit.exists() and len(scored) > int(limit.read_text()):
        raise KeyboardInterrupt
    return plain(samples)

reward = Reward(fn, "eight")
"""


def plugin(stem):
    """The module that a plug-in file became."""
    (found,) = [module for name, module in sys.modules.items() if name.endswith(f".{stem}")]
    return found


def test_a_cell_under_way_goes_on(tmp_path, finished, capsys):
    limit, file = tmp_path / "limit", tmp_path / "failing.py"
    file.write_text(FAILING.format(limit=str(limit)))
    limit.write_text("14")
    how = {"methods": ["dts_star"], "reward": f"{file}:reward"}
    assert command(tmp_path / "out", **how) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    limit.unlink()
    before = len(plugin("failing").scored)
    assert command(tmp_path / "out", "--keep-runs", **how) == 0
    checks = 3  # recorded samples that resuming scores again
    assert len(plugin("failing").scored) - before == 3 * 9 - 14 + checks
    reference = [r for r in rows(finished) if r["method"] == "dts_star"]
    for mine, straight in zip(rows(tmp_path / "out"), reference, strict=True):
        assert mine["best"] == pytest.approx(straight["best"], rel=1e-3, abs=1e-6)
        assert mine["samples"] == straight["samples"]
    before = len(plugin("failing").scored)
    assert command(tmp_path / "out", "--nfe", "60", **how) == 0
    assert len(plugin("failing").scored) - before == 3 * 3 + 2 * checks  # three rollouts a prompt, in two runs
    assert len(drawbench_report.tabulate(drawbench_report.read(tmp_path / "out")).levels["dts_star"]) == 3


# prompts


def write_prompts(file, lines, columns=("Prompts", "Category")):
    with open(file, "w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([columns, *lines])
    return file


def test_own_prompts():
    found = prompts.read_prompts(prompts.OWN)
    sizes = {}
    for p in found:
        sizes[p.category] = sizes.get(p.category, 0) + 1
    assert sorted(sizes.values()) == sorted(prompts.SIZES.values())
    assert len({p.text for p in found}) == 200
    assert max(len(p.text.split()) for p in found) <= 40
    assert not prompts.is_official(found)
    assert prompts.select(prompts.OWN, None)[1].startswith("NOT DrawBench")


def test_official_file_is_recognised(tmp_path, monkeypatch):
    lines = [(f"{name} {i}.", f"{name} ") for name, n in prompts.SIZES.items() for i in range(n)]
    file = write_prompts(tmp_path / "official.csv", lines)
    assert prompts.select(file, None)[1].startswith("NOT DrawBench")
    texts = sorted(text.lower() for text, name in lines if name == "Colors ")
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    monkeypatch.setattr(prompts, "COLORS_DIGEST", digest)
    chosen, label, known = prompts.select(file, 50)
    assert label.startswith("DrawBench")
    assert known["official"]
    assert [p.index for p in chosen[:3]] == [0, 4, 8]
    write_prompts(file, lines[:-1])
    assert prompts.select(file, None)[1].startswith("NOT DrawBench")


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        ([("a", "b")], ("Prompt", "Category"), "lacks the column Prompts"),
        ([("a", "b"), (" ", "b")], ("Prompts", "Category"), "line 3: the prompt is empty"),
        ([], ("Prompts", "Category"), "no prompts"),
    ],
)
def test_bad_prompt_files(tmp_path, lines, columns, message):
    file = write_prompts(tmp_path / "p.csv", lines, columns)
    with pytest.raises(ValueError, match=message):
        prompts.read_prompts(file)


# what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--also"], "also is empty"),
        (["--also", "2*digit(8) + brightness()"], "--reward optimises"),
        (["--also", "digit( 8 )"], r"holds digit\(8\)"),
        (["--nfe", "4"], "minimum is 5"),
        (["--nfe", "many"], "no number"),
        (["--features", "inception"], "unknown features"),
        (["--features", "clip:/nowhere"], "/nowhere"),
        (["--methods", "dts_tsar"], "did you mean 'dts_star'"),
        (["--limit", "201"], "limit is 201"),
        (["--top-k", "0"], "top_k is 0"),
        (["--prompts", "nowhere.csv"], "cannot read prompts"),
        (["--seeds"], "seeds is empty"),
    ],
)
def test_refused_before_anything_runs(tmp_path, capsys, words, message):
    assert command(tmp_path / "out", *words) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out" / "cells.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "key"),
    [(["--top-k", "2"], "top_k"), (["--limit", "4"], "limit"), (["--prompts-per-batch", "3"], "prompts_per_batch")],
)
def test_another_protocol_in_the_same_folder_is_refused(tmp_path, finished, capsys, words, key):
    shutil.copytree(finished, tmp_path / "out")
    before = (finished / "cells.jsonl").read_bytes()
    assert command(tmp_path / "out", *words) == 1
    assert f"was begun with {key} = " in capsys.readouterr().err
    assert (tmp_path / "out" / "cells.jsonl").read_bytes() == before


def test_a_method_that_changed_its_meaning_is_refused(tmp_path, finished, capsys, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setitem(drawbench.PROTOCOL, "fk", "fk(lam=2.0)")
    assert command(tmp_path / "out") == 1
    assert "was begun with fk = " in capsys.readouterr().err


def test_reports_of_nothing_are_refused(tmp_path, capsys):
    assert drawbench.main(["report", str(tmp_path)]) == 1
    assert "run the experiment first" in capsys.readouterr().err
    (tmp_path / "cells.jsonl").write_text("{}\n")
    assert drawbench.main(["report", str(tmp_path)]) == 1
    assert "does not begin with a header" in capsys.readouterr().err
    (tmp_path / "cells.jsonl").write_text(json.dumps(header()) + "\n")
    assert drawbench.main(["report", str(tmp_path)]) == 1
    assert "no prompt is finished" in capsys.readouterr().err


# real formats


def test_clip_features(tmp_path):
    folder = tiny_clip.clip(tmp_path / "clip")
    features, distance = grades.extractor(f"clip:{folder}", torch.device("cpu"))
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[1] = images[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vision.CLIP_MEAN, vision.CLIP_STD))
    with torch.no_grad():
        model = transformers.CLIPModel.from_pretrained(folder)
        expected = model(input_ids=torch.tensor([[1, 513]]), pixel_values=(images - mean) / std).image_embeds.double()
    gaps = distance(features(images))
    # Of unit vectors: a patch has 3 × 8 × 8 terms, then two blocks of six sums, projection, norm and the product.
    close = float32_tolerance(1, 3 * 8 * 8, 1 + 2 * 6 + 3)
    torch.testing.assert_close(gaps, 1 - expected @ expected.T, rtol=0, atol=close)
    assert gaps[0, 1].abs() < close < gaps[0, 2]


def test_end_to_end_on_a_tiny_stable_diffusion(tmp_path, capsys):
    folder = tiny.sd(tmp_path / "sd")
    kernel = f'diffusers("{folder}", num_steps=5, eta=1.0, guidance_scale=7.5)'
    clip = tiny_clip.clip(tmp_path / "clip")
    score = f'treesearch.rewards.images.clip_score:CLIPScore("{clip}")'
    words = ["--kernel", kernel, "--reward", "compressibility()", "--also", "brightness()", score]
    words += ["--features", f"clip:{clip}", "--nfe", "15", "40", "--prompts-per-batch", "3", "--top-k", "3"]
    lines = [("A blue owl.", "Colours"), ("Two drums.", "Counting"), ("A sign that reads 'Go'.", "Text")]
    words += ["--prompts", str(write_prompts(tmp_path / "three.csv", lines))]
    out = tmp_path / "out"
    assert drawbench.main(["run", "--out", str(out), *words]) == 0, capsys.readouterr().err
    found = rows(out)
    assert len(found) == 3 * 3 * 2
    assert {r["nfe"] for r in found} == {15, 40}
    assert all(set(r["also_top"]) == {"brightness()", score} for r in found)
    assert all(0 < r["distance"] < 2 for r in found)
    session = next(r for r in drawbench_report.read(out) if r["kind"] == "session")
    assert session["rows_per_nfe"] == 2
    best = {(r["method"], r["prompt"], r["level"]): r["best"] for r in found}
    assert len({best["best_of_n", r["prompt"], 40] for r in found}) == 3
    assert all(best[m, p, 40] >= best[m, p, 15] for m, p, _ in best if m != "fk")
    assert drawbench.main(["report", str(out)]) == 0
    assert "compressibility()" in (out / "report.md").read_text()
    assert (out / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "model", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen_image", "flux"))]
)
def test_models_of_random_weights_run_and_say_where_they_are_not(model, tmp_path, capsys, monkeypatch):
    kernel = f'experiments.bench.architectures:random_weights("{model}", size="tiny", num_steps=2)'
    words = ["--reward", "compressibility()", "--also", "brightness()", "--features", "pixels", "--nfe", "4"]
    words += ["--methods", "best_of_n", "--limit", "1", "--top-k", "2", "--out", str(tmp_path / "out")]
    assert drawbench.main(["run", "--kernel", kernel, *words]) == 0, capsys.readouterr().err
    (row,) = rows(tmp_path / "out")
    assert (row["nfe"], row["reward_calls"]) == (4, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    full = f'experiments.bench.architectures:random_weights("{model}")'
    assert drawbench.main(["run", "--kernel", full, *words]) == 1
    assert f"{model} at full size is not run without a GPU" in capsys.readouterr().err
