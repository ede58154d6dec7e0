"""Every experiment script runs, for seconds; those of ten seconds and more of a core behind the slow marker."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.mnist import train_mnist
from experiments.robustness.cpus import Passed, busy


def script(name, *words, code=0):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *words], capture_output=True, text=True, env=environment
    )
    assert job.returncode == code, job.stderr
    return job.stdout


COMMITTED = ("experiments/", "backends/", "rewards/", "treesearch/", "docs/", "tests/")
READ = {("evaluate_trajectory.py", "weights"), ("search.py", "beside")}  # inputs


def committed_defaults():
    """Arguments of scripts whose default lies among the files of the repository."""
    for path in sorted((Path(__file__).parents[2] / "experiments").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        constants = [node for node in tree.body if isinstance(node, ast.Assign)]
        named = {ast.unparse(target): node.value for node in constants for target in node.targets}
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                value = named.get(node.value.id, node.value) if isinstance(node.value, ast.Name) else node.value
                texts = [c.value for c in ast.walk(value) if isinstance(c, ast.Constant)]
                if any(isinstance(text, str) and text.startswith(COMMITTED) for text in texts):
                    yield path.name, node.target.id


def test_no_script_writes_over_committed_files_unless_it_is_told_to():
    assert set(committed_defaults()) == READ


def test_no_script_is_long():
    """One that does more than one job is split by them, as in the packages."""
    files = (Path(__file__).parents[2] / "experiments").rglob("*.py")
    assert not [f.name for f in files if f.read_text("utf-8").count("\n") > 450]


def test_cpus_names_what_failed(tmp_path):
    test = tmp_path / "test_this.py"
    test.write_text("import os\n\ndef test_it():\n    assert os.environ['TEST_THREADS'] == '2'\n")
    words = ["--what", "tests", "--tests", str(test), "--processes", "1", "--out", str(tmp_path / "out")]
    printed = script("robustness.cpus", *words, "--only", "SSE41", code=1).splitlines()
    assert [line.split()[0] for line in printed[:4]] == ["...", "FAILED", "...", "ok"]
    assert "SSE41, threads=1" in (tmp_path / "out" / "tests-0.txt").read_text()


def test_cpus_goes_on_at_the_same_commit(tmp_path):
    file = tmp_path / "out" / "passed.txt"
    for commit in ("a1", "b2", None):
        passed = Passed(file, commit)
        assert not passed.has("tests under this")
        passed.add("tests under this")
        assert passed.has("tests under this") == (commit is not None)
        assert not passed.has("tests under")


def test_busy_loops_are_busy_and_end():
    with suppress(KeyboardInterrupt), busy(2) as loops:
        assert [loop.poll() for loop in loops] == [None, None]
        raise KeyboardInterrupt
    assert [loop.poll() for loop in loops] == [-9, -9]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Noise in the format of the data set."""
    draw = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "mnist.npz"
    arrays = {}
    for part, n in (("train", 256), ("test", 128)):
        arrays[f"{part}_x"] = draw.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}_y"] = draw.integers(0, 10, n)
    np.savez(file, **arrays)
    return file


@pytest.mark.slow
def test_exactness(tmp_path):
    printed = script("bench.exactness", "--replicates", "20", "--out", str(tmp_path / "e.json"))
    assert "boltzmann" in printed
    assert len(json.loads((tmp_path / "e.json").read_text())["cells"]) == 18


def test_declared_values(tmp_path):
    words = ["--rollouts", "8", "--seeds", "1", "--num-steps", "4", "--tolerances", "1.0"]
    assert "| 8 | 1 | tree_sampling | TDS of the value |" in script(
        "bench.values", *words, "--out", str(tmp_path / "v.json")
    )
    assert len(json.loads((tmp_path / "v.json").read_text())["cells"]) == 10


def test_training_resumes(tmp_path, digits):
    args = train_mnist.Args(
        data=digits, out=tmp_path / "run", weights=tmp_path / "w.safetensors", curve=tmp_path / "curve.csv",
        limit=32, batch_size=32, threads=1, epochs=1,
    )  # fmt: skip
    train_mnist.main(args)
    train_mnist.main(replace(args, epochs=2))
    assert args.weights.exists()
    assert [line.split(",")[0] for line in args.curve.read_text().splitlines()] == ["epoch", "1", "2"]


@pytest.mark.slow
def test_bench_of_the_tree(tmp_path):
    script("bench.overhead", "--parts", "c", "--rounds", "1", "--nodes", "100000", "--out", str(tmp_path / "b.json"))
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["c"]["bytes_per_node"] <= 64


@pytest.mark.slow
def test_async_quality_runs(tmp_path):
    out = tmp_path / "a.json"
    script("bench.async_quality", "--quick", "--parts", "exact", "--work", str(tmp_path), "--out", str(out))
    assert json.loads(out.read_text())
