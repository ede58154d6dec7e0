"""The README's example is short, and its links lead somewhere; `test_examples.py` runs it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_example_is_short():
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ts.search(" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12


def test_the_links_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
