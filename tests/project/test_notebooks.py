"""The notebooks are kept without outputs, and their code runs: here in this process, on a small network of digits."""

import json
from pathlib import Path

import pytest
import torch

from tests.support import examples
from treesearch.backends import mnist  # noqa: F401 - its module is there to be patched

ROOT = Path(__file__).parents[2]
BOOKS = {path.stem: path for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb"))}
FOUND = {  # what a notebook has made at its end
    "compare_methods": (lambda it: (sorted(it["found"].refused), it["entry"].cost.nfe), ([], 600)),
    "first_search": (lambda it: (it["best"].shape, it["draws"].shape), ((8, 1, 28, 28), (8, 1, 28, 28))),
    "own_model_and_reward": (lambda it: bool(it["drawn"][:, 0].mean() > it["plain"].rewards.mean() + 0.3), True),
    "plan_in_a_maze": (lambda it: (it["plans"].shape, it["actions"].shape), ((8, 48, 6), (8, 2))),
}


def cells(path):
    return json.loads(path.read_text("utf-8"))["cells"]


@pytest.mark.parametrize("name", BOOKS)
def test_the_code_of_a_notebook_runs(name, tmp_path, monkeypatch):
    """`right` has mean 0 under the ring, and 0.8 under π at λ = 3: I_1(3)/I_0(3)."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("treesearch.backends.models.mnist.load_network", examples.small_mnist)
    scope = {"__name__": name}
    with torch.random.fork_rng():
        for number, cell in enumerate(cells(BOOKS[name])):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{BOOKS[name]}, cell {number}", "exec"), scope)
    look, expected = FOUND[name]
    assert look(scope) == expected


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_is_short_and_kept_without_outputs(name):
    found = cells(BOOKS[name])
    assert len(found) <= 12
    assert found[0]["source"][0].startswith("# ")
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
    assert f"docs/notebooks/{name}.ipynb" in (ROOT / "mkdocs.yml").read_text("utf-8")
