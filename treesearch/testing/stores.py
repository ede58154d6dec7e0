"""Laws of a run's folder: cut, damaged or stopped it ends like a straight run, or is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from treesearch.api import open_session, resume, search, stream
from treesearch.backends.base import Kernel, describe
from treesearch.budget import Budget
from treesearch.errors import StoreError
from treesearch.methods.base import Method
from treesearch.runs.log import read_blocks
from treesearch.testing.compare import require, same, same_result
from treesearch.testing.counting import Counting


def check_store(
    method: Method,
    kernel: Kernel,
    reward: Callable[..., Any],
    folder: str | os.PathLike[str],
    *,
    cuts: int = 8,
    atol: float = 0.0,
) -> None:
    """A run cut at any byte, with a damaged state or stopped half-way ends like a straight one; damage is refused."""
    counted: Any = Counting(kernel)
    kernel, folder = counted, Path(folder)
    whole, budget = folder / "whole", Budget(nfe=80 * describe(kernel).num_steps)
    straight = search(kernel, reward, method, budget=budget, seed=5)
    same_result(search(kernel, reward, method, budget=budget, seed=5, store=whole), straight, atol, "with a store")
    log, ends = (whole / "tree.bin").read_bytes(), [end for _, end in read_blocks(whole)]
    require(ends[-1] == len(log), f"tree.bin: expected whole blocks up to byte {len(log)}, got {ends[-1]}")
    cut = {f"log cut at byte {at}": log[:at] for at in np.linspace(12, len(log) - 1, cuts, dtype=int).tolist()}
    cut["log cut between two waves"] = log[: ends[len(ends) // 3]]
    spots = [at for at in (ends[0] + 4, ends[0] + 60) if at < len(log)]  # in a header, in what follows it
    damaged = {f"log with a flipped bit in byte {at}": flipped(log, at) for at in spots}
    damaged["log without its second wave"] = log[: ends[0]] + log[ends[min(1, len(ends) - 1)] :]
    for i, (what, data) in enumerate((cut | damaged).items()):
        copy = folder / f"damaged-{i}"
        shutil.copytree(whole, copy)
        (copy / "tree.bin").write_bytes(data)
        if what in damaged and len(ends) > 2:
            _refused(copy, kernel, reward, what)
        else:
            same_result(resume(copy, kernel, reward), straight, atol, what)
    for i, shard in enumerate(sorted(whole.glob("states-*"))):
        copy = folder / f"states-{i}"
        shutil.copytree(whole, copy)
        (copy / shard.name).write_bytes(flipped(shard.read_bytes(), shard.stat().st_size - 1))
        same_result(resume(copy, kernel, reward), straight, atol, f"{shard.name} with a flipped bit")
    for snapshot in stream(kernel, reward, method, budget=budget, seed=5, store=folder / "stopped"):
        if snapshot.wave + 1 >= len(ends) // 2:
            break
    same_result(resume(folder / "stopped", kernel, reward), straight, atol, "stopped half-way")
    session = open_session(whole, kernel, reward)
    stored = session.states.get(session.searches[0].tree.slot[straight.leaves])
    if session.recorder.run is not None:
        session.recorder.run.close("finished")
    same("stored states beside the samples", kernel.decode(stored), straight.samples)


def flipped(data: bytes, at: int) -> bytes:
    """Bytes with one bit flipped."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _refused(folder: Path, kernel: Kernel, reward: Callable[..., Any], what: str) -> None:
    try:
        resume(folder, kernel, reward)
    except StoreError:
        return
    require(False, f"{what}: expected a StoreError, got a result")
