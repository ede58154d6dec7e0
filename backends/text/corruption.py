"""How tokens are corrupted, α_t of levels 0..T, and what a step from t to s = t - 1 undoes.

    masked      a masked position is revealed with probability A = (α_s - α_t) / (1 - α_t)
    uniform     leaves x_t by the network with A (1 - p(x_t)), for any token with B (1 - p(x_t)) + B' p(x_t),
                B = (1 - α_t/α_s)(1 - α_s) / (1 - α_t),  B' = B (1 - α_t) / (1 - α_t + K α_t)

The second is Σ_{x_0} p(x_0) q(x_s | x_t, x_0) of K tokens in closed form: the step of the `DiscreteDDIMScheduler` of
diffusers.

    log-linear  α_t = 1 - t/T               cosine  α_t = cos(π t / 2 T)

Sources: Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021), eq. 3.
Simple and Effective Masked Diffusion Language Models (Sahoo et al., 2024), eq. 7 and appendix E.1, the schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from treesearch.rewards.numeric import is_whole

Noise = Literal["masked", "uniform"]
NOISES: tuple[Noise, ...] = ("masked", "uniform")
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "log-linear": lambda u: 1 - u,
    "cosine": lambda u: (math.pi / 2 * u).cos(),
}
# Samplers of discrete diffusion that are no such step, by their class in diffusers.
NO_LAW = {
    "BlockRefinementScheduler": "it commits tokens by the confidence of those it has drawn and remembers which, so "
    "that there is no law of x_s given x_t",
    "AmusedScheduler": "it keeps the tokens of highest confidence among those it has drawn, a law of x_s given x_t "
    "without a closed form",
    "EntropyBoundScheduler": "it keeps positions of low entropy and renoises the others, no posterior of a corruption",
    "VQDiffusionScheduler": "its corruption is a matrix of its own, which is not known here",
}


class Corruption(NamedTuple):
    """A process on tokens.

    Args:
        noise: what a corrupted token becomes, the mask or any token.
        alpha: α of x_0..x_T (T + 1,) float64, from 1 to 0: the share of tokens that are still clean.
    """

    noise: Noise
    alpha: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.alpha) - 1

    def reveal(self, t: Tensor) -> Tensor:
        """A of steps from levels t, float64."""
        alpha = self.alpha.to(t.device)
        return (alpha[t - 1] - alpha[t]) / (1 - alpha[t])

    def moves(self, t: Tensor, p_now: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Of uniform noise, (by the network, to anywhere else): probabilities of leaving x_t.

        Args:
            t: levels (m,).
            p_now: p(x_t) of the network (m,), float64.
            size: K.
        """
        alpha = self.alpha.to(t.device)
        at, above = alpha[t], alpha[t - 1]
        free = (1 - at / above) * (1 - above)
        spread = free * ((1 - p_now) / (1 - at) + p_now / (1 - at + size * at))
        return self.reveal(t) * (1 - p_now), spread * (size - 1) / size


def corruption(noise: Noise, schedule: Any, num_steps: int) -> Corruption:
    """A process of T steps.

    Args:
        noise: "masked" or "uniform".
        schedule: "log-linear" or "cosine", α of x_0..x_T as numbers, or a scheduler of diffusers.
        num_steps: T.

    Raises:
        ValueError: none of these, numbers that do not fall from 1 to 0, or a scheduler without a law of x_s given x_t;
            the message says why.
    """
    if noise not in NOISES:
        raise ValueError(f"noise is {noise!r}, expected one of {', '.join(NOISES)}")
    if not is_whole(num_steps):
        raise ValueError(f"num_steps is {num_steps!r}, expected at least 1")
    if hasattr(schedule, "step"):
        return Corruption(_noise_of(schedule, noise), _named("log-linear", num_steps))
    if isinstance(schedule, str):
        return Corruption(noise, _named(schedule, num_steps))
    return Corruption(noise, _given(schedule, num_steps))


def _named(schedule: str, num_steps: int) -> Tensor:
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: choose {', '.join(SCHEDULES)}, or give num_steps + 1 numbers")
    found = SCHEDULES[schedule](torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps)
    found[-1] = 0.0  # cos(π/2) in floating point is not
    return found


def _given(alpha: Sequence[float], num_steps: int) -> Tensor:
    found = torch.as_tensor(alpha, dtype=torch.float64, device="cpu")
    if found.shape != (num_steps + 1,):
        raise ValueError(
            f"the schedule has shape {tuple(found.shape)}, expected {num_steps + 1} numbers, α of x_0..x_T"
        )
    if found[0] != 1 or found[-1] != 0 or not (found.diff() < 0).all():
        raise ValueError(f"the schedule is {found.tolist()}, expected numbers that fall from 1 to 0")
    return found


def _noise_of(scheduler: Any, noise: Noise) -> Noise:
    """What corrupts under a scheduler of diffusers.

    Raises:
        ValueError: one whose step is no law of x_s given x_t, or another noise than was asked for.
    """
    name = type(scheduler).__name__
    if name != "DiscreteDDIMScheduler":
        why = NO_LAW.get(name, "it is none of discrete diffusion")
        raise ValueError(f"{name} cannot be searched: {why}; use DiscreteDDIMScheduler, or one of "
                         f"{', '.join(SCHEDULES)}")  # fmt: skip
    if scheduler.config.corrector_steps:
        raise ValueError(f"{name} with correctors draws from another law than its step: set corrector_steps=0")
    if noise != "uniform":
        raise ValueError(f"{name} is of uniform noise: pass noise='uniform'")
    return noise
