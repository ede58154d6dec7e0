"""What a sum of rewards says of observations: its linear measurements of states, its others, and what is left.

    v(x̂_0) = Σ_j log N(y_j; A_j(x̂_0), (s_j² + tolerance_j²) I) + the rest's r(x̂_0)

of the measurements that are not linear in the state, with the gradient of their part by autograd through A_j and the
decoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treesearch.backends.base import bare, optional
from treesearch.backends.guidance.base import attached, gradient_of
from treesearch.rewards.base import Reward, summands
from treesearch.rewards.observation import Measurement, Operator
from treesearch.rewards.values import flat


class Terms(NamedTuple):
    """The terms of a sum of rewards."""

    linear: tuple[Measurement, ...]  # of states
    bent: tuple[Reward, ...]  # measurements by a function, or of decoded samples
    rest: tuple[Reward, ...]


def terms(reward: Reward) -> Terms:
    """What a sum of rewards is made of.

    Raises:
        ValueError: one of them is a measurement under a weight.
    """
    linear, bent, rest = [], [], []
    for term in summands(reward):
        if not isinstance(term.fn, Measurement):
            refuse_scaled(term)
            rest.append(term)
        elif isinstance(term.fn.operator, Operator) and term.input == "state":
            linear.append(term.fn)
        else:
            bent.append(term)
    return Terms(tuple(linear), tuple(bent), tuple(rest))


def refuse_scaled(term: Reward) -> None:
    """Refuse a measurement with a weight, which has no noise of its own: a weight w asks for tolerance/√w.

    Raises:
        ValueError: it is one.
    """
    parts = getattr(term.fn, "parts", ())
    if len(parts) == 1 and isinstance(getattr(parts[0], "fn", None), Measurement):
        raise ValueError(f"{term.name} is a measurement under a weight, which is no likelihood to steer by: give "
                         "another tolerance, tolerance/√w for a weight of w")  # fmt: skip


def measurement_of(reward: Reward) -> Measurement:
    """The function of a reward that is a measurement."""
    assert isinstance(reward.fn, Measurement)
    return reward.fn


def shown(kernel: Any, reward: Reward, states: Tensor) -> Any:
    """What a reward is shown of endpoints (n, *state)."""
    if reward.input == "state":
        return bare(kernel, states)
    preview = optional(kernel, "preview")
    return kernel.decode(states) if preview is None else preview(states)


def ask(
    kernel: Any, of: Terms, endpoint: Tensor, variance: Tensor, prompts: Sequence[Any] | None
) -> tuple[Tensor, Tensor]:
    """v of endpoints (n, *state), (n,) float64, and the gradient of its measurements, (n, *state).

    Args:
        kernel: decodes.
        of: the terms, of which those of states that are linear are left out.
        endpoint: x̂_0.
        variance: s_j², (J, n) for the J bent measurements.
        prompts: of the rows, for the rest.

    Raises:
        TypeError: no gradient between the endpoint and what is seen.
        ValueError: one that is not finite.
    """
    first = (*of.bent, *of.rest)[0]  # a sum has one input
    gradient, value = torch.zeros_like(endpoint), endpoint.new_zeros(len(endpoint), dtype=torch.float64)
    with torch.set_grad_enabled(bool(of.bent)):
        leaf = endpoint.detach().requires_grad_(bool(of.bent))
        samples = shown(kernel, first, leaf)
        if of.bent:
            attached(samples, "the decoder keeps no graph: measure states (of='state')")
            pairs = zip(of.bent, variance, strict=True)
            value = torch.stack([_log_normal(measurement_of(part), samples, s) for part, s in pairs]).sum(0)
            gradient, value = _slope(value, leaf), value.detach().to(endpoint.device)
    if of.rest:
        seen = samples.detach() if isinstance(samples, Tensor) else samples
        value = value + torch.stack([part(seen, prompts) for part in of.rest]).sum(0).to(value.device)
    return value, gradient


def _log_normal(of: Measurement, samples: Tensor, variance: Tensor) -> Tensor:
    """log N(y; A(x), (s² + tolerance²) I) of samples, s² (n,)."""
    gap = flat(of.gap(samples)) * of.tolerance
    total = variance.to(gap) + of.tolerance**2
    return -0.5 * ((gap**2).sum(1) / total + gap.shape[1] * (total.log() + math.log(2 * math.pi)))


def _slope(value: Tensor, leaf: Tensor) -> Tensor:
    gradient = gradient_of(value, leaf, "the measurement")
    if not gradient.isfinite().all():
        rows = int((~flat(gradient.isfinite()).all(1)).sum())
        raise ValueError(f"the gradient of what is seen is not finite in {rows} of {len(leaf)} rows: use an operator "
                         "that is differentiable everywhere, such as |x| + a small number for a root")  # fmt: skip
    return gradient
