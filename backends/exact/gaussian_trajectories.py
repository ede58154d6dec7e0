"""Gaussian trajectories with an exact denoiser: a chain whose law, and whose reweighting by a policy, are closed forms.

    τ ~ N(m, Σ) over all entries of (s_h, a_h)_{h < H}

as `GaussianStates`: the law of x_0 at any number of steps is a Gaussian N(m', C'), the p of every search. For a policy
π(a | s) = N(K s + b, v² I)

    p(τ) Π_h π(a_h | s_h)^λ  ∝  N(C (C'^{-1} m' + λ/v² Σ_h G_hᵀ b), C),   C^{-1} = C'^{-1} + λ/v² Σ_h G_hᵀ G_h

with G_h τ = a_h - K s_h (`reweighted`). For linear systems, Σ follows from the dynamics and a behaviour (`of_system`).
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.rewards.channels import Channels

F64 = torch.float64


@final
class GaussianTrajectories(GaussianStates):
    """The chain of N(mean, cov) trajectories.

    Args:
        mean: m (H, C).
        cov: Σ (H·C, H·C), positive definite, entries ordered as in m.reshape(-1).
        channels: observation and action channels, C in all.
        num_steps: T, of the cosine schedule.
        eta: η of the steps.

    Raises:
        ValueError: shapes that do not fit, or a matrix that is no covariance.
    """

    def __init__(self, mean: Tensor, cov: Tensor, *, channels: Channels, num_steps: int = 30, eta: float = 1.0) -> None:
        if mean.ndim != 2 or mean.shape[1] != channels.size or channels.reward:
            raise ValueError(f"mean has shape {tuple(mean.shape)}, expected (H, {channels.size}) of {channels}")
        super().__init__(mean, cov, num_steps=num_steps, eta=eta)
        self.channels = channels

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
    def horizon(self) -> int:
        """H."""
        return len(self.mean)

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
