"""Critics and policies of reinforcement-learning libraries as rewards of trajectories.

    Critic(stable_baselines_q(model), channels)               min over the model's own ensemble
    PolicyLikelihood(StableBaselinesPolicy(model), channels)

Each is called in the library's own units: observations are normalised by the statistics that the agent was taught with,
actions scaled as it scales them. Nothing of these libraries is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

Q = Callable[[Tensor, Tensor], Tensor]


class Normalised(nn.Module):
    """(s - mean) / √(var + ε), cut to ±limit: what `VecNormalize` of Stable-Baselines3 does.

    Args:
        normaliser: with `obs_rms`, `epsilon` and `clip_obs`; None, or one of rewards alone (`norm_obs=False`), leaves
            observations as they are.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, normaliser: Any = None) -> None:
        super().__init__()
        self.limit, self.epsilon = None, 0.0
        if normaliser is not None and getattr(normaliser, "norm_obs", True):
            rms = normaliser.obs_rms
            if isinstance(rms, dict):
                raise ValueError(f"observations have the keys {sorted(rms)}, expected one vector of numbers")
            self.limit, self.epsilon = float(normaliser.clip_obs), float(normaliser.epsilon)
            self.register_buffer("mean", torch.as_tensor(rms.mean, dtype=torch.float32))
            self.register_buffer("var", torch.as_tensor(rms.var, dtype=torch.float32))

    def forward(self, observations: Tensor) -> Tensor:
        if self.limit is None:
            return observations
        return ((observations - self.mean) / (self.var + self.epsilon).sqrt()).clamp(-self.limit, self.limit)


@final
class StableBaselinesQ(nn.Module):
    """min_j Q_j(s, a) (n,) of a Stable-Baselines3 agent with critics of actions (SAC, TD3, DDPG).

    Args:
        model: the agent.
        normaliser: its `VecNormalize`; None takes the one that the agent holds, if any.

    Raises:
        ValueError: an agent without such critics.
    """

    low: Tensor
    high: Tensor

    def __init__(self, model: Any, normaliser: Any = None) -> None:
        super().__init__()
        if not hasattr(model, "critic"):
            raise ValueError(f"{type(model).__name__} has no critic of actions: expected SAC, TD3 or DDPG")
        self.critic = model.critic
        self.normalised = Normalised(normaliser or model.get_vec_normalize_env())
        self.register_buffer("low", torch.as_tensor(model.action_space.low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(model.action_space.high, dtype=torch.float32))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        scaled = 2 * (actions - self.low) / (self.high - self.low) - 1
        return torch.cat(tuple(self.critic(self.normalised(observations), scaled)), 1).amin(1)


@final
class StableBaselinesPolicy(nn.Module):
    """log π(a | s) of a Stable-Baselines3 SAC agent, in the environment's units of actions.

    Args:
        model, normaliser: as for `StableBaselinesQ`.

    Raises:
        ValueError: an agent whose actor has no density, or one that depends on its exploration (`use_sde=True`).
    """

    low: Tensor
    high: Tensor

    def __init__(self, model: Any, normaliser: Any = None) -> None:
        super().__init__()
        if not hasattr(model.actor, "get_action_dist_params"):
            raise ValueError(f"the actor of {type(model).__name__} has no density: expected SAC")
        if model.use_sde:
            raise ValueError("the noise of this agent depends on the state (use_sde=True), whose density is not known "
                             "here: train SAC with use_sde=False")  # fmt: skip
        self.actor = model.actor
        self.normalised = Normalised(normaliser or model.get_vec_normalize_env())
        self.register_buffer("low", torch.as_tensor(model.action_space.low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(model.action_space.high, dtype=torch.float32))

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """log π(a | s) (n,) of actions (n, A) strictly within their bounds."""
        mean, log_std, _ = self.actor.get_action_dist_params(self.normalised(observation))
        scaled = 2 * (action - self.low) / (self.high - self.low) - 1
        law = torch.distributions.TransformedDistribution(
            torch.distributions.Normal(mean, log_std.exp()), [torch.distributions.TanhTransform()]
        )
        return (law.log_prob(scaled) - ((self.high - self.low) / 2).log()).sum(-1)


def torchrl_q(module: Any, observation: str = "observation", action: str = "action") -> Q:
    """Q(s, a) of a TorchRL critic, a module of tensordicts (`ValueOperator`).

    Args:
        module: returns "state_action_value", or whatever its only output is called.
        observation, action: keys that it reads.

    Raises:
        ValueError: it reads other keys.
    """
    reads = [str(key) for key in module.in_keys]
    if not {observation, action} <= set(reads):
        raise ValueError(f"the critic reads {reads}, expected {observation!r} and {action!r} among them")
    if len(module.in_keys) != 2 or len(module.out_keys) != 1:
        raise ValueError(f"the critic reads {reads} and writes {module.out_keys}: expected two keys and one")

    def q(observations: Tensor, actions: Tensor) -> Tensor:
        given = {observation: observations, action: actions}
        found = module(**given)  # modules of tensordicts take tensors by key
        return found.flatten(0, -1)

    return q


def d3rlpy_q(algorithm: Any) -> Q:
    """Q(s, a) of a d3rlpy algorithm, its scalers of observations, actions and rewards included; without gradients.

    Args:
        algorithm: fitted or built, of continuous actions.
    """

    def q(observations: Tensor, actions: Tensor) -> Tensor:
        arrays = (v.detach().cpu().float().numpy() for v in (observations, actions))
        return torch.as_tensor(algorithm.predict_value(*arrays), dtype=torch.float32, device=observations.device)

    return q
