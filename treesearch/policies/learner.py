"""The two learners of DSRL on Stable-Baselines3's SAC: networks, replay, temperature and actor are its own.

SAC on noise:      Q(s, w) by TD, actor on Q

NA (noise aliased), for several w may give one action:

    Q^A   E (Q^A(s, a) - r - γ (min_j Q̄^A_j(s', π(s', w')) - α log π^W(w' | s')))²,   w' ~ π^W(s')
    Q^W   E_{w ~ N(0, I)} (Q^W_j(s, w) - Q^A_j(s, π(s, w)))²,  each j to its own
    π^W   max E (min_j Q^W_j(s, w) - α log π^W(w | s)),   w ~ π^W(s)

With search, which the paper has not: at n leaves of π^W(s') the target is the soft value of their tree,

    V(s') = α log (1/n) Σ_i exp((min_j Q̄^A_j(s', π(s', w_i)) - α log π^W(w_i | s')) / α)

the paper's own at n = 1, and less biased low as n grows; what is made and kept is the best of several leaves by Q^A.

Noise is scaled by 1/b, as Stable-Baselines3 scales actions. a is the state x_0 of the kernel.

Sources: Steering Your Diffusion Policy with Latent Space Reinforcement Learning (Wagenmaker et al., 2025), algorithm 1.
Soft Actor-Critic Algorithms and Applications (Haarnoja et al., 2018).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from treesearch.errors import TreeSearchError
from treesearch.policies.frozen import FrozenPolicy

try:
    from stable_baselines3 import SAC
    from stable_baselines3.common.policies import ContinuousCritic
    from stable_baselines3.common.utils import polyak_update
except ImportError as error:
    raise ImportError("DSRL needs stable-baselines3: pip install 'treesearch[rl]'") from error


UNSENT = ("replay_buffer", "env", "_vec_normalize_env", "_last_obs", "_last_original_obs", "_logger")


class Diverged(TreeSearchError):
    """Learning came to weights that are not finite; the last finite ones are kept."""


class NormedTanh(nn.Module):
    """tanh of layer-normalised features."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:]).tanh()


class NoiseSAC(SAC):
    """SAC on noise: warm-up by the frozen policy's own noise, weights that stay finite.

    Args:
        frozen: the policy that the noise is for.
        settings: of SAC.
    """

    def __init__(self, frozen: FrozenPolicy, **settings: Any) -> None:
        self.frozen = frozen
        super().__init__("MlpPolicy", **settings)

    def __getstate__(self) -> dict[str, Any]:
        """What was learnt, without what it learns from: workers are sent it."""
        return {name: value for name, value in vars(self).items() if name not in UNSENT}

    @property
    def bound(self) -> float:
        """b."""
        return float(self.action_space.high[0])  # type: ignore[attr-defined]

    def modules_of(self) -> dict[str, nn.Module]:
        """The networks that are learnt, by name."""
        return {"policy": self.policy}

    def optimizers_of(self) -> dict[str, torch.optim.Optimizer]:
        """Theirs."""
        assert self.ent_coef_optimizer is not None
        return {
            "actor": self.actor.optimizer,
            "critic": self.critic.optimizer,
            "temperature": self.ent_coef_optimizer,
        }

    def weights(self) -> dict[str, Tensor]:
        """All that is learnt, as it is now."""
        assert self.log_ent_coef is not None
        named = {f"{m}.{k}": v for m, net in self.modules_of().items() for k, v in net.state_dict().items()}
        return named | {"log_alpha": self.log_ent_coef.detach()}

    def moments(self) -> dict[str, Tensor]:
        """States of the optimisers, as they are now."""
        return {
            f"{name}.{index}.{key}": value
            for name, optimizer in self.optimizers_of().items()
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Put weights and states of the optimisers back."""
        assert self.log_ent_coef is not None
        for name, network in self.modules_of().items():
            own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
            network.load_state_dict(own)
        self.log_ent_coef.data.copy_(weights["log_alpha"])
        for name, optimizer in self.optimizers_of().items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in moments.items():
                if key.startswith(f"{name}."):
                    index, what = key.removeprefix(f"{name}.").split(".")
                    state.setdefault(int(index), {})[what] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """SAC's own steps, after which weights and states of optimisers are finite or as they were.

        Raises:
            Diverged: they were not.
        """
        before, moments = ({k: v.clone() for k, v in found.items()} for found in (self.weights(), self.moments()))
        self._train(gradient_steps, batch_size)
        bad = [name for name, value in (self.weights() | self.moments()).items() if not value.isfinite().all()]
        if bad:
            self.restore(before, moments)
            raise Diverged(
                f"after {self.num_timesteps} steps {len(bad)} tensors are not finite, first {bad[0]}; the last finite "
                "weights are kept: scale rewards to about 1, or lower the learning rate"
            )

    def _train(self, gradient_steps: int, batch_size: int) -> None:
        super().train(gradient_steps, batch_size)

    def _sample_action(self, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> tuple[Any, Any]:
        if self.num_timesteps >= learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        noise = torch.randn(n_envs, self.frozen.size).clamp(-self.bound, self.bound).numpy()
        return noise, noise / self.bound


class AliasedSAC(NoiseSAC):
    """NA: a critic of actions by TD, a critic of noise by distillation from it, the actor on that.

    Args:
        frozen: asked as a black box.
        noise_steps: distillation steps to a step of the critic of actions.
        leaves: noises of a decision, of which the best by the critic of actions is made.
        backup: noises of a target.
        settings: of SAC.
    """

    noise_critic: ContinuousCritic

    def __init__(
        self, frozen: FrozenPolicy, noise_steps: int, leaves: int = 1, backup: int = 1, **settings: Any
    ) -> None:
        self.noise_steps, self.leaves, self.backup = noise_steps, leaves, backup
        super().__init__(frozen, **settings)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.noise_critic = self.policy.make_critic(features_extractor=None)
        self.noise_optimizer = torch.optim.Adam(self.noise_critic.parameters(), lr=self.lr_schedule(1))

    def modules_of(self) -> dict[str, nn.Module]:
        return super().modules_of() | {"noise_critic": self.noise_critic}

    def optimizers_of(self) -> dict[str, torch.optim.Optimizer]:
        return super().optimizers_of() | {"noise_critic": self.noise_optimizer}

    def _store_transition(
        self, replay_buffer: Any, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: list[dict[str, Any]]
    ) -> None:
        """What is kept is the action, not its noise."""
        made = np.stack([info["state"] for info in infos])
        super()._store_transition(replay_buffer, made, new_obs, reward, dones, infos)

    def _sample_action(self, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> tuple[Any, Any]:
        noise, scaled = super()._sample_action(learning_starts, action_noise, n_envs)
        if self.leaves == 1 or self.num_timesteps < learning_starts:
            return noise, scaled
        best = self._best_leaf(torch.as_tensor(scaled, device=self.device)).cpu().numpy()
        return self.bound * best, best

    @torch.no_grad()
    def _best_leaf(self, own: Tensor) -> Tensor:
        """The best by Q^A of the actor's noise (1, d), scaled, of more of its draws, and of as many of the prior's."""
        seen = torch.as_tensor(self._last_obs, device=self.device).expand(self.leaves, -1)
        tried, _ = self.actor.action_log_prob(seen)
        tried[1::2] = torch.randn_like(tried[1::2]).div(self.bound).clamp(-1, 1)
        tried[:1] = own
        worth = torch.cat(self.critic(seen, self._made(seen, tried)), 1).amin(1)
        return tried[worth.argmax()][None]

    def _train(self, gradient_steps: int, batch_size: int) -> None:
        self.policy.set_training_mode(True)
        for _ in range(gradient_steps):
            data = self._batch(batch_size)
            alpha = self._temperature(data.observations)
            self._td(data, alpha)
            for _ in range(self.noise_steps):
                self._distil(self._batch(batch_size).observations)
            self._improve(data.observations, alpha)
            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        self._n_updates += gradient_steps

    def _batch(self, size: int) -> Any:
        assert self.replay_buffer is not None
        return self.replay_buffer.sample(size)

    def _made(self, observations: Tensor, scaled: Tensor) -> Tensor:
        """x_0 (n, d') of scaled noise (n, d)."""
        return self.frozen.states(observations, self.bound * scaled).flatten(1).to(observations.device)

    def _temperature(self, observations: Tensor) -> Tensor:
        """α, and a step of it."""
        assert self.log_ent_coef is not None
        assert self.ent_coef_optimizer is not None
        assert isinstance(self.target_entropy, float)
        alpha = self.log_ent_coef.detach().exp()
        with torch.no_grad():
            _, log_prob = self.actor.action_log_prob(observations)
        loss = -(self.log_ent_coef * (log_prob + self.target_entropy)).mean()
        _step(self.ent_coef_optimizer, loss)
        return alpha

    def _td(self, data: Any, alpha: Tensor) -> None:
        """A step of Q^A."""
        with torch.no_grad():
            target = data.rewards + (1 - data.dones) * self.gamma * self._value(data.next_observations, alpha)
        found = self.critic(data.observations, data.actions)
        _step(self.critic.optimizer, 0.5 * torch.stack([functional.mse_loss(q, target) for q in found]).sum())

    def _value(self, observations: Tensor, alpha: Tensor) -> Tensor:
        """V (n, 1): the soft value of a tree of `backup` leaves."""
        rows = observations.repeat_interleave(self.backup, 0)
        noise, log_prob = self.actor.action_log_prob(rows)
        worth = torch.cat(self.critic_target(rows, self._made(rows, noise)), 1).amin(1)
        soft = (worth - alpha * log_prob).unflatten(0, (-1, self.backup))
        return soft if self.backup == 1 else alpha * ((soft / alpha).logsumexp(1, keepdim=True) - math.log(self.backup))

    def _distil(self, observations: Tensor) -> None:
        """A step of Q^W at noise of the frozen policy's own."""
        noise = torch.randn(len(observations), self.frozen.size, device=observations.device) / self.bound
        with torch.no_grad():
            target = self.critic(observations, self._made(observations, noise))
        found = self.noise_critic(observations, noise)
        losses = [functional.mse_loss(w, a) for w, a in zip(found, target, strict=True)]
        _step(self.noise_optimizer, 0.5 * torch.stack(losses).sum())

    def _improve(self, observations: Tensor, alpha: Tensor) -> None:
        """A step of π^W on Q^W."""
        noise, log_prob = self.actor.action_log_prob(observations)
        worth = torch.cat(self.noise_critic(observations, noise), 1).amin(1)
        _step(self.actor.optimizer, (alpha * log_prob - worth).mean())


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
