"""Mutations of run folders: what disks, copies and tired people do to them, and what somebody who means harm would.

    natural   bits flipped, files cut, stretches zeroed, shards missing, short or of another run, blocks lost or moved
    forged    records, heads, states and documents with hostile values under valid checksums, deep nesting, large
              numbers, links, pipes and folders in the place of files, expressions that would run code

A mutation changes `path`, a run folder of its own, and takes what it needs from `other`, a run of another seed. All
that it draws comes from `rng`, so that a case can be repeated.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treesearch.runs.config import stamped
from treesearch.runs.log import HIT, NODE

Mutation = Callable[[random.Random, Path, Path], None]
MAGIC, HEAD = 12, struct.Struct("<4sIIIII")  # of tree.bin; its blocks' heads
PRECIOUS = "precious"  # a file two levels above a case, that links lead to


@dataclass
class Block:
    """A block of tree.bin, taken apart."""

    wave: int
    meta: bytes
    nodes: NDArray[Any]
    hits: NDArray[Any]

    def sealed(self, **counts: int) -> bytes:
        """With a valid checksum; `counts` replaces numbers of its head by untrue ones."""
        told = {"wave": self.wave, "text": len(self.meta), "nodes": len(self.nodes), "hits": len(self.hits)} | counts
        head = struct.pack("<4sIIII", b"WAVE", *told.values())
        payload = self.meta + self.nodes.tobytes() + self.hits.tobytes()
        return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


def blocks(path: Path) -> list[Block]:
    """The blocks of an intact tree.bin."""
    data, at, found = (path / "tree.bin").read_bytes(), MAGIC, []
    while at < len(data):
        _, wave, text, nodes, hits, _ = HEAD.unpack_from(data, at)
        at += HEAD.size
        ends = [at, at + text, at + text + nodes * NODE.itemsize]
        ends.append(ends[-1] + hits * HIT.itemsize)
        meta, rows, left = (data[a:b] for a, b in pairwise(ends))
        found.append(Block(wave, meta, np.frombuffer(bytearray(rows), NODE), np.frombuffer(bytearray(left), HIT)))
        at = ends[-1]
    return found


def whole_in(data: bytes) -> list[int]:
    """Numbers of the whole blocks anywhere in some bytes."""
    found, at = [], data.find(b"WAVE")
    while 0 <= at <= len(data) - HEAD.size:
        _, wave, text, nodes, hits, crc = HEAD.unpack_from(data, at)
        start, length = at + HEAD.size, text + nodes * NODE.itemsize + hits * HIT.itemsize
        if start + length <= len(data) and zlib.crc32(data[at : start - 4] + data[start : start + length]) == crc:
            found.append(wave)
        at = data.find(b"WAVE", at + 1)
    return found


def write(path: Path, parts: list[bytes]) -> None:
    """tree.bin of sealed blocks."""
    magic = (path / "tree.bin").read_bytes()[:MAGIC]
    (path / "tree.bin").write_bytes(magic + b"".join(parts))


def some_file(rng: random.Random, path: Path) -> Path:
    """A file of a run that is read."""
    files = [f for f in sorted(path.iterdir()) if f.name not in ("lock", "events.jsonl") and f.stat().st_size]
    return rng.choice(files)


# Natural damage.


def flip(rng: random.Random, path: Path, other: Path) -> None:
    """Bits, seldom many."""
    file = some_file(rng, path)
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def digit(rng: random.Random, path: Path, other: Path) -> None:
    """A bit of a digit of run.json or command.json: the document stays one."""
    file = path / rng.choice(("run.json", "run.json", "command.json"))
    data = bytearray(file.read_bytes())
    at = rng.choice([i for i, byte in enumerate(data) if chr(byte).isdigit()])
    data[at] ^= 1 << rng.randrange(4)
    file.write_bytes(data)


def cut(rng: random.Random, path: Path, other: Path) -> None:
    """The end of a file."""
    file = some_file(rng, path)
    os.truncate(file, rng.randrange(file.stat().st_size))


def zeros(rng: random.Random, path: Path, other: Path) -> None:
    """A stretch of a file, as a lost sector leaves it."""
    file = some_file(rng, path)
    data = bytearray(file.read_bytes())
    at, n = rng.randrange(len(data)), rng.choice((1, 8, 64, 512, 4096))
    data[at : at + n] = bytes(len(data[at : at + n]))
    file.write_bytes(data)


def tail(rng: random.Random, path: Path, other: Path) -> None:
    """Something behind the log."""
    more = rng.choice((rng.randbytes(rng.randrange(1, 300)), bytes(4000), b"WAVE" + bytes(200), b"WAVE" * 2000))
    with open(path / "tree.bin", "ab") as file:
        file.write(more)


def remove(rng: random.Random, path: Path, other: Path) -> None:
    """A file."""
    some_file(rng, path).unlink()


def empty(rng: random.Random, path: Path, other: Path) -> None:
    """The content of a file."""
    some_file(rng, path).write_bytes(b"")


def foreign(rng: random.Random, path: Path, other: Path) -> None:
    """A file of another run of the same search."""
    name = some_file(rng, path).name
    if (other / name).exists():
        shutil.copy(other / name, path / name)


def reorder(rng: random.Random, path: Path, other: Path) -> None:
    """Blocks swapped, doubled or left out."""
    parts = [block.sealed() for block in blocks(path)]
    i, j, how = rng.randrange(len(parts)), rng.randrange(len(parts)), rng.randrange(3)
    if how == 0:
        parts[i], parts[j] = parts[j], parts[i]
    elif how == 1:
        parts.insert(i, parts[j])
    else:
        del parts[i]
    write(path, parts)


# Forgeries.

NUMBERS = (-1, 0, 1, 2, 7, 2**15, 2**31 - 1, 2**31, 2**62, 2**63, 10**30, -(2**31), 1e308, -1e308, 0.5)
VALUES = (
    *NUMBERS,
    None,
    True,
    "x",
    "",
    "\ud800",
    [],
    {},
    [1, 2, 3],
    [[]],
    {"a": {}},
    [None],
    float("nan"),
    float("inf"),
)
LIMITS = {"<u2": (0, 1, 9, 65535), "<i2": (-5, -1, 0, 1, 5, 6, 7, 8, 32767), "<u4": (0, 1, 2**32 - 1)}
FLOATS = (np.nan, np.inf, -np.inf, 0.0, 1e308, -1e308)


def record(rng: random.Random, path: Path, other: Path) -> None:
    """Values of nodes or hits."""
    found = blocks(path)
    target = rng.choice(found)
    for _ in range(rng.choice((1, 1, 5))):
        whole = len(target.nodes) and (not len(target.hits) or rng.random() < 0.8)
        forge_row(rng, target.nodes if whole else target.hits)
    write(path, [block.sealed() for block in found])


def forge_row(rng: random.Random, rows: NDArray[Any]) -> None:
    """One field of one row."""
    if not len(rows):
        return
    name = rng.choice(rows.dtype.names or ())
    kind = rows.dtype[name]
    if kind.kind == "f":
        value: Any = rng.choice((*FLOATS, rng.gauss(0, 1)))
    elif kind.str in LIMITS:
        value = rng.choice(LIMITS[kind.str])
    else:
        value = rng.choice((0, 1, rng.randrange(80), 2**31 - 1, 10**8))
        value = -value - 1 if kind.kind == "i" and rng.random() < 0.3 else value
    rows[name][rng.randrange(len(rows))] = value


def head(rng: random.Random, path: Path, other: Path) -> None:
    """Numbers of a block's head that its bytes do not bear out."""
    found = blocks(path)
    target, name = rng.randrange(len(found)), rng.choice(("wave", "text", "nodes", "hits"))
    untrue = {name: rng.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1))}
    write(path, [block.sealed(**(untrue if i == target else {})) for i, block in enumerate(found)])


def meta(rng: random.Random, path: Path, other: Path) -> None:
    """A value of a block's JSON."""
    found = blocks(path)
    target = rng.choice((found[-1], rng.choice(found)))
    document = json.loads(target.meta)
    forge_value(rng, document)
    target.meta = json.dumps(document).encode()
    write(path, [block.sealed() for block in found])


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


def state(rng: random.Random, path: Path, other: Path) -> None:
    """Numbers of states, with the checksum that is theirs now."""
    file, found = path / "states-00000.safetensors", blocks(path)
    data = bytearray(file.read_bytes())
    start, size = (
        8 + struct.unpack_from("<Q", data)[0],
        8 * json.loads((path / "run.json").read_text())["state_shape"][0],
    )
    for block in found:
        for row in np.flatnonzero(block.nodes["slot"] >= 0):
            at = start + int(block.nodes["slot"][row]) * size
            if rng.random() < 0.2:
                struct.pack_into("<d", data, at + 8 * rng.randrange(size // 8), rng.choice(FLOATS))
                block.nodes["sum"][row] = zlib.crc32(data[at : at + size])
    file.write_bytes(data)
    write(path, [block.sealed() for block in found])


def header(rng: random.Random, path: Path, other: Path) -> None:
    """The JSON at the head of a shard."""
    file = path / "states-00000.safetensors"
    data = bytearray(file.read_bytes())
    document = json.loads(data[8:520])
    forge_value(rng, document)
    made = (json.dumps(document), "[" * 512, "null", '{"__metadata__": {"run": ' + "9" * 400 + "}}", "")
    data[8:520] = rng.choice(made).encode()[:512].ljust(512)
    if rng.random() < 0.3:
        data[:8] = struct.pack("<Q", rng.choice((0, 1, 2**40, 2**64 - 1)))
    file.write_bytes(data)


def config(rng: random.Random, path: Path, other: Path) -> None:
    """Values of run.json."""
    found = json.loads((path / "run.json").read_text("utf-8"))
    for _ in range(rng.choice((1, 1, 2))):
        forge_value(rng, found)
    (path / "run.json").write_text(json.dumps(stamped(found)), "utf-8")


def text(rng: random.Random, path: Path, other: Path) -> None:
    """run.json as text: nested, endless, of another version, none."""
    whole = (path / "run.json").read_text("utf-8")
    seed, deep = json.loads(whole)["seed"], rng.choice((100, 5_000, 100_000))
    made = (
        "[" * deep,
        whole.replace('"prompts": null', '"prompts": ' + "[" * deep + "]" * deep),
        whole.replace(f'"seed": {seed}', '"seed": ' + "9" * deep),
        whole.replace('"format": 2', '"format": 1'),
        whole.replace('"format": 2', '"format": ' + "{" * 3),
        "null",
        "{}",
    )
    (path / "run.json").write_text(rng.choice(made), "utf-8")


def link(rng: random.Random, path: Path, other: Path) -> None:
    """Something else in the place of a file: a link, a pipe, a device, a folder, a file without end."""
    read = ("lock", "events.jsonl", "states-00000.safetensors", "tree.bin", "run.json", "command.json")
    made = ("outputs", "README.md", "summary.json", "reward.png", "task0.csv")
    name = rng.choice((*read, *read, *made))
    (path / name).unlink(missing_ok=True)
    how = rng.randrange(6)
    if how == 0:
        (path / name).symlink_to(path.parent.parent / PRECIOUS)
    elif how == 1:
        (path / name).symlink_to(path.parent / "neighbour" / name)
    elif how == 2:
        os.mkfifo(path / name)
    elif how == 3:
        (path / name).symlink_to("/dev/zero")
    elif how == 4:
        (path / name).mkdir()
    else:
        (path / name).touch()
        os.truncate(path / name, rng.choice((2**20, 2**30, 2**40)))


EXPRESSIONS = (
    *(
        "",
        "x",
        "mnist",
        "ring",
        "gaussian",
        "linear",
        "kernel",
        "gaussian(num_steps=6)",
        "tds(gaussian(), linear(0.7))",
    ),
    *("gaussian(num_steps=7, dim=3)", "gaussian(num_steps=6, dim=3, std=-1)", "gaussian(num_steps='6', dim=3)"),
    *("gaussian(num_steps=10**9, dim=3)", "gaussian(num_steps=999999999, dim=3)", "gaussian(dim=9999999999)"),
    *(
        "linear(0.7).clip(1, 0)",
        "linear('x')",
        "linear([1, 2])",
        "linear(1e999)",
        "linear(0.7) * 'x'",
        "'x' * 9999999999",
    ),
    *("./evil.py:make", "/dev/zero:x", "os:system('touch stolen')", "__import__('os').system('touch stolen')"),
    *("(" * 10_000, "-" * 100_000 + "1", "f(" * 300, "linear(0.7)" + " + linear(0.7)" * 3000, "\x00", "\ud800"),
    *("http('http://localhost:1/')", "diffusers('/dev')", "critic('x')", "lambda: 0", "linear(*[1])", "linear.load"),
)


def command(rng: random.Random, path: Path, other: Path) -> None:
    """command.json: other expressions under the old mark, other values, no JSON."""
    file = path / "command.json"
    found = json.loads(file.read_text("utf-8"))
    (path / "evil.py").write_text("open('stolen', 'w').close()\ndef make(): pass\n", "utf-8")
    how = rng.random()
    if how < 0.6:
        found[rng.choice(("kernel", "reward"))] = rng.choice(EXPRESSIONS)
    elif how < 0.8:
        forge_value(rng, found)
    whole = json.dumps(found)
    made = ("[" * 100_000, "null", "", whole[: rng.randrange(len(whole))], whole + " " * 2**20 + "\x00", '"\\')
    file.write_text(whole if how < 0.8 else rng.choice(made), "utf-8")


NATURAL: tuple[Mutation, ...] = (flip, flip, flip, digit, cut, zeros, tail, remove, empty, foreign, reorder)
FORGED: tuple[Mutation, ...] = (
    *(record, record, record, meta, meta, config, config, config, command, command),
    *(head, state, header, text, link),
)
