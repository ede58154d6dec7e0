"""DPM-Solver++(2M) and SDE-DPM-Solver++(2M), and their third order, as a chain on states that hold earlier endpoints.

    λ = log α/σ,  h = λ_s - λ_t,  h_1, h_2 the two steps before,  κ = 1 + η²,  D_t = x̂_0(x_t)
    x_s = mean of the kernel's step + a D' + b D''/2,
    a = α_s ∫_0^h κ e^{-κ(h-u)} u du  = α_s (h - (1 - e^{-κh})/κ)
    b = α_s ∫_0^h κ e^{-κ(h-u)} u² du = α_s h² - 2 a/κ

D' and D''/2 are divided differences of D_t and those remembered: (D_t - D_1)/h_1 at order two, as a/h_1 = α_s φ2(h)/r
with r = h_1/h. The kernel's step is the first order of the same integral at η = 0, the flow, and at η = 1, the reverse
SDE. First steps have no memory, and the step to σ_0 = 0 has h = ∞: they are of lower order.

The tree is exact: (x_t, D_1, ...) is all that the solver knows. Order two is diffusers' DPMSolverMultistepScheduler
with solver_type="heun" and final_sigmas_type="zero"; "midpoint" has (1 - e^{-κh})/2 in place of φ2, the same to its
order. At order three published code has half of our b, which is φ3 = φ2/h - 1/2 with D''/2 in place of D'': of order
two in our measurement.

Source: DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022), eqs. 8-9,
algorithm 2 and app. B.5-B.6, with exact integrals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, expand
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.packed import Packed
from treesearch.rewards.numeric import is_whole


class Weights(NamedTuple):
    """What D_t - D_1 and D_1 - D_2 count for by level, (T + 1,) or (T + 1, *state)."""

    second: Tensor  # of D_t - D_1, at order two
    third: Tensor  # beside it at order three
    older: Tensor  # of D_1 - D_2


@final
@dataclass(frozen=True, eq=False)
class SecondOrder(Packed):
    """A kernel whose steps use the endpoints predicted before.

    Args:
        kernel: one on a `Chain` with η = 0 or η = 1.
        order: 2 or 3; a state holds order - 1 endpoints.

    Raises:
        TypeError: a kernel without such a chain.
        ValueError: another η or order.
    """

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.order, 2, 3):
            raise ValueError(f"order is {self.order!r}, expected 2 or 3")
        _kappa(self.kernel.chain)

    @property
    def memory(self) -> int:
        return self.order - 1

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        law = self._step(x[:, 0], t, cond)
        memory = [law.endpoint, *x[:, 1:].unbind(1)]
        return self._law(law, law.mean + self._push(t, *memory), *memory[:-1])

    def _push(self, t: Tensor, now: Tensor, last: Tensor, older: Tensor | None = None) -> Tensor:
        """a D' + b D''/2, of the memory there is."""
        second, third, oldest = (expand(w.to(now.device, now.dtype)[t], now) for w in self._weights)
        push = second * (now - last)
        if older is not None:
            more = third * (now - last) + oldest * (last - older)
            push = push + torch.where(_known(older), more, 0.0)
        return torch.where(_known(last), push, 0.0)

    @cached_property
    def _weights(self) -> Weights:
        chain = self.kernel.chain
        return weights(chain.schedule.alpha, chain.schedule.sigma, _kappa(chain))


def weights(alpha: Tensor, sigma: Tensor, kappa: float) -> Weights:
    """From α and σ of x_0..x_T."""
    log_snr = (alpha / sigma).log()
    h = -log_snr.diff(dim=0, prepend=log_snr[:1])  # of the step from x_t
    h1, h2 = (torch.cat([h[k:], torch.full_like(h[:k], torch.inf)]) for k in (1, 2))
    a = alpha.roll(1, 0) * (h + torch.expm1(-kappa * h) / kappa)
    b = alpha.roll(1, 0) * h**2 - 2 * a / kappa
    curved = (a * h1 + b) / (h1 + h2)  # of (D_t - D_1)/h_1 - (D_1 - D_2)/h_2
    return Weights(*(torch.where(w.isfinite(), w, 0.0) for w in (a / h1, curved / h1, -curved / h2)))


def _known(memory: Tensor) -> Tensor:
    """Which rows remember an endpoint, (n, 1, ...)."""
    return expand((memory != 0).flatten(1).any(1), memory)


def _kappa(chain: Chain) -> float:
    """1 + η²."""
    eta = torch.as_tensor(chain.eta, device="cpu")
    if chain.step == "renoise" or not ((eta == 0).all() or (eta == 1).all()):
        raise ValueError(
            f"the chain has eta={chain.eta}, step={chain.step!r}: a second order needs eta = 0 (the flow) or eta = 1 "
            "(the reverse SDE), between which a step is not the first order of an exact solution"
        )
    if (noisy := bool((eta == 1).all())) and chain.schedule.carry is not None:
        raise ValueError("a process with a carry of its own has no reverse SDE of this form: use eta = 0")
    return 2.0 if noisy else 1.0
