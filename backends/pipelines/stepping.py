"""The chain that stands for a checkpoint's scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from treesearch.backends.chains.diffusion import Chain, Step
from treesearch.backends.chains.schedules import Schedule, clip_of, settings_of
from treesearch.backends.pipelines.networks import log
from treesearch.rewards.numeric import is_number


def chain_of(scheduler: Any, schedule: Schedule, eta: float | Tensor, step: Step | None) -> Chain:
    """The chain on a grid; without a step of the user's, renoising for LCM, DDPM's for DDPM at η = 1, else DDIM(η)."""
    name, config = type(scheduler).__name__, settings_of(scheduler)
    renoises = name in ("LCMScheduler", "FlowMatchLCMScheduler") or config.get("stochastic_sampling")
    if config.get("variance_type") not in (None, "fixed_small"):
        log.warning("%s: %s is not used, steps have DDIM's variance", name, config["variance_type"])
    if step is None:
        step = "renoise" if renoises else "ddpm" if name == "DDPMScheduler" and is_number(eta, 1, 1) else "ddim"
    return Chain(schedule, eta=eta, step=step, clip_sample=clip_of(scheduler))
