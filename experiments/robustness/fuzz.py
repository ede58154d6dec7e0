"""Run folders, damaged and forged: 10,000 of them are looked at and resumed, and each must end well.

`experiments/robustness/fuzz_mutations.py` has what is done to them, `experiments/robustness/fuzz_judge.py` what they
come to. A traceback, a signal, a hang, more memory than allowed, a number that is silently another, a look that
changes the folder, a file written elsewhere or a neighbour that is not listed any more is a fault. Processes share the
cases; each case depends on (seed, number) alone: `--seed S --first K --n 1` repeats case K.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments.robustness.fuzz_judge import Base, case, make_bases, planned
from treesearch import host

BATCH, SECONDS, ROOM = (
    100,
    60,
    3 * 2**30,
)  # cases of a process; seconds of a case; bytes beyond what a process begins with


@dataclass(frozen=True)
class Fuzz:
    """What to run."""

    n: int = 10_000
    """cases"""
    seed: int = 0
    """of the cases"""
    first: int = 0
    """number of the first case"""
    processes: int = field(default_factory=host.cores)
    """that share the cases"""
    every: float = 5.0
    """seconds between lines of progress"""


@dataclass
class Child:
    """A process with the cases first..stop - 1, and how many of them it has told."""

    process: Any
    told: Any  # the end of a pipe
    slot: int
    first: int
    stop: int
    done: int = 0


@dataclass
class Tally:
    """What came out so far."""

    args: Fuzz
    counts: Counter[str] = field(default_factory=Counter)
    faults: int = 0
    memory: int = 0
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)

    def enter(self, number: int, outcome: str, more: str, memory: int = 0) -> None:
        """Count a case; a fault is told at once."""
        self.counts[outcome] += 1
        self.memory = max(self.memory, memory)
        if outcome.startswith("FAULT"):
            self.faults += 1
            _, name, mutation = planned(self.args.seed, number)
            self._print(f"case {number} of seed {self.args.seed} ({name}, {mutation.__name__}): {outcome} {more}")
        elif time.monotonic() - self.said > self.args.every:
            self.said = time.monotonic()
            self._print(str(self), passing=True)

    def _print(self, line: str, *, passing: bool = False) -> None:
        """A line; on a terminal, one of progress gives way to the next."""
        alive = sys.stdout.isatty()
        print(("\r\x1b[K" if alive else "") + line, end="" if alive and passing else "\n", flush=True)

    def finish(self) -> None:
        """The last line."""
        self._print(f"{self}; at most {self.memory >> 20} MiB in a process")

    def __str__(self) -> str:
        counts = Counter({("FAULTS" if k.startswith("FAULT") else k): 0 for k in self.counts})
        for outcome, count in self.counts.items():
            counts["FAULTS" if outcome.startswith("FAULT") else outcome] += count
        found = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        took = int(time.monotonic() - self.began)
        return f"{self.counts.total()} of {self.args.n} cases in {took // 60}:{took % 60:02d}: {found}"


def main(args: Fuzz) -> int:
    """Run the cases; 1 if any is a fault."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_STATE_HOME"] = str(Path(scratch) / "state")  # a key of its own
        bases, tally = make_bases(Path(scratch)), Tally(args)
        run(Path(scratch), bases, args, tally)
        tally.finish()
    return 1 if tally.faults else 0


def run(scratch: Path, bases: dict[str, Base], args: Fuzz, tally: Tally) -> None:
    """Deal batches to processes; where one dies, its case is a fault, and another goes on behind it."""
    size = min(BATCH, -(-args.n // args.processes))
    left = [(at, min(at + size, args.first + args.n)) for at in range(args.first, args.first + args.n, size)][::-1]
    slots, alive = list(range(args.processes)), []
    while left or alive:
        while left and slots:
            alive.append(_start(scratch, bases, args.seed, slots.pop(), *left.pop()))
        for child in _heard(alive, tally):
            alive.remove(child)
            slots.append(child.slot)
            if (at := child.first + child.done) < child.stop:
                code = child.process.exitcode
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                tally.enter(at, "FAULT: hung" if name == "SIGALRM" else f"FAULT: died of {name}", "")
                left.append((at + 1, child.stop))
                if at + 1 == child.stop:
                    left.pop()


def _start(scratch: Path, bases: dict[str, Base], seed: int, slot: int, first: int, stop: int) -> Child:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=work, args=(theirs, scratch / f"room-{slot}", bases, seed, first, stop), daemon=True
    )
    process.start()
    theirs.close()
    return Child(process, ours, slot, first, stop)


def _heard(alive: list[Child], tally: Tally) -> Iterator[Child]:
    """Enter what processes tell; those that have ended."""
    for told in wait([child.told for child in alive]):
        child = next(c for c in alive if c.told is told)
        try:
            tally.enter(*child.told.recv())
            child.done += 1
        except EOFError:
            child.told.close()
            child.process.join()
            yield child


def work(told: Any, room: Path, bases: dict[str, Base], seed: int, first: int, stop: int) -> None:
    """Cases first..stop - 1 within bounds of memory and time."""
    limit_memory()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in range(first, stop):
        signal.alarm(SECONDS)
        outcome, more = case(room, bases, seed, number)
        signal.alarm(0)
        told.send((number, outcome, more, host.resident() or 0))


def limit_memory() -> None:
    """No more address space than this process begins with, and some room."""
    used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Fuzz)))
