"""The tests, the demo and the exact figures on other processors, as far as this one can stand in: make test-cpus

    vector units    torch's kernels without AVX-512, or without any (ATEN_CPU_CAPABILITY); oneDNN's likewise
    threads         one, two
    load            a busy loop beside every core, as many again as there are

The tests must pass, the demo must end well, and the figures of `experiments.bench.exactness` must be the committed
ones: their chains compute in float64, where only the order of sums may differ. Settings run one after another; what
failed where is said at the end, and its output is kept. What has passed at the same commit is not run again.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from treesearch import host

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "exactness.json"
UNITS = (
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
)
RELATIVE = 1e-9  # sums of some thousand float64
WHAT = ("tests", "demo", "figures")


@dataclass(frozen=True)
class Setting:
    """One way to run: what is set, how many threads, and whether every core is busy."""

    units: dict[str, str]
    threads: int
    busy: bool = False

    @property
    def name(self) -> str:
        parts = [f"{key}={value}" for key, value in self.units.items()]
        return ", ".join([*parts, f"threads={self.threads}", *(["busy cores"] if self.busy else [])])

    @property
    def environment(self) -> dict[str, str]:
        threads = str(self.threads)
        return dict(os.environ) | self.units | {"OMP_NUM_THREADS": threads, "TEST_THREADS": threads}


SETTINGS = [*(Setting(units, threads) for units in UNITS for threads in (1, 2)), Setting({}, 1, busy=True)]


@dataclass(frozen=True)
class Args:
    """Arguments."""

    only: str = ""
    """settings whose name holds this"""
    what: list[str] = field(default_factory=lambda: list(WHAT))
    """tests, demo, figures"""
    tests: list[str] = field(default_factory=list)
    """files of tests; none for all"""
    processes: int = 2
    """test processes side by side"""
    out: Path = Path("runs/cpus")
    """where the output of what failed is kept, and what passed"""


# A busy loop, for as long as the process that started it lives.
SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"


@contextmanager
def busy(number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """That many busy loops meanwhile; they end in every case."""
    loops = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(number)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(command: list[str], setting: Setting) -> subprocess.CompletedProcess[str]:
    """A Python command under a setting."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=setting.environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def tests(setting: Setting, args: Args) -> str:
    """What the tests said if they failed, else nothing."""
    spread = ["-n", str(args.processes), "--dist", "loadfile", "--no-loadscope-reorder"] if args.processes > 1 else []
    done = run(["pytest", "-q", "-p", "no:cacheprovider", *spread, *args.tests], setting)
    return done.stdout if done.returncode else ""


def demo(setting: Setting, args: Args) -> str:
    """What the demo said if it failed, else nothing."""
    del args
    with tempfile.TemporaryDirectory() as folder:
        done = run(["treesearch", "compare", "--store", f"{folder}/demo"], setting)
    return done.stdout if done.returncode else ""


def figures(setting: Setting, args: Args) -> str:
    """Which exact figures are not the committed ones."""
    del args
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exactness.json"
        done = run(["experiments.bench.exactness", "--out", str(out)], setting)
        if done.returncode:
            return done.stdout
        found, shipped = (json.loads(path.read_text("utf-8")) for path in (out, RESULTS))
    return "\n".join(differences(found, shipped))


def differences(found: Any, want: Any, where: str = "") -> list[str]:
    """What two JSON values do not share, numbers up to rounding."""
    if isinstance(found, dict) and isinstance(want, dict):
        if found.keys() != want.keys():
            return [f"{where}: {sorted(found.keys() ^ want.keys())} in one of them only"]
        return [line for key in found for line in differences(found[key], want[key], f"{where}/{key}")]
    numbers = isinstance(found, (int, float)) and isinstance(want, (int, float))
    if found == want or (numbers and math.isclose(found, want, rel_tol=RELATIVE, abs_tol=RELATIVE)):
        return []
    return [f"{where}: {found}, committed {want}"]


CHECKS = {"tests": tests, "demo": demo, "figures": figures}


def check(what: str, setting: Setting, args: Args) -> str:
    """One check under one setting."""
    with busy(host.cores() if setting.busy else 0):
        return CHECKS[what](setting, args)


@dataclass(frozen=True)
class Passed:
    """Checks that passed, by commit; none are kept where files differ from it (None)."""

    file: Path
    commit: str | None

    def line(self, words: str) -> str:
        return f"{self.commit} {words}"

    def has(self, words: str) -> bool:
        return self.commit is not None and self.file.exists() and self.line(words) in self.file.read_text().splitlines()

    def add(self, words: str) -> None:
        if self.commit is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{self.line(words)}\n")


def commit() -> str | None:
    """The commit that is checked out, None if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    said = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    return None if said.returncode or said.stdout.strip().endswith("-dirty") else said.stdout.strip()


def main() -> int:
    """Run what is asked for under every setting; 1 if anything failed."""
    args, failed = tyro.cli(Args), []
    passed = Passed(args.out / "passed.txt", commit())
    for setting, what in [(s, w) for s in SETTINGS if args.only in s.name for w in args.what]:
        name, words = f"{what:<8} {setting.name:<45}", " ".join([what, setting.name, *args.tests])
        if passed.has(words):
            print(f"passed  {name} at this commit", flush=True)
            continue
        print(f"...     {name}", flush=True)
        began, said = time.monotonic(), check(what, setting, args)
        print(f"{'FAILED' if said else 'ok':<7} {name} {time.monotonic() - began:.0f} s", flush=True)
        if said:
            failed.append(f"{what} under {setting.name}: {kept(said, setting, args.out / f'{what}-{len(failed)}.txt')}")
        else:
            passed.add(words)
    print("\n".join(failed) if failed else "everything holds under every setting")
    return int(bool(failed))


def kept(said: str, setting: Setting, path: Path) -> Path:
    """Where what a check said is now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{setting.name}\n\n{said}", "utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
