"""Directions from what a part puts out along rollouts: principal components, and differences of labelled means.

    h_{j,t}    what the part puts out at x_t of rollout j: of the chain's own, or on the way up from given samples
    pca            h_t - mean = U S Vᵀ at each level;   v_{i,t} = S_i/√(N - 1) V_i, its sign that of the step before
    supervised     n_t = mean(h_t | positive) - mean(h_t | negative), less what it shares with those of other labels

All are scaled so that α counts standard deviations of h along them, at each level: one scale for all, where the paper
leaves differences of means at their own length. The paper aligns signs to the first step; a chain of neighbours is the
same where directions turn slowly, and does not flip where they have turned by a right angle.

Source: Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models (Haas et al., 2024),
sections 3.1 and 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, describe
from treesearch.backends.base.capture import captured
from treesearch.backends.chains.inversion import invert
from treesearch.backends.interventions.base import network_of
from treesearch.backends.interventions.directions import (
    Card,
    Directions,
    disentangled,
    given_rows,
    name_of,
    part_of,
    steps_of,
)
from treesearch.rewards.numeric import is_whole

UNIT = "a standard deviation of h along the direction"


@final
@dataclass(frozen=True)
class Walks:
    """What a part put out along rollouts.

    Args:
        h: (L, n, *part).
        x0: where they ended (n, *state).
        levels: t of the rows of h (L,), ascending.
        part: its whole name.
        num_steps: T.
        network: what tells it from others.
        seeds: that the rollouts were drawn by.
    """

    h: Tensor
    x0: Tensor
    levels: tuple[int, ...]
    part: str
    num_steps: int
    network: str
    seeds: tuple[int, ...] = ()


@torch.no_grad()
def rollouts(
    kernel: Any, n: int, seed: int = 0, part: str = "mid_block", levels: Sequence[int] | None = None, cond: Cond = None
) -> Walks:
    """n rollouts of a kernel, T evaluations each.

    Args:
        kernel: with a network.
        n: how many, at once.
        seed: of their noise.
        part: the end of a part's name.
        levels: t to keep h of; None are all.
        cond: conditioning of the n rows, as `encode` gives it.

    Raises:
        TypeError: a kernel without a network, or whose states hold more than x_t.
        ValueError: numbers out of range, no such part, one without a row for each of the evaluation, or one of an
            expert that is not called at one of the levels.
    """
    if not is_whole(n, 2):
        raise ValueError(f"n is {n!r}, expected 2 rollouts or more")
    found, rng = _Keeper(kernel, part, levels), torch.Generator("cpu").manual_seed(seed)
    spec = describe(kernel, identify=False)

    def noise() -> Tensor:
        return torch.randn(n, *spec.noise_shape, generator=rng, device="cpu").to(spec.device, spec.dtype)

    x = kernel.prior(noise(), cond)
    for t in range(spec.num_steps, 0, -1):
        x = found.law(x, t, cond).sample(noise())
    return found.walks(x, (seed,))


@torch.no_grad()
def inverted(
    kernel: Any, x0: Tensor, part: str = "mid_block", levels: Sequence[int] | None = None, cond: Cond = None
) -> Walks:
    """The same on the deterministic paths that end in given states x_0 (n, *state): the best of a search, or data.

    Raises:
        TypeError: a kernel without a network, or without a path to invert.
        ValueError: states of another shape, no such part.
    """
    found = _Keeper(kernel, part, levels)
    path = invert(kernel, x0, cond=cond)
    for t in found.levels:
        found.law(path[t], t, cond)
    return found.walks(path[0], ())


def pca(walks: Walks, k: int) -> Directions:
    """The k leading principal components of h at each level.

    Raises:
        ValueError: more than there can be.
    """
    most = min(walks.h.shape[1] - 1, walks.h[0, 0].numel())
    if not is_whole(k, 1, most):
        raise ValueError(f"k is {k!r}, expected 1..{most}: rollouts less one, or entries of the part")
    rows: list[Tensor] = []
    for h in walks.h.flatten(2).flip(0):  # the first step is the last level
        centred = h.double() - h.double().mean(0)
        _, sizes, v = torch.linalg.svd(centred, full_matrices=False)
        before = rows[-1] if rows else torch.ones_like(v[:k])
        sign = torch.where((v[:k] * before).sum(1, keepdim=True) < 0, -1.0, 1.0)
        rows.append(sign * sizes[:k, None] / (len(h) - 1) ** 0.5 * v[:k])
    vectors = torch.stack(rows[::-1], 1)
    return _directions(walks, "pca", tuple(f"pc{i + 1}" for i in range(k)), vectors)


def supervised(walks: Walks, groups: Mapping[str, tuple[Tensor, Tensor]], apart: bool = False) -> Directions:
    """A direction for each label, from rollouts that have it to those that do.

    Args:
        walks: of rollouts.
        groups: name -> (negative, positive), bool (n,) each.
        apart: every direction without its share in the others.

    Raises:
        ValueError: groups of another length, or an empty one; directions that say the same.
    """
    h = walks.h.flatten(2).double()
    for name, pair in groups.items():
        if any(tuple(g.shape) != (h.shape[1],) or g.dtype != torch.bool or not g.any() for g in pair):
            raise ValueError(
                f"the groups of {name!r} are no two of {h.shape[1]} rollouts: give bool (n,), each with some"
            )
    n = torch.stack([h[:, positive].mean(1) - h[:, negative].mean(1) for negative, positive in groups.values()])
    if apart and len(n) > 1:
        rest = [[j for j in range(len(n)) if j != i] for i in range(len(n))]
        n = torch.stack([disentangled(n[i], n[rest[i]].transpose(0, 1)) for i in range(len(n))])
    unit = n / n.norm(dim=2, keepdim=True)
    spread = torch.einsum("lnd,kld->kln", h - h.mean(1, keepdim=True), unit).std(2, keepdim=True)
    return _directions(walks, "supervised, apart" if apart else "supervised", tuple(groups), spread * unit)


def extremes(scores: Tensor, share: float = 0.25) -> tuple[Tensor, Tensor]:
    """The lowest and the highest of scores (n,), as groups (n,) of `supervised`.

    Raises:
        ValueError: scores that are no row of finite numbers, or a share out of range.
    """
    if scores.ndim != 1 or not scores.isfinite().all():
        raise ValueError(f"scores have shape {tuple(scores.shape)}, expected finite numbers (n,)")
    if not 0 < share <= 0.5 or (count := int(len(scores) * share)) < 1:
        raise ValueError(
            f"share is {share!r}, expected above 0, at most 0.5, and one of {len(scores)} rollouts or more"
        )
    order = scores.argsort(stable=True)
    groups = torch.zeros(2, len(scores), dtype=torch.bool, device=scores.device)
    groups[0, order[:count]] = groups[1, order[-count:]] = True
    return groups[0], groups[1]


class _Keeper:
    """Steps of a kernel, with what a part puts out kept."""

    def __init__(self, kernel: Any, part: str, levels: Sequence[int] | None) -> None:
        steps = steps_of(kernel)
        self.kernel, self.part, self.num_steps = kernel, part_of(kernel, part), steps
        self.levels = tuple(range(1, steps + 1)) if levels is None else tuple(sorted(set(levels)))
        if not self.levels or not all(is_whole(t, 1, steps) for t in self.levels):
            raise ValueError(f"levels are {levels!r}, expected some of 1..T = {steps}")
        self.seen: dict[int, Tensor] = {}

    def law(self, x: Tensor, t: int, cond: Cond) -> Any:
        rows = torch.full((len(x),), t, device=x.device)
        if t not in self.levels:
            return self.kernel.transition(x, rows, cond)
        with captured(network_of(self.kernel), (self.part,)) as seen:
            law = self.kernel.transition(x, rows, cond)
        if self.part not in seen:
            raise ValueError(
                f"{self.part!r} is not called at t = {t}, where another expert is: give the levels of its own"
            )
        self.seen[t] = given_rows(seen[self.part], len(x)).float().cpu()
        return law

    def walks(self, x0: Tensor, seeds: tuple[int, ...]) -> Walks:
        h = torch.stack([self.seen[t] for t in self.levels])
        return Walks(h, x0, self.levels, self.part, self.num_steps, name_of(network_of(self.kernel)), seeds)


def _directions(walks: Walks, method: str, names: tuple[str, ...], vectors: Tensor) -> Directions:
    """Vectors (k, L, D) with their card."""
    sizes = tuple(tuple(float(f"{s:.6g}") for s in row) for row in vectors.norm(dim=2).tolist())
    card = Card(
        method=method,
        names=names,
        part=walks.part,
        levels=walks.levels,
        num_steps=walks.num_steps,
        network=walks.network,
        sizes=sizes,
        unit=UNIT,
        seeds=walks.seeds,
    )
    return Directions(card, vectors.float().unflatten(2, walks.h.shape[2:]))
