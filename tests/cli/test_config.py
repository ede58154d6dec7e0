"""The options of `run` as a file."""

import pytest

from treesearch.cli import commands, config, searches
from treesearch.cli.main import main

WORDS = [
    ["--nfe", "2k", "--prompts", 'a "b"\\', "é\n-c", "--seed", "3", "--log", "tensorboard", "--debug"],
    ["--goal", "best", "--workers", "2", "--gpus-per-worker", "0.5", "--kernel", "gaussian(dim=2)", "--dry-run"],
    ["fk", "--num-particles", "8", "--tempering", "0.5", "1.0", "--seconds", "1.5h"],
    ["dts_star", "--lam", "auto", "--store", "runs/a b", "--json"],
    *([name] for name in searches.METHODS),
]


def parsed(*words):
    return commands.parse(["run", *words], None)


def saved(tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_text(text, "utf-8")
    return str(file)


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_command_comes_back_from_its_file(tmp_path, words):
    asked = parsed(*words)
    file = saved(tmp_path, config.written(asked))
    assert config.read(file, searches.Run()) == asked


def test_what_is_printed_runs_and_what_is_typed_stands_over_it(tmp_path, capsys):
    words = ["fk", "--num-particles", "8", "--nfe", "2k", "--prompts", "a", "b", "--seed", "3"]
    assert main(["run", *words, "--print-config"]) == 0
    file = saved(tmp_path, capsys.readouterr().out)
    assert main(["run", "--config", file, "--print-config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "run.toml").read_text("utf-8")
    over = parsed("--config", file, "--nfe", "3k", "--prompts", "c", "--lam", "0.5")
    assert over.limits.nfe == "3k"
    assert over.what.prompts == ("c",)
    assert over.what.seed == 3
    assert (over.method.num_particles, over.method.lam) == (8, 0.5)
    other = parsed("dts", f"--config={file}")
    assert type(other.method).__name__ == "DiffusionTreeSampling"
    assert other.limits.nfe == "2k"


def test_prompts_that_are_typed_stand_alone(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("c\nd\n")
    listed = saved(tmp_path, "prompts = ['a', 'b']")
    assert parsed("--config", listed).what.asked() == ["a", "b"]
    assert parsed("--config", listed, "--prompts-file", str(lines)).what.asked() == ["c", "d"]
    filed = saved(tmp_path, f"prompts_file = {str(lines)!r}")
    assert parsed("--config", filed).what.asked() == ["c", "d"]
    assert parsed("--config", filed, "--prompts", "e").what.asked() == ["e"]
    assert parsed("--config", filed, "--seed", "3").what.asked() == ["c", "d"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kernl = 'mnist'", "did you mean 'kernel'?"),
        ("seed = 'three'", "seed = 'three': expected a whole number"),
        ("seed = true", "seed = True: expected a whole number"),
        ("json = 1", "json = 1: expected true or false"),
        ("prompts = 'a'", "prompts = 'a': expected a list of texts"),
        ("method = 'fkk'", "did you mean 'fk'?"),
        ("[limits]\nnfe = 3", "unknown option 'limits'"),
        ("nfe =", "is no TOML"),
    ],
)
def test_a_file_that_is_no_command_is_wrong_usage(tmp_path, capsys, text, said):
    assert main(["run", "--config", saved(tmp_path, text)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path, capsys):
    assert main(["run", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: No such file" in capsys.readouterr().err
