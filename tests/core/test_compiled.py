"""Compiled code is kept where that is possible; where it is not, it is compiled again and nothing else happens."""

import ast
import errno
import importlib.util
from pathlib import Path

import numba
import pytest
from numba.core.caching import IndexDataCacheFile

from treesearch.cli.main import main
from treesearch.core.compiled import kept, kept_in

PACKAGES = Path(__file__).parents[2]
SOURCE = """
from treesearch.core.compiled import compiled

@compiled
def double(x):
    return 2 * x

@compiled(inline="always")
def more(x):
    return double(x) + 1
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's home without anything of numba's in it."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.setenv("LOCALAPPDATA", str(folder))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    return folder


def imported(folder):
    """The functions of SOURCE, imported from a folder as by a new process."""
    folder.mkdir(exist_ok=True)
    path = folder / "compiled_source.py"
    if not path.exists():
        path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("compiled_source", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_a_folder(package, home):
    """Files where folders would have to be: they stop root as well."""
    (package / "__pycache__").write_text("")
    home.rmdir()
    home.write_text("")


def test_kept_beside_the_source_or_for_the_user(tmp_path, home):
    assert kept_in(imported(tmp_path / "here").double) == str(tmp_path / "here" / "__pycache__")
    package = tmp_path / "there"
    package.mkdir()
    (package / "__pycache__").write_text("")
    assert kept_in(imported(package).double).startswith(str(home))


def test_no_place_at_all(tmp_path, home):
    package = tmp_path / "package"
    package.mkdir()
    without_a_folder(package, home)
    module = imported(package)
    assert module.more(20) == 41
    assert kept_in(module.more) is None


def refuse(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["_load_index", "_load_data", "_save_index", "_save_data"])
def test_a_folder_that_fails_later(tmp_path, home, monkeypatch, what):
    """Full, taken away or made unreadable after the import."""
    imported(tmp_path / "package").double(1)
    module = imported(tmp_path / "package")
    monkeypatch.setattr(IndexDataCacheFile, what, refuse)
    assert module.double(21) == 42
    assert module.double(0.25) == 0.5


@pytest.mark.parametrize("cut", [0, 1, 40])
@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
def test_damaged_files_are_made_again(tmp_path, home, kind, cut):
    folder = tmp_path / "package"
    imported(folder).double(1)
    (file,) = folder.glob(f"__pycache__/{kind}")
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    assert imported(folder).double(2) == 4
    after = imported(folder).double
    assert after(3) == 6
    assert after.stats.cache_hits


def test_whether_a_first_call_will_compile(tmp_path, home):
    assert not kept(imported(tmp_path / "package").double)
    imported(tmp_path / "package").double(1)
    assert kept(imported(tmp_path / "package").double)
    (tmp_path / "other").mkdir()
    without_a_folder(tmp_path / "other", home)
    nowhere = imported(tmp_path / "other").double
    assert not kept(nowhere)
    nowhere(1)
    assert kept(nowhere)
    assert kept(lambda x: x)  # as numba leaves a function where it is told to compile nothing


def test_only_one_module_knows_numbas_cache():
    """What is compiled without it dies at its import where there is no folder."""
    for path in [p for name in ("treesearch", "backends", "rewards") for p in (PACKAGES / name).rglob("*.py")]:
        nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        names = {name.name for node in nodes if node.module == "numba" for name in node.names}
        assert path.name == "compiled.py" or not names & {"njit", "jit", "vectorize", "guvectorize"}, path


def test_env_says_where(capsys, monkeypatch):
    assert main(["env"]) == 0
    assert "compiled code: kept in " in capsys.readouterr().out
    monkeypatch.setattr("treesearch.cli.about.kept_in", lambda function: None)
    assert main(["env"]) == 0
    assert "compiled code: compiled in every process" in capsys.readouterr().out
