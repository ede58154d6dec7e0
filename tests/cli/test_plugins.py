"""Plug-in files: where they lie, what they are called and what lies beside them changes nothing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import treesearch as ts
from treesearch import _names
from treesearch.cli.main import main
from treesearch.registry import expressions
from treesearch.registry import registry as specs

ROOT = Path(__file__).parents[2]
SCORE = "def score(samples):\n    return samples.flatten(1).sum(1)\n"
MAKE = (
    "from treesearch.backends.exact.gaussian import LinearGaussian\n\n\n"
    "def make(dim=1):\n    return LinearGaussian(dim=dim)\n"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose name an expression cannot hold without quotes."""
    place = tmp_path / "my files (2), x=1"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def write(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for stem, text in files.items():
        (folder / f"{stem}.py").write_text(text)


@pytest.mark.parametrize(
    ("kernel", "reward"),
    [
        ("./k.py:make(dim=2)", "./r.py:score"),
        ("gaussian", "2*./r.py:score + linear(1.0)"),
        ("tds(./k.py:make(), ./r.py:score)", "kernel"),
        ("tds(./k.py:make, reward=0.5*./r.py:score)", "kernel"),
        ("tds(kernel=gaussian, reward='./r.py':score)", "./r.py:score.clip(-3, 3)"),
    ],
)
def test_a_run_goes_on_from_another_folder(
    folder: Path, kernel: str, reward: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, k=MAKE, r=SCORE)
    words = ["run", "best-of-n", "--kernel", kernel, "--reward", reward, "--nfe", "50", "--store", "run"]
    assert main(words) == 0, capsys.readouterr().err
    monkeypatch.chdir("/")
    for again in (["resume", str(folder / "run"), "--nfe", "100"], ["export", str(folder / "run"), "npz"]):
        assert main(again) == 0, capsys.readouterr().err


def test_a_file_named_like_a_module_hides_nothing(folder: Path) -> None:
    for name in ("json", "numpy", "rewards", "test", "torch", "treesearch"):
        write(
            folder,
            **{name: "import json, numpy, torch\nassert json.dumps and numpy.ndarray and torch.Tensor\n" + SCORE},
        )
        assert specs.reward(f"./{name}.py:score").name == "score"
        if name not in ("rewards", "test"):  # modules elsewhere too; ours is treesearch.rewards
            assert Path(importlib.import_module(name).__file__ or "").parent != folder
    assert "k" not in sys.modules


def test_neighbours_of_one_name(tmp_path: Path) -> None:
    for i, place in enumerate(("one", "two")):
        lazy = "    import late\n    from pack.part import more\n    return samples.sum(1) * VALUE * late.ONE + more\n"
        write(
            tmp_path / place,
            mine=f"from helper import VALUE\ndef score(samples):\n{lazy}",
            helper=f"import second\nVALUE = second.VALUE + {i}\n",
        )
        write(tmp_path / place, second=f"VALUE = {10 * i}.0\n", late="ONE = 1.0\n")
        write(
            tmp_path / place / "pack",
            __init__="",
            part="from . import inner\nmore = inner.more\n",
            inner=f"more = {i}\n",
        )
    one, two = (specs.reward(f"{tmp_path / place}/mine.py:score") for place in ("one", "two"))
    assert one(torch.ones(1, 1)).tolist() == [0.0]
    assert two(torch.ones(1, 1)).tolist() == [12.0]
    assert "helper" not in sys.modules
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_file_is_executed_once_and_again_when_it_or_a_neighbour_changed(folder: Path) -> None:
    write(folder, mine=f"import helper\nVALUE = helper.VALUE\n{SCORE}", helper="VALUE = 1\n")
    first = expressions.load("./mine.py:score")
    assert expressions.load("./mine.py:score") is first
    write(folder, helper="VALUE = 2\n")
    assert expressions.load("./mine.py:VALUE") == 2
    assert expressions.load("./mine.py:score") is not first


@pytest.mark.parametrize(
    ("file", "spec", "code", "said"),
    [
        ("x = 1\nimport nothing_here\n", "./bad.py:score", 1, "bad.py, line 2, in <module>"),
        ("x = 1\ny = (\n", "./bad.py:score", 1, "bad.py, line 2"),
        (
            "def score(samples):\n    return samples.nothing\n",
            "./bad.py:score",
            1,
            "raised at {folder}/bad.py, line 2, in score",
        ),
        ("def make():\n    return 1 / 0\n", "./bad.py:make()", 1, "bad.py, line 2, in make"),
        ("def make(a):\n    return a\n", "./bad.py:make(b=1)", 2, "unknown argument 'b' (known: a)"),
        (SCORE, "./bad.py:scor", 2, "did you mean 'score'"),
        (SCORE, "./none.py:score", 2, "no such file"),
        ("raise SystemExit(0)\n", "./bad.py:score", 1, "ended the process"),
    ],
)
def test_errors_name_the_line_of_the_file(
    folder: Path, file: str, spec: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, bad=file)
    assert main(["run", "best-of-n", "--kernel", "gaussian", "--reward", spec, "--nfe", "50"]) == code
    error = capsys.readouterr().err
    assert said.format(folder=folder) in error
    assert "Traceback" not in error
    assert main(["run", "best-of-n", "--kernel", "gaussian", "--reward", spec, "--nfe", "50", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_a_kernel_names_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "    def transition(self, x, t, cond=None):\n        raise RuntimeError('no memory')\n"
    write(folder, k=f"from treesearch.backends.exact.gaussian import LinearGaussian\nclass K(LinearGaussian):\n{body}")
    assert main(["run", "best-of-n", "--kernel", "./k.py:K", "--reward", "linear", "--nfe", "50"]) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: no memory" in said
    assert "k.py, line 4, in transition" in said


def test_recipes_hold_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, k=MAKE, r=f"import helper\n{SCORE}", helper="")
    kernel, reward = ts.Recipe("tds(./k.py:make(dim=3), ./r.py:score)"), ts.Recipe("./r.py:score")
    monkeypatch.chdir("/")
    assert kernel.kernel().state_shape == (3,)
    assert kernel.kernel().scores == reward.reward()


@pytest.mark.parametrize(("how", "first"), [("-c", ""), ("-m", "."), ("script.py", None)])
def test_the_working_directory_comes_last(
    folder: Path, how: str, first: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = str(folder) if first == "." else ""
    monkeypatch.setattr(sys, "argv", [how])
    monkeypatch.setattr(sys, "path", [here, "/elsewhere"])
    _names.look_here_last()
    assert sys.path == ([here, "/elsewhere"] if first is None else ["/elsewhere", here])
    monkeypatch.chdir(ROOT)  # unless it is where this library lies
    monkeypatch.setattr(sys, "path", ["", str(ROOT), "/elsewhere"])
    _names.look_here_last()
    assert sys.path[-1] == "/elsewhere"


def test_the_working_directory_hides_nothing(folder: Path) -> None:
    write(folder, json="raise SystemExit('hidden')\n", numpy="raise SystemExit('hidden')\n", rewards=SCORE)
    words = [
        "run",
        "best-of-n",
        "--kernel",
        "gaussian",
        "--reward",
        "./rewards.py:score",
        "--nfe",
        "50",
        "--store",
        "r",
    ]
    job = subprocess.run(
        [sys.executable, "-m", "treesearch", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert job.returncode == 0, job.stderr
    assert json.loads((folder / "r" / "command.json").read_text())["reward"].endswith("rewards.py':score")


VALUE = "def value(x, t, law, cond):\n    return law.endpoint.sum(1) - t\n"
FORMED = "def make(scale=1.0):\n    return lambda samples: scale * samples.flatten(1).sum(1)\n"


@pytest.mark.parametrize(
    ("kernel", "reward"),
    [
        ("valued(gaussian, linear(0.5), ./v.py:value)", "kernel"),
        ("valued(gaussian, linear(0.5), ./v.py:value)", "linear(c=0.5)"),
        ("valued(./k.py:make(dim=2), ./r.py:score, './v.py':value)", "./r.py:score"),
        ("tds(gaussian, ./f.py:make(0.5), value=./v.py:value)", "kernel"),
        ("tds(gaussian, ./f.py:make(scale=0.5), value=./v.py:value)", "./f.py:make(scale = 0.5)"),
        ("guidance_scales(tds(gaussian, linear(0.5), value=./v.py:value), (0.0, 1.0), (3,))", "kernel"),
        ("./w.py:make", "kernel"),
    ],
)
def test_values_serve_a_run_that_goes_on(
    folder: Path, kernel: str, reward: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = "from treesearch.backends import gaussian, valued\nfrom treesearch.rewards import linear\n"
    made += f"{VALUE}\ndef make():\n    return valued(gaussian(), linear(0.5), value)\n"
    write(folder, k=MAKE, r=SCORE, v=VALUE, f=FORMED, w=made)
    words = ["--kernel", kernel, "--reward", reward, "--nfe", "200"]
    assert main(["run", "fk", *words, "--store", "run", "--json"]) == 0, capsys.readouterr().err
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["reward_calls"] == cost["nfe"] / 5  # samples alone
    assert json.loads((folder / "run" / "run.json").read_text())["valued"] is True
    if kernel.startswith("tds(gaussian, ./f.py:make(0.5)"):
        assert main(["compare", *words, "--methods", "fk", "--store", "both"]) == 0
    monkeypatch.chdir("/")
    assert main(["resume", str(folder / "run"), "--nfe", "400"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "compare"])
@pytest.mark.parametrize("way", ["valued(gaussian, {}, ./v.py:value)", "tds(gaussian, {}, value=./v.py:value)"])
def test_values_of_another_reward_are_wrong_usage(
    folder: Path, way: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, v=VALUE)
    words = ["--kernel", way.format("linear(0.5)"), "--reward", "linear(0.6)", "--nfe", "200", "--store", "run"]
    assert main(["run", "fk", *words] if command == "run" else ["compare", *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "declares values of reward 'linear(0.5)', the search is for 'linear(0.6)'" in said
    assert "--reward kernel" in said
    assert not (folder / "run" / "run.json").exists()


def test_a_function_that_needs_more_than_samples_is_no_reward(folder: Path) -> None:
    asks = "def asks(samples, prompts):\n    return samples.flatten(1).sum(1)\n"
    write(folder, v=VALUE, a=asks)
    found = specs.kernel("valued(gaussian, linear, ./v.py:value)").value
    assert found(torch.ones(1, 1), 2, ts.backends.base.Gaussian(None, None, torch.ones(1, 1)), None) == -1.0
    assert specs.reward("./a.py:asks")(torch.ones(2, 1), ["a", "b"]).tolist() == [1.0, 1.0]
