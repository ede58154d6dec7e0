"""What is asked of kernels beyond their methods stands in one place, the docstring of the protocol."""

import ast
import re
from pathlib import Path

from treesearch.backends.base import PASSED_ON, Kernel

ROOT = Path(__file__).parents[2]
ASKS = ("optional", "_by_level", "getattr", "hasattr")
METHODS = {name for name in vars(Kernel) if not name.startswith("_")}


def asked(source):
    """Names asked for in a source: `optional(<any>, "name")`, or getattr and hasattr of what is called a kernel."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", None) not in ASKS or len(node.args) < 2:
            continue
        of, name = ast.unparse(node.args[0]), node.args[1]
        if not isinstance(name, ast.Constant) or name.value.startswith("__"):
            continue
        if node.func.id == "optional" or of.rstrip(")").endswith("kernel"):
            yield name.value


def everywhere():
    """Names that the three packages ask kernels for."""
    files = [path for top in ("treesearch", "backends", "rewards") for path in (ROOT / top).rglob("*.py")]
    texts = [path.read_text("utf-8") for path in files]
    return {name for text in texts if any(f"{ask}(" in text for ask in ASKS) for name in asked(text)}


def documented():
    lines = re.findall(r"^ {4,}(\w+(?:, \w+)*): \S", Kernel.__doc__, re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


def test_every_name_that_is_asked_for_is_documented():
    assert everywhere() - METHODS - documented() == set()
    assert PASSED_ON - METHODS - documented() == set()


def test_every_name_that_is_documented_is_read():
    assert documented() - everywhere() - PASSED_ON == set()


def test_names_are_found_however_they_are_asked_for():
    source = 'optional(self, "a"); getattr(self.kernel, "b", None); hasattr(type(kernel), "c"); getattr(other, "d")'
    assert set(asked(source)) == {"a", "b", "c"}
