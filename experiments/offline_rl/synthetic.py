"""Synthetic data for a learner, from a behaviour model and the learner's policy, and what they are worth.

    target   π(τ) ∝ p(τ) Π_h π(a_h | s_h)^λ,   π the unit Gaussian about the learner's mean action

    unguided        draws of p
    guided          policy-guided diffusion as published
    fk              Feynman-Kac steering for the target
    tree_sampling   tree sampling for the target
    fk_chosen, tree_sampling_chosen     the same, λ chosen as the coefficient of guidance is: by the learner's return

All at no more than n·T NFE for n trajectories. A trajectory of H rows is H - 1 transitions, of which those after an
end of the task are dropped. Actions are clipped to [-1, 1], those of guidance too before π judges them, where the
released code of the paper squashes them by tanh.

Source: Policy-Guided Diffusion (Jackson et al., 2024), sections 4 and 5.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from experiments.offline_rl.learners import Transitions
from experiments.offline_rl.tasks import Ended, Simulator, Task
from experiments.planning.generate_data import KINDS, Figures, Kind, coverage, generate, published
from treesearch.errors import TreeSearchError
from treesearch.rewards.channels import Channels, known
from treesearch.rewards.trajectories.policy import PolicyLikelihood

BOUNDS = (-1.0, 1.0)
STRENGTHS = (1.0, 4.0, 16.0)  # coefficients of published guidance, and λ
SEARCHED = ("fk", "tree_sampling")
CHOSEN = {f"{kind}_chosen": kind for kind in SEARCHED}
TUNED = ("guided", *CHOSEN)  # kinds whose strength is chosen
DATA = ("real", "unguided", "guided", *SEARCHED, *CHOSEN)
CHECKED = 1_000  # transitions that the environment repeats
CELL = 0.5  # side of a cell of positions, in standard deviations of the real data


def kind_of(data: str, strength: float) -> Kind:
    """How a kind of data is made; the strength is the coefficient of published guidance."""
    if data != "guided":
        return KINDS[CHOSEN.get(data, data)]
    return replace(KINDS["guided"], guide=partial(published, coefficient=strength))


class Drawn(NamedTuple):
    """Trajectories, and what they cost."""

    samples: Tensor  # (n, H, C)
    nfe: int


def trajectories(
    kernel: Any, policy: nn.Module, data: str, n: int, starts: Tensor, *, lam: float, strength: float, seed: int
) -> Drawn:
    """n trajectories of a kind from each of some starts (m, S), or of any start where there are none.

    Args:
        lam: λ of the target.
        strength: the chosen one of `TUNED` kinds, which is λ of those in `CHOSEN`.
    """
    made = generate(
        kernel, policy, kind_of(data, strength), n, lam=strength if data in CHOSEN else lam, bounds=BOUNDS, seed=seed,
        batch_size=512, prompts=[known(start) for start in starts] or None,
    )  # fmt: skip
    return Drawn(made.samples, made.result.cost.nfe)


def transitions_of(samples: Tensor, channels: Channels, ended: Ended) -> Transitions:
    """The steps of trajectories (n, H, C) up to the first end of the task.

    Raises:
        TreeSearchError: there are none.
    """
    seen, actions = channels.observations(samples), channels.actions(samples).clamp(*BOUNDS)
    over = ended(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
    alive = (over[:, :-1].cumsum(1) == 0).flatten()
    if not alive.any():
        raise TreeSearchError(f"no transitions: all {len(samples)} trajectories begin where the task has ended")
    steps = (seen[:, :-1], actions[:, :-1], channels.rewards(samples)[:, :-1], seen[:, 1:], over[:, 1:])
    return Transitions(*(part.flatten(0, 1)[alive].clone() for part in steps))


def log_policy(samples: Tensor, channels: Channels, policy: nn.Module) -> float:
    """(1/H) Σ_h log π(a_h | s_h), mean over trajectories (n, H, C)."""
    return float(PolicyLikelihood(policy, channels, BOUNDS)(samples).mean()) / samples.shape[1]


def figures(samples: Tensor, channels: Channels, policy: nn.Module, task: Task, real: Transitions) -> Figures:
    """What trajectories (n, H, C) are worth; errors are root mean squares, of s' in deviations of the real data."""
    found, std = transitions_of(samples, channels, task.ended), real.observations.std(0) + 1e-6
    pick = np.random.default_rng(0).permutation(len(found))[:CHECKED]
    checked = found.take(torch.from_numpy(pick))
    after, rewards = Simulator(task).step(checked.observations.numpy(), checked.actions.numpy())
    gaps = (torch.from_numpy(after).float() - checked.after) / std
    positions = [(x.observations / std)[:, None, :2] for x in (found, real)]
    return {
        "distinct": len(samples.unique(dim=0)),
        "log π": log_policy(samples, channels, policy),
        "dynamics error": float(gaps.square().mean().sqrt()),
        "reward error": float((torch.from_numpy(rewards).float() - checked.rewards).square().mean().sqrt()),
        "coverage": coverage(positions[0], positions[1], CELL),
        "reward": float(found.rewards.mean()),
        "ends": float(found.terminated.float().mean()),
    }
