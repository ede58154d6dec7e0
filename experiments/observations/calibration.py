"""Whether draws of a posterior are what they say: where the truth ranks among them, judged by what no search has seen.

    x* ~ p,  y = A x* + noise,  draws of p(x | y)      then x* is one more draw, and for every f of x
    u = Σ w_i [f(x_i) < f(x*)] + V Σ w_i [f(x_i) = f(x*)],   V uniform,       is uniform on [0, 1]

however few numbers y holds: the truth comes from the model itself, so that nothing is asked of the model. Draws that
are too sure of themselves put x* in their tails. An interval of 90 % holds x* where .05 <= u <= .95. The ranks of one
truth go together; intervals are over truths.

Here f are 16 pixels and the ten logits of the judge of digits, which is in no search's reach.

Source: Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018), theorem 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.mnist import judge
from experiments.shared.evidence_duels import Gap, interval

F64 = NDArray[np.float64]
ROWS, COLUMNS = (6, 11, 16, 21), (8, 12, 16, 20)  # of the pixels
PIXELS = len(ROWS) * len(COLUMNS)
LEVEL = 0.9


def functionals(images: Tensor) -> Tensor:
    """f of images (n, 1, 28, 28) in [0, 1]: pixels, then logits of the judge, (n, 26) float64."""
    pixels = images[:, 0, list(ROWS)][:, :, list(COLUMNS)].flatten(1)
    with torch.no_grad():
        logits = torch.cat([judge.load_judge()(part) for part in images.float().split(500)])
    return torch.cat([pixels, logits], 1).double()


def ranks(values: Tensor, weights: Tensor, truth: Tensor, seed: int) -> F64:
    """u of each functional, (M,).

    Args:
        values: f of the draws (n, M).
        weights: theirs (n,), of sum 1.
        truth: f of the truth (M,).
        seed: of V.
    """
    below = weights @ (values < truth).double()
    level = weights @ (values == truth).double()
    return (below + torch.from_numpy(np.random.default_rng(seed).random(len(truth))) * level).numpy()


def covered(ranks: F64, level: float = LEVEL) -> NDArray[np.bool_]:
    """Whether the central interval of that mass holds the truth."""
    return np.abs(2 * ranks - 1) <= level


def coverage(ranks: Sequence[Sequence[float]], level: float = LEVEL) -> Gap | None:
    """Share of intervals that hold their truth, and its own 95 % interval over truths: Student's t of their shares.

    Args:
        ranks: of each truth, (truths, M).
        level: mass of the intervals.
    """
    return interval(list(covered(np.asarray(ranks, float), level).mean(1)))
