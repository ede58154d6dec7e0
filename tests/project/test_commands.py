"""Commands and settings that pages show: each is read as it would be if somebody typed it, and nothing is run."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from treesearch.cli import commands, searches
from treesearch.cli.config import read
from treesearch.registry import expressions
from treesearch.registry import registry as specs

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"```(bash|toml)\n(.*?)```", re.DOTALL)
FOUND = [
    (path.relative_to(ROOT).as_posix(), kind, text)
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    for kind, text in FENCE.findall(path.read_text("utf-8"))
]
LINES = [
    (page, line)
    for page, kind, text in FOUND
    if kind == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip()
]
KNOWN = {**specs.KERNELS, **specs.REWARDS, **specs.OPERATORS}


def read_as_typed(words):
    """Check one command."""
    match words:
        case ["treesearch", *rest]:
            command = commands.parse(rest, None)
            assert not isinstance(command, int), f"exit code {command}"
            for text in (getattr(getattr(command, "what", command), name, None) for name in ("kernel", "reward")):
                assert set(expressions.names_in(text or "mnist")) - {"kernel"} <= KNOWN.keys()
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None
        case ["make", verb, *_]:
            assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        case ["pip", "install", what]:
            extra = re.fullmatch(r"treesearch(?:\[(\w+)\])?", what)
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
            assert extra[1] in extras
        case ["ray", *rest]:
            if "--" in rest:
                read_as_typed(rest[rest.index("--") + 1 :])
        case _:
            raise AssertionError(f"no rule for {words[0]}: write one")


@pytest.mark.parametrize(("page", "line"), LINES)
def test_commands_of_pages_can_be_typed(page, line, capsys):
    read_as_typed(shlex.split(line, comments=True))


@pytest.mark.parametrize("text", [text for _, kind, text in FOUND if kind == "toml"])
def test_settings_of_pages_can_be_read(text, tmp_path):
    (tmp_path / "run.toml").write_text(text, "utf-8")
    assert read(str(tmp_path / "run.toml"), searches.Run()) != searches.Run()


@pytest.mark.parametrize(
    "line",
    [
        "treesearch run fkk",
        "treesearch run fk --num-particle 3",
        'treesearch run --reward "digt(8)"',
        "python -m experiments.nothing",
        "make nothing",
        "pip install 'treesearch[nothing]'",
        "rm -rf x",
    ],
)
def test_what_could_not_be_typed_is_found(line, capsys):
    with pytest.raises((AssertionError, ValueError)):
        read_as_typed(shlex.split(line))
