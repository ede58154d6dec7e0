"""Observations from the command line: as a reward, as what steers a kernel, and as what decides a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import treesearch as ts
from treesearch import rewards
from treesearch.backends.guidance import Steered
from treesearch.cli.main import main
from treesearch.errors import UsageError
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.rewards import masked, pooled

MNIST = "mnist(num_steps=2)"
SEEN = "measurement(pooled(7), 'observed.png', tolerance=0.2)"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an observation, a mask, a matrix."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("observed.png", 4), ("whole.png", 28)):
        pixels = torch.randint(0, 256, (size, size), generator=torch.Generator().manual_seed(0))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(name)
    Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save("mask.png")
    np.save("a.npy", np.eye(2, 1))
    np.save("seen.npy", np.zeros(2))
    np.save("waves.npy", np.zeros((1, 28)))
    return tmp_path


@pytest.mark.parametrize(
    "reward",
    [
        SEEN,
        "measurement(masked('mask.png'), 'whole.png', tolerance=0.2)",
        "measurement(blurred(1.5), 'whole.png', tolerance=0.2)",
        "measurement(grey([1.0]), 'whole.png', tolerance=0.2)",
        "measurement(frequencies('mask.png'), 'waves.npy', tolerance=0.2)",
        f"{SEEN} + measurement(masked('mask.png'), 'whole.png', tolerance=0.2)",
    ],
)
def test_a_kernel_is_steered_by_every_operator(reward):
    kernel = specs.kernel(f"steered({MNIST}, {reward}, pilot=2)")
    x = kernel.prior(torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    law = kernel.transition(x, torch.tensor([2, 1]))
    assert torch.isfinite(law.rewards).all()
    assert not torch.equal(law.mean, law.base_mean)


def test_a_matrix_is_a_reward_of_vectors():
    reward = specs.reward("measurement(matrix('a.npy'), 'seen.npy', tolerance=0.5)")
    found = ts.search(specs.kernel("gaussian(dim=1)"), reward, ts.BestOfN(n=4))
    assert torch.equal(found.rewards, reward(found.samples))


@pytest.mark.parametrize("guide", ["steered({0}, {1}, pilot=4)", "tds({0}, {1})", "dps({0}, {1}, scale=0.01)",
                                   "flowchef({0}, {1}, scale=0.01)", "elucd({0}, {1}, scale=0.1)"])  # fmt: skip
def test_guides_by_what_is_seen_run_for_their_own_reward(capsys, guide):
    kernel = guide.format(MNIST, SEEN)
    words = ["run", "best-of-n", "--kernel", kernel, "--reward", "kernel", "--nfe", "6", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"][0]["log_z"] < 0
    same = specs.kernel(kernel), specs.reward(SEEN)
    assert same[0].scores == same[1]  # written once more it is the same reward


def test_what_was_seen_decides_a_run(capsys, folder, monkeypatch):
    words = ["--kernel", f"steered({MNIST}, {SEEN}, pilot=4)", "--reward", "kernel"]
    assert main(["run", "best-of-n", *words, "--nfe", "8", "--store", "run"]) == 0
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert main(["resume", "../run", "--nfe", "16"]) == 0
    monkeypatch.chdir(folder)
    said = json.loads((folder / "run" / "run.json").read_text())
    assert said["measured"] == {"nfe": 8}
    pixels = np.asarray(Image.open("observed.png")).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save("observed.png")
    capsys.readouterr()
    assert main(["resume", "run", "--nfe", "24"]) == 1
    assert "differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            f"steered({MNIST}, measurement(pooled(4), 'observed.png', tolerance=0.2))",
            r"has shape \(1, 4, 4\), expected \(1, 7",
        ),
        (f"steered({MNIST}, measurement(pooled(7), 'gone.png', tolerance=0.2))", "gone.png: no such file"),
        (f"steered({MNIST}, measurement(pooled(7), 'observed.png'))", "tolerance"),
        (f"steered({MNIST}, measurement(pooled(7), 'observed.png', tolerance=0))", "tolerance is 0"),
        (f"steered({MNIST}, pooled(7))", "than a measurement"),
        (f"steered({SEEN}, {SEEN})", "Reward"),
        ("gaussian(dim=pooled(4))", "dim"),
    ],
)
def test_words_that_steer_nothing_are_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        specs.kernel(spec)


def test_the_names_are_those_of_python():
    y = rewards.measurement(pooled(4), torch.zeros(1, 7, 7), tolerance=0.2)
    kernel = Steered(specs.kernel("mnist(num_steps=3)"), y, pilot=2)
    found = ts.search(kernel, y, ts.TreeSampling(), budget=ts.Budget(nfe=40))
    assert torch.isfinite(torch.as_tensor(found.log_z))
    assert rewards.masked is masked


def test_data_files_have_absolute_paths_and_other_words_stay(folder):
    here = str(folder / "mask.png")
    assert expressions.absolute("masked('mask.png')") == f"masked({here!r})"
    for spec in ("masked('gone.png')", "f('observed')", "f('a.b', \"it's\")", "f('\\x.png')"):
        assert expressions.absolute(spec) == spec
    quoted = expressions.absolute('f("./my files/r.py":score, "a.npy")')
    assert str(folder / "a.npy") in quoted
    assert quoted.count("r.py") == 1


def test_operators_are_listed(capsys):
    assert main(["list", "operators"]) == 0
    assert set(capsys.readouterr().out.split()) == set(specs.OPERATORS)
    assert main(["list", "blurred"]) == 0
    assert "measurement(blurred(1.5), 'observed.npy', tolerance=0.2)" in capsys.readouterr().out
