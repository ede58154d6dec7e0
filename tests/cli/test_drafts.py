"""Drafts on the command line: what they cost is told, runs go on, and what cannot be drafted is said."""

import json
import shutil

import numpy as np
import pytest

from treesearch.cli.main import main
from treesearch.cli.show import read_result_of
from treesearch.runs.log import read_blocks

FEW = ["--kernel", "mnist(num_steps=6)", "--reward", "brightness()"]


def run(*words):
    return main(["run", "best-of-n", *FEW, *words])


def test_a_run_with_drafts_tells_goes_on_and_is_shown(tmp_path, capsys):
    straight, first = str(tmp_path / "straight"), str(tmp_path / "first")
    assert run("--draft", "2", "--nfe", "240", "--store", straight) == 0
    assert "NFE went into drafts" in capsys.readouterr().out
    assert "NFE went into drafts" in (tmp_path / "straight" / "README.md").read_text("utf-8")
    assert run("--draft", "2", "--floor", "0.5", "--nfe", "96", "--store", first) == 0
    assert main(["resume", first, "--nfe", "1200"]) == 0
    capsys.readouterr()
    assert main(["show", straight]) == 0
    assert "NFE went into drafts" in capsys.readouterr().out
    assert main(["show", first, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["draft_ratio"] == 1.0
    assert 0 < told["summary"]["cost"]["draft_nfe"] < told["summary"]["cost"]["nfe"] <= 1200
    assert read_result_of(first)[1].log_z is not None


def test_a_tree_with_drafts_that_is_killed_ends_like_one_that_is_not(tmp_path, capsys):
    """The log ends in the middle of its second wave, and run.json still says running."""
    words = ["run", "tree-search", *FEW, "--draft", "2", "--nfe", "600", "--store"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main([*words, str(straight)]) == 0
    assert "NFE went into drafts" in capsys.readouterr().out
    shutil.copytree(straight, killed)
    log, ends = (straight / "tree.bin").read_bytes(), [end for _, end in read_blocks(straight)]
    (killed / "tree.bin").write_bytes(log[: (ends[0] + ends[1]) // 2])
    config = json.loads((killed / "run.json").read_text("utf-8")) | {"status": "running"}
    (killed / "run.json").write_text(json.dumps(config), "utf-8")
    assert read_result_of(str(killed))[1].cost.nfe < 200
    assert main(["resume", str(killed)]) == 0
    found, want = (read_result_of(str(folder))[1] for folder in (killed, straight))
    assert found.cost.draft_nfe == want.cost.draft_nfe > 0
    assert found.cost.nfe == want.cost.nfe
    for column in ("parent", "t", "reward", "key"):
        assert np.array_equal(getattr(found.tree, column), getattr(want.tree, column), equal_nan=column == "reward")


def test_a_dry_run_knows_of_drafts(tmp_path, capsys):
    assert run("--draft", "2", "3", "--nfe", "600", "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["nfe"], found["reward_calls_at_most"]) == (600, 300)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--draft", "1"], "expected evaluations of a draft"),
        (["--draft", "7"], "expected 2..T = 6"),
        (["--draft", "2", "--kernel", "gaussian(dim=2)", "--reward", "linear(1.0)"], "no `chain`"),
        (["--floor", "0.5"], "floor"),
    ],
)
def test_what_cannot_be_drafted(words, said, capsys):
    assert run("--nfe", "600", *words) in (1, 2)
    told = capsys.readouterr()
    assert said in " ".join((told.out + told.err).split())


@pytest.mark.parametrize(
    "words",
    [
        ["tree-search", "--looks", "endpoints"],
        ["tree-search", "--draft", "3"],
        ["tree-search"],
        ["best-of-n", "--draft", "2", "3"],
        ["best-of-n", "--draft", "3", "--floor", "0.5"],
    ],
)
def test_what_a_dry_run_allows_is_enough(words, tmp_path, capsys):
    bounded = len(words) > 1
    words = ["run", *words, "--kernel", "mnist(num_steps=12)", "--nfe", "480", "--json"]
    assert main([*words, "--dry-run"]) == 0
    allowed = json.loads(capsys.readouterr().out)
    assert main([*words, "--store", str(tmp_path / "r")]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert len(read_result_of(str(tmp_path / "r"))[1].tree) <= allowed["nodes_at_most"]
    assert ("reward_calls_at_most" in allowed) == bounded
    assert not bounded or cost["reward_calls"] <= allowed["reward_calls_at_most"]
