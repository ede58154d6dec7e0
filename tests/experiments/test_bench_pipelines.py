"""The benchmark of pipelines runs, for seconds, on tiny models."""

import json
import sys

import pytest
import torch

from experiments.bench import architectures
from experiments.bench import pipelines as bench_pipelines

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


@pytest.mark.parametrize("model", ["sd3", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_full_size_part_goes_through_on_tiny_models(monkeypatch, tmp_path, model):
    words = ["--gpu", "--num-steps", "2", "--batch-sizes", "1", "2", "--models", model]
    found = bench(monkeypatch, tmp_path / "b.json", *words)["g"][model]
    assert found["ratio"] > 0
    assert set(found["by_batch"]) == {"1", "2"}
    assert found["by_batch"]["2"]["plan_mb"] > found["by_batch"]["1"]["plan_mb"]
    assert 0 < found["shares"]["decode"] + found["shares"]["reward"] < 1


@pytest.mark.parametrize(("name", "parameters"), [("sd", 859_520_964), ("sdxl", 2_567_463_684), ("sd3", 2_028_328_000)])
def test_full_size_is_the_published_size(name, parameters):
    with torch.device("meta"):
        network = architectures.sd3_transformer("full") if name == "sd3" else architectures.unet(name, "full")
    assert sum(p.numel() for p in network.parameters()) == parameters
