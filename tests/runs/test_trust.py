"""Run folders of others: looking runs no code, and going on asks before it does."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path

import pytest

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli.main import main
from treesearch.registry import expressions, trust
from treesearch.registry import registry as specs
from treesearch.rewards.analytic import linear

LOOKING = (["show", "F"], ["ls", "F"], ["plot", "F"], ["plot", "F", "--what", "tree"], ["export", "F", "csv"])
LOOKING += (["export", "F", "graphml"], ["cite", "F"])
BUILDING = (["resume", "F", "--nfe", "200"], ["export", "F", "npz"])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that this user's command line made."""
    monkeypatch.chdir(tmp_path)
    words = ["--kernel", "gaussian", "--reward", "linear(1.0)", "--nfe", "100", "--store", "F"]
    assert main(["run", "best-of-n", *words]) == 0
    (tmp_path / "evil.py").write_text(
        "open('pwned', 'w').close()\nfrom treesearch.backends.exact.gaussian import LinearGaussian as make\n"
    )
    return tmp_path / "F"


def say(run: Path, **command: object) -> None:
    """Write the folder's command, as somebody else would."""
    (run / "command.json").write_text(json.dumps(command))


@pytest.mark.parametrize(
    "kernel",
    [
        "./evil.py:make",
        "'./evil.py':make",
        "evil:make",
        "os:system('touch pwned')",
        "tds(./evil.py:make(), linear())",
        "diffusers('x/y')",
        "trajectories('weights.safetensors')",
    ],
)
def test_code_that_a_foreign_folder_names_is_not_loaded(
    run: Path, kernel: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(run.parent))
    say(run, kernel=kernel, reward="linear(1.0)", mark="0" * 64)
    for words in LOOKING:
        assert main(list(words)) == 0, capsys.readouterr().err
    for words in BUILDING:
        capsys.readouterr()
        assert main(list(words)) == 1
        assert "--trust" in capsys.readouterr().err
    say(run, kernel="gaussian", reward=kernel)
    assert main(list(BUILDING[0])) == 1
    assert main(list(BUILDING[1])) == 0  # decodes, scores nothing: the reward is not made
    assert not Path("pwned").exists()


def test_trust_follows_and_says_what(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(run, kernel="./evil.py:make()", reward="linear(1.0)")
    assert main(["export", "F", "npz", "--trust"]) == 0
    assert f"F names {run.parent}/evil.py:make, loading it" in capsys.readouterr().err
    assert Path("pwned").exists()


def test_what_ships_needs_no_trust(run: Path) -> None:
    say(run, kernel="gaussian", reward="linear(1.0)")
    for words in BUILDING:
        assert main(list(words)) == 0


def test_a_folder_of_another_user_is_not_ones_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = trust.signed({"kernel": "./evil.py:make()", "reward": "linear(1.0)"})
    trust.check(run, command, ("kernel", "reward"))
    owner = os.stat(run).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ts.StoreError, match="was not made by you"):
        trust.check(run, command, ("kernel", "reward"))


def test_a_mark_is_of_one_command_and_one_key(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = trust.signed({"kernel": "./evil.py:make()", "reward": "linear(1.0)"})
    with pytest.raises(ts.StoreError, match="--trust"):
        trust.check(run, command | {"kernel": "./evil.py:other()"}, ("kernel",))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(trust.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(ts.StoreError, match="--trust"):
        trust.check(run, command, ("kernel",))
    assert (tmp_path / "elsewhere" / "treesearch" / "key").stat().st_mode & 0o077 == 0


def test_a_key_finds_a_place_without_a_home(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(trust.tempfile, "gettempdir", lambda: str(tmp_path))
    command = trust.signed({"kernel": "./evil.py:make()", "reward": "linear(1.0)"})
    trust.check(run, command, ("kernel",))
    (tmp_path / f"treesearch-{os.geteuid()}" / "key").chmod(0o644)  # others may have read it
    assert "mark" not in trust.signed(command | {"mark": ""}) or trust.signed({"kernel": "", "reward": ""}) == {
        "kernel": "",
        "reward": "",
    }


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        '{"kernel": 1, "reward": "x"}',
        '{"reward": "x"}',
        "[" * 10**5,
        '{"kernel": "((", "reward": "linear"}',
        "\xff",
    ],
)
def test_a_command_that_is_none(run: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "command.json").write_bytes(text.encode("latin-1"))
    for words in BUILDING:
        assert main(list(words)) == 1
        assert "command.json" in capsys.readouterr().err


def test_a_run_from_python_goes_on_with_both_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "run")
    ts.search(LinearGaussian(), linear(0.7), ts.BestOfN(), budget=ts.Budget(nfe=100), store=store)
    resume = ["resume", store, "--nfe", "200"]
    assert main(resume) == 1
    assert "--kernel and --reward" in capsys.readouterr().err
    assert main([*resume, "--reward", "linear(0.7)"]) == 1
    assert main([*resume, "--reward", "linear(0.8)", "--kernel", "gaussian"]) == 1
    assert "reward differs" in capsys.readouterr().err
    assert main([*resume, "--reward", "linear(0.7", "--kernel", "gaussian"]) == 2
    assert main([*resume, "--reward", "linear(0.7)", "--kernel", "gaussian"]) == 0
    assert main(["resume", store, "--nfe", "300"]) == 0  # the folder says it now
    shutil.rmtree(store)


def test_what_reaches_outside_is_registered() -> None:
    known = specs.KERNELS | specs.REWARDS | specs.OPERATORS
    assert set(known) >= trust.REACHING
    read = {
        "observed",
        "mask",
        "rows",
        "checkpoint",
        "path",
        "weights",
        "url",
        "policy",
        "model",
        "file",
        "data",
        "endpoint",
        "pretrained_model",
    }
    for name, path in known.items():
        settings = set(inspect.signature(expressions.load(path)).parameters)
        assert name in trust.REACHING or not settings & read, f"{name} takes {settings & read}"


def test_a_folder_keeps_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.py").write_text("def make(url, api_key):\n    return lambda samples: samples.flatten(1).sum(1)\n", "utf-8")
    reward = "0.5*./r.py:make('http://h/hooks/S3CRET1?key=S3CRET2', api_key='S3CRET3')"
    words = ["run", "best-of-n", "--kernel", "gaussian", "--nfe", "50", "--store", "F", "--reward"]
    assert main([*words, reward]) == 0
    assert main([*words, reward + "*'"]) == main([*words, reward[:-2]]) == main([*words, f"linear({reward})"]) == 2
    assert main(["show", "F"]) == 0
    assert main(["resume", "F"]) == 1
    said = capsys.readouterr()
    assert "say it again with --reward" in said.err
    assert main(["resume", "F", "--reward", reward, "--nfe", "100"]) == 0
    shown = [path.read_bytes() for path in Path("F").rglob("*") if path.is_file()]
    assert not any(b"S3CRET" in text for text in [*shown, said.out.encode(), said.err.encode()])
