"""Null-text inversion: an ∅ learnt for each level, so that the guided chain goes back to the picture.

    z*_0..z*_T     DDIM inversion of the picture at w = 1, the pivots
    z̄_T = z*_T;    for t = T..1 from ∅_t := ∅_{t+1}:
    ∅_t ← Adam on mean (z*_{t-1} - D_w(z̄_t, ∅_t, C))²,    z̄_{t-1} = D_w(z̄_t, ∅_t, C)

D_w is the kernel's step without noise, whatever its η. The i-th level (i = 0 at T) takes at most 10 steps of size
0.01 (1 - i/2T) and stops below 1e-5 (1 + 100 i/T): at T = 50 the published 0.01 (1 - i/100) and 1e-5 + 2e-5 i. Images
of a batch are optimised together; each row stops by its own loss, and is evaluated no more. No weight and no text
moves: ∅ is learnt as conditioning, all that guidance reads beside a prompt; of SDXL and SD3 the pooled vector too.

The tolerance is in units of states, and the published one was made for latents of Stable Diffusion: on pictures of a
small network in [-1, 1] it stopped at twice what a negative prompt misses, and `tolerance=1e-7` from ∅ := C, which is
`cond=unguided(kernel, cond)`, came to .7 of that (experiments/results/roots/reconstruction.md).

Costs at most T (1 + steps) evaluations an image, of which T steps are with a backward pass, after the T of the pivots.

Source: Null-text Inversion for Editing Real Images using Guided Diffusion Models (Mokady et al., 2023), algorithm 1;
step sizes and stopping rule are those of its published code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from treesearch.backends.base import Cond, describe
from treesearch.backends.chains.diffusion import NEGATIVE
from treesearch.backends.chains.inversion import still, still_of
from treesearch.backends.roots.absent import Absent, guided
from treesearch.rewards.numeric import is_number, is_whole

Rows = dict[str, Tensor]
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam


class NullText(NamedTuple):
    """What the optimisation found.

    Args:
        kernel: with the learnt ∅.
        path: z̄_0..z̄_T (T + 1, m, *state), which that kernel's chain takes from the last pivot at η = 0; the pivots
            above the level where it began.
        evaluations: of each image (m,), those of the pivots apart.
    """

    kernel: Absent
    path: Tensor
    evaluations: Tensor


def null_text(
    kernel: Any,
    path: Tensor,
    *,
    cond: Cond,
    level: int | None = None,
    steps: int = 10,
    lr: float = 1e-2,
    tolerance: float = 1e-5,
) -> NullText:
    """Learn the ∅ of each level and image.

    Args:
        kernel: on a `Chain`, under classifier-free guidance.
        path: pivots (T + 1, m, *state), `invert(kernel, x0, cond=unguided(kernel, cond))`.
        cond: conditioning of the pictures' prompts, a row for each, as `invert` takes it.
        level: where the chain will begin, 1..T; None is T.
        steps: at most, a level.
        lr, tolerance: of the first level.

    Raises:
        TypeError: an ∅ without numbers to learn, such as a label.
        ValueError: conditioning without an ∅, a path of another shape, settings out of range.
        ArithmeticError: a loss that is not finite.
    """
    spec = describe(kernel, identify=False)
    level = spec.num_steps if level is None else level
    _check(spec, path, level, steps, lr, tolerance)
    start = _floating(kernel, cond, path.shape[1])
    table = {name: each[None].repeat(spec.num_steps, *(1,) * each.ndim) for name, each in start.items()}
    found, z = path.to(spec.device, spec.dtype, copy=True), path[level].to(spec.device, spec.dtype)
    evaluations = torch.full((path.shape[1],), level, device="cpu")
    for i, t in enumerate(range(level, 0, -1)):
        share = i / spec.num_steps
        rate, stop = lr * (1 - share / 2), tolerance * (1 + 100 * share)
        learnt, taken = _learnt(
            _Level(kernel, z, found[t - 1], t, cond), _at(table, min(t, level - 1)), steps, rate, stop
        )
        for name, each in learnt.items():
            table[name][t - 1] = each.to(table[name].dtype)
        evaluations += taken
        z = found[t - 1] = _stepped(kernel, z, t, _told(cond, _at(table, t - 1)))
    return NullText(Absent(kernel, table), found, evaluations)


class _Level(NamedTuple):
    """One step of the chain, rows (n, *state)."""

    kernel: Any
    z: Tensor
    pivot: Tensor
    t: int
    cond: Cond

    def take(self, rows: Tensor) -> _Level:
        cond = {
            name: v[rows.to(v.device)] if isinstance(v, Tensor) and len(v) == len(self.z) else v
            for name, v in (self.cond or {}).items()
        }
        return self._replace(z=self.z[rows.to(self.z.device)], pivot=self.pivot[rows.to(self.z.device)], cond=cond)

    def losses(self, nulls: Rows) -> Tensor:
        """Mean square of the miss (n,)."""
        x = self.z.detach().requires_grad_()  # kernels keep a graph where x asks for one
        at = torch.full((len(x),), self.t, device=x.device)
        return (self.pivot - still(self.kernel, x, at, _told(self.cond, nulls))).square().flatten(1).mean(1)


def _learnt(level: _Level, nulls: Rows, steps: int, rate: float, stop: float) -> tuple[Rows, Tensor]:
    """∅ of each row, and how many steps it took (n,)."""
    nulls = {name: each.to(torch.float32, copy=True) for name, each in nulls.items()}
    first = {name: torch.zeros_like(each) for name, each in nulls.items()}
    second = {name: torch.zeros_like(each) for name, each in nulls.items()}
    rows, taken = torch.arange(len(level.z), device="cpu"), torch.zeros(len(level.z), dtype=torch.long, device="cpu")
    for j in range(1, steps + 1):
        mine = {name: each[rows.to(each.device)].requires_grad_() for name, each in nulls.items()}
        with torch.enable_grad():
            losses = level.take(rows).losses(mine)
            slopes = torch.autograd.grad(losses.sum(), list(mine.values()))
        if not losses.isfinite().all():
            raise ArithmeticError(f"the loss of ∅ at level {level.t} is not finite: a smaller lr, or whole pivots?")
        for name, slope in zip(mine, slopes, strict=True):
            where = rows.to(slope.device)
            m = first[name][where] = torch.lerp(slope, first[name][where], BETAS[0])
            v = second[name][where] = torch.lerp(slope.square(), second[name][where], BETAS[1])
            move = (m / (1 - BETAS[0] ** j)) / ((v / (1 - BETAS[1] ** j)).sqrt() + EPS)
            nulls[name][where] = mine[name].detach() - rate * move
        taken[rows] += 1
        rows = rows[(losses.detach() >= stop).cpu()]
        if not len(rows):
            break
    return nulls, taken


@torch.no_grad()
def _stepped(kernel: Any, z: Tensor, t: int, cond: Cond) -> Tensor:
    """z̄_{t-1}: the kernel's own mean where its step has no noise, so that its chain comes by to the bit."""
    at = torch.full((len(z),), t, device=z.device)
    law = kernel.transition(z, at, cond)
    return still_of(kernel.chain, law, z, at) if law.std.any() else law.mean


def _told(cond: Cond, nulls: Rows) -> dict[str, Any]:
    given = dict(cond or {})
    return given | {NEGATIVE + name: each.to(given[NEGATIVE + name]) for name, each in nulls.items()}


def _at(table: Rows, index: int) -> Rows:
    return {name: each[index] for name, each in table.items()}


def _floating(kernel: Any, cond: Cond, images: int) -> Rows:
    """The ∅ that can be learnt, a row an image."""
    given = dict(cond or {})
    absent = {name: given[NEGATIVE + name] for name in guided(kernel, cond)}
    found = {name: each for name, each in absent.items() if each.is_floating_point()}
    if not found:
        raise TypeError(f"the ∅ of {type(kernel).__name__} is a label, which cannot be learnt: use negative_prompt")
    if odd := [name for name in found if len(given[name]) != images]:
        raise ValueError(
            f"conditioning {odd[0]!r} has {len(given[odd[0]])} rows for {images} images: give each its own"
        )
    return {name: each.detach().expand(images, *each.shape[1:]).clone() for name, each in found.items()}


def _check(spec: Any, path: Tensor, level: Any, steps: Any, lr: Any, tolerance: Any) -> None:
    want = (spec.num_steps + 1, "m", *spec.state_shape)
    if path.ndim < 2 or (len(path), *path.shape[2:]) != (want[0], *want[2:]) or not path.isfinite().all():
        raise ValueError(f"path has shape {tuple(path.shape)}, expected finite states {want}, as `invert` gives them")
    if not is_whole(level, 1, spec.num_steps):
        raise ValueError(f"level is {level!r}, expected 1..T = {spec.num_steps} (denoising steps left)")
    if not is_whole(steps, 0, 10**6):
        raise ValueError(f"steps is {steps!r}, expected a whole number, 0 or more")
    for name, value in (("lr", lr), ("tolerance", tolerance)):
        if not is_number(value, 0, 1e6):
            raise ValueError(f"{name} is {value!r}, expected a finite number >= 0")
