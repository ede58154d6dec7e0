"""DSRL as a bandit whose optimum is known: a frozen sampler of a ring in two dimensions, and a reward for one side.

    best of a grid of w in [-b, b]²        max_w R(π(w)), the exact optimum up to the grid
    the base sampler                       E_{w ~ N(0, I)} R(π(w))

The sampler is the deterministic chain of a mixture of Gaussians with its exact denoiser. `folded` is a policy that maps
w and -w to one action, for what two noises of one action are worth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.policies.frozen import FrozenPolicy
from treesearch.policies.noise_env import Among, Prompted
from treesearch.rewards.base import Reward

MODES, STD, BOUND = 6, 0.15, 1.5
TARGET = (0.8, 0.5)


class Modes(nn.Module):
    """E[x_0 | x_t] of six Gaussians on the unit circle."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(MODES) * 2 * math.pi / MODES
        self.means, self.bars = torch.stack([angles.cos(), angles.sin()], 1), cosine_alphas_cumprod()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        means, bar = self.means.to(x), self.bars[timestep].to(x.dtype)[:, None]
        variance = bar * STD**2 + 1 - bar
        gaps = x[:, None] - bar[..., None].sqrt() * means
        share = (-0.5 * gaps.square().sum(-1) / variance).softmax(1)
        nearest = means + (bar.sqrt() * STD**2 / variance)[..., None] * gaps
        return (share[..., None] * nearest).sum(1)


class Folded(nn.Module):
    """|x_t|."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x.abs()


def ring(num_steps: int = 10) -> DiffusionKernel:
    """Six Gaussians on the unit circle, deterministic steps with the exact E[x_0 | x_t]."""
    schedule = Schedule.variance_preserving(cosine_alphas_cumprod(), num_steps, prediction="sample")
    return DiffusionKernel(Modes(), state_shape=(2,), schedule=schedule, eta=0.0, name="ring")


def folded() -> DiffusionKernel:
    """One step whose sample is |w|, so that 2^d noises make one action."""
    schedule = Schedule.variance_preserving(cosine_alphas_cumprod(), 1, prediction="sample")
    return DiffusionKernel(Folded(), state_shape=(2,), schedule=schedule, eta=0.0, name="folded")


def near(samples: Tensor, prompts: object) -> Tensor:
    """1 at the target, falling off."""
    return torch.exp(-(samples - samples.new_tensor(TARGET)).square().sum(1) / 0.5).double()


def bandit(kernel: DiffusionKernel) -> Prompted:
    """One draw an episode."""
    return Prompted(FrozenPolicy(kernel, ask=Among([None])), Reward(near), [None], bound=BOUND)


def optimum(env: Prompted, side: int = 200) -> tuple[float, float]:
    """max_w R(π(w)) over a grid of the box, and the base sampler's mean."""
    axis = torch.linspace(-BOUND, BOUND, side)
    grid = torch.cartesian_prod(axis, axis)
    draws = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    return worth(env, grid).max().item(), worth(env, draws).mean().item()


def worth(env: Prompted, noise: Tensor) -> Tensor:
    """R(π(w)) of noise (n, 2)."""
    return env.reward(env.frozen.actions(torch.ones(len(noise), 1), noise))
