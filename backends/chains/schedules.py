"""Noise schedules on a grid of T steps: what the network is told at x_t, and x_t = α_t x_0 + σ_t ε.

    variance preserving   α_t = √ᾱ_t, σ_t = √(1 - ᾱ_t)      DDPM and every solver of its family
    flow                  α_t = 1 - σ_t                     rectified flow, network time 1000 σ_t
    Karras                σ_t/α_t = (a + (b - a)(t-1)/(T-1))^ρ   variance preserving, spaced in the noise level

Entry 0 is the end of the chain: α_0 = 1, σ_0 = 0, unless the schedule stops at the first training step.
The grids of diffusers' schedulers are what their own `set_timesteps` gives, solvers with memory included.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 4.
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 5, the spacing.
    Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), spacing and zero terminal SNR.
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), eq. 23, the shift.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from treesearch.rewards.numeric import is_whole

Prediction = Literal["epsilon", "v", "sample", "flow"]
Spacing = Literal["leading", "trailing", "linspace"]
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
    "flow_prediction": "flow",
}
# Schedulers of diffusers, by where the levels of their grid stand: ᾱ at their timesteps, or their own σ/α, where the
# scaled ones draw x_T / α_T.
_AT_TIMESTEPS = (
    *("DDIM", "DDPM", "LCM", "TCD", "PNDM", "DDIMParallel", "DDPMParallel", "CogVideoXDDIM", "CogVideoXDPM"),
)
_SCALED = (
    "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete", "KDPM2Discrete",
    "KDPM2AncestralDiscrete", "DPMSolverSDE",
)  # fmt: skip
_EDM = ("CosineDPMSolverMultistep", "EDMDPMSolverMultistep")  # of v: x / √(1 + σ²), where its data has unit variance
_BY_SIGMA = (
    *_SCALED, *_EDM, "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver",
)  # fmt: skip
_FLOW = ("FlowMatchEulerDiscrete", "FlowMatchLCM")
_KNOWN = _AT_TIMESTEPS + _BY_SIGMA + _FLOW


EPS = 1e-12  # of comparisons that hold in exact arithmetic


@dataclass(frozen=True)
class Schedule:
    """A grid of T steps.

    Args:
        timestep: what the network is told at x_1..x_T, (T,).
        alpha, sigma: α and σ of x_0..x_T, (T + 1,) float64; (T + 1, *state) where entries differ.
        prediction: what the network returns.
        prior_std: standard deviation of x_T: 1, or σ_T where a solver in the coordinates x / α_t begins there.
        carry: what x_t keeps of x_s, for t = 1..T and s = t - 1, (T,) or (T, *state); None for α_t/α_s, where x_t needs
            nothing but x_s. With another the rest of α_t x_0 enters as x_0 itself, so that noising needs x_0.

    Raises:
        ValueError: lengths that do not fit, noise that does not grow with t, a step that would take noise away, or ε
            predicted where α_T = 0.
    """

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction: Prediction = "epsilon"
    prior_std: float = 1.0
    carry: Tensor | None = None

    def __post_init__(self) -> None:
        steps = len(self.timestep)
        if len(self.alpha) != steps + 1 or len(self.sigma) != steps + 1:
            raise ValueError(f"{steps} timesteps need {steps + 1} values of alpha and sigma, one more for x_0")
        if self.prediction not in PREDICTIONS.values():
            raise ValueError(f"unknown prediction {self.prediction!r}: choose {', '.join(PREDICTIONS.values())}")
        if not (self.alpha.isfinite().all() and self.sigma.isfinite().all()):
            raise ValueError(f"the grid of {steps} steps is not finite: use more steps")
        ratio = self.alpha[1:] * self.sigma[:-1] - self.alpha[:-1] * self.sigma[1:]  # α/σ falls, also through σ_0 = 0
        if (ratio > EPS).any() or not (self.alpha[:-1] > 0).all() or (self.sigma < 0).any():
            raise ValueError("noise must grow with t: alpha/sigma falls, and alpha stays above 0 before x_T")
        if self.carry is not None:
            self._refuse_carry(self.carry)
        if self.prediction == "epsilon" and (self.alpha[-1] == 0).any():
            raise ValueError(
                "alphas_cumprod ends at 0, where ε does not give x_0: the network must predict v or sample"
            )

    def _refuse_carry(self, carry: Tensor) -> None:
        if len(carry) != self.num_steps:
            raise ValueError(f"{self.num_steps} steps need as many values of carry, got {len(carry)}")
        by_entry = carry if carry.ndim > 1 else carry.reshape(-1, *(1,) * (self.sigma.ndim - 1))
        if not ((by_entry * self.sigma[:-1]) ** 2 <= self.sigma[1:] ** 2 + EPS).all():
            raise ValueError("carry keeps more noise of x_s than x_t has: expected carry · σ_s <= σ_t")

    @property
    def num_steps(self) -> int:
        return len(self.timestep)

    def last(self, steps: int) -> Schedule:
        """The last `steps` steps alone: a chain that begins at a noised image."""
        carry = None if self.carry is None else self.carry[:steps]
        return Schedule(
            self.timestep[:steps], self.alpha[: steps + 1], self.sigma[: steps + 1], self.prediction, carry=carry
        )

    def coarse(self, num_steps: int) -> Schedule:
        """m of the T levels, evenly spaced from T down, and x_0.

        Raises:
            ValueError: more steps than there are, or a process that says what it carries from one level to the next.
        """
        if self.carry is not None:
            raise ValueError("this process carries more than α_t/α_s from level to level: it has no coarse grid")
        rows = respace(self.num_steps, num_steps)
        keep = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), rows + 1])
        return Schedule(self.timestep[rows], self.alpha[keep], self.sigma[keep], self.prediction, self.prior_std)

    @staticmethod
    def variance_preserving(
        alphas_cumprod: Tensor,
        num_steps: int,
        *,
        spacing: Spacing = "trailing",
        offset: int = 0,
        final_alpha: float | None = 1.0,
        prediction: Prediction = "epsilon",
    ) -> Schedule:
        """From ᾱ on the training grid.

        Args:
            alphas_cumprod: ᾱ of the N training steps, (N,).
            num_steps: T.
            spacing, offset: which of them the chain visits, see `respace`.
            final_alpha: ᾱ of x_0; 1 makes the last step deterministic, None takes ᾱ of the first training step.
            prediction: what the network returns.
        """
        bars = alphas_cumprod.double().cpu()
        if bars.ndim != 1 or not ((bars >= 0) & (bars < 1)).all() or (bars.diff() > 0).any():
            raise ValueError("alphas_cumprod must be one axis of numbers in [0, 1) that never increase")
        return _on_grid(bars, respace(len(bars), num_steps, spacing, offset), final_alpha, prediction)

    @staticmethod
    def karras(
        alphas_cumprod: Tensor,
        num_steps: int,
        *,
        sigma_min: float = 0.02,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        prediction: Prediction = "epsilon",
    ) -> Schedule:
        """Noise levels σ/α evenly spaced in their 1/ρ-th power, for a network taught on ᾱ.

        Args:
            alphas_cumprod: ᾱ of the N training steps, (N,); the network is told the step of each level, interpolated.
            num_steps: T; x_1 has sigma_min, x_T has sigma_max and x_0 no noise.
            sigma_min, sigma_max: of σ/α, cut to the levels of the training grid.
            rho: larger values spend more steps on little noise.
            prediction: what the network returns.

        Raises:
            ValueError: fewer than two steps, or levels that do not rise.
        """
        bars = alphas_cumprod.double().cpu()
        taught = ((1 - bars) / bars).sqrt()
        low, high = max(sigma_min, float(taught[0])), min(sigma_max, float(taught[-1]))
        if not is_whole(num_steps, 2) or not 0 < low < high:
            raise ValueError(f"expected two or more steps from low to high noise, got {num_steps} of {low} to {high}")
        ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64, device="cpu")
        ratio = (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho
        ratio = ratio.clamp(float(taught[0]), float(taught[-1]))
        index = torch.searchsorted(taught, ratio).clamp(1, len(taught) - 1)
        below, above = taught[index - 1].log(), taught[index].log()
        timestep = (index - 1 + (ratio.log() - below) / (above - below)).float()
        alpha = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), (1 + ratio**2).rsqrt()])
        sigma = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), ratio * alpha[1:]])
        return Schedule(timestep, alpha, sigma, prediction)

    @staticmethod
    def flow(sigmas: Tensor, timestep: Tensor | None = None) -> Schedule:
        """From the noise levels of x_0..x_T, (T + 1,) rising from 0; the network is told 1000 σ by default."""
        sigmas = sigmas.double().cpu()
        timestep = 1000 * sigmas[1:] if timestep is None else timestep.cpu()
        return Schedule(timestep, 1 - sigmas, sigmas, "flow")

    @staticmethod
    def of(scheduler: Any, num_steps: int, **grid: Any) -> Schedule:
        """The grid of a diffusers scheduler: the timesteps and the noise that its own `set_timesteps` gives.

        The solver itself is not used. One that evaluates the network more than once a step (Heun, KDPM2, PNDM) gives
        the points where its steps begin.

        Args:
            scheduler: of a pipeline; it is not changed.
            num_steps: T.
            grid: what the pipeline hands to `set_timesteps` (`sigmas`, `mu`, `strength`).

        Raises:
            ValueError: a scheduler that holds no such schedule, or none of so many steps; the message names it.
        """
        name, config = _name(scheduler), settings_of(scheduler)
        if not is_whole(num_steps):
            raise ValueError(f"num_steps is {num_steps!r}, expected at least 1")
        if config.get("thresholding"):
            raise ValueError(f"{name} with dynamic thresholding is not supported: set thresholding=False")
        found = _read(copy.deepcopy(scheduler), config, num_steps, grid)
        _refuse_standing_still(name, found)
        return found


def _read(scheduler: Any, config: dict[str, Any], num_steps: int, grid: dict[str, Any]) -> Schedule:
    """The grid of a scheduler that may be changed."""
    name = _name(scheduler)
    if name in _FLOW or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return _of_flow(scheduler, num_steps, grid)
    prediction = PREDICTIONS.get(config.get("prediction_type", "epsilon"))
    if prediction is None:
        raise ValueError(f"{name} predicts {config['prediction_type']!r}: choose {', '.join(PREDICTIONS)}")
    if name not in _KNOWN:
        raise _unknown(name)
    if name in _EDM and (prediction != "v" or config["sigma_data"] != 1):
        raise ValueError(f"{name} with prediction_type={config['prediction_type']!r} and sigma_data="
                         f"{config['sigma_data']:g} is not supported: its network is one of v where they are "
                         "'v_prediction' and 1")  # fmt: skip
    return (_at_timesteps if name in _AT_TIMESTEPS else _by_sigma)(scheduler, num_steps, prediction, grid)


def settings_of(scheduler: Any) -> dict[str, Any]:
    """What a scheduler of diffusers is set to: `from_config` keeps settings of other classes beside its own."""
    taken = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in taken}


def clip_of(scheduler: Any) -> float | None:
    """Limit of |x̂_0| by which a scheduler's step cuts; None where it cuts nothing, whatever its settings say."""
    config = settings_of(scheduler)
    if not config.get("clip_sample") or _name(scheduler).startswith("CogVideoX"):
        return None
    return config.get("clip_sample_range", 1.0)


def refuse_scheduler(kind: str) -> None:
    """Refuse a scheduler of diffusers by its class's name alone.

    Raises:
        ValueError: it holds no schedule that `Schedule.of` can read.
    """
    name = kind.removesuffix("Scheduler")
    if name not in _KNOWN:
        raise _unknown(name)


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__.removesuffix("Scheduler")


def _unknown(name: str) -> ValueError:
    """The error about a scheduler that holds no known schedule."""
    return ValueError(f"cannot read a schedule from {name}Scheduler: expected one of {', '.join(_KNOWN)}")


def _at_timesteps(scheduler: Any, num_steps: int, prediction: Prediction, grid: dict[str, Any]) -> Schedule:
    name, steps = _name(scheduler), len(scheduler.alphas_cumprod)
    if num_steps > steps:
        raise ValueError(f"num_steps is {num_steps}, expected 1..{steps} (the steps of the training grid)")
    if name == "PNDM":
        scheduler.register_to_config(skip_prk_steps=True)  # whose evaluations lie between the points of the grid
    _set(scheduler, num_steps, grid)
    timesteps = scheduler.timesteps.unique() if name == "PNDM" else scheduler.timesteps.flip(0)
    _refuse_timesteps(scheduler, timesteps, num_steps)
    # LCM's last step returns the endpoint, whatever set_alpha_to_one says; DDPM's always does.
    final = 1.0 if name == "LCM" else float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return _on_grid(scheduler.alphas_cumprod.double().cpu(), timesteps.cpu(), final, prediction)


def _by_sigma(scheduler: Any, num_steps: int, prediction: Prediction, grid: dict[str, Any]) -> Schedule:
    """The grid in σ/α, whatever its spacing; x_T is drawn as the solver does."""
    _set(scheduler, num_steps, grid)
    name, timesteps, ratio = _name(scheduler), scheduler.timesteps, scheduler.sigmas.double().cpu()
    if getattr(scheduler, "order", 1) == 2 and len(timesteps) == 2 * num_steps - 1:
        # Evaluated twice a step but the last: once where it begins, once at its middle or end.
        timesteps, ratio = timesteps[::2], torch.cat([ratio[:1], ratio[1::2]])[: num_steps + 1]
    _refuse_timesteps(scheduler, timesteps.flip(0), num_steps)
    if (ratio.diff() > 0).any():
        raise ValueError(f"noise of {name} falls where t rises, at num_steps={num_steps}: take fewer steps, or set "
                         "rescale_betas_zero_snr=False, by which ᾱ of the last timestep is above others")  # fmt: skip
    ratio = ratio.flip(0)
    alpha = (1 + ratio**2).rsqrt()
    prior_std = float(scheduler.init_noise_sigma) * float(alpha[-1]) if name in _SCALED + _EDM else 1.0
    return Schedule(timesteps.flip(0).float().cpu(), alpha, ratio * alpha, prediction, prior_std)


def _set(scheduler: Any, num_steps: int, grid: dict[str, Any]) -> None:
    """Ask a scheduler for a grid."""
    try:
        scheduler.set_timesteps(num_steps, **grid)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{_name(scheduler)} has no grid of {num_steps} steps ({error}): take fewer") from error


def _refuse_timesteps(scheduler: Any, timesteps: Tensor, num_steps: int) -> None:
    """Rounding gives some spacings one timestep too many, below 0, and an offset one beyond the last."""
    if settings_of(scheduler).get("timestep_type") == "continuous" or _name(scheduler) in _EDM:
        return  # a function of the noise
    last, first, end = float(timesteps[-1]), float(timesteps[0]), scheduler.config["num_train_timesteps"] - 1
    if len(timesteps) != num_steps or not 0 <= first <= last <= end:
        raise ValueError(f"{_name(scheduler)} visits {len(timesteps)} timesteps, {first:g}..{last:g}, in {num_steps} "
                         f"steps, expected {num_steps} within 0..{end}: take another number of steps")  # fmt: skip


def _refuse_standing_still(name: str, schedule: Schedule) -> None:
    """Refuse grids with more steps than levels; x_0 may have the noise of x_1."""
    same = ((schedule.alpha.diff() == 0) & (schedule.sigma.diff() == 0))[1:]
    if same.any():
        steps = schedule.num_steps
        raise ValueError(f"{int(same.sum())} of the {steps} steps of {name} end with the noise that they begin with: "
                         "take fewer steps, or another timestep_spacing")  # fmt: skip


def _on_grid(bars: Tensor, steps: Tensor, final_alpha: float | None, prediction: Prediction) -> Schedule:
    last = float(bars[0]) if final_alpha is None else final_alpha
    if not float(bars[steps[0]]) <= last <= 1:
        raise ValueError(f"final_alpha is {last}, expected {float(bars[steps[0]]):.4g} (ᾱ of the last step) to 1")
    bar = torch.cat([torch.tensor([last], dtype=torch.float64, device="cpu"), bars[steps]])
    return Schedule(steps, bar.sqrt(), (1 - bar).sqrt(), prediction)


def _of_flow(scheduler: Any, num_steps: int, grid: dict[str, Any]) -> Schedule:
    name = _name(scheduler)
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(f"{name} with invert_sigmas=True is not supported: noise must grow with t")
    _set(scheduler, num_steps, grid)
    if len(scheduler.timesteps) != num_steps or len(scheduler.sigmas) != num_steps + 1:
        raise ValueError(f"{name} is a multi-step solver of {len(scheduler.timesteps)} evaluations: use FlowMatchEuler")
    return Schedule.flow(scheduler.sigmas.flip(0), scheduler.timesteps.flip(0))


def respace(train_steps: int, num_steps: int, spacing: Spacing = "trailing", offset: int = 0) -> Tensor:
    """The network timesteps of a chain of `num_steps`, ascending: entry t - 1 belongs to x_t.

    Raises:
        ValueError: more steps than the model was trained with, or an unknown spacing.
    """
    if not is_whole(num_steps, 1, train_steps):
        raise ValueError(f"num_steps is {num_steps!r}, expected 1..{train_steps} (the steps of the training grid)")
    index = torch.arange(num_steps, dtype=torch.float64, device="cpu")
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
