"""Directions of one sample: what moves the noise estimate most, all of it or within a mask.

    J = ∂(mask ⊙ ε̂)/∂h at (x_t, t),   J = U Σ Vᵀ,   directions V_1 ... V_k of unit length
    V <- orth(Jᵀ J V)                subspace iteration, a few rows more than asked; then the SVD of J V

Jᵀu is reverse mode. J w is reverse mode twice, of w -> ⟨Jᵀu, w⟩ by u, in which Jᵀu is linear: forward mode has no rule
for fused attention, which is why the network attends by torch's plain formula here. The k + 4 products go as rows of
one batch. A direction found at one level is used at all of them.

Source: Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models (Haas et al., 2024),
section 3.2 and algorithm 1, there a vector after the other, with deflation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from treesearch.backends.base import Cond, optional
from treesearch.backends.base.capture import captured, changed
from treesearch.backends.chains.diffusion import Chain, to_endpoint
from treesearch.backends.interventions.base import network_of
from treesearch.backends.interventions.directions import (
    Card,
    Directions,
    given_rows,
    name_of,
    part_of,
    steps_of,
)
from treesearch.backends.interventions.heads import experts
from treesearch.rewards.numeric import is_whole

MORE = 4  # rows beyond those asked for, that the slowest of them settles sooner


def jacobian(
    kernel: Any,
    x: Tensor,
    t: int,
    k: int = 3,
    mask: Tensor | None = None,
    *,
    part: str = "mid_block",
    cond: Cond = None,
    tolerance: float = 1e-4,
    iterations: int = 200,
    seed: int = 0,
) -> Directions:
    """The k directions in h-space that move ε̂ most at one state.

    Args:
        kernel: with a network, on a `Chain`.
        x: one state (1, *state) at level t.
        t: the level.
        k: how many.
        mask: what counts, broadcastable to a state; None is all of it.
        part: the end of a part's name.
        cond: conditioning of that row; tensors (1, ...) are repeated.
        tolerance: sine of the angle that the subspace turns by in the last iteration.
        iterations: at most so many.
        seed: of the vectors to begin with.

    Raises:
        TypeError: a kernel without a network or a chain, or whose states hold more than x_t.
        ValueError: a state of another shape, numbers out of range, no such part.
        RuntimeError: it has not settled: the k-th singular value is as large as the next ones.
    """
    steps, part = steps_of(kernel), part_of(kernel, part)
    if tuple(x.shape) != (1, *kernel.state_shape):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected one state (1, *{tuple(kernel.state_shape)})")
    if not is_whole(t, 1, steps) or not is_whole(k):
        raise ValueError(f"t and k are {t!r} and {k!r}, expected 1..T = {steps} and 1 or more")
    found = products(kernel, x, t, mask, part, cond, k + MORE)
    if k > (most := min(found.h[0].numel(), found.y.shape[1]) - MORE):
        raise ValueError(f"k is {k}, expected at most {most}: the Jacobian has {most + MORE} singular values")
    v, sizes = found.settled(k, tolerance, iterations, seed)
    card = Card(
        method=f"jacobian at t = {t}",
        names=tuple(f"j{i + 1}" for i in range(k)),
        part=part,
        levels=(t,),
        num_steps=steps,
        network=name_of(network_of(kernel)),
        sizes=tuple((float(f"{s:.6g}"),) for s in sizes.tolist()),
        unit="unit length",
        seeds=(seed,),
    )
    return Directions(card, v.float().cpu().unflatten(1, found.h.shape[1:])[:, None])


@final
@dataclass(frozen=True, eq=False)
class Products:
    """J w and Jᵀu at one state, for as many vectors at once as there are rows.

    Args:
        y: mask ⊙ ε̂ (rows, outputs), every row the same.
        h: that it is a function of, (rows, *part).
        u: zeros like y, that Jᵀu is a function of.
        pulled: Jᵀu with its graph, (rows, *part).
    """

    y: Tensor
    h: Tensor
    u: Tensor
    pulled: Tensor

    def jw(self, w: Tensor) -> Tensor:
        """J w (rows, outputs) of w (rows, D)."""
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.grad(self.pulled, self.u, w.to(self.h).reshape_as(self.h), retain_graph=True)[0]

    def jtu(self, u: Tensor) -> Tensor:
        """Jᵀu (rows, D) of u (rows, outputs)."""
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.grad(self.y, self.h, u.to(self.y), retain_graph=True)[0].flatten(1)

    def settled(self, k: int, tolerance: float, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
        """V (k, D) and singular values (k,), float64.

        Raises:
            RuntimeError: they have not settled.
        """
        rng, size = torch.Generator("cpu").manual_seed(seed), self.h[0].numel()
        v = _orthonormal(torch.randn(len(self.y), size, generator=rng, dtype=torch.float64, device="cpu"))
        for _ in range(iterations):
            pushed = self.jw(v).double().cpu()
            left, sizes, _ = torch.linalg.svd(pushed, full_matrices=False)
            v = left.mT @ v  # the best directions of the subspace
            new = _orthonormal(self.jtu(left.mT @ pushed).double().cpu())
            turned = v[:k] - v[:k] @ new[:k].mT @ new[:k]
            if float(torch.linalg.matrix_norm(turned, 2)) < tolerance:
                return v[:k], sizes[:k]
            v = new
        raise RuntimeError(
            f"directions have not settled in {iterations} iterations: ask for another k than {k}, since singular "
            "values next to it are equal, or allow a larger tolerance"
        )


def products(
    kernel: Any,
    x: Tensor,
    t: int,
    mask: Tensor | None = None,
    part: str = "mid_block",
    cond: Cond = None,
    rows: int = 1,
) -> Products:
    """One evaluation, of which all products are, at a state x (1, *state).

    Raises:
        ValueError: a part of an expert that is not called at t, or an estimate that is not finite.
    """
    network, level = network_of(kernel), torch.full((rows,), t, device=x.device)
    wide = x.detach().expand(rows, *x.shape[1:]).clone().requires_grad_(True)  # so that the step keeps its graph
    at = {name: v.expand(rows, *v.shape[1:]) for name, v in (cond or {}).items() if isinstance(v, Tensor)}
    kept: list[Tensor] = []

    def cut(h: Tensor, *call: Any) -> Tensor:
        """h as if nothing came before it, its rows of the prompt a leaf."""
        kept.append(given_rows(h, rows).detach().clone().requires_grad_(True))
        return torch.cat([h[: len(h) - rows].detach(), kept[-1]])

    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        with captured(network, experts(network)) as seen, changed(network, {part_of(kernel, part): cut}):
            kernel.transition(wide, level, {**(cond or {}), **at} or None)
        if not kept:
            raise ValueError(f"{part!r} is not called at t = {t}, where another expert is: give a level of its own")
        (output,) = seen.values()
        eps = _noise_estimate(kernel, wide.detach(), level, given_rows(output, rows))
        if not eps.isfinite().all():
            raise ValueError("the noise estimate is not finite: is x?")
        y = (eps if mask is None else eps * mask.to(eps)).flatten(1)
        u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, kept[0], u, create_graph=True)
    return Products(y, kept[0], u, pulled)


def _orthonormal(v: Tensor) -> Tensor:
    """Rows that span the same, orthonormal."""
    return torch.linalg.qr(v.mT).Q.mT


def _noise_estimate(kernel: Any, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """ε̂ of a network's output, before x̂_0 is clipped.

    Raises:
        TypeError: a kernel without a chain.
        ValueError: an output that is not like a state.
    """
    chain = optional(kernel, "chain")
    if not isinstance(chain, Chain):
        raise TypeError(f"{type(kernel).__name__} is no kernel on a backends.chains.diffusion.Chain: what is its ε̂?")
    if output.shape != x.shape:
        raise ValueError(f"the network puts out {tuple(output.shape)}, expected {tuple(x.shape)} like its states")
    alpha, sigma = chain.at("alpha", t, x), chain.at("sigma", t, x)
    return to_endpoint(chain.schedule.prediction, output, x, alpha, sigma)[1]
