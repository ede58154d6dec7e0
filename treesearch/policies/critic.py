"""What a learner of noise knows, as a reward of searches: the critic of actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from treesearch.policies.dsrl import DSRL
from treesearch.rewards.base import Reward


def action_value(dsrl: DSRL) -> Reward:
    """r = min_j Q^A_j(s, a) of states x_0 of the kernel that it was learnt on, s what a prompt says.

    Args:
        dsrl: learnt by method="na".

    Raises:
        ValueError: it has no critic of actions; when called, without prompts.
    """
    if dsrl.settings.method != "na":
        raise ValueError("method='sac' learns no critic of actions: use method='na'")

    def fn(states: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        if prompts is None:
            raise ValueError("a critic judges actions where something was observed: give prompts, prompts=[...]")
        return dsrl.q_action(dsrl.observations(prompts), states)

    return Reward(fn, "action_value", input="state", settings=(dsrl.fingerprint,))
