"""A reward, a kernel, a guide and a method are one file and one line of registration each: tried on a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "rewards/mine.py": '''
"""A reward of somebody else's."""

from treesearch.rewards.base import Reward, as_reward


def my_reward(scale: float = 1.0) -> Reward:
    """The sum of a state's numbers.

    Args:
        scale: factor.
    """
    return as_reward(lambda samples: scale * samples.flatten(1).sum(1), name="my_reward")
''',
    "backends/exact/mine.py": '''
"""A kernel of somebody else's: every step halves the state and adds noise."""

import torch

from treesearch.backends.base import Gaussian


class MyKernel:
    """A chain in one dimension.

    Args:
        num_steps: T.
    """

    state_shape = (1,)

    def __init__(self, num_steps: int = 4) -> None:
        self.num_steps = num_steps

    def prior(self, noise, cond=None):
        return noise

    def transition(self, x, t, cond=None):
        return Gaussian(0.5 * x, torch.ones_like(x), endpoint=0.5 * x)

    def decode(self, x0):
        return x0
''',
    "backends/guidance/mine.py": '''
"""A guide of somebody else's: it pushes every step up."""

from treesearch.backends.base import Guided, shift_mean


def my_guide(kernel, reward, push: float = 0.1):
    """Steps that are shifted.

    Args:
        kernel: what is guided.
        reward: by which reward; its scale alone counts here.
        push: standard deviations of a step.
    """
    return Guided(kernel, shift_mean(lambda x, t, base, cond: push * base.std), "my_guide")
''',
    "treesearch/methods/mine.py": '''
"""A method of somebody else's: plain rollouts, of which the best is kept."""

from dataclasses import dataclass

from treesearch.citations import Paper
from treesearch.methods.base import Greedy, Readout, Unit
from treesearch.methods.best_of_n import Rollouts


@dataclass(frozen=True, kw_only=True)
class MyMethod(Greedy):
    """Plain rollouts.

    Args:
        n: how many; None for as many as the budget allows.
    """

    name = "my_method"
    papers = (Paper("article", "me2026mine", "Plain Rollouts", "Me", "Journal of Mine", 2026),)

    n: int | None = None

    def unit(self, spec):
        return Unit.rollout(spec)

    def start(self, problem):
        return MySearch(problem, self.n, self.lam)


class MySearch(Rollouts):
    """Rollouts, all alike."""

    def readout(self):
        return Readout.greedy(self.told)
''',
}
LINES = {  # a line and what is registered behind it
    "rewards/__init__.py": ("REWARDS = {", '    "my_reward": ("mine:my_reward", "my_reward()"),'),
    "backends/__init__.py": (
        "KERNELS = {",
        '    "my_kernel": ("exact.mine:MyKernel", "my_kernel()"),',
        '    "my_guide": ("guidance.mine:my_guide", "my_guide(my_kernel(), my_reward())"),',
    ),
    "treesearch/methods/__init__.py": (
        "from treesearch.methods.base import",
        "from treesearch.methods.mine import MyMethod as MyMethod",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The three packages with one of each added."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "treesearch", root / "treesearch", ignore=shutil.ignore_patterns("backends", "rewards"))
    for name in ("backends", "rewards"):
        shutil.copytree(ROOT / name, root / "treesearch" / name, ignore=shutil.ignore_patterns("weights"))
    for file, text in FILES.items():
        place(root, file).write_text(text.lstrip(), "utf-8")
    for file, (anchor, *lines) in LINES.items():
        place(root, file).write_text(registered(place(root, file).read_text("utf-8"), anchor, lines), "utf-8")
    return root


def place(root, file):
    return root / file if file.startswith("treesearch/") else root / "treesearch" / file


def registered(text, anchor, lines):
    """The text with lines behind the one that begins with the anchor."""
    rows = text.split("\n")
    (at,) = [i for i, row in enumerate(rows) if row.startswith(anchor)]
    return "\n".join([*rows[: at + 1], *lines, *rows[at + 1 :]])


CODE = """
import sys
from treesearch.cli.main import main
import treesearch as ts
print(ts.MyMethod(n=3))
for line in sys.stdin.read().splitlines():
    print(main(line.split("|")))
"""


def test_one_file_and_one_line_make_a_reward_a_kernel_a_guide_and_a_method(copy, tmp_path):
    commands = (
        "run|my_method|--kernel|my_guide(my_kernel(), my_reward())|--reward|my_reward()|--nfe|100|--store|run",
        "cite|run",
        "list",
        "list|my_guide",
        "list|my_method",
    )
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(copy),
        "NUMBA_DISABLE_JIT": "1",
        "OMP_NUM_THREADS": "1",
    }
    found = subprocess.run(
        [sys.executable, "-P", "-c", CODE],
        cwd=tmp_path,
        env=env,
        input="\n".join(commands),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    out = found.stdout
    assert found.returncode == 0, found.stderr
    assert out.split("\n").count("0") == len(commands), out + found.stderr
    assert "MyMethod(n=3)" in out
    assert "@article{me2026mine," in out
    for what, name in (("kernels", "my_guide"), ("rewards", "my_reward"), ("methods", "my_method")):
        assert any(row.startswith(what) and name in row for row in out.split("\n")), (what, out)
    assert "standard deviations of a step" in out
    assert "how many; None" in out
