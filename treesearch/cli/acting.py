"""What `plan` and `steer` share: a policy, where it acts, and how it is shown what is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, final

import torch
from tyro.conf import arg

from treesearch.backends import lerobot
from treesearch.backends.models.policy import PolicyKernel, policy, with_eta
from treesearch.cli.base import Command
from treesearch.errors import UsageError
from treesearch.policies.environments import environment, told
from treesearch.policies.episodes import Read, Stacked, Told, flat
from treesearch.registry import expressions

NUM_STEPS = 5  # of a policy of this library


@dataclass(frozen=True, kw_only=True)
class Acting(Command):
    """A policy in an environment."""

    policy: str
    """weights of a policy of this library (.safetensors), a folder of LeRobot's, or the id of a hub"""
    env: str
    """an environment of gymnasium (PushT-v0, package:Name-v0), package.module:attr or ./file.py:attr"""
    env_settings: Annotated[str, arg(metavar="JSON")] = "{}"
    """what the environment is made with, such as '{"obs_type": "pixels_agent_pos"}'"""
    num_steps: int | None = None
    """denoising steps; the policy's own by default, 5 for one of this library"""
    steps: int | None = None
    """actions that are made before the next decision; all of a chunk by default"""
    device: str = "cpu"
    """of the policy"""

    def opened(self, eta: float, num_steps: int | None) -> Opened:
        """The policy, and what makes environments for it.

        Args:
            eta: noise of its steps.
            num_steps: T; None for the policy's own.

        Raises:
            UsageError, ValueError, ImportError, FileNotFoundError: something typed that is not there, or does not fit.
        """
        settings = _settings(self.env_settings)
        if not self.policy:
            raise UsageError("--policy is empty: name a file, a folder of LeRobot's or the id of a hub")
        _check_device(self.device)
        if self.policy.endswith(".safetensors"):
            kernel = policy(self.policy, NUM_STEPS if num_steps is None else num_steps, eta, self.device)
            read: Read = flat
        else:
            kernel, read = lerobot.from_pretrained(self.policy, num_steps, eta, self.device)
            settings = told(self.env, read.shapes) | settings

        def make() -> Any:
            return fitting(self._environment(settings), kernel, self.env)

        return Opened(kernel, read, make)

    def _environment(self, settings: dict[str, Any]) -> Any:
        _, colon, attribute = self.env.rpartition(":")
        if not colon or not attribute.partition("(")[0].isidentifier():
            return environment(self.env, settings)
        return expressions.load(self.env)(**settings) if settings else expressions.build(self.env, "environment", {})


@final
@dataclass(frozen=True)
class Opened:
    """A policy that was opened.

    Args:
        kernel: of its chunks.
        reads: what of an observation it is told.
        make: environments, each like the other.
    """

    kernel: Any  # a PolicyKernel, which has the kernel contract by passing it on
    reads: Read
    make: Callable[[], Any]

    @property
    def history(self) -> int:
        """h, observations that it is told."""
        return self.kernel.told.history

    @property
    def read(self) -> Told:
        """A reader of one observation that refuses another number of numbers."""
        return Told(self.reads, self.kernel.observed // self.history)

    def executed(self, steps: int | None) -> int:
        """Actions that are made before the next decision.

        Raises:
            UsageError: more than a chunk has.
        """
        kernel = self.kernel
        length = kernel.decode(torch.zeros(1, *kernel.state_shape, device=kernel.device)).shape[1]
        if steps is not None and not 1 <= steps <= length:
            raise UsageError(f"--steps {steps}: expected 1..{length}, the actions of a chunk")
        return length if steps is None else steps

    def noisy(self, env: Any, execute: int, bound: float) -> Any:
        """An environment whose actions are the noise of the policy with η = 0, as DSRL learns in it.

        Of LeRobot's it observes what their networks are told, pictures by their own encoders.
        """
        from gymnasium.spaces import Dict
        from gymnasium.wrappers import FrameStackObservation

        from treesearch.policies.frozen import FrozenPolicy
        from treesearch.policies.noise_env import NoiseEnv

        kernel: Any = with_eta(self.kernel, 0.0)
        plain = self.reads is flat and not isinstance(env.observation_space, Dict)  # as NoiseEnv reads by itself
        return NoiseEnv(
            FrameStackObservation(env, self.history),
            FrozenPolicy(kernel, encoded=self.reads is not flat),
            execute=execute,
            bound=bound,
            read=None if plain else Stacked(self.read, self.history),
        )


def fitting(env: Any, kernel: PolicyKernel, name: str) -> Any:
    """An environment that takes the actions of a policy.

    Raises:
        ValueError: it takes others, does not say which, or is of the older gym.
    """
    import gymnasium

    if (space := getattr(env, "action_space", None)) is None:
        raise ValueError(f"{name} has no action_space: expected an environment of gymnasium")
    if not isinstance(env, gymnasium.Env):
        raise ValueError(f"{name} makes {type(env).__name__}, expected a gymnasium.Env: wrap it as one")
    if not hasattr(space, "high") or space.shape != (kernel.channels.action,):
        raise ValueError(f"{name} takes actions {space}, the policy's have {kernel.channels.action} numbers")
    return env


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: this torch cannot compute there, expected cpu, cuda or mps") from error


def check_seed(seed: int) -> None:
    """Refuse what environments refuse.

    Raises:
        UsageError: it is negative.
    """
    if seed < 0:
        raise UsageError(f"--seed {seed}: expected 0 or more")


def _settings(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--env-settings {text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f'--env-settings {text!r}: expected an object, such as \'{{"obs_type": "state"}}\'')
    return found
