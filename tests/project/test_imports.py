"""Who may import what, read from the source, and what `import treesearch` loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rewards", "backends", "treesearch")
SOURCES = {p.relative_to(ROOT).as_posix(): p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))}
LIGHT = {"rewards": {"torch"}, "backends": {"torch", "numpy", "diffusers"}}
OURS = {
    "rewards": {"rewards"},
    "backends": {"backends", "rewards.base", "rewards.channels", "rewards.numeric"},
    "treesearch": {
        "treesearch",
        "backends.base",
        "backends.fingerprint",
        "rewards.base",
        "rewards.numeric",
        "rewards.redact",
        "rewards.channels",
        "rewards.potentials",
    },
}
ONLY = {"ray": "treesearch/distributed.py", "networkx": "treesearch/export/"}


def imports(path, *, top_only=False):
    """Modules that a file imports; with `top_only` those it needs to be imported itself."""
    tree, found = ast.parse(path.read_text("utf-8")), set()
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if top_only and node in lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} if "." in node.module else {f"{node.module}.{a.name}" for a in node.names}
    return found


def _is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def third_parties(modules):
    first = {m.split(".")[0] for m in modules}
    return first - set(sys.stdlib_module_names) - set(PACKAGES) - {"__future__"}


@pytest.mark.parametrize("file", SOURCES)
def test_imports_go_one_way(file):
    package = file.split("/")[0]
    for module in imports(SOURCES[file]):
        if module.split(".")[0] in PACKAGES:
            allowed = any(module == ours or module.startswith(ours + ".") for ours in OURS[package])
            assert allowed, f"{file} imports {module}"


@pytest.mark.parametrize("file", [f for f in SOURCES if not f.startswith("treesearch/")])
def test_rewards_and_backends_stay_light(file):
    heavy = third_parties(imports(SOURCES[file], top_only=True)) - LIGHT[file.split("/")[0]]
    assert not heavy, f"{file} imports {heavy} at module level"


@pytest.mark.parametrize("package", ONLY)
def test_ray_and_networkx_have_one_place_each(package):
    for file, path in SOURCES.items():
        if package in third_parties(imports(path)):
            assert file.startswith(ONLY[package]), f"{file} imports {package}"


@pytest.mark.parametrize("file", SOURCES)
def test_nothing_names_the_shared_folder_or_a_place_on_this_machine(file):
    text = SOURCES[file].read_text("utf-8")
    for word in ("../shared", "/work/", "/home/", "/root/", "/Users/"):
        assert word not in text, f"{file} names {word}"


def python(code, cwd):
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    return run.returncode, run.stdout + run.stderr


def test_importing_treesearch_is_light():
    heavy = ("diffusers", "transformers", "ray", "networkx", "matplotlib", "PIL", "rich", "tyro")
    code = f"import sys, treesearch; print([m for m in {heavy!r} if m in sys.modules])"
    assert python(code, ROOT) == (0, "[]\n")


@pytest.mark.parametrize("name", ["rewards", "backends"])
def test_a_user_s_module_that_hides_ours_is_named(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("mine = 1\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import treesearch"
    failed, output = python(code, tmp_path)
    assert failed
    assert "ImportError" in output
    assert str(tmp_path / f"{name}.py") in output
