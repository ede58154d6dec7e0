"""Locomotion: medium-replay data from an agent whose actions are disturbed to different degrees, and plans executed.

    a = clip(tanh(μ(s)) + σ ε, -1, 1),   σ drawn for each episode from `noise`

An episode of low σ is the agent's own, one of high σ is barely a gait: a mixture of grades, like the replay buffer of
an agent that is half trained, which a model imitates as a whole and a search can choose from.

    python -m experiments.planning.locomotion --agent sac_HalfCheetah.npz --out runs/locomotion/halfcheetah.npz

Agents: npz files of an actor observation-256-256-action (relu, tanh at the end), weights `latent_pi.{0,2}` and `mu`.
Environments: gymnasium's MuJoCo tasks. Name of the mixture: D4RL (Fu et al., 2020), section 5, "medium-replay".
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.offline.arrays import read_npz

Array = NDArray[Any]
NOISE = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the data script."""

    agent: Path
    """npz file of the actor's weights."""
    out: Path = Path("runs/locomotion/halfcheetah.npz")
    environment: str = "HalfCheetah-v5"
    steps: int = 300_000
    limit: int = 150
    """Steps an episode: short ones, so that the standing start of a plan's episode is no rarity in the data."""
    noise: tuple[float, ...] = NOISE
    """σ of an episode is one of them; a single one for "medium" data."""
    seed: int = 0


@dataclass(frozen=True)
class Actor:
    """The mean action of an agent.

    Args:
        weights, biases: of its three layers.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]

    @staticmethod
    def load(path: Path) -> Actor:
        """From an npz file.

        Raises:
            ValueError: arrays that are missing.
        """
        names = ("latent_pi.0", "latent_pi.2", "mu")
        file = read_npz(path)
        if lost := [f"{n}.{part}" for n in names for part in ("weight", "bias") if f"{n}.{part}" not in file]:
            raise ValueError(f"{path.name} is no actor of this kind: it lacks {', '.join(lost)}")
        arrays = [tuple(file[f"{n}.{part}"] for n in names) for part in ("weight", "bias")]
        return Actor(*arrays)

    def act(self, observation: Array) -> Array:
        """Actions (..., A) in [-1, 1] for observations (..., S)."""
        x = observation
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = np.maximum(x @ weight.T + bias, 0.0)
        return np.tanh(x @ self.weights[-1].T + self.biases[-1])


class Data(NamedTuple):
    """Steps in order, with D4RL's names."""

    observations: Array  # (n, S) float32
    actions: Array  # (n, A) float32
    rewards: Array  # (n,) float32
    terminals: Array  # (n,) bool
    timeouts: Array  # (n,) bool
    next_observations: Array  # (n, S) float32


def make(environment: str) -> Any:
    """A MuJoCo environment without its limit of time.

    Raises:
        ImportError: gymnasium or MuJoCo is missing.
    """
    try:
        import gymnasium
        import mujoco
    except ImportError as error:
        raise ImportError("locomotion needs gymnasium and mujoco: pip install 'treesearch[rl]'") from error
    mujoco.set_mju_user_warning(_warned)
    return gymnasium.make(environment).unwrapped


def _warned(message: str) -> None:
    """Without a handler MuJoCo writes a file of warnings; that gymnasium's models are dated is none."""
    if "deprecated" not in message:
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def generate(actor: Actor, environment: str, steps: int, limit: int, seed: int, noise: Sequence[float] = NOISE) -> Data:
    """At least `steps` steps: whole episodes of up to `limit` steps, σ of each one of `noise`."""
    env, rng = make(environment), np.random.default_rng(seed)
    rows: list[tuple[Array, Array, float, bool, bool, Array]] = []
    while len(rows) < steps:
        seen, _ = env.reset(seed=int(rng.integers(2**31)))
        sigma = noise[rng.integers(len(noise))]
        for step in range(limit):
            action = actor.act(seen)
            action = np.clip(action + sigma * rng.standard_normal(action.shape), -1, 1).astype(np.float32)
            after, reward, terminal, _, _ = env.step(action)
            rows.append((seen, action, float(reward), bool(terminal), step == limit - 1 and not terminal, after))
            seen = after
            if terminal:
                break
    types = (np.float32, np.float32, np.float32, bool, bool, np.float32)
    return Data(*(np.array(column, kind) for column, kind in zip(zip(*rows, strict=True), types, strict=True)))


class Runners:
    """n environments that execute pieces of plans.

    Args:
        environment: makes one.
        seeds: of the first states, one an environment.
    """

    def __init__(self, environment: Callable[[], Any], seeds: Sequence[int]) -> None:
        self.envs = [environment() for _ in seeds]
        self.observations = np.array([env.reset(seed=s)[0] for env, s in zip(self.envs, seeds, strict=True)])
        self.returns = np.zeros(len(seeds))
        self.alive = np.ones(len(seeds), bool)

    def run(self, actions: Array) -> Array:
        """Make the k steps of actions (n, k, A), clipped to [-1, 1]; returns observations (n, S).

        An environment that has ended stays as it is and earns no more.
        """
        for i, env in enumerate(self.envs):
            for action in np.clip(np.asarray(actions[i], np.float64), -1, 1):
                if not self.alive[i]:
                    break
                self.observations[i], reward, terminal, _, _ = env.step(action)
                self.returns[i] += float(reward)
                self.alive[i] = not terminal
        return self.observations.copy()


def episode_returns(data: Data) -> Array:
    """Undiscounted return of each episode."""
    ends = np.flatnonzero(data.terminals | data.timeouts)
    return np.diff(data.rewards.cumsum(dtype=np.float64)[ends], prepend=0.0)


def main(args: Args) -> None:
    """Write the data set and say what is in it."""
    start = time.monotonic()
    data = generate(Actor.load(args.agent), args.environment, args.steps, args.limit, args.seed, args.noise)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, **data._asdict())
    found = episode_returns(data)
    print(
        f"{args.environment}: {len(data.rewards)} steps, {len(found)} episodes, {time.monotonic() - start:.0f} s; "
        f"return {found.mean():.0f} on average, {found.min():.0f} to {found.max():.0f}"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
