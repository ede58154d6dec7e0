"""The standard normal law on arrays, by torch, which is loaded when it is first asked."""

from __future__ import annotations

import math

from treesearch.core.weights import F64


def quantile(p: F64) -> F64:
    """Φ⁻¹(p) (n,)."""
    import torch

    return torch.special.ndtri(torch.from_numpy(p)).numpy()


def tail(z: F64) -> F64:
    """1 - Φ(z) (n,), which keeps its digits far out."""
    import torch

    return 0.5 * torch.special.erfc(torch.from_numpy(z / math.sqrt(2.0))).numpy()
