"""Kernels in the table of published systems are written as the command line reads them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from treesearch.registry.expressions import SpecError, bound, load
from treesearch.registry.registry import KERNELS, OPERATORS, REWARDS, kernel

PAGE = Path(__file__).parents[2] / "docs" / "systems.md"
WRITTEN = [a or b for a, b in re.findall(r"--kernel (?:'([^']+)'|\"([^\"]+)\")`?", PAGE.read_text("utf-8"))]
THEIRS = ("DIR", "seen.png", "mask.png", "seed.png", "clips.safetensors")  # files that the reader has
NAMES = KERNELS | REWARDS | OPERATORS


def calls(spec):
    return [node for node in ast.walk(ast.parse(re.sub(r"[\w.]+:(\w+)", r"\1", spec))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("spec", WRITTEN)
def test_its_arguments_are_those_of_the_factories(spec):
    known = [call for call in calls(spec) if ast.unparse(call.func) in NAMES]
    assert known
    for call in known:
        bound(load(NAMES[ast.unparse(call.func)]), call)


@pytest.mark.parametrize("spec", [spec for spec in WRITTEN if not any(file in spec for file in THEIRS)])
def test_it_makes_a_kernel_where_it_needs_no_files(spec):
    assert kernel(spec).num_steps > 0


def test_a_command_that_is_wrong_is_found():
    with pytest.raises(SpecError, match="directions"):
        bound(load(NAMES["hspace"]), calls("hspace(mnist(), alphas=(-4, 4))")[0])
