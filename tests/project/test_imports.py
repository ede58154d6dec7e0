"""The house's laws, read from the source: who may import whom, who may know Ray, networkx and the disk, how long a file
may be; and what `import treesearch` loads."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import treesearch
from treesearch.backends import base

ROOT = Path(__file__).parents[2]
REWARDS, BACKENDS = "treesearch.rewards", "treesearch.backends"

# A room is a folder, or a file beside folders. What a room may import of the others; its own files it may always.
LEAVES = {"budget", "errors", "host", "interrupts", "citations", "text", "version"}
REWARD = {f"{REWARDS}.base", f"{REWARDS}.values"}  # what scores, and what goes in and comes out
FACTORY = REWARD | {f"{REWARDS}.facts"}
BASES = {f"{BACKENDS}.base"} | REWARD
CHANNELS = f"{REWARDS}.channels"
COSINES = f"{REWARDS}.cosines"
HEADED = f"{REWARDS}.headed"
LOADING = f"{REWARDS}.loading"
EVERYWHERE = f"{REWARDS}.numeric"  # what a number is
ROOMS = {
    EVERYWHERE: set(),
    f"{REWARDS}.lending": set(),
    f"{REWARDS}.redact": set(),
    CHANNELS: set(),
    f"{REWARDS}.potentials": set(),
    f"{REWARDS}.plain": set(),
    f"{REWARDS}.values": set(),
    f"{REWARDS}.algebra": {f"{REWARDS}.values"},
    f"{REWARDS}.base": {f"{REWARDS}.{name}" for name in ("algebra", "lending", "plain", "values")},
    f"{REWARDS}.facts": {f"{REWARDS}.base", f"{REWARDS}.redact"},
    f"{REWARDS}.analytic": FACTORY,
    f"{REWARDS}.compose": REWARD,
    COSINES: set(),
    f"{REWARDS}.files": set(),
    f"{REWARDS}.observation": REWARD | {COSINES, f"{REWARDS}.files"},
    f"{REWARDS}.outlines": set(),
    HEADED: set(),
    LOADING: set(),
    f"{REWARDS}.images": FACTORY | {HEADED, LOADING, f"{REWARDS}.files"},
    f"{REWARDS}.text": FACTORY | {LOADING},
    f"{REWARDS}.trajectories": FACTORY | {CHANNELS},
    f"{REWARDS}.remote": FACTORY | {f"{REWARDS}.{name}" for name in ("redact", "images")},
    REWARDS: {
        f"{REWARDS}.{name}" for name in ("base", "channels", "compose", "images", "remote", "text", "trajectories")
    },
    f"{BACKENDS}.base": REWARD | {f"{REWARDS}.files"},
    f"{BACKENDS}.chains": {f"{BACKENDS}.base"},
    f"{BACKENDS}.diagnostics": {f"{BACKENDS}.base"},
    f"{BACKENDS}.exact": {f"{BACKENDS}.base", f"{BACKENDS}.chains", CHANNELS},
    f"{BACKENDS}.lerobot": {f"{BACKENDS}.{name}" for name in ("base", "chains", "models")},
    f"{BACKENDS}.models": {f"{BACKENDS}.base", f"{BACKENDS}.chains", CHANNELS, COSINES},
    f"{BACKENDS}.pipelines": {f"{BACKENDS}.base", f"{BACKENDS}.chains"},
    f"{BACKENDS}.text": {f"{BACKENDS}.base", f"{BACKENDS}.models", LOADING, f"{REWARDS}.text"},
    f"{BACKENDS}.training": {f"{BACKENDS}.base", f"{BACKENDS}.chains"},
    f"{BACKENDS}.wrappers": {f"{BACKENDS}.base", f"{BACKENDS}.chains", f"{REWARDS}.files"} | REWARD,
    f"{BACKENDS}.guidance": {
        f"{BACKENDS}.{name}" for name in ("base", "chains", "interventions", "models", "roots", "wrappers")
    }
    | REWARD
    | {f"{REWARDS}.{name}" for name in ("algebra", "files", "observation", "outlines")}
    | {HEADED},
    f"{BACKENDS}.interventions": {f"{BACKENDS}.{name}" for name in ("base", "chains", "models", "wrappers")}
    | REWARD
    | {f"{REWARDS}.files"},
    f"{BACKENDS}.roots": {f"{BACKENDS}.{name}" for name in ("base", "chains", "interventions", "wrappers")}
    | REWARD
    | {f"{REWARDS}.files"},
    BACKENDS: set(),
    **{leaf: set() for leaf in LEAVES | {"_names"}},
    "core": {"errors"},
    "engine": {"core", "budget", "errors", f"{BACKENDS}.chains"} | BASES,
    "runs": {"core", "engine", "budget", "errors", "host", "text", f"{BACKENDS}.base"},
    "methods": {"core", "engine", "budget", "citations", "errors", "host", f"{REWARDS}.potentials"} | BASES,
    "pictures": {"runs", "text"},
    "results": {"core", "methods", "pictures", "runs", "budget", "errors", "text", f"{REWARDS}.base"},
    "registry": {"methods", "errors", "text", f"{REWARDS}.base", f"{REWARDS}.redact", REWARDS, BACKENDS},
    "session": {"core", "engine", "methods", "results", "runs", "budget", "errors", "interrupts", "version"} | BASES,
    "distributed": {"core", "engine", "registry", "budget", "errors", "host", "interrupts"} | BASES,
    "api": {"session", "methods", "registry", "report", "results", "runs", "budget", "errors"} | BASES,
    "report": {"text", "core", "pictures", "results", "runs", "session", "budget", "errors", f"{REWARDS}.images"},
    "comparing": {"text", "api", "methods", "registry", "report", "results", "runs", "session", "budget", "errors"}
    | BASES,
    "diagnosis": {
        "api",
        "core",
        "engine",
        "methods",
        "registry",
        "report",
        "runs",
        "session",
        "budget",
        "errors",
        "text",
    }
    | {f"{BACKENDS}.diagnostics"}
    | BASES,
    "harness": {"api", "methods", "budget"} | BASES,
    "planning": {"api", "core", "engine", "methods", "results", "budget", "errors"} | BASES,
    "policies": {"errors"} | {CHANNELS} | BASES,
    "offline": {CHANNELS},
    "loggers": {"report", "results", "session", "errors", "text"},
    "page": {"core", "engine", "pictures", "report", "results", "runs", "session", "errors"},
    "export": {"core", "pictures", "report", "results", "runs", "budget", "errors", "text", CHANNELS},
    "testing": {"api", "core", "methods", "results", "runs", "budget", "errors"} | BASES,
}
INNER = set(ROOMS)
ROOMS["treesearch"] = INNER - {"report", "export", "page", "testing", REWARDS, BACKENDS}
ROOMS["cli"] = INNER | {"treesearch"}
ROOMS["__main__"] = {"cli"}
LIGHT = {"rewards": {"torch"}, "backends": {"torch", "numpy", "diffusers"}}
ONLY = {"ray": "treesearch/distributed/", "networkx": "treesearch/export/"}
LONGEST = 450


def sources():
    """Module by its file; `backends` and `rewards` stand in `treesearch` by the links of a checkout."""
    for top in ("treesearch", "backends", "rewards"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in (("treesearch", "backends"), ("treesearch", "rewards")):
                continue
            name = ".".join(parts if top == "treesearch" else ("treesearch", *parts))
            yield path.relative_to(ROOT).as_posix(), name.removesuffix(".__init__"), path


SOURCES = {file: (name, path) for file, name, path in sources()}
MODULES = {name for name, _ in SOURCES.values()}


def room_of(module):
    parts = module.split(".")
    if parts == ["treesearch"]:
        return "treesearch"
    return ".".join(parts[:3]) if parts[1] in ("backends", "rewards") else parts[1]


@cache
def imports(path, *, top_only=False):
    """Modules that a file imports; with `top_only` those it needs to be imported itself."""
    found = set()
    for node in _statements(path, top_only=top_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = {f"{node.module}.{a.name}" for a in node.names}
            found |= (whole & MODULES) | ({node.module} if whole - MODULES else set())
    return found


@cache
def _parsed(path):
    return ast.parse(path.read_text("utf-8"))


def _statements(path, *, top_only):
    """The nodes of a file, without those that run later, in functions and for type checkers alone."""
    nodes = [_parsed(path)]
    while nodes:
        node = nodes.pop()
        yield node
        later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node)
        nodes += () if top_only and later else ast.iter_child_nodes(node)


def _is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def third_parties(modules):
    first = {m.split(".")[0] for m in modules}
    return first - set(sys.stdlib_module_names) - {"treesearch", "__future__"}


@pytest.mark.parametrize("file", SOURCES)
def test_a_room_imports_what_its_law_allows(file):
    name, path = SOURCES[file]
    room = room_of(name)
    for module in imports(path):
        first = module.split(".")[0]
        assert first not in ("backends", "rewards", "experiments", "tests"), f"{file} imports {module}"
        if first == "treesearch" and (other := room_of(module)) != room:
            assert other in ROOMS[room] | {EVERYWHERE}, (
                f"{file} imports {module}: {room} may import {sorted(ROOMS[room])}"
            )


def test_no_room_is_unknown_and_imports_run_one_way():
    assert {room_of(name) for name, _ in SOURCES.values()} == set(ROOMS)
    TopologicalSorter({room: others - {room} for room, others in ROOMS.items()}).prepare()  # CycleError names a circle


@pytest.mark.parametrize("folder", sorted({path.parent for _, path in SOURCES.values()}))
def test_a_folder_says_its_law(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))), (
        f"{folder}/__init__.py has no words"
    )


@pytest.mark.parametrize("file", SOURCES)
def test_no_file_is_long(file):
    lines = SOURCES[file][1].read_text("utf-8").count("\n")
    assert lines <= LONGEST, f"{file} has {lines} lines, at most {LONGEST}: it does more than one job"


@pytest.mark.parametrize("file", [f for f in SOURCES if not f.startswith("treesearch/")])
def test_rewards_and_backends_stay_light(file):
    heavy = third_parties(imports(SOURCES[file][1], top_only=True)) - LIGHT[file.split("/")[0]]
    assert not heavy, f"{file} imports {heavy} at module level"


@pytest.mark.parametrize("package", ONLY)
def test_ray_and_networkx_have_one_place_each(package):
    for file, (_, path) in SOURCES.items():
        if package in third_parties(imports(path)):
            assert file.startswith(ONLY[package]), f"{file} imports {package}"


@pytest.mark.parametrize("file", SOURCES)
def test_nothing_names_the_shared_folder_or_a_place_on_this_machine(file):
    text = SOURCES[file][1].read_text("utf-8")
    for word in ("../shared", "/work/", "/home/", "/root/", "/Users/"):
        assert word not in text, f"{file} names {word}"


def python(code, cwd):
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    return run.returncode, run.stdout + run.stderr


def test_importing_treesearch_is_light():
    heavy = (
        "torch",
        "numpy",
        "numba",
        "diffusers",
        "transformers",
        "ray",
        "networkx",
        "matplotlib",
        "PIL",
        "rich",
        "tyro",
    )
    code = f"import sys, treesearch; print([m for m in {heavy!r} if m in sys.modules])"
    assert python(code, ROOT) == (0, "[]\n")


def test_without_ray_only_workers_are_missing():
    code = (
        "import sys; sys.modules['ray'] = None; import treesearch as ts; "
        "from treesearch.backends.exact.gaussian import LinearGaussian; "
        "print(len(ts.search(LinearGaussian(), lambda x: x.sum(1), ts.BestOfN(n=2)).rewards)); ts.RayWorkers"
    )
    failed, output = python(code, ROOT)
    assert failed
    assert output.startswith("2\n")
    assert output.endswith("ImportError: this needs Ray: pip install 'treesearch[ray]'\n")


@pytest.mark.parametrize(("package", "folders"), [(treesearch, {"loggers"}), (base, set())])
def test_every_public_name_is_found_where_a_type_checker_sees_it(package, folders):
    seen = {
        alias.name: node.module
        for node in ast.walk(ast.parse(Path(package.__file__).read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("treesearch.")
        for alias in node.names
    }
    assert set(seen) | folders == set(package.__all__)
    for name, home in seen.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = package.serach


@pytest.mark.parametrize("name", ["rewards", "backends"])
def test_a_folder_has_one_name(name):
    assert importlib.util.find_spec(f"treesearch.{name}")
    failed, output = python(f"import {name}", ROOT)
    assert failed
    assert f"ImportError: import treesearch.{name}" in output


@pytest.mark.parametrize("name", ["rewards", "backends"])
def test_a_package_called_like_a_folder_of_ours_does_no_harm(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("mine = 1\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import treesearch, {name}; print({name}.mine)"
    )
    assert python(code, tmp_path) == (0, "1\n")
