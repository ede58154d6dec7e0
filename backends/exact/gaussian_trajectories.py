"""Gaussian trajectories with an exact denoiser: a chain whose law, and whose reweighting by a policy, are closed forms.

    τ ~ N(m, Σ) over all entries of (s_h, a_h)_{h < H};   x̂_0(x_t) = m + α_t Σ (α_t² Σ + σ_t² I)^{-1} (x_t - α_t m)

in the steps of `chains.diffusion.Chain`. As x̂_0 is linear, the law of x_0 at any number of steps is a Gaussian
N(m', C') too, near N(m, Σ) and found by recursion (`law`); it, not N(m, Σ), is the p of every search. For a policy
π(a | s) = N(K s + b, v² I)

    p(τ) Π_h π(a_h | s_h)^λ  ∝  N(C (C'^{-1} m' + λ/v² Σ_h G_hᵀ b), C),   C^{-1} = C'^{-1} + λ/v² Σ_h G_hᵀ G_h

with G_h τ = a_h - K s_h (`reweighted`). For linear systems, Σ follows from the dynamics and a behaviour (`of_system`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import cosine_bar
from treesearch.rewards.channels import Channels

F64 = torch.float64


@final
class GaussianTrajectories:
    """The chain of N(mean, cov) trajectories.

    Args:
        mean: m (H, C).
        cov: Σ (H·C, H·C), positive definite, entries ordered as in m.reshape(-1).
        channels: observation and action channels, C in all.
        num_steps: T, of the cosine schedule.
        eta: η of the steps.

    Raises:
        ValueError: shapes that do not fit.
    """

    dtype = F64

    def __init__(self, mean: Tensor, cov: Tensor, *, channels: Channels, num_steps: int = 30, eta: float = 1.0) -> None:
        if mean.ndim != 2 or mean.shape[1] != channels.size or channels.reward:
            raise ValueError(f"mean has shape {tuple(mean.shape)}, expected (H, {channels.size}) of {channels}")
        if tuple(cov.shape) != (mean.numel(), mean.numel()):
            raise ValueError(f"cov has shape {tuple(cov.shape)}, expected ({mean.numel()}, {mean.numel()})")
        self.mean, self.cov, self.channels, self.num_steps = mean.to(F64), cov.to(F64), channels, num_steps
        bar = cosine_bar(num_steps)
        told = torch.arange(1, num_steps + 1, device="cpu")
        self.chain = Chain(Schedule(told, bar.sqrt(), (1 - bar).sqrt(), "sample"), eta=eta)
        self.stochastic = self.chain.stochastic

    @staticmethod
    def of_system(
        transition: Tensor, control: Tensor, gain: Tensor, *, horizon: int, start: float, noise: float,
        behaviour: float, num_steps: int = 30,
    ) -> GaussianTrajectories:  # fmt: skip
        """Trajectories of s' = A s + B a + noise·w under the behaviour a = gain·s + behaviour·w', s_0 ~ start·w''.

        Args:
            transition: A (S, S).
            control: B (S, A).
            gain: (A, S).
            horizon: H.
            start, noise, behaviour: standard deviations, positive.
            num_steps: T.
        """
        dim, act = control.shape
        # Rows are loadings on independent normals.
        state = start * torch.eye(dim, horizon * (dim + act), dtype=F64, device="cpu")
        rows, used = [], dim
        for _ in range(horizon):
            action = gain.to(F64) @ state
            action[:, used : used + act] += behaviour * torch.eye(act, dtype=F64, device="cpu")
            rows += [state, action]
            used += act
            state = transition.to(F64) @ state + control.to(F64) @ action
            if used < state.shape[1]:
                state[:, used : used + dim] += noise * torch.eye(dim, dtype=F64, device="cpu")
                used += dim
        loading = torch.cat(rows)
        mean = torch.zeros(horizon, dim + act, dtype=F64, device="cpu")
        return GaussianTrajectories(mean, loading @ loading.T, channels=Channels(dim, act), num_steps=num_steps)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    @property
    def horizon(self) -> int:
        """H."""
        return len(self.mean)

    @cached_property
    def fingerprint(self) -> str:
        return f"gaussian-trajectories{self.chain.settings()}{self.mean.tolist()}{self.cov.tolist()}"

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return noise.to(F64)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        gap = (x - self.chain.at("alpha", t, x) * self.mean).flatten(1)
        moved = (self._gain[t] @ gap[..., None]).reshape(x.shape)
        return self.chain.law(x, t, self.mean + moved)

    def encode(self, prompts: Sequence[Any]) -> None:
        return None

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    @cached_property
    def _gain(self) -> Tensor:
        """α_t Σ (α_t² Σ + σ_t² I)^{-1}, (T + 1, D, D)."""
        alpha, sigma = self.chain.alpha[:, None, None], self.chain.sigma[:, None, None]
        eye = torch.eye(len(self.cov), dtype=F64, device="cpu")
        noisy = alpha**2 * self.cov + torch.where(sigma > 0, sigma, 1.0) ** 2 * eye
        return torch.linalg.solve(noisy, alpha * self.cov)  # symmetric: the two commute

    @cached_property
    def law(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of x_0, D = H·C."""
        dim = len(self.cov)
        mean, eye = torch.zeros(dim, dtype=F64, device="cpu"), torch.eye(dim, dtype=F64, device="cpu")
        cov, probes = eye, torch.cat([mean[None], eye]).reshape(-1, *self.state_shape)
        for t in range(self.num_steps, 0, -1):
            step = self.transition(probes, torch.full((dim + 1,), t, device="cpu"))
            at = step.mean.flatten(1)
            slope = (at[1:] - at[0]).T
            mean = slope @ mean + at[0]
            cov = slope @ cov @ slope.T + float(step.std.flatten()[0]) ** 2 * eye
        return mean, cov

    def reweighted(self, gain: Tensor, offset: Tensor, std: float, lam: float) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of p(τ) Π_h π(a_h | s_h)^λ for π(a | s) = N(gain·s + offset, std² I).

        Args:
            gain: K (A, S).
            offset: b (A,).
            std: v.
            lam: λ.
        """
        mean, cov = self.law
        each = torch.cat(
            [-gain.to(F64), torch.eye(len(gain), dtype=F64, device="cpu")], 1
        )  # (A, C): a - K s of one row
        residual = torch.block_diag(*[each] * self.horizon)  # (H·A, D)
        precision = torch.linalg.inv(cov)
        new = torch.linalg.inv(precision + lam / std**2 * residual.T @ residual)
        pull = lam / std**2 * residual.T @ offset.to(F64).repeat(self.horizon)
        return new @ (precision @ mean + pull), new
