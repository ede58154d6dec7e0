"""The flow of Gaussian data N(μ, Σ_k λ_k u_k u_kᵀ) in closed form: how far each feature has come at each level.

    x_t = α_t μ + Σ_k ψ_k c_k u_k + (σ_t/σ_T) x_⊥,   c_k = u_kᵀ(x_T - α_T μ)
    ψ_k = √((σ_t² + λ_k α_t²)/(σ_T² + λ_k α_T²))
    x̂_0(x_t) = μ + Σ_k α_t λ_k/(α_t² λ_k + σ_t²) u_kᵀ(x_t - α_t μ) u_k
             = μ + Σ_k ξ_k c_k u_k,   ξ_k = α_t λ_k / √((α_t² λ_k + σ_t²)(α_T² λ_k + σ_T²))
    ∇log p_t = -(α_t² Σ + σ_t² I)^{-1} (x_t - α_t μ)

x_⊥ is what of x_T - α_T μ the basis does not span, where λ = 0. A feature emerges where α_t² λ_k ~ σ_t²: those of large
variance first, the outline before the texture. It has half of its final size in x̂_0 where 3 α_t² λ_k = σ_t². A kick
along u_k at level t ends as ψ_k(0)/ψ_k(t) of it.

Source: Diffusion Models Generate Images Like Painters: an Analytical Theory of Outline First, Details Later (Wang and
Vastola, 2023), the solution for Gaussian data; The Unreasonable Effectiveness of Gaussian Score Approximation for
Diffusion Models and its Applications (Wang and Vastola, 2024), on trained networks. Exact for Gaussian data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from treesearch.backends.chains.schedules import Schedule
from treesearch.rewards.numeric import is_whole

NAMES = ("mean", "basis", "eigenvalues")


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and leading principal components of data, in units of states.

    Args:
        mean: μ (*state).
        basis: u_k (K, *state), orthonormal.
        eigenvalues: λ_k (K,), positive.

    Raises:
        ValueError: shapes that do not fit, entries that are not finite, a basis that is not orthonormal.
    """

    mean: Tensor
    basis: Tensor
    eigenvalues: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(getattr(self, name).shape) for name in NAMES]
        if len(shapes[2]) != 1 or shapes[1] != (*shapes[2], *shapes[0]):
            raise ValueError(f"mean, basis and eigenvalues have shapes {shapes}, expected (*state), (K, *state), (K,)")
        if not all(getattr(self, name).isfinite().all() for name in NAMES) or not (self.eigenvalues > 0).all():
            raise ValueError("mean and basis must be finite, eigenvalues finite and positive")
        flat = self.basis.double().flatten(1)
        gap = (flat @ flat.T - torch.eye(len(flat), dtype=flat.dtype, device=flat.device)).abs().max()
        if gap > 0.01:  # what float16 leaves of orthogonality is 100 times less
            raise ValueError(f"the basis is off orthonormal by {float(gap):.2g}: give unit vectors at right angles")

    @staticmethod
    def of(states: Tensor, rank: int) -> Moments:
        """Of states x_0 (n, *state): the `rank` leading components, each with its largest entry positive."""
        shape, rows = states.shape[1:], states.double().flatten(1)
        if not is_whole(rank, 1, most := min(len(rows) - 1, rows.shape[1])):
            raise ValueError(f"rank is {rank!r}, expected 1..{most}, less than states and no more than their entries")
        values, vectors = torch.linalg.eigh(torch.cov(rows.T))
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank].T
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        return Moments(rows.mean(0).reshape(shape), (vectors * largest.sign()).reshape(rank, *shape), values)

    @staticmethod
    def load(path: str | Path) -> Moments:
        """From a safetensors file with the three tensors.

        Raises:
            ValueError: a file of another kind.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error}): Moments.save writes one") from error
        if missing := [name for name in NAMES if name not in found]:
            raise ValueError(f"{path} has no {', '.join(missing)}: expected the tensors {', '.join(NAMES)}")
        return Moments(*(found[name].float() for name in NAMES))

    def save(self, path: str | Path) -> None:
        """In float16, which `load` reads."""
        from safetensors.torch import save_file

        save_file({name: getattr(self, name).half().contiguous() for name in NAMES}, path)

    def move(self, x: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> Tensor:
        """x (n, *state) carried along the flow, from one (α, σ) to another."""
        (alpha, sigma), (alpha_t, sigma_t) = now, then
        rest = x - alpha * self.mean.to(x)
        lam, plain = self.eigenvalues.to(x), sigma_t / sigma
        psi = ((sigma_t**2 + lam * alpha_t**2) / (sigma**2 + lam * alpha**2)).sqrt()
        return alpha_t * self.mean.to(x) + plain * rest + self._along(rest, psi - plain)

    def endpoint(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x̂_0 = E[x_0 | x_t] of states x (n, *state) at (α, σ)."""
        lam = self.eigenvalues.to(x)
        gain = alpha * lam / (alpha**2 * lam + sigma**2)
        return self.mean.to(x) + self._along(x - alpha * self.mean.to(x), gain)

    def emergence(self, schedule: Schedule) -> Tensor:
        """The highest level t at which x̂_0 shows half of feature k or more, 3 α_t² λ_k >= σ_t², (K,) whole."""
        ratio = (schedule.sigma / schedule.alpha) ** 2
        return torch.searchsorted(ratio.double().cpu(), 3 * self.eigenvalues.double().cpu(), right=True) - 1

    def sensitivity(self, schedule: Schedule) -> Tensor:
        """ψ_k(0)/ψ_k(t), (T + 1, K): what a kick along u_k at level t comes to in x_0."""
        spread = schedule.sigma[:, None] ** 2 + self.eigenvalues.to(schedule.alpha) * schedule.alpha[:, None] ** 2
        return (spread[:1] / spread).sqrt()

    def _along(self, rest: Tensor, gain: Tensor) -> Tensor:
        """Σ_k gain_k (u_kᵀ rest) u_k."""
        basis = self.basis.to(rest).flatten(1)
        return ((rest.flatten(1) @ basis.T * gain) @ basis).reshape(rest.shape)
