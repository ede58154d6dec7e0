"""Coarse chains: jumps over several steps of a chain, on the noise that those steps would have drawn.

Notation: n = σ/α; the fine steps of a jump from x_t to x_s are u = t, ..., s + 1, each from x_u to x_{u-1} with unit
noise z_u; ρ_u = √(σ_{u-1}² - s̃_u²)/σ_{u-1}. A step of a `Chain` with x̂_0 given, ε̂ = (x_u - α_u x̂_0)/σ_u, is affine:

    x_{u-1} = α_{u-1} x̂_0 + a_u (x_u - α_u x̂_0) + s̃_u z_u           a_u = ρ_u σ_{u-1}/σ_u

and so is a jump that holds x̂_0 over all of them:

    x_s = α_s x̂_0 + G (x_t - α_t x̂_0) + s̃ Σ_u w_u z_u               G = Π_{s<v≤t} a_v
    s̃ w_u = s̃_u Π_{s<v<u} a_v,   Σ w_u² = 1

It is what the fine chain makes of the same noise if x̂_0 does not change on the way, exactly, whatever η, step, schedule
or carry.

η = 1: s̃_u² = σ_{u-1}² (1 - n_{u-1}²/n_u²) and ρ_u = n_{u-1}/n_u, so that the products telescope to
Π_{s<v<u} a_v = σ_s n_s/(σ_{u-1} n_{u-1}), and

    s̃² w_u² = σ_s² n_s² (1/n_{u-1}² - 1/n_u²),   s̃² = σ_s² n_s² (1/n_s² - 1/n_t²) = σ_s² (1 - n_s²/n_t²)
    w_u² = (1/n_{u-1}² - 1/n_u²)/(1/n_s² - 1/n_t²)

which is the law of the chain's step on the sub-grid (`Chain.on`): holding endpoints and leaving out levels are one. So
they are at η = 0, for DDPM's step, and for renoising, where ρ = 0 and z_{s+1} alone counts. With 0 < η < 1 they are
not: ε̂ keeps Π ρ_u of itself, (n_s/n_t)^{η²} on a fine grid, where DDIM's one step keeps √(1 - η² (1 - n_s²/n_t²)),
which is never below √(1 - η²). The product is the fine chain's, and jumps are of it.

What is not exact is x̂_0, which the fine chain looks up at every level. Its coefficient in x_s is

    c_u = (α_{u-1} - a_u α_u) Π_{s<v<u} a_v                          of x̂_0(x_u),  Σ c_u = α_s - G α_t

At η = 1 x̂_0 is a martingale: nothing foretells its changes but the noise to come, which a keyed path knows. So a jump
holds x̂_0 of another state than x_t, one amid the jump that has seen all of its noise (a *probe*):

    log n_e = Σ c_u log n_u/Σ c_u, to the nearest level              where x̂_0 counts on average
    x_e = α_e D + G_te (x_t - α_t D) + s̃_te Σ_u p_u z_u             D the x̂_0 of the jump before, G_te, s̃_te of t to e
    p_v ∝ s̃_v Σ_{s<u<v} c_u α_u/σ_u² Π_{u<w<v} a_w,   Σ p_v² = 1

x_e has the law of the held chain at e, so that the network sees what it was trained on; its noise is mixed as the
average of x̂_0 over the jump sees it where x̂_0 is linear in α x/σ². With 0 noise this is a midpoint rule. The first
jump has no D: it holds x̂_0 of x_t. So do jumps of one step, which are the kernel's own law, and those to x_0,
and all of a walk of three: the one that could probe has x̂_0 of x_T for D, the mean of the data, and is too long for it.
Measured: `experiments.drafts`. The rule is ours.

What differs from entry to entry of a state (α, σ or η by entry) has weights by entry and is refused.
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

F64 = NDArray[np.float64]


PROBING = 4  # jumps of a walk from T, with fewer of which none probes


@final
class Coarse:
    """Jumps down a sub-grid of a chain: from any level to the next of the sub-grid below it, one evaluation each.

    Args:
        chain: of the kernel.
        levels: where jumps of a walk from T begin, falling from T, and 0 at the end; see `backends.base.grids.subgrid`.

    Raises:
        ValueError: levels that do not fall from T to 0, or a chain whose noise levels differ from entry to entry.
    """

    below: Tensor
    """The level s a jump from t leads to, (T + 1,) int64: the largest of the sub-grid below t; 0 for 0."""
    evaluations: NDArray[np.int64]
    """How many a walk from t to 0 takes, (T + 1,)."""
    weights: F64
    """w_u of the jump from t, (T + 1, T + 1) by t and u; rows have Σ w² = 1, or are 0 where the jump has no noise."""
    probed: NDArray[np.int64]
    """The level e of the probe of a jump from t, (T + 1,); t where x_t itself is evaluated."""
    probes: F64
    """p_u of that probe, as `weights`."""

    def __init__(self, chain: Chain, levels: Sequence[int]) -> None:
        steps = chain.schedule.num_steps
        _refuse(levels, steps)
        if chain.std.numel() > steps + 1:
            raise ValueError(
                "the chain's noise differs from entry to entry of a state, as a jump's would: no draft is made of it"
            )
        self.levels = tuple(map(int, levels))
        below = [max((s for s in self.levels if s < t), default=0) for t in range(steps + 1)]
        self.evaluations, self.probed = np.zeros(steps + 1, np.int64), np.arange(steps + 1)
        self.weights, self.probes = np.zeros((2, steps + 1, steps + 1))
        own, held, probe = np.zeros((3, steps + 1, 3))
        fine = _Fine(chain)
        for t in range(1, steps + 1):
            s = below[t]
            self.evaluations[t] = 1 + self.evaluations[s]
            self.weights[t, s + 1 : t + 1] = _unit(fine.noise(t, s))
            own[t], held[t] = fine.jump(t - 1, s), fine.jump(t, s)
            if 0 < s < t - 1 and t < steps and len(self.levels) > PROBING:
                self.probed[t] = e = fine.amid(t, s)
                self.probes[t, s + 1 : t + 1], probe[t] = _unit(fine.seen(t, s)), fine.jump(t, e)
        device = chain.std.device
        self.below = torch.tensor(below, device=device)
        self._own, self._held, self._probe = torch.tensor(np.stack([own, held, probe]), device=device)
        self._pull = torch.tensor(fine.pull, device=device)
        self._noisy = chain.std.flatten() > 0

    def probe(self, x: Tensor, t: Tensor, at: Tensor, last: Tensor, offset: Tensor | None = None) -> Gaussian:
        """Law of what is evaluated: of x_e on the unit noise Σ_u p_u z_u, or x itself.

        Args:
            x: states (n, *state).
            t: their levels (n,) in 1..T.
            at: the level that is evaluated: probed[t], or t, as it must be in the first jump of a walk.
            last: D, the endpoint of the `law` that led to them; any number where at = t.
            offset: m (n, *state) where the chain is that of y = x - m.
        """
        kept, pull, std = self._at(self._probe, t, x)
        stay = self._rows(at == t, x)
        mean = torch.where(stay, x, _around(kept * x + pull * last, kept, pull, offset))
        return Gaussian(mean, torch.where(stay, 0.0, std), last)

    def law(self, x: Tensor, t: Tensor, at: Tensor, fine: Transition, offset: Tensor | None = None) -> Gaussian:
        """Law of x_s, s = below[t], on the unit noise Σ_u w_u z_u; its endpoint is the x̂_0 that it holds.

        Args:
            x, t, at, offset: as for `probe`.
            fine: the kernel's own step from what was evaluated. Where that is x, it is the first step of the jump,
                whatever it is. A guide's shift of the mean counts as one of x̂_0, and so in all steps of the jump; its
                log p/q does not count: a draft is no step of the search.

        Raises:
            TypeError: a step that is not Gaussian.
        """
        if not isinstance(fine, Gaussian):
            raise TypeError(f"jumps take kernels of Gaussian steps, got {type(fine).__name__}")
        end, first = self._shifted(fine, at), self._rows(at == t, x)
        own, held = self._at(self._own, t, x), self._at(self._held, t, x)
        kept, pull, rest = (torch.where(first, *pair) for pair in zip(own, held, strict=True))
        start, std = torch.where(first, fine.mean, x), torch.where(first, fine.std, 0.0)
        mean = _around(kept * start + pull * end, kept, pull, offset)
        still = (fine.std == 0) & self._rows(self._noisy[at], x)  # entries that the kernel gives no noise
        return Gaussian(mean, torch.where(still, 0.0, torch.hypot(kept * std, rest)), end)

    def _shifted(self, fine: Gaussian, at: Tensor) -> Tensor:
        """x̂_0 with which a step without a guide has the guided mean."""
        if fine.base_mean is None:
            return fine.endpoint
        pull = self._at(self._pull[:, None], at, fine.mean)[0]
        return fine.endpoint + torch.where(pull > 0, (fine.mean - fine.base_mean) / pull, 0.0)

    def _at(self, table: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Columns of a table at levels t, against states x, in their precision."""
        rows = table.to(torch.promote_types(x.dtype, torch.float32))[t]
        return tuple(self._rows(column, x) for column in rows.unbind(1))

    @staticmethod
    def _rows(values: Tensor, x: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * (x.ndim - 1))


def _around(y: Tensor, kept: Tensor, pull: Tensor, offset: Tensor | None) -> Tensor:
    """What is affine in x and x̂_0, around an offset."""
    return y if offset is None else y + (1 - kept - pull) * offset


class _Fine:
    """The fine steps of a chain, by the level u that each begins at."""

    def __init__(self, chain: Chain) -> None:
        def table(values: Tensor) -> F64:
            return values.flatten().cpu().numpy()

        self.std, self.alpha, self.sigma = table(chain.std), table(chain.schedule.alpha), table(chain.schedule.sigma)
        self.kept = np.divide(table(chain.direction), self.sigma, out=np.zeros_like(self.std), where=self.sigma > 0)
        self.pull = np.append(0.0, self.alpha[:-1] - self.kept[1:] * self.alpha[1:])  # of x̂_0 in one step

    def after(self, t: int, s: int) -> F64:
        """Π_{s<v<u} a_v of u = s + 1..t."""
        return np.cumprod(np.append(1.0, self.kept[s + 1 : t]), dtype=np.float64)[: t - s]

    def noise(self, t: int, s: int) -> F64:
        """s̃_u Π_{s<v<u} a_v of u = s + 1..t."""
        return self.std[s + 1 : t + 1] * self.after(t, s)

    def jump(self, t: int, s: int) -> tuple[float, float, float]:
        """Coefficients of x_t and x̂_0, and the standard deviation, of x_s."""
        kept = float(np.prod(self.kept[s + 1 : t + 1]))
        return kept, float(self.alpha[s] - kept * self.alpha[t]), float(np.linalg.norm(self.noise(t, s)))

    def counts(self, t: int, s: int) -> F64:
        """c_u of u = s + 1..t."""
        return self.pull[s + 1 : t + 1] * self.after(t, s)

    def amid(self, t: int, s: int) -> int:
        """The level of a probe, s < e <= t."""
        with np.errstate(divide="ignore"):
            log_n = np.log(self.sigma[s + 1 : t + 1]) - np.log(self.alpha[s + 1 : t + 1])
        counts = self.counts(t, s)
        return s + 1 + int(np.abs(log_n - np.average(log_n, weights=counts)).argmin()) if counts.any() else t

    def seen(self, t: int, s: int) -> F64:
        """What the average of x̂_0 over the jump sees of z_u, u = s + 1..t, up to a factor."""
        found, total = np.zeros(t - s), 0.0
        for i, (u, count) in enumerate(zip(range(s + 1, t + 1), self.counts(t, s), strict=True)):
            found[i] = self.std[u] * total
            total = self.kept[u] * total + count * self.alpha[u] / self.sigma[u] ** 2
        return found


def _unit(weights: F64) -> F64:
    """Of length 1; 0 stays 0."""
    length = np.linalg.norm(weights)
    return weights / length if length else weights


def _refuse(levels: Sequence[int], steps: int) -> None:
    whole = all(is_whole(level, 0) for level in levels)
    if not (whole and len(levels) > 1 and levels[0] == steps and levels[-1] == 0 and (np.diff(levels) < 0).all()):
        raise ValueError(f"levels are {tuple(levels)}, expected whole numbers that fall from T = {steps} to 0")
