"""Environments whose action is the noise w of a frozen policy: what a learner of noise is put into.

    w in [-b, b]^d -> a = π(s, w) -> the chunk a_0..a_{H-1} is made, its rewards are summed          `NoiseEnv`
    w in [-b, b]^d -> x_0 = π(prompt, w) -> r(x_0), and the episode ends                             `Prompted`

Source: Steering Your Diffusion Policy with Latent Space Reinforcement Learning (Wagenmaker et al., 2025), sec. 4.1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import fingerprint
from treesearch.policies.episodes import bounded, finite
from treesearch.policies.frozen import FrozenPolicy
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.numeric import is_positive, is_whole

try:
    import gymnasium
    from gymnasium.spaces import Box
except ImportError as error:
    raise ImportError("environments need gymnasium: pip install 'treesearch[rl]'") from error

Array = NDArray[Any]
Read = Callable[[Any], Any]
"""An observation of the environment -> the numbers that the policy observes."""


class Noisy(gymnasium.Env[Array, Array]):
    """What environments of noise share: spaces, and the state x_0 that a step decoded, `info["state"]` (d',).

    Args:
        frozen: π.
        observed: numbers of an observation.
        bound: b.
    """

    def __init__(self, frozen: FrozenPolicy, observed: int, bound: float) -> None:
        if not is_positive(bound):
            raise ValueError(f"bound is {bound!r}, expected a positive number, in standard deviations of the noise")
        self.frozen = frozen
        self.observation_space = Box(-math.inf, math.inf, (observed,), np.float32)
        self.action_space = Box(-bound, bound, (frozen.size,), np.float32)
        self.seen = np.zeros(observed, np.float32)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its episodes from those of others beside π and b, for json; None for what cannot be told."""
        raise NotImplementedError

    def _made(self, noise: Array) -> Tensor:
        """x_0 (1, *state) of noise (d,) at what is seen now."""
        return self.frozen.states(torch.as_tensor(self.seen)[None], torch.as_tensor(noise, dtype=torch.float32)[None])


@final
class NoiseEnv(Noisy):
    """An environment of actions under a policy of chunks.

    Args:
        env: of single actions; give it a history (gymnasium's `FrameStackObservation`) where the policy is told one.
        frozen: whose samples are chunks (H, A).
        execute: actions of a chunk that are made; None for all.
        bound: b.
        read: numbers that the policy is told of an observation; None for all of them in a row.

    What a store knows the environment's rewards by is the code of its class and wrappers, the functions that they hold,
    what `gymnasium.make` was told, and the `fingerprint` of the innermost, where it has one: it says what else differs.

    Raises:
        ValueError: a setting out of range; when stepped, observations of other numbers than the policy's, rewards or
            actions that are not finite, or actions so far out of bounds that they must be in other units.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        frozen: FrozenPolicy,
        *,
        execute: int | None = None,
        bound: float = 1.5,
        read: Read | None = None,
    ) -> None:
        if not isinstance(env.action_space, Box) or frozen.observed is None:
            raise ValueError("expected an environment with a Box of actions and a kernel of policies (`observed`)")
        super().__init__(frozen, frozen.observed, bound)
        none = torch.zeros(1, *frozen.spec.state_shape, device=frozen.spec.device)
        chunk, *action = frozen.kernel.decode(none).shape[1:]
        if tuple(action) != env.action_space.shape:
            raise ValueError(
                f"the policy's actions have shape {tuple(action)}, the environment takes {env.action_space}"
            )
        self.execute = chunk if execute is None else execute
        if not is_whole(self.execute, 1, chunk):
            raise ValueError(f"execute is {execute!r}, expected 1..{chunk}, the actions of a chunk")
        self.env, self.read, self.box = env, read, env.action_space

    @property
    def identity(self) -> dict[str, Any]:
        made, spec = type(self.env.unwrapped), self.env.spec
        return {
            "environment": f"{made.__module__}.{made.__qualname__} {spec.id if spec else ''}".strip(),
            "rewards": content_of(self.env),
            "execute": self.execute,
            "read": fingerprint.of(self.read),
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        observation, info = self.env.reset(seed=seed, options=options)
        self.seen = self.numbers(observation)
        return self.seen, info

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Denoise one chunk and make its actions; an episode that ends within it ends there."""
        state = self._made(action)
        made = self.executed(self.frozen.kernel.decode(state)[0])
        total, ended, cut, info, observation = 0.0, False, False, {}, None
        for one in made:
            observation, reward, ended, cut, info = self.env.step(one)
            total += finite(reward)
            if ended or cut:
                break
        self.seen = self.numbers(observation)
        return self.seen, total, bool(ended), bool(cut), info | {"state": state.flatten().cpu().numpy()}

    def executed(self, chunk: Tensor) -> Array:
        """The actions (k, A) of a chunk (H, A) that are made, within bounds.

        Raises:
            ValueError: numbers that are not finite, or actions that seem to be in other units.
        """
        return bounded(chunk[: self.execute], self.box)

    def numbers(self, observation: Any) -> Array:
        """What the frozen policy observes, (O,).

        Raises:
            ValueError: other numbers than the policy's.
        """
        if self.read is None and isinstance(observation, dict):
            raise ValueError(f"observations have the keys {sorted(observation)}: say by `read` what the policy is told")
        try:
            told = observation if self.read is None else self.read(observation)
        except KeyError as error:
            raise ValueError(f"observations have no {error}, only {sorted(observation)}") from error
        try:
            seen = np.asarray(told, np.float32).reshape(-1)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"an observation is a {type(told).__name__}, expected numbers: say by `read` what the policy is told"
            ) from error
        size = self.frozen.kernel.observed
        if seen.shape != (size,):
            raise ValueError(
                f"an observation has {seen.size} numbers, expected {size}: give the environment the history that the "
                "policy is told (gymnasium's FrameStackObservation)"
            )
        if not np.isfinite(seen).all():
            raise ValueError(f"an observation has numbers that are not finite: {seen.tolist()}")
        return self.frozen.features(torch.as_tensor(seen)[None])[0].cpu().numpy()


def content_of(env: gymnasium.Env[Any, Any]) -> str | None:
    """What tells an environment's rewards from those of others of its class; None for what cannot be told."""
    layers, inner = [], env
    while inner is not env.unwrapped:
        layers.append(_held(inner))
        inner = inner.env  # type: ignore[attr-defined]
    told = None if env.spec is None else env.spec.kwargs
    return fingerprint.of([layers, _held(inner), getattr(inner, "fingerprint", None), told])


def _held(layer: Any) -> list[Any]:
    """Its class, and the functions that it holds."""
    functions = {name: value for name, value in vars(layer).items() if inspect.isroutine(value)}
    return [type(layer), functions]


@final
class Prompted(Noisy):
    """One sample of any kernel an episode: the noise of a prompt, then its reward.

    Args:
        frozen: made with `ask=Among(prompts)`, which reads a prompt off its place.
        reward: of samples and prompts.
        prompts: that episodes are about, one at random each.
        bound: b.
    """

    def __init__(
        self, frozen: FrozenPolicy, reward: Reward | Callable[..., Any], prompts: Sequence[Any], *, bound: float = 1.5
    ) -> None:
        if not len(prompts):
            raise ValueError("expected one prompt or more, [None] for a kernel that takes none")
        super().__init__(frozen, len(prompts), bound)
        self.reward, self.prompts = as_reward(reward), list(prompts)

    @property
    def identity(self) -> dict[str, Any]:
        reward = self.reward
        return {
            "prompts": fingerprint.of(self.prompts),
            "ask": fingerprint.of(self.frozen.ask),
            "reward": reward.source or fingerprint.of([reward.fn, reward.name, reward.settings]),
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = int(self.np_random.integers(len(self.prompts)))
        self.seen = np.eye(len(self.prompts), dtype=np.float32)[self.at]
        return self.seen, {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        state = self._made(action)
        samples = state if self.reward.input == "state" else self.frozen.kernel.decode(state)
        value = float(self.reward(samples, [self.prompts[self.at]])[0])
        if not math.isfinite(value):
            raise ValueError(f"reward {self.reward.name!r} is {value}: learn from finite rewards, clip or gate it")
        return self.seen, value, True, False, {"state": state.flatten().cpu().numpy()}


@final
class Among:
    """Observations (n, P) of `Prompted` -> the prompts whose places they mark."""

    def __init__(self, prompts: Sequence[Any]) -> None:
        self.prompts = list(prompts)

    def __call__(self, observations: Tensor) -> list[Any]:
        return [self.prompts[i] for i in observations.argmax(1).tolist()]

    def marks(self, prompts: Sequence[Any]) -> Tensor:
        """Observations (n, P) that mark the places of prompts.

        Raises:
            ValueError: a prompt that is not among them.
        """
        absent = [prompt for prompt in prompts if prompt not in self.prompts]
        if absent:
            raise ValueError(f"prompt {absent[0]!r} is none of the {len(self.prompts)} that noise was learnt for")
        return torch.eye(len(self.prompts))[[self.prompts.index(prompt) for prompt in prompts]]
