"""The reverse chain of diffusion and flow models: DDIM(η), DDPM and full renoising, every row at its own t.

    x_t = α_t x_0 + σ_t ε                        `Schedule`
    x_s = α_s x̂_0 + √(σ_s² - s̃²) ε̂ + s̃ z        s the next entry of the grid after t
    s̃²  = η² (σ_s²/σ_t²) (σ_t² - (α_t/α_s)² σ_s²)

With α² + σ² = 1 this is DDIM (eqs. 12 and 16). With α = 1 - σ and the velocity v = ε - x_0 it is a stochastic flow
chain, finite at σ_T = 1, and Euler's method at η = 0. DDPM is the same law at η = 1, with ε̂ recomputed from a clipped
x̂_0. Full renoising is s̃ = σ_s, what few-step models (LCM, Turbo, Lightning, Schnell) are distilled for.
The law that a search leaves invariant is this discrete chain's, at its number of steps.

Equal to diffusers' DDPMScheduler (fixed_small), and to its DDIMScheduler where that one lands on its own grid: it takes
s = t - N // T, which is the next entry only for leading spacing, and for trailing spacing where T divides N.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eqs. 6-7.
    Denoising Diffusion Implicit Models (Song et al., 2021), eqs. 12 and 16.
    Progressive Distillation (Salimans and Ho, 2022), v = α ε - σ x_0.
    Flow Matching for Generative Modeling (Lipman et al., 2023), straight paths.
    Latent Consistency Models (Luo et al., 2023), algorithm 3, renoising.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Gaussian, expand, fingerprint
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.schedules import Prediction, Schedule
from treesearch.rewards.numeric import is_number

Step = Literal["ddim", "ddpm", "renoise"]


def to_endpoint(
    prediction: Prediction, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε̂) from a network output; alpha = α_t and sigma = σ_t broadcast against x."""
    if prediction == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction == "v":
        return alpha * x - sigma * output, sigma * x + alpha * output
    if prediction == "flow":
        return x - sigma * output, x + alpha * output
    return output, (x - alpha * output) / sigma


@final
class Chain:
    """The law of x_s given x_t and a network output, as tables over t.

    Args:
        schedule: the grid.
        eta: η in [0, 1]; 0 is deterministic after the prior, 1 is ancestral sampling.
        step: "ddim", "ddpm" (η = 1, ε̂ recomputed from the clipped x̂_0) or "renoise" (s̃ = σ_s, whatever η).
        clip_sample: limit of |x̂_0|, None for none.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self, schedule: Schedule, *, eta: float = 1.0, step: Step = "ddim", clip_sample: float | None = None
    ) -> None:
        if not is_number(eta, 0, 1):
            raise ValueError(f"eta is {eta!r}, expected 0..1")
        if step not in ("ddim", "ddpm", "renoise"):
            raise ValueError(
                f"unknown step {step!r}: choose ddim, ddpm or renoise; solvers with memory (DPM-Solver++, UniPC, PNDM, "
                "Heun, ...) have no law of x_s given x_t alone"
            )
        if step != "ddim" and eta != 1:
            raise ValueError(f"step={step!r} has eta = 1, got {eta}: use step='ddim' for other values")
        self.schedule, self.eta, self.clip_sample = schedule, eta, clip_sample
        self.step: Step = step
        alpha_t, sigma_t = schedule.alpha[1:], schedule.sigma[1:]
        alpha_s, sigma_s = schedule.alpha[:-1], schedule.sigma[:-1]
        if step == "renoise":
            variance = sigma_s**2
        else:
            variance = (eta * sigma_s / sigma_t) ** 2 * (sigma_t**2 - (alpha_t * sigma_s / alpha_s) ** 2)
        variance = variance.clamp_min(0)  # rounding, where two grid points coincide
        self.timestep = _table(schedule.timestep)
        self.alpha, self.sigma = _table(alpha_t.float()), _table(sigma_t.float())
        self.alpha_s, self.std = _table(alpha_s.float()), _table(variance.sqrt().float())
        self.direction = _table((sigma_s**2 - variance).clamp_min(0).sqrt().float())
        self.stochastic = torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), self.std[1:] > 0])

    def to(self, device: str | torch.device) -> Chain:
        """The same chain, its tables moved to a device."""
        for name in ("timestep", "alpha", "sigma", "alpha_s", "std", "direction"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def law(self, x: Tensor, t: Tensor, output: Tensor) -> Gaussian:
        """Law of x_s for states x (n, *state) at levels t (n,), from the network's output (n, *state)."""
        alpha, sigma = expand(self.alpha[t], x), expand(self.sigma[t], x)
        endpoint, eps = to_endpoint(self.schedule.prediction, output, x, alpha, sigma)
        if self.clip_sample is not None:
            endpoint = endpoint.clamp(-self.clip_sample, self.clip_sample)
            if self.step == "ddpm":
                eps = (x - alpha * endpoint) / sigma
        mean = expand(self.alpha_s[t], x) * endpoint + expand(self.direction[t], x) * eps
        return Gaussian(mean, expand(self.std[t], x), endpoint)

    def settings(self) -> tuple[Any, ...]:
        """What tells chains apart, beside their tables."""
        of = self.schedule
        return (self.step, self.eta, of.prediction, self.clip_sample, of.num_steps, of.prior_std)

    def tables(self) -> dict[str, Tensor]:
        """The tables that define the chain."""
        return {"timestep": self.timestep, "alpha": self.alpha, "sigma": self.sigma, "alpha_s": self.alpha_s}


def _table(values: Tensor) -> Tensor:
    """Values indexed by t in 1..T; entry 0 is unused."""
    return torch.cat([torch.zeros_like(values[:1]), values])


@final
class DiffusionKernel:
    """The chain that a network defines.

    Args:
        model: called as model(x, timestep) with timestep (n,); returns a tensor like x, or has it as `.sample`. A
            network is moved to the device, called in evaluation mode and otherwise left as it is.
        state_shape: shape of one state.
        schedule: the grid, and what the network returns.
        eta, step, clip_sample: as for `Chain`.
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
        schedule: Schedule,
        eta: float = 1.0,
        step: Step = "ddim",
        clip_sample: float | None = None,
        decode: Callable[[Tensor], Any] | None = None,
        device: str | torch.device = "cpu",
        name: str = "diffusion",
    ) -> None:
        self.model, self.num_steps, self.state_shape = model, schedule.num_steps, tuple(state_shape)
        self.device, self.dtype, self.name = torch.device(device), torch.float32, name
        self.chain = Chain(schedule, eta=eta, step=step, clip_sample=clip_sample).to(self.device)
        self.stochastic = self.chain.stochastic
        self._decode = decode
        networks = [model.to(self.device)] if isinstance(model, nn.Module) else []
        self._quiet = Quiet(*networks)

    def to(self, device: str | torch.device) -> DiffusionKernel:
        """The same kernel, moved to a device."""
        self.device = torch.device(device)
        self.chain.to(self.device)
        if isinstance(self.model, nn.Module):
            self.model.to(self.device)
        return self

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        self._quiet.look()
        return noise.to(self.device, self.dtype)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        with self._quiet, torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            output = self.model(x, self.chain.timestep[t])
            output = getattr(output, "sample", output)
            if not isinstance(output, Tensor) or output.shape != x.shape:
                got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"the network returned {got}, expected {tuple(x.shape)}, like x: wrap it to return that alone"
                )
            return self.chain.law(x, t, output)

    def encode(self, prompts: Sequence[Any]) -> None:
        """Unconditional: prompts reach the reward only."""
        return

    def decode(self, x0: Tensor) -> Any:
        return x0 if self._decode is None else self._decode(x0)

    @property
    def fingerprint(self) -> str | None:
        """Hash of the network as it is now, the grid and the settings; None for a model that cannot be read."""
        if not isinstance(self.model, nn.Module):
            return None
        found = fingerprint.of([self.name, self.chain.settings(), self.chain.tables(), self.model, self._decode])
        return None if found is None else f"{self.name}:{found}"
