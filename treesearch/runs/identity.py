"""What decides a run: one list, which run.json must hold, `resume` compares and the hash of a certificate digests.

FIXED   a run goes on with the same: method, seed, prompts, kernel's law, reward
FREE    decides the result as well, but a run may go on with another: budget, and the name of the kernel's class
beside  of the options the size of a pass and whether it is padded, and the version of the library

settings hash = SHA-256(FIXED, FREE, beside, task)        tree hash = SHA-256(shape, keys, rewards, weights, visits)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treesearch.backends.base import STEPS
from treesearch.core.tree import Tree
from treesearch.errors import StoreError
from treesearch.runs.dtypes import DTYPES
from treesearch.runs.log import TASKS
from treesearch.runs.schema import Check, maybe, number, one_of, plain, record, several, text, whole
from treesearch.text import brief

_LIMIT = maybe(whole(1))
FIXED: dict[str, Check] = {
    "method": record({"name": text(200)}, rest=plain(3)),
    "seed": whole(0, 2**64 - 1),
    "prompts": maybe(several(plain(16), 1, TASKS)),
    "num_steps": whole(1, STEPS),
    "state_shape": several(whole(0, 2**31), 0, 16),
    "dtype": one_of(*DTYPES),
    "fingerprint": plain(16),
    "reward": text(),
    "reward_settings": plain(16),
}
FREE: dict[str, Check] = {
    "kernel": text(),
    "budget": record(
        {"nfe": _LIMIT, "seconds": maybe(number(0.0)), "reward_calls": _LIMIT, "iterations": _LIMIT},
    ),
}
DECIDES = FIXED | FREE
BATCHES = ("batch_size", "batch_invariant")  # of the options
SEARCHED = ("kernel", "fingerprint", "num_steps", "state_shape", "prompts", "reward", "reward_settings")  # the problem
COLUMNS = ("parent", "t", "key", "log_w", "reward", "visits")


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the run that run.json tells of.

    Raises:
        StoreError: part of it is not there.
    """
    if missing := [name for name in (*DECIDES, "options", "versions") if name not in config]:
        raise StoreError(
            f"run.json lacks {', '.join(map(repr, missing))}: it is damaged, edited or of another version: put back "
            "the file as it was written"
        )
    return {name: config[name] for name in DECIDES} | {
        "batches": {name: config["options"][name] for name in BATCHES},
        "version": config["versions"]["treesearch"],
    }


FILES = ", and with files that hold what they held: an observation, a mask or weights that are read may have changed"


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Whether a search can go on with a run.

    Args:
        saved, now: what run.json holds, and what it would hold now.

    Raises:
        StoreError: something that must not change has; the message names the first.
    """
    if bool(saved.get("valued")) != bool(now.get("valued")):
        raise StoreError(
            "valued differs: one of the run and this search scores states by values that its kernel declares, the "
            "other by the reward of their endpoints; resume with the run's own kernel"
        )
    was, found = identity(saved), identity(json.loads(json.dumps(now)))  # as a run keeps it: tuples are lists there
    for name in FIXED:
        if was[name] != found[name]:
            raise StoreError(
                f"{name} differs: the run has {brief(was[name])}, this search {brief(found[name])}; resume with the "
                f"run's own{FILES if name in ('fingerprint', 'reward_settings') else ''}"
            )


def settings_hash(config: Mapping[str, Any], task: int) -> str:
    """Digest of everything that decides a task's result, as run.json has it.

    Raises:
        StoreError: part of it is not there.
    """
    chosen = identity(config) | {"task": task}
    return digest([json.dumps(chosen, sort_keys=True, default=lambda o: type(o).__name__).encode()])


def tree_hash(tree: Tree) -> str:
    """Digest of a tree's shape, noise keys, rewards, weights and visits."""
    return digest([np.ascontiguousarray(getattr(tree, name)).tobytes() for name in COLUMNS])


def digest(parts: Sequence[bytes]) -> str:
    """Sixteen hexadecimal digits of SHA-256; parts that are joined elsewhere give others."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]
