"""DDPM and DDIM(η) over any torch module that predicts ε, v or x_0; every row of a batch has its own t.

    x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t,   x_s = √ᾱ_s x̂_0 + √(1 - ᾱ_s - σ²) ε + σ z        (DDIM eq. 12)
    σ = η √((1-ᾱ_s)/(1-ᾱ_t)) √(1 - ᾱ_t/ᾱ_s)                                             (DDIM eq. 16)

ᾱ is `alphas_cumprod` on the training grid of N steps, s the next entry of the respaced grid (ᾱ_s = `final_alpha` at
its end). DDPM is the same law at η = 1, with ε recomputed from a clipped x̂_0.

Equal to diffusers' DDPMScheduler (fixed_small), and to its DDIMScheduler where that one lands on its own grid: it takes
s = t - N // T, which is the next entry only for leading spacing, and for trailing spacing where T divides N.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eqs. 6-7.
    Denoising Diffusion Implicit Models (Song et al., 2021), eqs. 12 and 16.
    Progressive Distillation (Salimans and Ho, 2022), v = √ᾱ ε - √(1-ᾱ) x_0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from backends.base import Cond, Gaussian, expand

Prediction = Literal["epsilon", "v", "sample"]
Spacing = Literal["leading", "trailing", "linspace"]


def respace(train_steps: int, num_steps: int, spacing: Spacing = "trailing", offset: int = 0) -> Tensor:
    """The network timesteps of a chain of `num_steps`, ascending: entry t - 1 belongs to x_t.

    Raises:
        ValueError: more steps than the model was trained with, or an unknown spacing.
    """
    if not 1 <= num_steps <= train_steps:
        raise ValueError(f"num_steps is {num_steps}, expected 1..{train_steps} (the steps of the training grid)")
    index = torch.arange(num_steps, dtype=torch.float64)
    if spacing == "leading":
        steps = index * (train_steps // num_steps) + offset
    elif spacing == "trailing":
        # The arithmetic of numpy.arange, so that ties round as they do in diffusers.
        steps = (train_steps + index * ((train_steps - train_steps / num_steps) - train_steps)).round().flip(0) - 1
    elif spacing == "linspace":
        steps = (index * ((train_steps - 1) / max(1, num_steps - 1))).round()
    else:
        raise ValueError(f"unknown spacing {spacing!r}: choose leading, trailing or linspace")
    if not (steps[0] >= 0 and steps[-1] < train_steps):
        ends = f"{steps[0]:g}..{steps[-1]:g}"
        raise ValueError(f"offset {offset} gives timesteps {ends}, expected them within 0..{train_steps - 1}")
    return steps.long()


def to_endpoint(
    prediction: Prediction, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε̂) from a network output; alpha = √ᾱ_t and sigma = √(1-ᾱ_t) broadcast against x."""
    if prediction == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction == "v":
        return alpha * x - sigma * output, sigma * x + alpha * output
    return output, (x - alpha * output) / sigma


@final
class DiffusionKernel:
    """The chain that DDPM or DDIM(η) makes of a network.

    Args:
        model: called as model(x, timestep) with timestep (n,) int64; returns a tensor like x, or has it as `.sample`.
        state_shape: shape of one state.
        alphas_cumprod: ᾱ on the training grid, (N,).
        num_steps: T, the steps of the chain.
        eta: DDIM's η in [0, 1]; 0 is deterministic after the prior, 1 is ancestral sampling.
        step: "ddim", or "ddpm" (η = 1, ε recomputed from the clipped x̂_0).
        prediction: what the network returns.
        spacing, offset: the respaced grid, see `respace`.
        final_alpha: ᾱ after the last step; 1 makes it deterministic, None takes ᾱ of the first training step.
        clip_sample: limit of |x̂_0|, None for none.
        decode: x_0 (n, *state) -> samples; the identity by default.
        name: enters the fingerprint.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        *,
        state_shape: Sequence[int],
        alphas_cumprod: Tensor,
        num_steps: int,
        eta: float = 1.0,
        step: Literal["ddim", "ddpm"] = "ddim",
        prediction: Prediction = "epsilon",
        spacing: Spacing = "trailing",
        offset: int = 0,
        final_alpha: float | None = 1.0,
        clip_sample: float | None = None,
        decode: Callable[[Tensor], Any] | None = None,
        device: str | torch.device = "cpu",
        name: str = "diffusion",
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, expected 0..1")
        if step not in ("ddim", "ddpm"):
            raise ValueError(f"unknown step {step!r}: choose ddim or ddpm")
        if step == "ddpm" and eta != 1:
            raise ValueError(f"step='ddpm' has eta = 1, got {eta}: use step='ddim' for other values")
        if prediction not in ("epsilon", "v", "sample"):
            raise ValueError(f"unknown prediction {prediction!r}: choose epsilon, v or sample")
        self.model, self.num_steps, self.state_shape = model, num_steps, tuple(state_shape)
        self.device, self.dtype, self.name = torch.device(device), torch.float32, name
        self.eta, self.step, self.clip_sample = eta, step, clip_sample
        self.prediction: Prediction = prediction
        self._decode = decode
        bars = alphas_cumprod.double().cpu()
        if bars.ndim != 1 or not ((bars >= 0) & (bars < 1)).all() or (bars.diff() > 0).any():
            raise ValueError("alphas_cumprod must be one axis of numbers in [0, 1) that never increase")
        steps = respace(len(bars), num_steps, spacing, offset)
        bar_t = bars[steps]
        if prediction == "epsilon" and bar_t[-1] == 0:
            raise ValueError(
                "alphas_cumprod ends at 0, where ε does not give x_0: the network must predict v or sample"
            )
        last = float(bars[0]) if final_alpha is None else final_alpha
        if not float(bar_t[0]) <= last <= 1:
            raise ValueError(f"final_alpha is {last}, expected {float(bar_t[0]):.4g} (ᾱ of the last step) to 1")
        bar_s = torch.cat([torch.tensor([last], dtype=torch.float64), bar_t[:-1]])
        variance = eta**2 * (1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s)
        variance = variance.clamp_min(0)  # bar_t > bar_s by rounding where two grid points coincide
        self._timestep = self._table(steps)
        self._alpha, self._sigma = self._table(bar_t.sqrt().float()), self._table((1 - bar_t).sqrt().float())
        self._alpha_s = self._table(bar_s.sqrt().float())
        self._direction = self._table((1 - bar_s - variance).clamp_min(0).sqrt().float())
        self._std = self._table(variance.sqrt().float())
        self.stochastic = torch.cat([torch.ones(1, dtype=torch.bool), (self._std[1:] > 0).cpu()])
        if isinstance(model, nn.Module):
            model.to(self.device).eval().requires_grad_(False)

    def _table(self, values: Tensor) -> Tensor:
        """Values indexed by t in 1..T; entry 0 is unused."""
        return torch.cat([torch.zeros_like(values[:1]), values]).to(self.device)

    def to(self, device: str | torch.device) -> DiffusionKernel:
        """The same kernel, moved to a device."""
        self.device = torch.device(device)
        for name in ("_timestep", "_alpha", "_sigma", "_alpha_s", "_direction", "_std"):
            setattr(self, name, getattr(self, name).to(self.device))
        if isinstance(self.model, nn.Module):
            self.model.to(self.device)
        return self

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return noise.to(self.device, self.dtype)

    @torch.no_grad()
    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        alpha, sigma = expand(self._alpha[t], x), expand(self._sigma[t], x)
        output = self.model(x, self._timestep[t])
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the network returned {got}, expected {tuple(x.shape)}, like x: wrap it to return that alone"
            )
        endpoint, eps = to_endpoint(self.prediction, output, x, alpha, sigma)
        if self.clip_sample is not None:
            endpoint = endpoint.clamp(-self.clip_sample, self.clip_sample)
            if self.step == "ddpm":
                eps = (x - alpha * endpoint) / sigma
        mean = expand(self._alpha_s[t], x) * endpoint + expand(self._direction[t], x) * eps
        return Gaussian(mean, expand(self._std[t], x), endpoint)

    def encode(self, prompts: Sequence[Any]) -> None:
        """Unconditional: prompts reach the reward only."""
        return

    def decode(self, x0: Tensor) -> Any:
        return x0 if self._decode is None else self._decode(x0)

    @cached_property
    def fingerprint(self) -> str | None:
        """Hash of the weights, the grid and the settings; None for a model without weights to hash."""
        if not isinstance(self.model, nn.Module):
            return None
        digest = hashlib.blake2b(digest_size=12)
        settings = (self.name, self.step, self.eta, self.prediction, self.clip_sample, self.num_steps)
        digest.update(repr(settings).encode())
        tables = {"timestep": self._timestep, "alpha": self._alpha, "alpha_s": self._alpha_s}
        for key, value in (tables | self.model.state_dict()).items():
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"{self.name}:{digest.hexdigest()}"
