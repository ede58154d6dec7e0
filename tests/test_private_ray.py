"""A Ray that `RayWorkers` starts itself: private to the machine, and gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import kernels
from conftest import BEDS
from kernels import noted

import treesearch as ts
from backends.gaussian import LinearGaussian

TESTS = Path(__file__).parent
FK = ts.FeynmanKac
SCRIPT = """
import json, os, sys
from pathlib import Path
import treesearch as ts
import kernels

def family(pid):
    found = {pid}
    while True:
        parents = {int(p.name): int((p / "stat").read_text().rpartition(")")[2].split()[1])
                   for p in Path("/proc").iterdir() if p.name.isdigit() and (p / "stat").exists()}
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
kernel, reward = ts.Recipe(kernels.built, {"folder": folder}), ts.Recipe(kernels.judge, {"folder": folder})

def look(snapshot):
    if snapshot.wave:
        return
    out["pids"] = family(os.getpid())
    out["listening"] = listening(out["pids"])

with ts.RayWorkers(2) as workers:
    while any(a.ready is not None for a in workers.pool.workers):
        workers.pool._greet(timeout=0.1)
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
    """Recipes are built once on each worker; nothing listens to other machines; no process is left."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env["HOME"] = str(tmp_path)  # Ray keeps a token there
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "error", script, tmp_path], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert len(out["pids"]) > 3
    assert out["listening"]
    local = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert set(out["listening"]) <= local
    end = time.monotonic() + 10
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
