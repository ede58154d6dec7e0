"""A Ray that `RayWorkers` starts itself: private to the machine, and gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

import treesearch as ts
from tests.support import kernels
from tests.support.beds import BEDS
from tests.support.kernels import noted
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.distributed import cluster

MB = 2**20
Usage = namedtuple("Usage", "total used free")
TESTS = Path(__file__).parents[1]
FK = ts.FeynmanKac
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
import treesearch as ts
from tests.support import kernels
import ray

def read(path):
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""

def family(pid):
    found = {pid}
    while True:
        stats = {int(p.name): read(p / "stat") for p in Path("/proc").iterdir() if p.name.isdigit()}
        parents = {pid: int(stat.rpartition(")")[2].split()[1]) for pid, stat in stats.items() if stat}
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return sorted(found - {pid})
        found |= more

def listening(pids):
    inodes = set()
    for pid in [os.getpid(), *pids]:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(fd)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]

folder, out = sys.argv[1], {}
torch.set_float32_matmul_precision("medium")
kernel, reward = ts.Recipe(kernels.built, {"folder": folder}), ts.Recipe(kernels.judge, {"folder": folder})

def look(snapshot):
    if snapshot.wave:
        return
    out["pids"] = family(os.getpid())
    out["listening"] = listening(out["pids"])
    names = [read(Path(f"/proc/{pid}/cmdline")).partition(chr(0))[0] for pid in out["pids"]]
    out["idle"] = [name for name in names if "IDLE" in name]
    out["cpus"] = ray.cluster_resources()["CPU"]

with ts.RayWorkers(2) as workers:
    while any(a.ready is not None for a in workers.pool.workers):
        workers.pool.greet(timeout=0.1)
    for seed in range(2):
        found = ts.search(kernel, reward, ts.FeynmanKac(num_particles=200), prompts=["a", "b"], workers=workers,
                          budget=ts.Budget(nfe=4000), seed=seed, callbacks=[look], batch_size=16)
    named = ts.search(ts.Recipe("gaussian"), ts.Recipe("linear(1.0)"), ts.BestOfN(n=8), workers=workers)
    out["samples"] = named.samples.flatten().tolist()
    out["built"] = kernels.noted(folder + "/built")
out["rewards"] = [task.rewards.tolist() for task in found.tasks]
out["here"] = os.getpid()
print(json.dumps(out))
"""


def test_a_ray_of_its_own(tmp_path):
    """Recipes are built once on each worker; nothing listens to other machines; no process is left.

    TMPDIR has a name that is too long for sockets, and Ray was imported before.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env["HOME"] = str(tmp_path)  # Ray keeps a token there
    long = tmp_path / ("a-long-name-" * 10)
    long.mkdir()
    env["TMPDIR"] = str(long)
    env["PYTHONPATH"] = str(TESTS.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", script, tmp_path], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert len(out["pids"]) > 3
    assert out["cpus"] == 2
    assert out["idle"] == []
    assert {line.split()[0] for line in noted(tmp_path / "torch")} == {"medium"}
    assert out["listening"]
    local = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert set(out["listening"]) <= local
    end = time.monotonic() + 600
    while left := [pid for pid in out["pids"] if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"processes are left: {left}"
        time.sleep(0.1)
    assert len(out["built"]) == len(set(out["built"])) == 2
    assert str(out["here"]) not in out["built"]
    assert len(noted(tmp_path / "judge")) == 2
    want = ts.search(
        LinearGaussian(num_steps=5), kernels.total, FK(num_particles=200), prompts=["a", "b"], seed=1,
        budget=ts.Budget(nfe=4000),
    )  # fmt: skip
    assert out["rewards"] == [task.rewards.tolist() for task in want.tasks]
    assert out["samples"] == ts.search(BEDS["gaussian"], kernels.total, ts.BestOfN(n=8)).samples.flatten().tolist()


@pytest.mark.parametrize(
    ("memory", "shared", "store"),
    [
        (10_000 * MB, 64 * MB, 3_000 * MB),
        (200 * MB, 64 * MB, cluster.STORE_LEAST),
        (2**40, 64 * MB, cluster.STORE_ON_DISK),
        (2**40, 2**40, int(0.3 * 2**40)),
        (None, 64 * MB, None),
    ],
)
def test_the_object_store_by_what_a_container_allows(monkeypatch, memory, shared, store):
    monkeypatch.setattr(cluster.host, "memory", lambda: memory)
    monkeypatch.setattr(cluster.shutil, "disk_usage", lambda path: Usage(0, 0, shared))
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    assert cluster._store_bytes() == store


@pytest.mark.parametrize(
    ("variables", "ours"),
    [
        ({}, False),
        ({"TMPDIR": "/tmp"}, False),
        ({"TMPDIR": "/tmp/" + "a" * 100}, True),
        ({"TMPDIR": "/tmp/" + "ä" * 20}, True),
        ({"TMPDIR": "/tmp/" + "a" * 100, "RAY_TMPDIR": "/tmp"}, False),
        ({"RAY_TMPDIR": "/tmp/" + "a" * 100}, True),
        ({"RAY_TMPDIR": "/nowhere"}, True),
    ],
)
def test_a_folder_for_sockets(monkeypatch, variables, ours):
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = cluster._socket_folder()
    assert (found is not None) == ours
    if found is not None:
        assert len(found) <= cluster.SOCKET_BYTES
        os.rmdir(found)


def test_no_folder_for_sockets(monkeypatch):
    def refuse(**where):
        raise PermissionError

    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    monkeypatch.setattr(cluster.tempfile, "mkdtemp", refuse)
    with pytest.raises(ts.WorkerError, match="set RAY_TMPDIR"):
        cluster._socket_folder()


def test_rays_private_modules_are_left_alone():
    packages = [TESTS.parent / name for name in ("treesearch", "backends", "rewards", "experiments")]
    files = [path for package in packages for path in package.rglob("*.py")]
    assert [path.name for path in files if "ray._private" in path.read_text("utf-8")] == []
