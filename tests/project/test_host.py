"""Memory and cores by what limits the process, and populations that are sized by it and never by what is free."""

import ast
import mmap
import os
import sys
from pathlib import Path

import pytest

import treesearch as ts
from treesearch import host
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli import show
from treesearch.methods import population
from treesearch.methods.base import MEMORY

ROOT = Path(__file__).parents[2]
MB, GB = 2**20, 2**30
HUGE = 2**63 - 4096  # version 1 for "no limit"
TABLE = "31 23 0:28 / {root}/{at} rw,relatime - {kind} {kind} rw,{with_}\n"
V2 = TABLE.replace("{kind}", "cgroup2").replace("{at}", "").replace("{with_}", "nsdelegate")
V1 = TABLE.replace("{kind}", "cgroup")

# What a process reads of its groups: its `cgroup`, `mountinfo`, the files; bytes and cores that they allow.
GROUPS = {
    "nothing": ("", "", {}, None, None),
    "none mounted": (None, None, {}, None, None),
    "2": ("0::/", V2, {"memory.max": 3 * GB, "cpu.max": "200000 100000"}, 3 * GB, 2),
    "2, no limit": ("0::/", V2, {"memory.max": "max", "cpu.max": "max 100000"}, None, None),
    "2, a part of a core": ("0::/", V2, {"cpu.max": "50000 100000"}, None, 1),
    "2, soft limit": ("0::/", V2, {"memory.max": 3 * GB, "memory.high": 2 * GB}, 2 * GB, None),
    "2, its own is tighter": (
        "0::/slice/job",
        V2,
        {"slice/memory.max": 4 * GB, "slice/job/memory.max": 3 * GB, "slice/job/cpu.max": "150000 100000"},
        3 * GB,
        2,
    ),
    "2, the one above is tighter": (
        "0::/slice/job/step",
        V2,
        {"slice/memory.max": GB, "slice/job/memory.max": 3 * GB, "slice/job/step/memory.max": "max"},
        GB,
        None,
    ),
    "2, seen from a container": ("0::/../../pod/one", V2, {"memory.max": GB}, GB, None),
    "2, without mountinfo": ("0::/pod", None, {"memory.max": 2 * GB, "pod/memory.max": GB}, GB, None),
    "1": (
        "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/other",
        V1.format(root="{root}", at="memory", with_="memory") + V1.format(root="{root}", at="cpu", with_="cpu,cpuacct"),
        {
            "memory/memory.limit_in_bytes": HUGE,
            "memory/job/memory.limit_in_bytes": GB,
            "cpu/job/cpu.cfs_quota_us": 300_000,
            "cpu/job/cpu.cfs_period_us": 100_000,
        },
        GB,
        3,
    ),
    "1, no quota": (
        "5:cpu:/\n4:memory:/",
        V1.format(root="{root}", at="cpu", with_="cpu"),
        {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100_000},
        None,
        None,
    ),
    "1, the host's path inside a container": (
        "4:memory:/docker/0123",
        V1.format(root="{root}", at="memory", with_="memory").replace(" / ", " /docker/0123 "),
        {"memory/memory.limit_in_bytes": 2 * GB},
        2 * GB,
        None,
    ),
    "1, mounted elsewhere": (
        "4:memory:/a",
        V1.format(root="{root}", at="elsewhere", with_="memory"),
        {"elsewhere/a/memory.limit_in_bytes": 2 * GB},
        2 * GB,
        None,
    ),
    "both": (
        "4:memory:/a\n0::/a",
        V1.format(root="{root}", at="memory", with_="memory") + V2,
        {"memory/a/memory.limit_in_bytes": 2 * GB, "a/cpu.max": "100000 100000"},
        2 * GB,
        1,
    ),
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 64 GB and 16 cores without limits."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "groups").mkdir()
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "_installed", lambda: 64 * GB)
    monkeypatch.setattr(host, "_affinity", lambda: 16)
    monkeypatch.setattr(host, "_resource", lambda: None)
    return tmp_path


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_control_groups(machine, name):
    groups, mounts, files, memory, cores = GROUPS[name]
    for file, text in (("cgroup", groups), ("mountinfo", mounts)):
        if text is not None:
            (machine / "proc" / file).write_text(text.format(root=machine / "groups"))
    for file, text in files.items():
        path = machine / "groups" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert host.memory() == (memory or 64 * GB)
    assert host.cores() == (cores or 16)


class Limits:
    """The module `resource` with limits of our own."""

    RLIM_INFINITY, RLIMIT_AS, RLIMIT_DATA = -1, "as", "data"

    def __init__(self, **limits):
        self.limits = limits

    def getrlimit(self, which):
        return self.limits.get(which, -1), -1


@pytest.mark.parametrize(
    ("limits", "left"),
    [({}, 64 * GB), ({"as": 3 * GB}, 2 * GB), ({"data": 3 * GB}, 5 * GB // 2), ({"as": GB, "data": 3 * GB}, 1)],
)
def test_what_ulimit_leaves(machine, monkeypatch, limits, left):
    pages = [GB // host.mmap.PAGESIZE, 0, 0, 0, 0, GB // 2 // host.mmap.PAGESIZE, 0]
    (machine / "proc" / "statm").write_text(" ".join(map(str, pages)))
    monkeypatch.setattr(host, "_resource", lambda: Limits(**limits))
    assert host.memory() == left


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_says_something():
    assert host.memory() > 100 * MB
    assert 1 <= host.cores() <= os.cpu_count()
    held = mmap.mmap(-1, 50 * MB)  # given back at once, unlike what an allocator holds
    held.write(bytes(50 * MB))
    before = host.resident()
    held.close()
    assert before - host.resident() > 40 * MB


@pytest.mark.parametrize("gone", [(), ("sysconf",), ("sysconf", "sched_getaffinity")])
def test_where_a_system_tells_nothing(machine, monkeypatch, gone):
    monkeypatch.undo()
    monkeypatch.setattr(host, "PROC", machine / "nowhere")
    monkeypatch.setattr(host, "CGROUPS", machine / "nowhere")
    monkeypatch.setattr(host, "_resource", lambda: None)
    for name in gone:
        monkeypatch.delattr(os, name)
    assert (host.memory() is None) == bool(gone)
    assert host.cores() >= 1
    assert host.resident() is None
    assert population.planned_memory() == MEMORY


# Populations.

SIZED = {"fk": ts.FeynmanKac(), "tree sampling": ts.TreeSampling()}
BED = LinearGaussian(num_steps=5, dim=64)  # 4 KB a particle


def search(method, particles=2048, **options):
    return ts.search(BED, lambda x: x.sum(1), method, budget=ts.Budget(nfe=5 * particles), seed=7, **options)


def sizes(result):
    extra = result.diagnostics
    return extra.get("populations") or extra["waves"]


def allowed(monkeypatch, size):
    monkeypatch.setattr(host, "memory", lambda: size)


@pytest.mark.parametrize("name", SIZED)
def test_what_is_free_has_no_say(monkeypatch, name):
    real, seen = os.sysconf, []
    for free in (2 * MB, 64 * GB):
        say = lambda which, free=free: free // host.mmap.PAGESIZE if which == "SC_AVPHYS_PAGES" else real(which)  # noqa: E731
        monkeypatch.setattr(os, "sysconf", say)
        seen.append(search(SIZED[name]))
    assert sizes(seen[0]) == sizes(seen[1])
    assert seen[0].log_z == seen[1].log_z
    assert not [w for w in seen[0].diagnostics["warnings"] if "memory" in w]


def test_machines_that_allow_enough_agree(monkeypatch):
    for size in (8 * GB, 64 * GB, 1024 * GB, None):
        allowed(monkeypatch, size)
        assert population.planned_memory() == MEMORY
    allowed(monkeypatch, 8 * GB - 1)
    assert population.planned_memory() == MEMORY // 2


@pytest.mark.parametrize("name", SIZED)
def test_memory_makes_populations_smaller_says_so_and_is_recorded(monkeypatch, tmp_path, name):
    """A quarter of 4 MB holds 256 particles of 4 KB; a run goes on with what it began with."""
    allowed(monkeypatch, 4 * MB)
    straight = search(SIZED[name], 2048)
    assert max(sizes(straight)) == 256
    assert sum(sizes(straight)) == 2048
    (warning,) = [w for w in straight.diagnostics["warnings"] if w.startswith("memory: populations of at most 256")]
    store = tmp_path / "run"
    search(SIZED[name], 1024, store=store)
    allowed(monkeypatch, 64 * GB)
    found = ts.resume(store, BED, lambda x: x.sum(1), budget=ts.Budget(nfe=5 * 2048))
    assert max(sizes(found)) == 256
    assert warning.partition("where")[0] in "\n".join(found.diagnostics["warnings"])
    _, read = show.read_result_of(store)
    assert warning.partition("where")[0] in "\n".join(read.diagnostics["warnings"])


def test_tasks_share_the_memory(monkeypatch):
    allowed(monkeypatch, 4 * MB)
    found = search(SIZED["fk"], 1024, prompts=["a", "b"])
    assert {size for task in found.tasks for size in task.diagnostics["populations"]} == {128}


# Every system.

LINUX = {"fdatasync", "pwrite", "pread", "sysconf", "sched_getaffinity", "getloadavg", "fork", "uname", "getuid"}
MODULES = {"fcntl", "resource", "pwd", "grp", "termios"}


@pytest.mark.parametrize("package", ["treesearch", "backends", "rewards"])
def test_what_a_system_may_lack_is_asked_of_one_module(package):
    """Elsewhere such a name is used behind `hasattr(os, name)` only."""
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "os"} & LINUX
        asked = {
            n.args[1].value
            for n in ast.walk(tree)
            if isinstance(n, ast.Call)
            and ast.unparse(n).startswith("hasattr(os,")
            and isinstance(n.args[1], ast.Constant)
        }
        imports = {name.name for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names}
        own = {"host.py", "states.py", "runs.py"}
        assert path.name in own or used <= asked, f"{path}: {used - asked}"
        assert not imports & MODULES, f"{path}: {imports & MODULES}"
