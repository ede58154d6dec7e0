"""How the misses of endpoints go together: x_0 given x_t as N(x̂_0, S_t), S_t from the rollouts of a pilot.

    e_i = x_0 - x̂_0(x_t) of rollout i,   Ŝ = Σ e_i e_iᵀ/n
    S_t = (1 - ρ) Ŝ + ρ r_t² I,   ρ = min(1, Σ_i |e_i e_iᵀ - Ŝ|²/n² / |Ŝ - r_t² I|²)
    x̂_0' = x̂_0 + S_t Aᵀ (A S_t Aᵀ + I)^{-1} (y - A x̂_0),   v = log N(y; A x̂_0, A S_t Aᵀ + I)

in place of S_t = r_t² I, which takes n misses of neighbours for n opinions: where states are smooth v is then far too
sure of itself at high noise, and log Z comes out low. With few rollouts ρ is near 1 where nothing goes together, and
small where much does. Entries of y are in units of their tolerances, as in `Stacked`.

Neither S_t nor A S_t Aᵀ is made: both are a multiple of what `Stacked` takes apart and n rows, and n × n matrices are
all that is solved (Woodbury's identity). A pilot's misses are kept, (T + 1) n D numbers.

Sources: A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices (Ledoit and Wolf, 2004), section 3, ρ.
Score-Based Data Assimilation (Rozet and Louppe, 2023) and Tweedie Moment Projected Diffusions (Boys et al., 2023), the
covariance of x_0 given x_t in the likelihood; there it is made of the denoiser's Jacobian at each state.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from treesearch.backends.guidance.stacked import Stacked
from treesearch.rewards.values import flat


class Level(NamedTuple):
    """S_t = EᵀE + c I, and A S_t Aᵀ + I = D^½ (I + GᵀG) D^½ along the eigenvectors of A Aᵀ."""

    rows: Tensor  # E (n, D), n <= D
    rest: float  # c = ρ r_t²
    root: Tensor  # D^½ (M,)
    seen: Tensor  # G (n, M)
    factor: Tensor  # of I + G Gᵀ, Cholesky (n, n)


@final
class Correlated:
    """The pull and the value of a stacked measurement where misses go together.

    Args:
        stacked: what is seen.
        misses: e (T + 1, n, *state), of t = 0..T.
    """

    def __init__(self, stacked: Stacked, misses: Tensor) -> None:
        self._stacked, self._misses = stacked, misses
        self._levels: dict[tuple[int, str], Level] = {}

    def __call__(self, gap: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """v (n,) and pulls on endpoints (n, *state), float64, of gaps (n, M) at levels t (n,)."""
        value, pull = gap.new_empty(len(gap)), gap.new_empty(len(gap), *self._misses.shape[2:])
        for t_here in t.unique().tolist():
            rows = (t == t_here).nonzero().flatten()
            value[rows], pull[rows] = self._update(self._level(t_here, gap.device), gap[rows])
        return value, pull

    def _update(self, level: Level, gap: Tensor) -> tuple[Tensor, Tensor]:
        z = gap / level.root
        along = z @ level.seen.T
        solved = torch.cholesky_solve(along.T, level.factor).T
        square = (z**2).sum(1) - (along * solved).sum(1)
        volume = level.root.log().sum() + level.factor.diagonal().log().sum()
        back = self._stacked.back((z - solved @ level.seen) / level.root)
        pull = (flat(back) @ level.rows.T) @ level.rows + level.rest * flat(back)
        return -0.5 * square - volume - self._stacked.constant, pull.reshape(back.shape)

    def _level(self, t: int, device: torch.device) -> Level:
        if (t, str(device)) not in self._levels:
            self._levels[t, str(device)] = self._made(self._misses[t].to(device, torch.float64))
        return self._levels[t, str(device)]

    def _made(self, misses: Tensor) -> Level:
        rho, square = shrunk(flat(misses))
        rows = flat(misses) * ((1 - rho) / len(misses)) ** 0.5
        if len(rows) > rows.shape[1]:  # D rows of the same EᵀE do
            rows = torch.linalg.qr(rows, mode="r").R
        root = (rho * square * self._stacked.axes.to(misses.device) + 1).sqrt()
        seen = self._stacked.seen(rows.reshape(-1, *misses.shape[1:])) / root
        eye = torch.eye(len(rows), dtype=torch.float64, device=misses.device)
        return Level(rows, rho * square, root, seen, torch.linalg.cholesky(eye + seen @ seen.T))


def shrunk(misses: Tensor) -> tuple[float, float]:
    """ρ and r² of misses (n, D)."""
    n, dim = misses.shape
    inner = misses @ misses.T
    square = float(inner.diagonal().sum()) / (n * dim)
    size = float(inner.square().sum()) / n**2  # |Ŝ|²
    apart = size - dim * square**2  # |Ŝ - r² I|²
    chance = (float(inner.diagonal().square().sum()) / n - size) / n
    return (min(1.0, chance / apart) if apart > 0 else 1.0), square
