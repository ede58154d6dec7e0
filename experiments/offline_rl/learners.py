"""Learners of logged transitions: TD3+BC and IQL by TorchRL's losses, in chunks of steps that a run can stop between.

    TD3+BC   Q_j: E (Q_j(s, a) - r - γ min_j Q̄_j(s', π̄(s') + clipped noise))²;   π: max E λ Q_1(s, π(s)) - |π(s) - a|²
    IQL      V: E |τ - 1(Q̄ < V)| (Q̄(s, a) - V(s))²;   Q_j: E (r + γ V(s') - Q_j)²;   π: max E exp(β (Q̄ - V)) log π(a|s)

π is tanh of a network; IQL's density is a Gaussian about it, of a learnt std that no state changes, as its authors have
it: a squashed one has none at clipped actions, which the data are full of. Observations are normalised by the real
data's moments. Draws of a chunk depend on (seed, chunk) only, and a chunk ends with finite weights or with those before
it: a learner that diverges says so and keeps the last finite ones.

Deviations of TD3+BC: where the actor has a step, it steps on the critics as they were before their update of that step,
by the same Adam, and it has the first step of every `delay`; TD3 updates critics first, and the actor in the last.

Sources: A Minimalist Approach to Offline Reinforcement Learning (Fujimoto and Gu, 2021). Offline Reinforcement Learning
with Implicit Q-Learning (Kostrikov et al., 2022).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from treesearch.errors import StoreError, TreeSearchError, missing
from treesearch.offline.data import OfflineData

LEARNERS = ("td3bc", "iql")


class Diverged(TreeSearchError):
    """Learning came to weights that are not finite; the last finite ones are kept."""


@dataclass(frozen=True)
class Transitions:
    """Steps (s, a, r, s', whether s' ended the task), float32 but for the last.

    Args:
        observations, after: (n, S).
        actions: (n, A).
        rewards: (n,).
        terminated: (n,) bool.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    after: Tensor
    terminated: Tensor

    def __len__(self) -> int:
        return len(self.rewards)

    def take(self, rows: Tensor) -> Transitions:
        """Those of some rows."""
        return Transitions(*(getattr(self, field.name)[rows] for field in fields(self)))

    def joined(self, other: Transitions) -> Transitions:
        """These, then the other ones."""
        return Transitions(*(torch.cat([getattr(x, f.name) for x in (self, other)]) for f in fields(self)))


def transitions_of(data: OfflineData) -> Transitions:
    """All steps whose next observation is known, or does not matter because the task ended.

    Raises:
        TreeSearchError: rewards that are all the same, of which nothing can be learnt, or no such steps.
    """
    if data.rewards.min() == data.rewards.max():
        raise TreeSearchError(f"{data.source}: every reward is {data.rewards[0]:g}: give the rewards of a task")
    seen, last = torch.from_numpy(data.observations), torch.from_numpy(data.ends - 1)
    over = torch.from_numpy(data.terminated)
    after = torch.roll(seen, -1, 0)
    after[last] = seen[last] if data.closing is None else torch.from_numpy(data.closing)
    terminated = torch.zeros(len(seen), dtype=torch.bool)
    terminated[last] = over
    known = torch.ones(len(seen), dtype=torch.bool)
    known[last] = over | (data.closing is not None)
    if not known.any():
        raise TreeSearchError(f"{data.source}: no step leads to a known observation: give longer episodes")
    every = Transitions(seen, torch.from_numpy(data.actions), torch.from_numpy(data.rewards), after, terminated)
    return every.take(known.nonzero().flatten())


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of both learners: the papers' own but for smaller networks and batches, and a learning rate for few steps."""

    width: int = 128
    """of two layers"""
    batch_size: int = 128
    """transitions of a step"""
    lr: float = 1e-3
    """of Adam"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """of target networks"""
    chunk: int = 250
    """steps between checks and checkpoints"""
    alpha: float = 2.5
    """λ = α / mean |Q| of TD3+BC"""
    delay: int = 2
    """steps of its critics to one of its actor"""
    expectile: float = 0.7
    """τ of IQL"""
    temperature: float = 3.0
    """β of IQL"""


class Normalised(nn.Module):
    """A network of observations (n, S) by their mean and std in the data."""

    mean: Tensor
    std: Tensor

    def __init__(self, observations: Tensor, net: nn.Module) -> None:
        super().__init__()
        std, mean = torch.std_mean(observations, 0)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std + 1e-3)
        self.net = net

    def normal(self, observations: Tensor) -> Tensor:
        return (observations - self.mean) / self.std


class Mean(Normalised):
    """tanh of a network of normalised observations (n, S): actions (n, A)."""

    def __init__(self, observations: Tensor, actions: int, width: int) -> None:
        super().__init__(observations, mlp(observations.shape[1], actions, width))

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(self.normal(observations)).tanh()


class Law(nn.Module):
    """The mean, and a std (n, A) that no state changes."""

    def __init__(self, mean: Mean, actions: int) -> None:
        super().__init__()
        self.inner, self.log_std = mean, nn.Parameter(torch.zeros(actions))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.inner(observations)
        return mean, self.log_std.clamp(-5, 2).exp().expand_as(mean)


class Worth(Normalised):
    """A number (n, 1) of normalised observations, and actions where it is given some."""

    def __init__(self, observations: Tensor, actions: int, width: int) -> None:
        super().__init__(observations, mlp(observations.shape[1] + actions, 1, width))

    def forward(self, observations: Tensor, *actions: Tensor) -> Tensor:
        return self.net(torch.cat([self.normal(observations), *actions], -1))


def mlp(inputs: int, outputs: int, width: int) -> nn.Sequential:
    """Two hidden layers of relu."""
    hidden = (nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


class Learner:
    """One of `LEARNERS`, at its first step.

    Args:
        name: which.
        real: whose moments normalise observations.
        settings: of the learner.
        seed: of first weights and all draws.
        scale: of rewards.
    """

    def __init__(self, name: str, real: Transitions, settings: Settings, seed: int, scale: float = 1.0) -> None:
        if name not in LEARNERS:
            raise ValueError(f"unknown learner {name!r}: choose {', '.join(LEARNERS)}")
        self.name, self.settings, self.seed, self.scale, self.step = name, settings, seed, scale, 0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.mean, self.loss, self.target = _losses(name, real, settings)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=settings.lr)

    def learn(self, data: Transitions, steps: int, file: Path | None = None) -> Learner:
        """Go on to step `steps` on some data; with a file from where it was, kept there after each chunk.

        Raises:
            Diverged: weights or losses were not finite; those before the chunk are in place and in the file.
            StoreError: a file that is damaged, or of another learner or seed.
        """
        if file is not None and file.exists():
            self.load(file)
        while self.step < steps:
            before, kept = self.state(), self.step
            found = self._chunk(data, min(self.settings.chunk, steps - self.step))
            if not (found.isfinite().all() and all(v.isfinite().all() for v in self.loss.state_dict().values())):
                self._restore(before)
                raise Diverged(
                    f"{self.name} diverged between steps {kept} and {self.step + self.settings.chunk}; the weights of "
                    f"step {kept} are kept: lower the learning rate, or look at the rewards"
                )
            if file is not None:
                self.save(file)
        return self

    def _chunk(self, data: Transitions, steps: int) -> Tensor:
        """So many steps; returns their losses."""
        found = []
        with torch.random.fork_rng():
            torch.manual_seed(1_000_003 * (self.seed + 1) + self.step)
            for _ in range(steps):
                rows = data.take(torch.randint(len(data), (self.settings.batch_size,)))
                found.append(self._update(self._batch(rows)))
        return torch.stack(found)

    def _batch(self, rows: Transitions) -> Any:
        from tensordict import TensorDict

        over = rows.terminated[:, None]
        after = {"observation": rows.after, "reward": self.scale * rows.rewards[:, None], "done": over}
        given = {"observation": rows.observations, "action": rows.actions, "next": after | {"terminated": over}}
        return TensorDict(given, [len(rows)])

    def _update(self, batch: Any) -> Tensor:
        if self.name == "iql":
            losses = self.loss(batch)
            total = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]
        else:
            total = self.loss.qvalue_loss(batch)[0]
            if self.step % self.settings.delay == 0:
                total = total + self.loss.actor_loss(batch)[0]
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        if self.name == "iql" or self.step % self.settings.delay == 0:
            self.target.step()
        self.step += 1
        return total.detach()

    def policy(self) -> nn.Module:
        """π(s), a copy of what it is now."""
        return copy.deepcopy(self.mean).requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds, as it is now."""
        weights, optimizer = dict(self.loss.state_dict()), self.optimizer.state_dict()
        return copy.deepcopy({"loss": weights, "optimizer": optimizer, "step": self.step, "seed": self.seed})

    def save(self, file: Path) -> None:
        """Write the checkpoint so that a crash leaves the old or the new one, never a part."""
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.state(), file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)

    def load(self, file: Path) -> Learner:
        """Go on from a checkpoint.

        Raises:
            StoreError: a damaged one, or of another learner or seed.
        """
        try:
            kept = torch.load(file, weights_only=True)
            if (seed := kept["seed"]) != self.seed:
                raise StoreError(f"{file} is of seed {seed}, not {self.seed}: remove it to begin anew")
            self._restore(kept)
        except (OSError, EOFError, UnpicklingError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{file} is damaged, or no checkpoint of this {self.name}: remove it to begin anew"
            ) from error
        return self

    def _restore(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def _losses(name: str, real: Transitions, settings: Settings) -> tuple[Mean, Any, Any]:
    """π, TorchRL's loss over it and critics, and the updater of target networks."""
    try:
        from tensordict.nn import TensorDictModule
        from torchrl.modules import ProbabilisticActor, ValueOperator
        from torchrl.modules.distributions import IndependentNormal
        from torchrl.objectives import IQLLoss, SoftUpdate, TD3BCLoss
    except ImportError as error:
        raise missing("torchrl", "rl") from error
    seen, size = real.observations, real.actions.shape[1]
    mean = Mean(seen, size, settings.width)
    critic = ValueOperator(Worth(seen, size, settings.width), in_keys=["observation", "action"])
    how: dict[str, Any] = {"loss_function": "l2", "deactivate_vmap": True}  # on a CPU faster than vmap
    if name == "iql":
        law = TensorDictModule(Law(mean, size), in_keys=["observation"], out_keys=["loc", "scale"])
        actor = ProbabilisticActor(
            law, in_keys=["loc", "scale"], distribution_class=IndependentNormal, distribution_kwargs={"tanh_loc": False}
        )
        value = ValueOperator(Worth(seen, 0, settings.width), in_keys=["observation"])
        how |= {"temperature": settings.temperature, "expectile": settings.expectile}
        loss: Any = IQLLoss(actor, critic, value, **how)
    else:
        actor = TensorDictModule(mean, in_keys=["observation"], out_keys=["action"])
        bound = torch.ones(size)
        loss = TD3BCLoss(actor, critic, bounds=(-bound, bound), alpha=settings.alpha, **how)
    loss.make_value_estimator(gamma=settings.gamma)
    return mean, loss, SoftUpdate(loss, tau=settings.tau)
