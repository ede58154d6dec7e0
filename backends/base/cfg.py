"""Classifier-free guidance, the one line of it.

Source: Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), eq. 6, with w here 1 + w there.
"""

from __future__ import annotations

from torch import Tensor


def extrapolated(absent: Tensor, given: Tensor, scale: float) -> Tensor:
    """f(∅) + w (f(c) - f(∅)) of what a network returns without and with its conditioning; w = 1 is f(c)."""
    return absent + scale * (given - absent)
