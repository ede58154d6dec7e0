"""Composed: plans longer than the model's, chunk after chunk down one chain of K·T steps.

    plan      rows 0..K (H - 1); chunk k is rows k (H - 1)..(k + 1)(H - 1): neighbours share the row that they meet in
    levels    t in 1..K·T: chunk k = K - ⌈t/T⌉ is denoised, at its own level τ = t - (K - 1 - k) T
    law       p(c_0 | start) Π_k p(c_k | s of the last row of c_{k-1}),   the last chunk given the goal too

Chunks that are done stay as they are; the last step of a chunk draws x_T of the next one beside, so that a node of the
tree at t = k T is a plan of K - k chunks, and its children extend it. The shared row has the observation that the
earlier chunk ended at and the action of the later one. All that a chunk knows of those before it is the observation
that it starts from; of a Markov process there is no more to know, and the law is that of its longer trajectories.

Endpoints of a plan that is not whole: the chunk's own x̂_0, and from its end on the plan stands still (the last
observation, no action, no reward), so that rewards say how far it has come.

Sources: Monte Carlo Tree Diffusion for System 2 Planning (Yoon et al., 2025), subplans as nodes of a tree; Generative
Trajectory Stitching through Diffusion Composition (Luo et al., 2025), chunks that meet. There all chunks are denoised
at once; here one after the other, which keeps the law a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, expand, optional
from treesearch.rewards.numeric import is_whole


@final
@dataclass(frozen=True, eq=False)
class Composed(Wrapper):
    """A kernel of plans that are several chunks of another's long.

    Args:
        kernel: of trajectories (H, C) by Gaussian steps, told what is known, as
            `models.trajectory.TrajectoryKernel` is: `encode` gives "known" and "mask". Its prior is affine in its
            noise, entry by entry. A guide goes around the whole, `tds(composed(maze(), 3), reward)`.
        chunks: K; 1 is the kernel itself.

    Raises:
        TypeError: a kernel of no trajectories, or one that is not told what is known.
        ValueError: a guided kernel, or a number of chunks that is none.
    """

    chunks: int

    withheld: ClassVar[frozenset[str]] = frozenset({"chain", "renoise"})  # of one chunk
    undrafted: ClassVar[str] = "levels of a composed chain are those of several"

    def __post_init__(self) -> None:
        if not is_whole(self.chunks):
            raise ValueError(f"chunks is {self.chunks!r}, expected a whole number, 1 or more")
        name, spec, channels = type(self.kernel).__name__, self._spec, optional(self.kernel, "channels")
        if (
            len(spec.state_shape) != 2
            or not getattr(channels, "observation", 0)
            or spec.noise_shape != spec.state_shape
        ):
            raise TypeError(f"{name} is no kernel of trajectories with observations, which chunks could meet in")
        if spec.state_shape[0] < 2:
            raise ValueError(f"{name} plans {spec.state_shape[0]} row, expected two or more: chunks share one")
        told = self.kernel.encode([{}])
        if told is None or not {"known", "mask"} <= told.keys():
            raise TypeError(f"{name} cannot be told where a chunk starts: its `encode` gives no `known` and `mask`")
        if any(spec.rewards_per_nfe) or optional(self.kernel, "prior_log_weight") is not None:
            raise ValueError(f"{name} is guided by what one chunk is worth: put the guide around, guide(composed(...))")

    @property
    def num_steps(self) -> int:
        return self.chunks * self._steps

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.horizon, self._spec.state_shape[1])

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.state_shape

    @property
    def horizon(self) -> int:
        """Rows of a plan."""
        return self.chunks * self._gap + 1

    @property
    def stochastic(self) -> tuple[bool, ...]:
        """As for the kernel, and where a step draws x_T of the next chunk."""
        prior, *steps = self._spec.stochastic
        return (prior, *steps, *([steps[0] or prior, *steps[1:]] * (self.chunks - 1)))

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Network rows of an evaluation at each t."""
        first, *each = self._spec.rows_per_nfe
        return (first, *each * self.chunks)

    @property
    def backward_per_nfe(self) -> tuple[int, ...]:
        """Backward passes of an evaluation at each t."""
        first, *each = self._spec.backward_per_nfe
        return (first, *each * self.chunks)

    @property
    def base_law(self) -> str | None:
        """Longer plans are not the model's."""
        inner = optional(self.kernel, "base_law")
        law = f"{self.chunks} plans of the model in a row, each given the observation that the one before ended at"
        return inner if self.chunks == 1 else law if inner is None else f"{law}, of {inner}"

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What is known of whole plans: the start in their first row, the goal in their last."""
        told = self.kernel.encode(prompts)
        between = (0, 0, 0, self.horizon - self._gap - 1)
        ends = {
            name: torch.cat([pad(told[name][:, :-1], between), told[name][:, -1:]], 1) for name in ("known", "mask")
        }
        return {**told, **ends}

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        """x_T of the first chunk; nothing is there of the others."""
        x = noise.new_zeros(len(noise), *self.state_shape).to(self._spec.device, self._spec.dtype)
        first = torch.zeros(len(noise), dtype=torch.long, device=x.device)
        chunk = self.kernel.prior(noise[:, : self._gap + 1], self._told(x, first, cond))
        return torch.cat([chunk, x[:, self._gap + 1 :]], 1)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The law of the plan after a step of its chunk.

        Raises:
            TypeError: no Gaussian step.
        """
        chunk, rows = self._chunk(t), self._rows(self._chunk(t))
        law = self.kernel.transition(_taken(x, rows), (t - 1) % self._steps + 1, self._told(x, chunk, cond))
        if not isinstance(law, Gaussian):
            raise TypeError(f"composing needs a kernel of Gaussian steps, got {type(law).__name__}")
        mean, std = _put(x, rows, law.mean), _put(torch.zeros_like(x), rows, law.std.expand(law.mean.shape))
        base = None if law.base_mean is None else _put(x, rows, law.base_mean)
        ends = ((t - 1) % self._steps == 0) & (chunk < self.chunks - 1)
        if ends.any():
            mean, std, base = self._begun(mean, std, base, torch.where(ends, chunk + 1, chunk), ends, cond)
        return replace(law, mean=mean, std=std, endpoint=self._endpoint(x, chunk, law.endpoint), base_mean=base)

    def diagnose(self, t: Tensor) -> str:
        """What the kernel says of its own levels."""
        hint = optional(self.kernel, "diagnose")
        return "" if hint is None else hint((t - 1) % self._steps + 1)

    def _begun(
        self, mean: Tensor, std: Tensor, base: Tensor | None, chunk: Tensor, ends: Tensor, cond: Cond
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean and standard deviation with x_T of the next chunk in the rows that end one; it keeps where they meet."""
        rows, told = self._rows(chunk), self._told(mean, chunk, cond)
        still = self.kernel.prior(torch.zeros_like(told["known"]), told)
        spread = self.kernel.prior(torch.ones_like(told["known"]), told) - still
        fresh = expand(ends, still).expand(still.shape).clone()
        fresh[:, 0, : self._observed] = False
        mean, std = (
            _put(now, rows, torch.where(fresh, new, _taken(now, rows))) for now, new in ((mean, still), (std, spread))
        )
        return mean, std, None if base is None else _put(base, rows, torch.where(fresh, still, _taken(base, rows)))

    def _endpoint(self, x: Tensor, chunk: Tensor, endpoint: Tensor) -> Tensor:
        """Plans (n, rows, C) as far as they have come, and standing still from there on."""
        end = _put(x, self._rows(chunk), endpoint)
        encode = optional(self.kernel, "encode_samples")
        rest = x.new_zeros(1, 1, x.shape[2])
        rest = (rest if encode is None else encode(rest)).expand(len(x), 1, -1).clone()
        rest[:, :, : self._observed] = endpoint[:, -1:, : self._observed]
        later = torch.arange(self.horizon, device=x.device) > ((chunk + 1) * self._gap)[:, None]
        return torch.where(later[..., None], rest, end)

    def _told(self, x: Tensor, chunk: Tensor, cond: Cond) -> dict[str, Any]:
        """What chunks (n,) know: their share of what is known of the plan, and the observation that they start from."""
        rows = self._rows(chunk)
        if cond is None or "mask" not in cond:
            mask = torch.zeros(len(x), *self._spec.state_shape, dtype=torch.bool, device=x.device)
            values = torch.zeros_like(mask, dtype=x.dtype)
        else:
            values, mask = _taken(cond["known"].to(x.dtype), rows), _taken(cond["mask"], rows)
        linked = expand(chunk > 0, mask) & (torch.arange(mask.shape[1], device=x.device) == 0)[:, None]
        linked = linked & (torch.arange(mask.shape[2], device=x.device) < self._observed)
        return {**(cond or {}), "known": torch.where(linked, _taken(x, rows), values), "mask": mask | linked}

    def _chunk(self, t: Tensor) -> Tensor:
        """Which chunk levels t (n,) denoise."""
        return self.chunks - 1 - (t - 1) // self._steps

    def _rows(self, chunk: Tensor) -> Tensor:
        """Rows (n, H) of chunks (n,)."""
        return chunk[:, None] * self._gap + torch.arange(self._gap + 1, device=chunk.device)

    @property
    def _gap(self) -> int:
        """H - 1, rows from one start to the next."""
        return self._spec.state_shape[0] - 1

    @property
    def _steps(self) -> int:
        """T of a chunk."""
        return self._spec.num_steps

    @property
    def _observed(self) -> int:
        return self.kernel.channels.observation

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (n, H) of plans (n, L, C): (n, H, C)."""
    return x[torch.arange(len(x), device=x.device)[:, None], rows]


def _put(x: Tensor, rows: Tensor, chunk: Tensor) -> Tensor:
    """Plans (n, L, C) with a chunk (n, H, C) in their rows (n, H)."""
    return x.scatter(1, rows[..., None].expand(chunk.shape), chunk.to(x.dtype))
