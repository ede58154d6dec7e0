"""Run folders, damaged and forged: 10,000 of them are looked at and resumed, and each must end well.

    natural   bits flipped, files cut, stretches zeroed, shards missing, short or of another run, blocks lost or moved
    forged    records and run.json with hostile values under valid checksums, deep nesting, large numbers, links

A folder ends well if it is resumed to what the run would have been, if it is refused with a StoreError (or another
error of this library), or, where only a forger knows the truth, if it is resumed to anything. A traceback, a signal, a
hang, more memory than allowed, a sample whose reward is not the recorded one, or a look that changes the folder is a
fault. Cases are numbered: `--seed S --first K --n 1` repeats case K.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

import treesearch as ts
from backends.gaussian import LinearGaussian
from rewards.analytic import linear
from treesearch import runs
from treesearch.session import read_result

KERNEL, REWARD, NFE, SEED = LinearGaussian(num_steps=6, dim=3), linear(0.7), 360, 3
METHODS: dict[str, Any] = {
    "best_of_n": ts.BestOfN(),
    "fk": ts.FeynmanKac(num_particles=8),
    "dts": ts.DiffusionTreeSampling(wave=8, widening_c=1, widening_alpha=0.5),
    "tree_sampling": ts.TreeSampling(),
    "tree_search": ts.TreeSearch(wave=8),
    "beam": ts.BeamSearch(),
    "noise": ts.NoiseSearch(),
    "tasks": ts.DiffusionTreeSearch(wave=4, lag=1),
}
BATCH, SECONDS, ROOM = 40, 30, 3 * 2**30
Mutation = Callable[[random.Random, Path, Path], None]


@dataclass(frozen=True)
class Fuzz:
    """What to run."""

    n: int = 10_000
    """cases"""
    seed: int = 0
    """of the cases"""
    first: int = 0
    """number of the first case"""
    show: Annotated[int, tyro.conf.arg(help="faults told in full")] = 20


def block(data: bytes, at: int) -> tuple[int, int, int, int, int]:
    """(wave, bytes of JSON, nodes, hits, end) of a block."""
    _, wave, text, nodes, hits, _ = struct.unpack_from("<4sIIIII", data, at)
    return wave, text, nodes, hits, at + 24 + text + nodes * runs.NODE.itemsize + hits * runs.HIT.itemsize


def blocks(data: bytes) -> list[tuple[int, int]]:
    """(begin, end) of every block."""
    found, at = [], 12
    while at < len(data):
        end = block(data, at)[-1]
        found.append((at, end))
        at = end
    return found


def sealed(wave: int, meta: bytes, nodes: np.ndarray, hits: np.ndarray) -> bytes:
    """A block with a valid checksum."""
    head = struct.pack("<4sIIII", b"WAVE", wave, len(meta), len(nodes), len(hits))
    payload = meta + nodes.tobytes() + hits.tobytes()
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


# Natural damage.


def flip(rng: random.Random, path: Path, other: Path) -> None:
    file = some_file(rng, path)
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(rng: random.Random, path: Path, other: Path) -> None:
    file = some_file(rng, path)
    os.truncate(file, rng.randrange(file.stat().st_size))


def zeros(rng: random.Random, path: Path, other: Path) -> None:
    file = some_file(rng, path)
    data = bytearray(file.read_bytes())
    at, n = rng.randrange(len(data)), rng.choice((1, 8, 64, 512, 4096))
    data[at : at + n] = bytes(len(data[at : at + n]))
    file.write_bytes(data)


def tail(rng: random.Random, path: Path, other: Path) -> None:
    with open(path / "tree.bin", "ab") as file:
        more = rng.choice((rng.randbytes(rng.randrange(1, 300)), bytes(4000), b"WAVE" + bytes(200), b"WAVE" * 2000))
        file.write(more)


def remove(rng: random.Random, path: Path, other: Path) -> None:
    some_file(rng, path).unlink()


def empty(rng: random.Random, path: Path, other: Path) -> None:
    some_file(rng, path).write_bytes(b"")


def foreign(rng: random.Random, path: Path, other: Path) -> None:
    name = some_file(rng, path).name
    if (other / name).exists():
        shutil.copy(other / name, path / name)


def reorder(rng: random.Random, path: Path, other: Path) -> None:
    data = (path / "tree.bin").read_bytes()
    parts = [data[a:b] for a, b in blocks(data)]
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    how = rng.randrange(3)
    if how == 0:
        parts[i], parts[j] = parts[j], parts[i]
    elif how == 1:
        parts.insert(i, parts[j])
    else:
        del parts[i]
    (path / "tree.bin").write_bytes(data[:12] + b"".join(parts))


def some_file(rng: random.Random, path: Path) -> Path:
    files = [f for f in sorted(path.iterdir()) if f.name != "lock" and f.stat().st_size]
    return rng.choice([f for f in files if f.name != "events.jsonl"] or files)


# Forgeries.

NUMBERS = (-1, 0, 1, 2, 7, 2**15, 2**31 - 1, 2**31, 2**62, 2**63, 10**30, -(2**31), 1e308, -1e308, 0.5)
VALUES = (*NUMBERS, None, True, "x", "", [], {}, [1, 2, 3], [[]], {"a": {}}, [None], float("nan"), float("inf"))
LIMITS = {"<u2": (0, 1, 9, 65535), "<i2": (-5, -1, 0, 1, 5, 6, 7, 8, 32767), "<u4": (0, 1, 2**32 - 1)}


def record(rng: random.Random, path: Path, other: Path) -> None:
    data, out = (path / "tree.bin").read_bytes(), b""
    parts = blocks(data)
    target, count = rng.randrange(len(parts)), rng.choice((1, 1, 5))
    for i, (at, end) in enumerate(parts):
        wave, text, nodes, *_ = block(data, at)
        cut = at + 24 + text
        rows = np.frombuffer(bytearray(data[cut : cut + nodes * runs.NODE.itemsize]), runs.NODE)
        ends = np.frombuffer(bytearray(data[cut + nodes * runs.NODE.itemsize : end]), runs.HIT)
        if i == target:
            for _ in range(count):
                forge_row(rng, rows if len(rows) and (not len(ends) or rng.random() < 0.8) else ends)
        out += sealed(wave, data[at + 24 : cut], rows, ends)
    (path / "tree.bin").write_bytes(data[:12] + out)


def forge_row(rng: random.Random, rows: np.ndarray) -> None:
    if not len(rows):
        return
    name = rng.choice(rows.dtype.names or ())
    kind = rows.dtype[name]
    if kind.kind == "f":
        value: Any = rng.choice((np.nan, np.inf, -np.inf, 0.0, 1e308, -1e308, rng.gauss(0, 1)))
    elif kind.str in LIMITS:
        value = rng.choice(LIMITS[kind.str])
    else:
        value = rng.choice((0, 1, rng.randrange(80), 2**31 - 1, 10**8))
        value = -value - 1 if kind.kind == "i" and rng.random() < 0.3 else value
    rows[name][rng.randrange(len(rows))] = value


def meta(rng: random.Random, path: Path, other: Path) -> None:
    data, out = (path / "tree.bin").read_bytes(), b""
    parts = blocks(data)
    target = rng.choice((len(parts) - 1, rng.randrange(len(parts))))
    for i, (at, end) in enumerate(parts):
        wave, text, nodes, *_ = block(data, at)
        cut = at + 24 + text
        words = data[at + 24 : cut]
        if i == target:
            found = json.loads(words)
            forge_value(rng, found)
            words = json.dumps(found).encode()
        rows = np.frombuffer(data[cut : cut + nodes * runs.NODE.itemsize], runs.NODE)
        ends = np.frombuffer(data[cut + nodes * runs.NODE.itemsize : end], runs.HIT)
        out += sealed(wave, words, rows, ends)
    (path / "tree.bin").write_bytes(data[:12] + out)


def forge_value(rng: random.Random, found: Any) -> None:
    """Somewhere within, another value, one key less or one more."""
    places = [found]
    for place in places:
        inner = place.values() if isinstance(place, dict) else place
        places += [v for v in inner if isinstance(v, (dict, list)) and len(v)]
    place = rng.choice(places)
    key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    how = rng.random()
    if how < 0.15:
        del place[key]
    elif how < 0.25 and isinstance(place, dict):
        place[rng.choice(("tree", "share", "__class__", "x"))] = rng.choice(VALUES)
    else:
        place[key] = rng.choice(VALUES)


def config(rng: random.Random, path: Path, other: Path) -> None:
    found = json.loads((path / "run.json").read_text("utf-8"))
    for _ in range(rng.choice((1, 1, 2))):
        forge_value(rng, found)
    (path / "run.json").write_text(json.dumps(found), "utf-8")


def text(rng: random.Random, path: Path, other: Path) -> None:
    whole = (path / "run.json").read_text("utf-8")
    deep = rng.choice((100, 5_000, 100_000))
    made = (
        "[" * deep,
        whole.replace('"prompts": null', '"prompts": ' + "[" * deep + "]" * deep),
        whole.replace(f'"seed": {SEED}', '"seed": ' + "9" * deep),
        whole.replace('"format": 2', '"format": 1'),
        whole.replace('"format": 2', '"format": ' + "{" * 3),
        "null",
        "{}",
    )
    (path / "run.json").write_text(rng.choice(made), "utf-8")


def link(rng: random.Random, path: Path, other: Path) -> None:
    victim = path.parent / "precious"
    victim.write_text("precious " * 100)
    name = rng.choice(("lock", "events.jsonl", "states-00000.safetensors", "tree.bin", "run.json"))
    (path / name).unlink(missing_ok=True)
    how = rng.randrange(3)
    if how == 0:
        (path / name).symlink_to(victim)
    elif how == 1:
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to("/dev/zero")


NATURAL: tuple[Mutation, ...] = (flip, flip, flip, cut, zeros, tail, remove, empty, foreign, reorder)
FORGED: tuple[Mutation, ...] = (record, record, record, meta, meta, config, config, config, text, link)


def main(args: Fuzz) -> int:
    """Run the cases; 1 if any is a fault."""
    with tempfile.TemporaryDirectory() as scratch:
        bases = make_bases(Path(scratch))
        counts: Counter[str] = Counter()
        faults: list[str] = []
        at, end = args.first, args.first + args.n
        while at < end:
            at, told = run_batch(Path(scratch), bases, args.seed, at, min(at + BATCH, end))
            for outcome, line in told:
                counts[outcome] += 1
                if outcome.startswith("FAULT"):
                    faults.append(line)
        print("\n".join(faults[: args.show]))
        print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    return 1 if faults else 0


def make_bases(scratch: Path) -> dict[str, tuple[Path, Path, tuple[ts.SearchResult, ...]]]:
    """By name: a recorded run of half the budget, one of another seed, and what the whole budget comes to."""
    found = {}
    for name, method in METHODS.items():
        how: dict[str, Any] = {"prompts": ["a", "b"] if name == "tasks" else None}
        for folder, seed in ((f"{name}-0", SEED), (f"{name}-1", SEED + 1)):
            ts.search(KERNEL, REWARD, method, budget=ts.Budget(nfe=NFE // 2), seed=seed, store=scratch / folder, **how)
        ts.resume(scratch / f"{name}-0", KERNEL, REWARD, budget=ts.Budget(nfe=NFE // 2))
        shutil.copytree(scratch / f"{name}-0", scratch / f"{name}-whole")
        whole = ts.resume(scratch / f"{name}-whole", KERNEL, REWARD, budget=ts.Budget(nfe=NFE))
        [task.samples for task in whole.tasks]
        straight = ts.search(
            KERNEL, REWARD, method, budget=ts.Budget(nfe=NFE), seed=SEED, **how
        )  # where waves were lost
        found[name] = scratch / f"{name}-0", scratch / f"{name}-1", (whole, straight)
    return found


def run_batch(scratch: Path, bases: Any, seed: int, first: int, stop: int) -> tuple[int, list[tuple[str, str]]]:
    """Cases first..stop - 1 in a child; where it dies, the case is a fault, and the next batch begins behind it."""
    out = scratch / "told"
    out.write_text("")
    if (child := os.fork()) == 0:
        limit_memory()
        with open(out, "a", encoding="utf-8") as told:
            for number in range(first, stop):
                outcome, line = case(scratch, bases, seed, number)
                told.write(json.dumps([outcome, line]) + "\n")
                told.flush()
        os._exit(0)
    _, ended = os.waitpid(child, 0)
    lines = [tuple(json.loads(line)) for line in out.read_text("utf-8").splitlines()]
    if ended:
        at = first + len(lines)
        lines.append((f"FAULT: died ({ended})", f"case {at} of seed {seed} {planned(seed, at)}: ended with {ended}"))
    return first + len(lines), lines


def limit_memory() -> None:
    import resource

    used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def planned(seed: int, number: int) -> str:
    """Base and mutation of a case."""
    rng = random.Random(seed * 1_000_003 + number)
    return f"({rng.choice(list(METHODS))}, {rng.choice(NATURAL if number % 2 else FORGED).__name__})"


def case(scratch: Path, bases: Any, seed: int, number: int) -> tuple[str, str]:
    """Outcome of a case, and a line about it."""
    rng = random.Random(seed * 1_000_003 + number)
    name = rng.choice(list(METHODS))
    mutation = rng.choice(NATURAL if number % 2 else FORGED)
    base, other, whole = bases[name]
    path = scratch / "case"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(base, path)
    mutation(rng, path, other)
    signal.alarm(SECONDS)
    try:
        outcome = judge(path, whole, natural=bool(number % 2))
    except Exception as error:
        outcome = f"FAULT: {type(error).__name__}: {str(error)[:150]}"
    signal.alarm(0)
    return outcome.partition(":")[0] if not outcome.startswith("FAULT") else outcome[:40], (
        f"case {number} of seed {seed} ({name}, {mutation.__name__}): {outcome}"
    )


def judge(path: Path, whole: tuple[ts.SearchResult, ...], *, natural: bool) -> str:
    """Look at a folder, then go on with it."""
    before, victim = content(path), path.parent / "precious"
    try:
        found = runs.read_config(path)
        result = read_result(found, runs.read_log(path, found)[0])
        [task.certificate() for task in result.tasks]
    except ts.TreeSearchError:
        pass
    if content(path) != before:
        return "FAULT: looking changed the folder"
    kept = victim.read_bytes() if victim.exists() else None
    try:
        result = ts.resume(path, KERNEL, REWARD, budget=ts.Budget(nfe=NFE))
        samples = [task.samples for task in result.tasks]
    except ts.TreeSearchError:
        outcome = "refused"
    else:
        outcome = compare(result, samples, whole) if natural else "gone on with"
    if kept is not None and victim.read_bytes() != kept:
        return "FAULT: a file elsewhere was written to"
    return outcome


def compare(result: ts.SearchResult, samples: list[Any], whole: tuple[ts.SearchResult, ...]) -> str:
    """Whether a resumed run is what the whole one is, or at least true to itself."""
    for task, x in zip(result.tasks, samples, strict=True):
        if not torch.allclose(0.7 * x.sum(1), task.rewards, atol=1e-9):
            return "FAULT: samples without their rewards"
    for one in whole:
        if all(torch.equal(a.rewards, b.rewards) for a, b in zip(result.tasks, one.tasks, strict=True)):
            return "equal"
    return "FAULT: another result"


def content(path: Path) -> dict[str, bytes]:
    """Regular files of a folder."""
    return {f.name: f.read_bytes() for f in path.iterdir() if f.is_file() and not f.is_symlink()}


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Fuzz)))
