"""The benchmark of pipelines runs, for seconds, on tiny models."""

import json
import sys

import pytest
import torch

from experiments.bench import architectures
from experiments.bench import pipelines as bench_pipelines
from experiments.shared import pages

# diffusers' Euler scheduler hands a tensor to numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def bench(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["bench_pipelines", "--tiny", "--rounds", "1", "--out", str(out), *words])
    bench_pipelines.main()
    return json.loads(out.read_text("utf-8"))


def test_searches_are_compared_with_pipelines(monkeypatch, tmp_path):
    words = ["--parts", "12", "--num-steps", "3", "--models", "flux"]
    found = bench(monkeypatch, tmp_path / "b.json", *words)
    assert found["1"]["flux"]["ratio"] > 0
    assert found["2"]["flux"]["ratio_of_process_time"] > 0


SLOW = [pytest.param(model, marks=pytest.mark.slow) for model in ("sd", "sdxl", "flux", "qwen_image")]


@pytest.mark.parametrize("model", ["sd3", "wan", *SLOW])
def test_full_size_part_goes_through_on_tiny_models(monkeypatch, tmp_path, model):
    words = ["--gpu", "--num-steps", "2", "--batch-sizes", "1", "2", "--models", model]
    found = bench(monkeypatch, tmp_path / "b.json", *words)["g"][model]
    assert found["ratio"] > 0
    assert set(found["by_batch"]) == {"1", "2"}
    assert found["by_batch"]["2"]["plan_mb"] > found["by_batch"]["1"]["plan_mb"]
    assert 0 < found["shares"]["decode"] + found["shares"]["reward"] < 1


def test_without_a_gpu_rows_say_that_they_were_not_run(monkeypatch, tmp_path):
    """And the page of the figures says so too."""
    out = tmp_path / "b.json"
    monkeypatch.setattr(sys, "argv", ["bench_pipelines", "--gpu", "--out", str(out)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench_pipelines.main()
    found = json.loads(out.read_text("utf-8"))["g"]
    assert {name: found[name] for name in bench_pipelines.FULL} == dict.fromkeys(
        ("sd", "sdxl", "sd3", "flux", "qwen_image", "wan"), bench_pipelines.NOT_RUN
    )
    table = pages.full_size_table(found).splitlines()
    assert len(table) == 2 + len(bench_pipelines.FULL)
    assert all(line.count("not run") == 4 for line in table[2:])
    ran = {
        "best_batch": {"search": 4},
        "nfe_per_s": {"search": 12.345},
        "ratio": 0.98765,
        "shares": {"decode": 0.1, "reward": 0.25},
        "by_batch": {"4": {"search_peak_over_plan": 1.234}},
    }
    row = next(line for line in pages.full_size_table({"wan": ran}).splitlines() if "Wan" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["12.35", "0.988", "1.23", "35%"]


SIZES = {"sd": 859_520_964, "sdxl": 2_567_463_684, "sd3": 2_028_328_000, "flux": 11_901_408_320,
         "qwen_image": 20_430_401_088, "wan": 1_418_996_800}  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), SIZES.items())
def test_full_size_is_the_published_size(name, parameters):
    made = {"sd3": architectures.sd3_transformer, "flux": architectures.flux_transformer,
            "qwen_image": architectures.qwen_transformer, "wan": architectures.wan_transformer}  # fmt: skip
    with torch.device("meta"):
        network = made[name]("full") if name in made else architectures.unet(name, "full")
    assert sum(p.numel() for p in network.parameters()) == parameters
