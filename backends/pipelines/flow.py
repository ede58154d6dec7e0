"""Grids of flow pipelines: shifts that depend on the resolution.

    σ ← e^μ σ / (1 + (e^μ - 1) σ),   μ linear in the number of image tokens

References:
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), eq. 23.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def shift(scheduler: Any, tokens: int, max_shift: float = 1.15) -> float:
    """μ for an image of so many tokens, from the scheduler's configuration."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    return first + (last - first) * (tokens - low) / (high - low)


def steps_from_below(num_steps: int, strength: float) -> int:
    """Steps of T that flow pipelines take from an image: what they leave out is rounded down, and not the rest."""
    return num_steps - int(num_steps - num_steps * strength)


def even_grid(scheduler: Any, num_steps: int, tokens: int) -> dict[str, Any]:
    """Equal steps from 1 to 1/T, before the shift."""
    grid: dict[str, Any] = {"mu": shift(scheduler, tokens)}
    if not scheduler.config.get("use_flow_sigmas"):
        grid["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    return grid
