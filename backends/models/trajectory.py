"""Trajectory diffusion: a state is a whole plan (s, a, r)_{0..H-1}, and what is known of it stays as it is.

Notation: x_k = α_k x_0 + σ_k ε on the free entries, x_k = x_0 on the known ones (mask M); K = 1000 training steps.

    network   x̂_0 = f(x_k, k, M), taught with the same masks, loss on the free entries alone
    prior     free entries N(0, 1), known entries as given
    law       N(mean, std²) on the free entries, std 0 and mean = known on the others

So the clamped chain is the model's own law given what is known: known entries enter log_prob and log_weight as zeros.
`treesearch.backends.models.unet1d` is the network, `treesearch.backends.models.card` what is stored with its weights.

References:
    Planning with Diffusion for Flexible Behavior Synthesis (Janner et al., 2022), sec. 3: states, actions, temporal
        U-Net, in-painting of start and goal; there the network is not told what is known.
    Is Conditional Generative Modeling all you need for Decision-Making? (Ajay et al., 2023), known states in training.
    Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 17, the cosine schedule.
The shipped weights are the project's own: `backends/weights/README.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Gaussian, fingerprint
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import Chain, Step
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.models.card import Card, Normalisation, load_model
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.rewards.channels import Channels, entry
from treesearch.rewards.numeric import is_whole

Grid = Literal["uniform", "karras"]


@final
class TrajectoryKernel:
    """The clamped chain of a trajectory network: prompts {"start": observation, "goal": position} are what is known.

    Args:
        network: called as network(x, timestep, mask) with x and mask (n, H, C) and timestep (n,); returns (n, H, C). It
            is moved to the device, called in evaluation mode and otherwise left as it is.
        channels: how a row is split.
        normalisation: between states and data units.
        horizon: H.
        schedule: the grid, and what the network returns.
        eta, step, clip_sample: as for `treesearch.backends.chains.diffusion.Chain`.
        card: what the network was trained on, where that is known.
        name: enters the fingerprint.

    Raises:
        ValueError: a horizon that the network cannot halve, a normalisation of another size, a setting out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        channels: Channels,
        normalisation: Normalisation,
        horizon: int,
        schedule: Schedule,
        eta: float | Tensor = 1.0,
        step: Step = "ddim",
        clip_sample: float | None = None,
        card: Card | None = None,
        device: str | torch.device = "cpu",
        name: str = "trajectory",
    ) -> None:
        if len(normalisation.mean) != channels.size:
            raise ValueError(f"normalisation has {len(normalisation.mean)} channels, expected {channels.size}")
        multiple = int(getattr(network, "multiple", 1))
        if not is_whole(horizon, 2) or horizon % multiple:
            raise ValueError(f"horizon is {horizon!r}, expected a multiple of {multiple}, at least 2")
        self.network, self.channels, self.normalisation = network, channels, normalisation
        self.horizon, self.card, self.name = horizon, card, name
        self.num_steps, self.state_shape = schedule.num_steps, (horizon, channels.size)
        self.device, self.dtype = torch.device(device), torch.float32
        self.chain = Chain(schedule, eta=eta, step=step, clip_sample=clip_sample).to(self.device)
        self.stochastic = self.chain.stochastic
        self._quiet = Quiet(network.to(self.device))

    def to(self, device: str | torch.device) -> TrajectoryKernel:
        """The same kernel, moved to a device."""
        self.device = torch.device(device)
        self.chain.to(self.device)
        self.network.to(self.device)
        return self

    def with_horizon(self, horizon: int) -> TrajectoryKernel:
        """The same model for plans of another length."""
        chain = self.chain
        return TrajectoryKernel(
            self.network,
            channels=self.channels,
            normalisation=self.normalisation,
            horizon=horizon,
            schedule=chain.schedule,
            eta=chain.eta,
            step=chain.step,
            clip_sample=chain.clip_sample,
            card=self.card,
            device=self.device,
            name=self.name,
        )

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        self._quiet.look()
        return self.clamp(self.chain.schedule.prior_std * noise.to(self.device, self.dtype), cond)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        with self._quiet, torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            known, mask = self._known(x, cond)
            x = torch.where(mask, known, x)
            law = self.chain.law(x, t, self.network(x, self.chain.timestep[t], mask))
            return clamped(law, known, mask)

    def clamp(self, x: Tensor, cond: Cond) -> Tensor:
        """States (n, H, C) with their known entries put in."""
        known, mask = self._known(x, cond)
        return torch.where(mask, known, x)

    def held(self, x: Tensor, cond: Cond) -> Tensor:
        """Where the known entries of states (n, H, C) are."""
        return self._known(x, cond)[1]

    def encode(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """Known entries, normalised, and where they are: both (n, H, C).

        Raises:
            ValueError: a prompt with other entries than a start and a goal of this model's sizes.
        """
        values = torch.zeros(len(prompts), *self.state_shape, dtype=self.dtype, device="cpu")
        mask = torch.zeros_like(values, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            if (start := entry(prompt, "start", self.channels.observation)) is not None:
                _put(values[row, 0], mask[row, 0], start)
            if (goal := entry(prompt, "goal")) is not None:
                if len(goal) > self.channels.observation:
                    raise ValueError(f"goal has {len(goal)} numbers, expected up to {self.channels.observation}")
                _put(values[row, -1], mask[row, -1], goal)
        known = torch.where(mask, self.normalisation.encode(values), 0.0)
        return {"known": known.to(self.device), "mask": mask.to(self.device)}

    def decode(self, x0: Tensor) -> Tensor:
        return self.normalisation.decode(x0)

    def encode_samples(self, samples: Tensor) -> Tensor:
        """States of trajectories (n, H, C) in data units: the inverse of `decode`."""
        return self.normalisation.encode(samples.to(self.device, self.dtype))

    def renoise(self, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Tensor) -> Tensor:
        """x_{t_to} ~ q(x_{t_to} | x_{t_from} = x), rows (n, H, C) with t_to >= t_from >= 0 (n,).

        Every entry is noised: put the known ones back with `clamp`.

        Raises:
            ValueError: a move down the chain.
        """
        return self.chain.renoise(x, t_from, t_to, noise)

    @property
    def fingerprint(self) -> str | None:
        """Hash of the network as it is now, the grid and the settings; None for a network that cannot be read."""
        settings = (self.name, self.channels, self.normalisation, self.horizon, self.chain.settings())
        found = fingerprint.of([settings, self.chain.tables(), self.network])
        return None if found is None else f"{self.name}:{found}"

    def _known(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        if cond is None or "mask" not in cond:
            return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
        return cond["known"].to(x.dtype), cond["mask"]


def clamped(law: Gaussian, known: Tensor, mask: Tensor) -> Gaussian:
    """The law with its entries under mask (n, *state) fixed: mean and endpoint known, std 0."""
    base = None if law.base_mean is None else torch.where(mask, known, law.base_mean)
    std = torch.where(mask, 0.0, law.std)
    mean, endpoint = torch.where(mask, known, law.mean), torch.where(mask, known, law.endpoint)
    return replace(law, mean=mean, std=std, endpoint=endpoint, base_mean=base)


def _put(values: Tensor, mask: Tensor, numbers: Sequence[float]) -> None:
    values[: len(numbers)] = torch.tensor(numbers, device="cpu")
    mask[: len(numbers)] = True


def trajectory_kernel(
    path: str | Path,
    num_steps: int = 20,
    eta: float = 1.0,
    horizon: int | None = None,
    grid: Grid = "uniform",
    device: str | torch.device = "cpu",
) -> TrajectoryKernel:
    """A saved model as a kernel.

    Args:
        path: written by `treesearch.backends.models.card.save_model`.
        num_steps: T.
        eta: 1 is ancestral sampling, 0 is deterministic after the prior.
        horizon: rows of a plan; None for the longest that the model was trained with.
        grid: "uniform" in the training steps, or "karras" in the noise levels σ/α.
    """
    network, card = load_model(path)
    spaced = {"uniform": Schedule.variance_preserving, "karras": Schedule.karras}
    if grid not in spaced:
        raise ValueError(f"unknown grid {grid!r}: choose {', '.join(spaced)}")
    return TrajectoryKernel(
        network,
        channels=card.channels,
        normalisation=card.normalisation,
        horizon=horizon or card.horizon,
        schedule=spaced[grid](cosine_alphas_cumprod(), num_steps, prediction=card.prediction),
        eta=eta,
        card=card,
        device=device,
        name=card.environment or "trajectory",
    )


def maze_kernel(
    name: str = "medium",
    num_steps: int = 20,
    eta: float = 1.0,
    horizon: int | None = None,
    grid: Grid = "uniform",
    device: str | torch.device = "cpu",
) -> TrajectoryKernel:
    """The shipped model of a PointMaze: rows (x, y, v_x, v_y, f_x, f_y); the rest as for `trajectory_kernel`.

    Raises:
        FileNotFoundError: no weights of that name are shipped.
    """
    folder = resources.files("treesearch.backends").joinpath("weights")
    with resources.as_file(folder.joinpath(f"maze_{name}.safetensors")) as path:
        if not path.exists():
            shipped = sorted(f.name[5:-12] for f in folder.iterdir() if f.name.startswith("maze_"))
            raise FileNotFoundError(
                f"no weights of the maze {name!r} are shipped, only {', '.join(shipped)}: train it with "
                "experiments/planning/train_trajectory.py and load it with trajectory_kernel(path)"
            )
        return trajectory_kernel(path, num_steps, eta, horizon, grid, device)
