"""The reverse chain of diffusion and flow models: DDIM(η), DDPM and full renoising, every row at its own t.

    x_t = α_t x_0 + σ_t ε                        `Schedule`
    x_s = α_s x̂_0 + √(σ_s² - s̃²) ε̂ + s̃ z        s the next entry of the grid after t
    s̃²  = η² (σ_s²/σ_t²) (σ_t² - (α_t/α_s)² σ_s²)

σ_t² - (α_t/α_s)² σ_s² is the noise of the step x_s -> x_t; a process whose x_t keeps another part of x_s than α_t/α_s
says so (`Schedule.carry`). α, σ and η may differ from entry to entry of the state.

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

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Gaussian, Shared, expand, fingerprint
from treesearch.backends.base.cfg import extrapolated
from treesearch.backends.base.pictures import pixels_of
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.schedules import Prediction, Schedule
from treesearch.rewards.numeric import is_number

Step = Literal["ddim", "ddpm", "renoise"]
CONDITION = "condition"  # of conditioning: rows that a model is told
NEGATIVE = "negative_"  # of conditioning: what guidance reads as ∅ beside the conditioning of that name


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


def from_endpoint(prediction: Prediction, endpoint: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The network output that means (x̂_0, ε̂): the inverse of `to_endpoint`."""
    if prediction == "epsilon":
        return eps
    if prediction == "v":
        return alpha * eps - sigma * endpoint
    if prediction == "flow":
        return eps - endpoint
    return endpoint


@final
class Chain:
    """The law of x_s given x_t and a network output, as float64 tables over t, cast where they are used.

    Args:
        schedule: the grid.
        eta: η in [0, 1]; 0 is deterministic after the prior, 1 is ancestral sampling. A tensor (1, *state) says it by
            entry, one (T + 1, *state) by level too.
        step: "ddim", "ddpm" (η = 1, ε̂ recomputed from the clipped x̂_0) or "renoise" (s̃ = σ_s, whatever η).
        clip_sample: limit of |x̂_0|, None for none.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self, schedule: Schedule, *, eta: float | Tensor = 1.0, step: Step = "ddim", clip_sample: float | None = None
    ) -> None:
        _refuse_eta(eta, schedule.num_steps)
        if step not in ("ddim", "ddpm", "renoise"):
            raise ValueError(
                f"unknown step {step!r}: choose ddim, ddpm or renoise; solvers with memory (DPM-Solver++, UniPC, PNDM, "
                "Heun, ...) have no law of x_s given x_t alone"
            )
        if step != "ddim" and not (is_number(eta) and eta == 1):
            raise ValueError(f"step={step!r} has eta = 1, got {eta}: use step='ddim' for other values")
        self.schedule, self.eta, self.clip_sample = schedule, eta, clip_sample
        self.step: Step = step
        levels, own = _aligned(schedule, eta)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((v[1:] for v in levels), (v[:-1] for v in levels))
        carried = alpha_t * sigma_s / alpha_s if schedule.carry is None else _like(schedule.carry, alpha_t) * sigma_s
        ddim = (own * sigma_s / sigma_t) ** 2 * (sigma_t**2 - carried**2)
        variance = (sigma_s**2 if step == "renoise" else ddim).clamp_min(0)  # rounding, where two grid points coincide
        self.timestep = _table(schedule.timestep)
        self.alpha, self.sigma, self.alpha_s = _table(alpha_t), _table(sigma_t), _table(alpha_s)
        self.std, self.direction = _table(variance.sqrt()), _table((sigma_s**2 - variance).clamp_min(0).sqrt())
        noisy = (self.std[1:].float() > 0).flatten(1).any(1) if self.std.ndim > 1 else self.std[1:].float() > 0
        self.stochastic = torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), noisy])

    def to(self, device: str | torch.device) -> Chain:
        """The same chain, its tables moved to a device."""
        for name in ("timestep", *TABLES):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def on(self, schedule: Schedule) -> Chain:
        """The same settings on another grid; η by level is cut to its length."""
        eta = self.eta
        if isinstance(eta, Tensor) and len(eta) > 1:
            eta = eta[: schedule.num_steps + 1]
        return Chain(schedule, eta=eta, step=self.step, clip_sample=self.clip_sample).to(self.alpha.device)

    def at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """Entries of a table for rows at levels t (n,), broadcastable to states x (n, *state), in their precision."""
        rows = getattr(self, name)[t]
        return expand(rows.to(torch.promote_types(x.dtype, torch.float32)), x)

    def law(
        self, x: Tensor, t: Tensor, output: Tensor | tuple[Tensor, Tensor], offset: Tensor | None = None
    ) -> Gaussian:
        """Law of x_s for states x (n, *state) at levels t (n,).

        Args:
            x, t: as said.
            output: of the network (n, *state); or x̂_0 and ε̂ themselves, which need not add up to x_t: the step is
                then x_t + (α_s - α_t) x̂_0 + (√(σ_s² - s̃²) - σ_t) ε̂ + s̃ z.
            offset: m (n, *state) where the chain is that of y = x - m, as of a process that reverts to m; the network's
                output, x̂_0 and ε̂ are then those of y. The law and its endpoint are of x.
        """
        y = x if offset is None else x - offset
        alpha, sigma, alpha_s = self.at("alpha", t, x), self.at("sigma", t, x), self.at("alpha_s", t, x)
        direction = self.at("direction", t, x)
        if isinstance(output, tuple):
            endpoint, eps = output
        else:
            endpoint, eps = to_endpoint(self.schedule.prediction, output, y, alpha, sigma)
        if self.clip_sample is not None:
            endpoint = self._clipped(endpoint, offset)
            if self.step == "ddpm":
                eps = (y - alpha * endpoint) / sigma
        if isinstance(output, tuple):
            mean = y + (alpha_s - alpha) * endpoint + (direction - sigma) * eps
        else:
            mean = alpha_s * endpoint + direction * eps
        std = self.at("std", t, x)
        return Gaussian(mean, std, endpoint) if offset is None else Gaussian(mean + offset, std, endpoint + offset)

    def _clipped(self, endpoint: Tensor, offset: Tensor | None) -> Tensor:
        """x̂_0 within its limit, as seen from the offset."""
        limit = self.clip_sample
        if limit is None or offset is None:
            return endpoint if limit is None else endpoint.clamp(-limit, limit)
        return (endpoint + offset).clamp(-limit, limit) - offset

    def renoise(self, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Tensor) -> Tensor:
        """x_{t_to} ~ q(x_{t_to} | x_{t_from} = x), rows (n, *state) with t_to >= t_from >= 0 (n,).

        Raises:
            ValueError: a move down the chain, or a process whose noising needs x_0.
        """
        if (t_to < t_from).any():
            raise ValueError("renoise moves up the chain: expected t_to >= t_from")
        if self.schedule.carry is not None:
            raise ValueError("this process cannot be noised from a state alone: its steps need x_0")
        alpha, sigma = self.schedule.alpha.to(x.device), self.schedule.sigma.to(x.device)
        scale = alpha[t_to] / alpha[t_from]
        std = (sigma[t_to] ** 2 - (scale * sigma[t_from]) ** 2).clamp_min(0).sqrt()
        return expand(scale.to(x.dtype), x) * x + expand(std.to(x.dtype), x) * noise.to(x.device, x.dtype)

    def settings(self) -> tuple[Any, ...]:
        """What tells chains apart, beside their tables."""
        of, eta = self.schedule, self.eta
        return (self.step, "by entry" if isinstance(eta, Tensor) else eta, of.prediction, self.clip_sample,
                of.num_steps, of.prior_std)  # fmt: skip

    def tables(self) -> dict[str, Tensor]:
        """The tables that define the chain."""
        return {name: getattr(self, name) for name in ("timestep", "alpha", "sigma", "alpha_s", "std")}


TABLES = ("alpha", "sigma", "alpha_s", "std", "direction")


def _refuse_eta(eta: float | Tensor, steps: int) -> None:
    if not isinstance(eta, Tensor):
        if not is_number(eta, 0, 1):
            raise ValueError(f"eta is {eta!r}, expected 0..1")
        return
    if eta.ndim < 2 or len(eta) not in (1, steps + 1):
        got = tuple(eta.shape)
        raise ValueError(f"eta has shape {got}, expected (1, *state), or (T + 1, *state) with T = {steps}")
    if not ((eta >= 0) & (eta <= 1)).all():
        raise ValueError("eta has entries outside 0..1")


def _aligned(schedule: Schedule, eta: float | Tensor) -> tuple[tuple[Tensor, Tensor], float | Tensor]:
    """α and σ of x_0..x_T with the axes that η has, and η of x_1..x_T."""
    if not isinstance(eta, Tensor):
        return (schedule.alpha, schedule.sigma), eta
    own = eta.detach().double().cpu()
    return (_like(schedule.alpha, own), _like(schedule.sigma, own)), own if len(own) == 1 else own[1:]


def _like(table: Tensor, other: Tensor) -> Tensor:
    """A table over t with trailing axes, so that it broadcasts against another."""
    return expand(table, other) if other.ndim > 1 else table


def _table(values: Tensor) -> Tensor:
    """Values indexed by t in 1..T; entry 0 is unused."""
    return torch.cat([torch.zeros_like(values[:1]), values])


@final
class DiffusionKernel:
    """The chain that a network defines.

    Args:
        model: called as model(x, timestep) with timestep (n,), or, where there is a `condition`, as model(x, timestep,
            rows of it); returns a tensor like x, or has it as `.sample`. A network is moved to the device, called in
            evaluation mode and otherwise left as it is.
        state_shape: shape of one state.
        schedule: the grid, and what the network returns.
        eta, step, clip_sample: as for `Chain`.
        condition: prompts -> rows (n, ...) that the model is told; None for a model that is told nothing.
        guidance_scale: w of classifier-free guidance, ε(∅) + w (ε(c) - ε(∅)) in one call of 2n rows, ∅ before c; at 1
            the model is told c alone.
        negative_prompt: what ∅ is told.
        decode: x_0 (n, *state) -> samples; the identity by default.
        to_state: pixels (n, c, h, w) in [0, 1] -> their x_0, where `decode` draws pictures; None where it does not.
        sample_range: (low, high) of the entries of samples; None where that is unknown.
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
        eta: float | Tensor = 1.0,
        step: Step = "ddim",
        clip_sample: float | None = None,
        condition: Callable[[Sequence[Any]], Tensor] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: Any = "",
        decode: Callable[[Tensor], Any] | None = None,
        to_state: Callable[[Tensor], Tensor] | None = None,
        sample_range: tuple[float, float] | None = None,
        device: str | torch.device = "cpu",
        name: str = "diffusion",
    ) -> None:
        self.model, self.num_steps, self.state_shape = model, schedule.num_steps, tuple(state_shape)
        self.device, self.dtype, self.name = torch.device(device), torch.float32, name
        self.chain = Chain(schedule, eta=eta, step=step, clip_sample=clip_sample).to(self.device)
        self.stochastic = self.chain.stochastic
        self._condition, self._decode, self._to_state, self.sample_range = condition, decode, to_state, sample_range
        if not is_number(guidance_scale, 0, 1e6) or (guidance_scale != 1 and condition is None):
            raise ValueError(
                f"guidance_scale is {guidance_scale!r}, expected a number >= 0, and a `condition` to guide by"
            )
        self.guidance_scale, self._negative = float(guidance_scale), negative_prompt
        networks = [model.to(self.device)] if isinstance(model, nn.Module) else []
        self._quiet = Quiet(*networks)

    @property
    def network(self) -> nn.Module | None:
        """The module that a step calls; None where that is a function."""
        return self.model if isinstance(self.model, nn.Module) else None

    def to(self, device: str | torch.device) -> DiffusionKernel:
        """The same kernel, moved to a device."""
        self.device = torch.device(device)
        self.chain.to(self.device)
        if isinstance(self.model, nn.Module):
            self.model.to(self.device)
        return self

    def with_network(self, network: nn.Module, chain: Chain, name: str) -> DiffusionKernel:
        """A kernel of the same states, samples and conditioning under another network and chain, told c alone."""
        made = copy.copy(self)
        made.model, made.chain, made.name = network.to(self.device), chain.to(self.device), name
        made.num_steps, made.stochastic, made.guidance_scale = chain.schedule.num_steps, chain.stochastic, 1.0
        made._quiet = Quiet(network)
        return made

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        self._quiet.look()
        return self.chain.schedule.prior_std * noise.to(self.device, self.dtype)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        with self._quiet, torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            told, timestep = self._told(cond), self.chain.timestep[t]
            if self.guidance_scale == 1:
                return self.chain.law(x, t, self._called(x, timestep, *told))
            absent, given = self._called(torch.cat([x, x]), torch.cat([timestep, timestep]), *told).chunk(2)
            return self.chain.law(x, t, extrapolated(absent, given, self.guidance_scale))

    def _called(self, x: Tensor, *told: Tensor) -> Tensor:
        """What the network returns."""
        output = self.model(x, *told)
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the network returned {got}, expected {tuple(x.shape)}, like x: wrap it to return that alone"
            )
        return output

    @property
    def rows_per_nfe(self) -> int:
        return 1 if self.guidance_scale == 1 else 2

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any] | None:
        """Rows that the model is told; without a `condition` prompts reach the reward only."""
        if self._condition is None:
            return None
        given = {CONDITION: self._condition(prompts).to(self.device)}
        if self.guidance_scale == 1:
            return given
        return given | {NEGATIVE + CONDITION: Shared(self._condition([self._negative]).to(self.device))}

    def _told(self, cond: Cond) -> tuple[Tensor, ...]:
        """What the model is told beside the time, ∅ before c where it is guided."""
        if self._condition is None:
            return ()
        if cond is None or CONDITION not in cond:
            raise ValueError(f"{self.name} is told what to make: give it prompts, prompts=[...]")
        given = cond[CONDITION]
        if self.guidance_scale == 1:
            return (given,)
        return (torch.cat([cond[NEGATIVE + CONDITION].expand_as(given), given]),)

    def decode(self, x0: Tensor) -> Any:
        return x0 if self._decode is None else self._decode(x0)

    @property
    def state_of(self) -> Callable[[Any], Tensor] | None:
        """x_0 (*state) of a picture; None of a kernel that draws none."""
        return None if self._to_state is None else partial(_state_of, self._to_state, self.state_shape, self.device)

    @property
    def fingerprint(self) -> str | None:
        """Hash of the network as it is now, the grid and the settings; None for a model that cannot be read."""
        if not isinstance(self.model, nn.Module):
            return None
        told = [self._decode, self._condition]
        if self.guidance_scale != 1:
            told += [self.guidance_scale, self._negative]
        found = fingerprint.of([self.name, self.chain.settings(), self.chain.tables(), self.model, *told])
        return None if found is None else f"{self.name}:{found}"


def _state_of(to_state: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: torch.device, image: Any) -> Tensor:
    """x_0 of a picture of as many channels and pixels as states have."""
    channels, height, width = shape
    return to_state(pixels_of(image, channels, (height, width))[None].to(device))[0]
