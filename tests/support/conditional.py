"""Gaussian classes that a prompt names, with their exact denoiser under guidance; ∅ is the law of all classes."""

import torch
from torch import nn

from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule

CLASSES = {"left": (-1.5, 0.5), "right": (1.0, 1.0), "": (0.0, 0.0)}
SPREAD, WIDE = 0.3, 1.2  # of a class, and of all


def told(prompts):
    """Rows (n, 3): the mean and the log of the spread, which are all that the denoiser is told."""
    wide = [[*CLASSES[p], SPREAD if p else WIDE] for p in prompts]
    rows = torch.tensor(wide, device="cpu", dtype=torch.float32)
    return torch.cat([rows[:, :2], rows[:, 2:].log()], 1)


class Denoiser(nn.Module):
    """ε̂ of N(m, s²): a (x - α m) σ / (α² s² + σ²), with nothing learnt but a scale of 1."""

    def __init__(self, bars):
        super().__init__()
        self.register_buffer("bars", bars)
        self.scale = nn.Parameter(torch.ones((), device="cpu"))

    def forward(self, x, timestep, condition):
        bar = self.bars[timestep.long()][:, None].to(x)
        variance = bar * (2 * condition[:, 2:]).exp() + 1 - bar
        return self.scale * (x - bar.sqrt() * condition[:, :2]) * (1 - bar).sqrt() / variance


def conditional(steps=50, scale=7.5, **more):
    bars = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    schedule = Schedule.variance_preserving(bars, steps, prediction="epsilon")
    settings = {"eta": 0.0, "guidance_scale": scale, "condition": told} | more
    return DiffusionKernel(Denoiser(bars), state_shape=(2,), schedule=schedule, name="classes", **settings)


def cond_of(kernel, prompts):
    """Conditioning as an engine hands it to rows, one of each prompt."""
    rows = {name: getattr(value, "value", value) for name, value in kernel.encode(prompts).items()}
    return rows | {"task": torch.arange(len(prompts))}


def draws(prompts, seed=0):
    """A draw of each prompt's class."""
    noise = torch.randn(len(prompts), 2, generator=torch.Generator().manual_seed(seed))
    return told(prompts)[:, :2] + SPREAD * noise


def run(kernel, x, cond):
    """Means of the steps from x_T on."""
    for t in range(kernel.num_steps, 0, -1):
        x = kernel.transition(x, torch.full((len(x),), t), cond).mean
    return x
