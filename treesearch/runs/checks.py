"""What the blocks of a log hold, beside one another, beside run.json and beside the method's own search.

A folder may come from anybody: compiled code follows parents and leaves without looking, so they are looked at here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import STEPS
from treesearch.core.tree import NONE
from treesearch.errors import StoreError
from treesearch.runs import schema
from treesearch.runs.log import Block
from treesearch.runs.schema import maybe, number, record, several, whole


def check_blocks(path: Path, config: dict[str, Any], blocks: list[Block]) -> None:
    """What blocks hold, beside one another and beside run.json.

    Raises:
        StoreError: they belong to another run, or hold what no search writes; the message names block and field.
    """
    tasks, total, slots, ends = len(config["prompts"] or [None]), 0, 0, []
    for block in blocks:
        total += len(block.nodes)
        ends.append(total)
        slots = max(slots, int(block.nodes["slot"].max(initial=NONE)) + 1)
        meta, history = block.meta, block.meta["history"]
        if meta["run"] != config["id"]:
            raise StoreError(
                f"{path}: tree.bin and run.json belong to two runs: block {block.wave} is of run {meta['run']!r}, "
                f"run.json of {config['id']!r}"
            )
        for name, got, want in (
            ("history.wave", history["wave"], block.wave),
            ("history.nodes", history["nodes"], total + tasks),
            ("searches", len(meta["searches"]), tasks),
            ("slots", meta["slots"], slots),
        ):
            if got != want:
                _refuse(path, block.wave, f"{name} is {got}, expected {want}")
    if blocks:
        _check_nodes(path, config["num_steps"], tasks, blocks, np.array(ends))


def _check_nodes(path: Path, top: int, tasks: int, blocks: list[Block], ends: NDArray[np.int64]) -> None:
    """Every record and hit within bounds, so that compiled code may follow them."""
    nodes = np.concatenate([b.nodes for b in blocks])

    def check(name: str, bad: NDArray[np.bool_], expected: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            block = int(np.searchsorted(ends, row, side="right"))
            at = row - (int(ends[block - 1]) if block else 0)
            _refuse(path, block, f"{name} of its node {at} is {nodes[name][row]}, expected {expected}")

    task, t, parent, slot = (nodes[name].astype(np.int64) for name in ("task", "t", "parent", "slot"))
    check("task", task >= tasks, f"0..{tasks - 1}")
    order = np.argsort(task, kind="stable")
    starts = np.searchsorted(task[order], np.arange(tasks + 1))
    own = np.empty(len(nodes), np.int64)
    own[order] = np.arange(len(nodes)) - starts[task[order]] + 1
    check("parent", (parent < 0) | (parent >= own), "a node before it")
    check("t", (t < 0) | (t > top), f"0..{top}")
    if len(nodes):
        above = np.where(parent > 0, t[order[np.minimum(starts[task] + parent - 1, len(nodes) - 1)]], top + 1)
        check("t", (t >= above) & ~((t == top) & (above == top)), "a level below its parent's, or beside it at the top")
    check("slot", slot < NONE, "a place among the states, or -1")
    kept = np.flatnonzero(slot != NONE)
    by_slot = kept[np.argsort(slot[kept], kind="stable")]
    twice = np.zeros(len(nodes), np.bool_)
    twice[by_slot[1:][np.diff(slot[by_slot]) == 0]] = True
    check("slot", twice, "a place of its own")
    check("log_w", ~(nodes["log_w"] < np.inf), "a number below infinity")
    check("reward", np.where(t == 0, ~(nodes["reward"] < np.inf), nodes["reward"] == np.inf), "a number below infinity")
    sizes = np.zeros(tasks, np.int64)
    for block in blocks:
        sizes += np.bincount(block.nodes["task"], minlength=tasks)
        hits = block.hits
        if not len(hits):
            continue
        inside = (hits["task"] >= 0) & (hits["task"] < tasks)
        of = np.where(inside, hits["task"], 0)
        inside &= (hits["leaf"] >= 1) & (hits["leaf"] <= sizes[of])
        if not inside.all() or (t[order[starts[of] + hits["leaf"] - 1]] != 0).any():
            _refuse(path, block.wave, "hits name nodes that are no leaves")


def check_state(state: dict[str, Any], like: dict[str, Any], nodes: int) -> None:
    """A search's recorded state: names and kinds as its own, numbers that its tree can have come to.

    Args:
        like: the state of a fresh search of the same method.
        nodes: of the tree.

    Raises:
        ValueError: it differs.
    """
    kinds: dict[type, schema.Check] = {
        int: whole(),
        list: several(several(several(whole(0, 2**31), 2, 2), 1, nodes), 0, nodes),
        type(None): maybe(several(number(0.0), 1, STEPS + 2)),
    }
    record({name: kinds[type(value)] for name, value in like.items()})(state, "state")
    for name, value in like.items():
        if type(value) is list and sum(count for group in state[name] for _, count in group) > nodes:
            raise schema.refused(state[name], f"state.{name}", f"groups of at most {nodes} in all")


def _refuse(path: Path, block: int, what: str) -> NoReturn:
    raise StoreError(f"{path}/tree.bin: block {block}: {what}: no search wrote this")
