"""Coarse chains: the law of a jump over several steps of a chain, on the noise that those steps would have drawn.

Notation: n = σ/α; the fine steps of a jump from x_t to x_s are u = t, ..., s + 1, each from x_u to x_{u-1} with unit
noise z_u; ρ_u = √(σ_{u-1}² - s̃_u²)/σ_{u-1}. A step of a `Chain` with x̂_0 given, ε̂ = (x_u - α_u x̂_0)/σ_u, is affine:

    x_{u-1} = α_{u-1} x̂_0 + a_u (x_u - α_u x̂_0) + s̃_u z_u           a_u = ρ_u σ_{u-1}/σ_u

and so is the jump that holds x̂_0 of x_t over all of them, the first being the kernel's own law N(m, s̃_t²):

    x_s = α_s x̂_0 + g (m - α_{t-1} x̂_0) + s̃ Σ_u w_u z_u             g = Π_{s<v<t} a_v
    s̃ w_u = s̃_u Π_{s<v<u} a_v,   Σ w_u² = 1

One evaluation, and every z_u in its place: the jump is what the fine chain makes of the same noise if x̂_0 does not
change on the way, exactly, whatever η, step, schedule or carry. s = t - 1 is the kernel's own law.

η = 1: s̃_u² = σ_{u-1}² (1 - n_{u-1}²/n_u²) and ρ_u = n_{u-1}/n_u, so that the products telescope to
Π_{s<v<u} a_v = σ_s n_s/(σ_{u-1} n_{u-1}), and

    s̃² w_u² = σ_s² n_s² (1/n_{u-1}² - 1/n_u²),   s̃² = σ_s² n_s² (1/n_s² - 1/n_t²) = σ_s² (1 - n_s²/n_t²)
    w_u² = (1/n_{u-1}² - 1/n_u²)/(1/n_s² - 1/n_t²)

which is the law of the chain's step on the sub-grid (`Chain.on`): holding endpoints and leaving out levels are one. So
they are at η = 0, for DDPM's step, and for renoising, where ρ = 0 and z_{s+1} alone counts. With 0 < η < 1 they are
not: ε̂ keeps Π ρ_u of itself, (n_s/n_t)^{η²} on a fine grid, where DDIM's one step keeps √(1 - η² (1 - n_s²/n_t²)),
which is never below √(1 - η²). The product is the fine chain's, and drafts are of it.

Not exact is x̂_0, which the fine chain looks up at every level. What differs from entry to entry of a state (α, σ or η
by entry) has weights by entry and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Gaussian, Transition
from treesearch.backends.chains.diffusion import Chain
from treesearch.rewards.numeric import is_whole


@final
class Coarse:
    """Jumps down a sub-grid of a chain: from any level to the next of the sub-grid below it.

    Args:
        chain: of the kernel.
        levels: where a walk from T evaluates, falling from T, and 0 at the end; see `backends.base.grids.subgrid`.

    Raises:
        ValueError: levels that do not fall from T to 0, or a chain whose noise levels differ from entry to entry.
    """

    below: Tensor
    """The level a jump from t leads to, (T + 1,) int64: the largest of the sub-grid below t; 0 for 0."""
    evaluations: NDArray[np.int64]
    """How many a walk from t to 0 takes, (T + 1,)."""
    weights: NDArray[np.float64]
    """w_u of the jump from t, (T + 1, T + 1) by t and u; rows have Σ w² = 1, or are 0 where the jump has no noise."""

    def __init__(self, chain: Chain, levels: Sequence[int]) -> None:
        steps = chain.schedule.num_steps
        _refuse(levels, steps)
        if chain.std.numel() > steps + 1:
            raise ValueError(
                "the chain's noise differs from entry to entry of a state, as a jump's would: no draft is made of it"
            )
        self.levels = tuple(map(int, levels))
        below = [max((s for s in self.levels if s < t), default=0) for t in range(steps + 1)]
        self.evaluations = np.zeros(steps + 1, np.int64)
        self.weights = np.zeros((steps + 1, steps + 1))
        self._kept, self._rest = np.ones(steps + 1), np.zeros(steps + 1)  # g, and the noise of all steps but the first
        ratio, std = _ratio(chain), chain.std.flatten().cpu().numpy()
        for t in range(1, steps + 1):
            self.evaluations[t] = 1 + self.evaluations[below[t]]
            self._compose(t, below[t], ratio, std)
        self.below = torch.tensor(below, device=chain.std.device)
        alpha = chain.schedule.alpha.flatten().cpu().numpy()
        pull = alpha[below] - self._kept * np.concatenate([alpha[:1], alpha[:-1]])  # of x̂_0, beside g m
        self._tables = torch.tensor(np.stack([self._kept, pull, self._rest]), device=chain.std.device)
        self._noisy = chain.std.flatten() > 0

    def _compose(self, t: int, s: int, ratio: NDArray[np.float64], std: NDArray[np.float64]) -> None:
        """Put the fine steps of the jump from t to s together."""
        kept = np.cumprod(np.concatenate([[1.0], ratio[s + 1 : t]]))  # Π_{s<v<u} a_v of u = s + 1..t
        noise = kept * std[s + 1 : t + 1]
        self._kept[t], self._rest[t] = kept[-1], np.linalg.norm(noise[:-1])
        whole = np.linalg.norm(noise)
        self.weights[t, s + 1 : t + 1] = noise / whole if whole else 0.0

    def law(self, x: Tensor, t: Tensor, fine: Transition, offset: Tensor | None = None) -> Gaussian:
        """Law of x_s, s = below[t], on the unit noise Σ_u w_u z_u.

        Args:
            x: states (n, *state).
            t: their levels (n,) in 1..T.
            fine: of x_{t-1}, from one evaluation at x. Its mean is carried on, a guide's shift in it included, and its
                log p/q is not: a draft is no step of the search.
            offset: m (n, *state) where the chain is that of y = x - m.

        Raises:
            TypeError: a step that is not Gaussian.
        """
        if not isinstance(fine, Gaussian):
            raise TypeError(f"jumps take kernels of Gaussian steps, got {type(fine).__name__}")
        tables = self._tables.to(torch.promote_types(x.dtype, torch.float32))[:, t]
        kept, pull, rest = tables.reshape(3, -1, *(1,) * (x.ndim - 1))
        mean = kept * fine.mean + pull * fine.endpoint
        if offset is not None:
            mean = mean + (1 - kept - pull) * offset
        held = (fine.std == 0) & self._noisy[t].reshape(kept.shape)  # entries that the kernel gives no noise
        return Gaussian(mean, torch.where(held, 0.0, torch.hypot(kept * fine.std, rest)), fine.endpoint)


def _ratio(chain: Chain) -> NDArray[np.float64]:
    """a_u by u, (T + 1,); entry 0 is unused. Noise that is 0 stays so."""
    return torch.where(chain.sigma > 0, chain.direction / chain.sigma, 0.0).flatten().cpu().numpy()


def _refuse(levels: Sequence[int], steps: int) -> None:
    whole = all(is_whole(level, 0) for level in levels)
    if not (whole and len(levels) > 1 and levels[0] == steps and levels[-1] == 0 and (np.diff(levels) < 0).all()):
        raise ValueError(f"levels are {tuple(levels)}, expected whole numbers that fall from T = {steps} to 0")
