"""DSRL: learn which noise to give a frozen diffusion policy, so that what it makes earns more.

    dsrl = DSRL(NoiseEnv(env, FrozenPolicy(kernel)), Steering(method="na"), seed=0)
    dsrl.learn(10_000, store="runs/dsrl")
    w = dsrl.noise(observations)                         # π^W(s), of which π(s, w) makes the action

The kernel is a black box: its weights are not touched and no gradient passes it. Learning goes by segments of `every`
steps, each with the environment begun anew and all generators seeded by (seed, segment), so that a run that was
interrupted and one that was not are the same, bit for bit. The store has no pickle.

Source: Steering Your Diffusion Policy with Latent Space Reinforcement Learning (Wagenmaker et al., 2025).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from treesearch.errors import StoreError, choose
from treesearch.policies.store import INDEX, put_back, read_index, write
from treesearch.rewards.numeric import is_number, is_positive, is_whole

if TYPE_CHECKING:
    from treesearch.policies.learner import NoiseSAC
    from treesearch.policies.noise_env import Noisy

METHODS = ("na", "sac")
NODES = 24  # of Gauss-Hermite quadrature


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How noise is learnt; the paper's own settings.

    Args:
        method: "na", critics of actions and of noise, or "sac", a critic of noise alone.
        gamma: γ, of a chunk.
        tau: share of the critic that its target moves by.
        lr: of all networks.
        batch_size: transitions of a gradient step.
        updates: gradient steps to a chunk.
        noise_steps: distillation steps to a gradient step ("na").
        leaves: noises of a decision while it learns; the best by the critic of actions is made and kept ("na").
        backup: leaves of the tree whose soft value is the target of the critic of actions ("na").
        width: of the hidden layers, tanh after layer normalisation.
        layers: how many.
        target_entropy: of scaled noise, in nats.
        temperature: α at the beginning, in units of the reward; it moves towards the target entropy.
        warmup: chunks made with the frozen policy's own noise before anything is learnt.
        replay: transitions that are kept.
        every: chunks of a segment, after which it is kept.

    Raises:
        ValueError: a setting out of range.
    """

    method: str = "na"
    gamma: float = 0.99
    tau: float = 0.005
    lr: float = 3e-4
    batch_size: int = 256
    updates: int = 20
    noise_steps: int = 10
    leaves: int = 1
    backup: int = 1
    width: int = 128
    layers: int = 3
    target_entropy: float = 0.0
    temperature: float = 1.0
    warmup: int = 1500
    replay: int = 100_000
    every: int = 500

    def __post_init__(self) -> None:
        choose("method", self.method, METHODS)
        whole = (
            "batch_size",
            "updates",
            "noise_steps",
            "leaves",
            "backup",
            "width",
            "layers",
            "warmup",
            "replay",
            "every",
        )
        for name in whole:
            if not is_whole(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a whole number, 1 or more")
        if self.method != "na" and (self.leaves, self.backup) != (1, 1):
            raise ValueError("leaves and backup are judged by the critic of actions: use method='na'")
        for name in ("gamma", "tau"):
            if not is_number(getattr(self, name), 0, 1):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected 0..1")
        if not (is_positive(self.lr) and is_positive(self.temperature) and math.isfinite(self.target_entropy)):
            told = {k: getattr(self, k) for k in ("lr", "temperature", "target_entropy")}
            raise ValueError(f"expected positive numbers, and a finite target entropy, got {told}")

    def nfe(self, chunks: int, num_steps: int) -> int:
        """Evaluations of the policy's network (rows) by which so many chunks are learnt from, T = num_steps each."""
        learning = max(0, chunks - self.warmup)
        drawn = self.updates * self.batch_size * (self.backup + self.noise_steps) if self.method == "na" else 0
        tried = self.leaves if self.leaves > 1 else 0
        return num_steps * (chunks + learning * (drawn + tried))


@final
class DSRL:
    """A policy of noise, and what it learns from.

    Args:
        env: a `NoiseEnv`, or `Prompted` for any kernel and reward.
        settings: how to learn.
        seed: of the networks, of exploration and of the environment.

    Attributes:
        steps: of the environment so far, one a chunk.
        episodes: (steps, return) of each that ended.

    Raises:
        ValueError: "na" for a kernel whose noise has not the size of its states.
    """

    def __init__(self, env: Noisy, settings: Steering | None = None, *, seed: int = 0) -> None:
        self.env, self.settings, self.seed = env, settings or Steering(), seed
        self.frozen = env.frozen
        if self.settings.method == "na" and self.frozen.size != math.prod(self.frozen.spec.state_shape):
            raise ValueError("this kernel's noise and states differ in size: use method='sac'")
        with _own_randomness():
            self.learner = _learner(env, self.settings, seed)
        self.episodes: list[tuple[int, float]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy on a worker knows what was learnt, and learns no more."""
        return vars(self) | {"env": None}

    @property
    def steps(self) -> int:
        return self.learner.num_timesteps

    @property
    def bound(self) -> float:
        """b: noise lies in [-b, b]."""
        return self.learner.bound

    # learning

    def learn(self, steps: int, store: str | Path | None = None, watch: Callable[[DSRL], None] | None = None) -> DSRL:
        """Learn until so many steps of the environment were made, all told.

        Args:
            steps: a multiple of `every`; less than were made already is nothing to do.
            store: folder that every segment is kept in, and that learning goes on from.
            watch: called after every step.

        Raises:
            ValueError: no multiple of `every`.
            StoreError: a folder of another learner, or one that could not be told from others.
            Diverged: weights that are not finite; the last finite ones are in place and in the store, and learning may
                go on.
        """
        from treesearch.policies.learner import Diverged

        every = self.settings.every
        if not is_whole(steps) or steps % every:
            raise ValueError(f"steps is {steps!r}, expected a multiple of every = {every}, the steps of a segment")
        folder = None if store is None else Path(store)
        if folder is not None:
            self._identity()
            if (folder / INDEX).exists():
                _ = self._own(folder) if self.steps else self.load(folder)
        while self.steps < steps:
            try:
                with _own_randomness():
                    self._segment(every - self.steps % every, watch)  # less after one that diverged
            except Diverged:
                if folder is not None:
                    self.save(folder)
                raise
            if folder is not None:
                self.save(folder)
        return self

    def _segment(self, steps: int, watch: Callable[[DSRL], None] | None) -> None:
        from treesearch.policies.watching import Returns

        learner = self.learner
        segment, within = divmod(self.steps, self.settings.every)
        learner.set_random_seed((1_000_003 * self.seed + segment + 500_009 * within) % 2**31)
        learner._last_obs = None  # the environment begins anew
        told = Returns(self.episodes, None if watch is None else partial(watch, self))
        learner.learn(steps, callback=told, log_interval=None, reset_num_timesteps=False)  # type: ignore[arg-type]

    # what was learnt

    def observations(self, prompts: Sequence[Any]) -> Tensor:
        """What was observed (n, O), as prompts of a search say it."""
        return self.frozen.observations(prompts)

    @property
    def fingerprint(self) -> str:
        """Hash of what was learnt so far, and of the policy."""
        digest = hashlib.blake2b(str(self.frozen.fingerprint).encode(), digest_size=16)
        for name, value in sorted(self.learner.weights().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def noise(self, observations: Tensor, z: Tensor | None = None) -> Tensor:
        """w (n, d) for observations (n, O): b tanh(μ), or b tanh(μ + σ z) with standard normals z (n, d)."""
        mean, log_std = self._actor(observations)
        return self.bound * (mean if z is None else mean + log_std.exp() * z.to(mean)).tanh()

    def actions(self, observations: Tensor, z: Tensor | None = None) -> Any:
        """Samples of the frozen policy at that noise: T evaluations each."""
        return self.frozen.actions(observations, self.noise(observations, z))

    @torch.no_grad()
    def moments(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (n, d) float64 of w ~ π^W(s), entry by entry, by quadrature."""
        mean, log_std = (v.double().cpu() for v in self._actor(observations))
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(NODES))
        values = self.bound * (mean[..., None] + log_std.exp()[..., None] * nodes).tanh()
        share = weights / weights.sum()
        first = (values * share).sum(-1)
        return first, ((values - first[..., None]).square() * share).sum(-1).sqrt()

    @torch.no_grad()
    def q_noise(self, observations: Tensor, noise: Tensor) -> Tensor:
        """min_j Q^W_j(s, w) (n,) float64, for noise w (n, d); of "sac" its critic. No evaluation of the kernel."""
        learner: Any = self.learner
        critic = learner.noise_critic if self.settings.method == "na" else learner.critic
        return least(critic(self._seen(observations), self._placed(noise / self.bound)))

    @torch.no_grad()
    def q_action(self, observations: Tensor, states: Tensor) -> Tensor:
        """min_j Q^A_j(s, a) (n,) float64, for states x_0 (n, *state) of the kernel.

        Raises:
            ValueError: learnt by "sac", which has no critic of actions.
        """
        if self.settings.method != "na":
            raise ValueError("method='sac' learns no critic of actions: use method='na'")
        return least(self.learner.critic(self._seen(observations), self._placed(states.flatten(1))))

    def _actor(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """μ and log σ before the tanh."""
        mean, log_std, _ = self.learner.actor.get_action_dist_params(self._seen(observations))
        return mean, log_std

    def _seen(self, observations: Tensor) -> Tensor:
        """Observations (n, O) where the networks are.

        Raises:
            ValueError: other numbers than it has learnt on.
        """
        want: tuple[int, ...] = self.learner.observation_space.shape or ()
        if observations.shape[1:] != want or not observations.isfinite().all():
            raise ValueError(
                f"observations have shape {tuple(observations.shape)}, expected (n, {math.prod(want)}), finite"
            )
        return self._placed(observations)

    def _placed(self, values: Tensor) -> Tensor:
        return values.to(self.learner.device, torch.float32)

    # the store

    def save(self, folder: Path) -> None:
        """Keep everything; a crash leaves this state or the one before."""
        told = {"steps": self.steps, "episodes": self.episodes, "num_steps": self.frozen.spec.num_steps}
        write(folder, self.learner, told | self._identity())

    def load(self, folder: str | Path) -> DSRL:
        """Go back to what a folder keeps.

        Raises:
            StoreError: there is nothing, it is damaged, or of another learner; the message says what differs.
        """
        index = self._own(Path(folder))
        put_back(self.learner, Path(folder), index)
        self.episodes[:] = [(int(s), float(r)) for s, r in index["episodes"]]
        return self

    def _own(self, folder: Path) -> dict[str, Any]:
        """What a folder says of its learner, which must be this one."""
        index = read_index(folder)
        for name, own in self._identity().items():
            found: Any = index.get(name)
            if found != own:
                if name == "settings":
                    name = next(setting for setting in own if found.get(setting) != own[setting])
                    found, own = found.get(name), own[name]
                raise StoreError(
                    f"{folder} is of another learner: its {name} is {found!r}, not {own!r}; ask "
                    "for the same, or name another folder"
                )
        return index

    def _identity(self) -> dict[str, Any]:
        found = {
            "settings": asdict(self.settings),
            "seed": self.seed,
            "bound": self.bound,
            "policy": self.frozen.fingerprint,
            **self.env.identity,
        }
        unknown = [name for name, value in found.items() if value is None]
        if unknown:
            raise StoreError(
                f"no digest of the {unknown[0]}, so that a store could be another learner's: give no store"
            )
        return found


def _learner(env: Noisy, settings: Steering, seed: int) -> NoiseSAC:
    from treesearch.policies.learner import AliasedSAC, NoiseSAC, NormedTanh

    how: dict[str, Any] = {
        "env": env,
        "learning_rate": settings.lr,
        "buffer_size": settings.replay,
        "learning_starts": settings.warmup,
        "batch_size": settings.batch_size,
        "tau": settings.tau,
        "gamma": settings.gamma,
        "gradient_steps": settings.updates,
        "target_entropy": settings.target_entropy,
        "ent_coef": f"auto_{settings.temperature}",
        "policy_kwargs": {"net_arch": [settings.width] * settings.layers, "activation_fn": NormedTanh},
        "seed": seed,
        "device": "cpu",
    }
    if settings.method == "na":
        return AliasedSAC(env.frozen, settings.noise_steps, settings.leaves, settings.backup, **how)
    return NoiseSAC(env.frozen, **how)


def least(values: Any) -> Tensor:
    """min over critics (n, 1) each, (n,) float64."""
    return torch.cat(tuple(values), 1).amin(1).double()


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Stable-Baselines3 draws from global generators: they are as before afterwards."""
    import random

    numpy, python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(numpy)
            random.setstate(python)
