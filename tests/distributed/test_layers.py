"""The folder's own order: each file imports from those below it, and what needs no Ray is there without it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import treesearch.distributed

FOLDER = Path(treesearch.distributed.__file__).parent
LAYERS = [
    {"settings", "bundles", "raised", "process", "leases"},
    {"station", "bundling", "sharing", "stats", "cluster", "scorer"},
    {"worker"},
    {"pool"},
    {"stand_ins", "rewards", "landing", "loads"},
    {"lending"},
    {"engine"},
    {"workers"},
]
WITHOUT_RAY = ("bundles", "bundling", "sharing", "station", "settings", "stats")


def within(name):
    """The folder's modules that one of them imports."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    ours = {n.module.rpartition(".")[2] for n in found if n.module.startswith("treesearch.distributed.")}
    return ours | {a.name for n in found if n.module == "treesearch.distributed" for a in n.names}


def test_every_file_has_a_layer():
    assert sorted(set().union(*LAYERS)) == sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("at", range(len(LAYERS)))
def test_imports_run_down(at):
    below = set().union(*LAYERS[:at])
    for name in LAYERS[at]:
        assert within(name) <= below, f"{name} imports {sorted(within(name) - below)}"


def test_what_decides_and_what_travels_needs_no_ray():
    modules = ", ".join(f"treesearch.distributed.{name}" for name in WITHOUT_RAY)
    code = f"import sys, {modules}; from treesearch.distributed import WorkerError; print('ray' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert run.stdout == "False\n"
