"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_example_runs(capsys):
    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ts.search(" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    scope: dict = {}
    exec(example, scope)
    assert scope["best"].shape == (8, 1, 28, 28)
    assert scope["draws"].shape == (16, 1, 28, 28)
    assert scope["result"].cost.nfe == 2_000
    assert "log Z" in capsys.readouterr().out


def test_the_planning_example_runs():
    page = (ROOT / "docs" / "planning.md").read_text("utf-8")
    scope: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], scope)
    assert scope["actions"].shape == (8, 2)
    assert scope["planner"].decision.nfe == 160


def test_the_links_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
