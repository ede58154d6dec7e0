"""What `steer` learnt, as `plan` acts with it: where x_T is drawn, and the critic that judges chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treesearch.cli.acting import Acting, Opened
from treesearch.errors import StoreError, UsageError
from treesearch.policies.critic import action_value
from treesearch.policies.dsrl import DSRL, Steering
from treesearch.policies.store import read_index
from treesearch.rewards.base import Reward

OTHER = {
    "policy": "another policy, or other weights of it",
    "environment": "another environment, or one in another folder",
    "rewards": "an environment of other code or settings",
    "read": "an environment that shows something else",
}


def read(folder: Path) -> dict[str, Any]:
    """What a folder says of its learner.

    Raises:
        StoreError: there is none, or it has learnt nothing yet.
    """
    index = read_index(folder)
    if not index.keys() >= OTHER.keys() | {"execute", "num_steps"}:
        raise StoreError(f"{folder} is of a learner in no environment: learn one with treesearch steer")
    if index["steps"] <= index["settings"]["warmup"]:
        raise StoreError(
            f"the learner in {folder} has learnt nothing yet, its {index['steps']} chunks are warm-up: go on with "
            "treesearch steer"
        )
    return index


def steps_of(index: dict[str, Any], typed: Acting) -> int:
    """T that the noise was learnt for.

    Raises:
        UsageError: another one is typed.
    """
    if typed.num_steps not in (None, index["num_steps"]):
        raise UsageError(
            f"--num-steps {typed.num_steps}: the noise was learnt for {index['num_steps']} steps, leave it out"
        )
    return index["num_steps"]


def learnt(folder: Path, index: dict[str, Any], opened: Opened, env: Any) -> DSRL:
    """What was learnt for a policy in an environment, which is not asked for anything.

    Raises:
        StoreError: it was learnt for another policy or environment.
    """
    noisy = opened.noisy(env, index["execute"], index["bound"])
    own = {"policy": noisy.frozen.fingerprint, **noisy.identity}
    for name, what in OTHER.items():
        if index[name] != own[name]:
            raise StoreError(f"{folder} was learnt for {what}: name those of treesearch steer, or another --steering")
    return DSRL(noisy, Steering(**index["settings"]), seed=index["seed"]).load(folder)


def critic(dsrl: DSRL) -> Reward:
    """Its critic of chunks.

    Raises:
        UsageError: it has none.
    """
    if dsrl.settings.method != "na":
        raise UsageError("--steering: learnt by sac, which has no critic of chunks: name a --reward, such as env")
    return action_value(dsrl)
