"""What a learner of noise knows, as a reward of searches: the critic of actions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treesearch.policies.dsrl import DSRL, least
from treesearch.rewards.base import Reward


def action_value(dsrl: DSRL) -> Reward:
    """r = min_j Q^A_j(s, a) of states x_0 of the kernel that it was learnt on, s what a prompt says.

    The critics are those of now: learning on changes no reward that was made before.

    Args:
        dsrl: learnt by method="na".

    Raises:
        ValueError: it has no critic of actions; when called, without prompts.
    """
    if dsrl.settings.method != "na":
        raise ValueError("method='sac' learns no critic of actions: use method='na'")
    critic = copy.deepcopy(dsrl.learner.critic).requires_grad_(False)
    observations, device = dsrl.frozen.observations, dsrl.learner.device

    def fn(states: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        if prompts is None:
            raise ValueError("a critic judges actions where something was observed: give prompts, prompts=[...]")
        seen = observations(prompts).to(device, torch.float32)
        with torch.no_grad():
            return least(critic(seen, states.flatten(1).to(seen)))

    return Reward(fn, "action_value", input="state", settings=(dsrl.fingerprint,))
