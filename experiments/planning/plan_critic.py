"""A critic for mazes, learnt in hindsight from the behaviour's data: the reward of best-of-N by Q.

    Q(s_h, a_h, g) ≈ γ^k   g the position k rows later in the same segment      three draws in four
                     0     g a position of another segment                    the fourth

γ^k is the return of a goal that is entered once, k rows later, under the behaviour; positions of other segments count
as never reached, so that Q is low where actions lead away. Good for ranking, not for reading times off. An
ensemble of networks is fitted by least squares; `trajectories.critic.Critic` takes its smallest value, at one row or
averaged over all of a plan. The goal is part of the observation.

Sources: Hindsight Experience Replay (Andrychowicz et al., 2017), section 4.1, for goals taken from the future;
Addressing Function Approximation Error in Actor-Critic Methods (Fujimoto et al., 2018), eq. 10, for the minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.planning.pointmaze import generate
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.rewards.trajectories.critic import Critic
from treesearch.rewards.trajectories.trajectory import goals

DISCOUNT = 0.98
ELSEWHERE = 0.25  # share of goals from other segments
MEMBERS = 3
WIDTH = 128
STEPS = 3_000
BATCH = 1_024
DATA_STEPS = 200_000
DATA_SEED = 4_000_000


def network(inputs: int) -> nn.Sequential:
    """One member."""
    return nn.Sequential(
        nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1), nn.Sigmoid()
    )


class Member(nn.Module):
    """Q of observations (n, S + 2), the goal last, and actions (n, A)."""

    def __init__(self, observation: int, action: int) -> None:
        super().__init__()
        self.layers = network(observation + 2 + action)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.layers(torch.cat([observations, actions], -1))[..., 0]


def hindsight(rows: Tensor, last: Tensor, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """n draws: (s, a, g) (n, C + 2) and their values (n,), of rows (N, C) whose segments end at `last` (N,)."""
    at, other = (torch.randint(0, len(rows), (n,), generator=draw) for _ in range(2))
    ahead = (torch.rand(n, generator=draw) * (last[at] - at + 1)).long()
    apart = (torch.rand(n, generator=draw) < ELSEWHERE) & (last[other] != last[at])
    goal = torch.where(apart, other, at + ahead)
    return torch.cat([rows[at], rows[goal, :2]], 1), torch.where(apart, 0.0, DISCOUNT ** ahead.float())


def train(rows: Tensor, last: Tensor, observation: int, steps: int, seed: int) -> Member:
    """One member, fitted by least squares."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        member = Member(observation, rows.shape[1] - observation)
    optimiser = torch.optim.Adam(member.parameters(), 1e-3)
    for _ in range(steps):
        known, value = hindsight(rows, last, BATCH, draw)
        s, a, g = known.split([observation, rows.shape[1] - observation, 2], 1)
        loss = (member(torch.cat([s, g], 1), a) - value).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return member.eval().requires_grad_(False)


def data_of(maze: str, stride: int, steps: int = DATA_STEPS) -> tuple[Tensor, Tensor]:
    """Rows (N, 6), every `stride` steps of the behaviour, and the last row of each one's segment."""
    data, _ = generate(maze, steps, 192, DATA_SEED)
    segment = np.concatenate([[0], np.cumsum(data.timeouts)[:-1]])
    kept = np.arange(0, len(segment), stride)
    rows = torch.from_numpy(np.concatenate([data.observations, data.actions], 1)[kept])
    last = np.searchsorted(segment[kept], segment[kept], side="right") - 1
    return rows, torch.from_numpy(last)


@cache
def ensemble(maze: str, stride: int, folder: Path = Path("runs/planning")) -> tuple[Member, ...]:
    """The critics of a maze, from their file or trained: a minute."""
    from safetensors.torch import load_file, save_file

    file = folder / f"critic-{maze}-{stride}.safetensors"
    if not file.exists():
        rows, last = data_of(maze, stride)
        members = [train(rows, last, 4, STEPS, seed) for seed in range(MEMBERS)]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({f"{i}.{k}": v for i, m in enumerate(members) for k, v in m.state_dict().items()}, file)
    stored, members = load_file(file), [Member(4, 2) for _ in range(MEMBERS)]
    for i, member in enumerate(members):
        own = {k.split(".", 1)[1]: v for k, v in stored.items() if k.startswith(f"{i}.")}
        member.load_state_dict(own)
        member.eval().requires_grad_(False)
    return tuple(members)


def critic_reward(maze: str, channels: Channels, stride: int, *, row: int | None = None) -> Reward:
    """r = min_j Q_j(s_h, a_h, goal) at row h, or its mean over rows; the goal is the prompt's."""
    return with_goal(ensemble(maze, stride), channels, row)


def with_goal(members: Sequence[Member], channels: Channels, row: int | None) -> Reward:
    """The critic of trajectories that do not say where they should end."""
    inner = Critic(list(members), Channels(channels.observation + 2, channels.action), row=row)

    def fn(samples: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        target = samples.new_tensor(goals(len(samples), prompts, None, 2))[:, None].expand(-1, samples.shape[1], -1)
        parts = [channels.observations(samples), target, channels.actions(samples)]
        return inner.attached(torch.cat(parts, 2), None)

    return Reward(fn, f"critic(row={row})", settings=(f"hindsight(row={row}, members={len(members)})",))
