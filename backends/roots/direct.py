"""Direct inversion: the source branch of an edit is a table, and the edited branch looks at it while it walks.

    δ_t = x*_{t-1} - D_w(x*_t, source)              what a guided step misses of the inverted path x*_0..x*_T
    source branch     D_w(x*_t, source) + δ_t = x*_{t-1}            at any scale w, whatever the inversion missed
    edited branch     D_w(x_t, target; attention of x*_t) + s δ_t   published s = 0; others are its ablation

Since the corrected source branch is the path, it is looked up and not walked: x*_t is bitwise what the network sees in
every step. Its evaluation is only for what the edited rows take from it (`Control`) and for δ: beside them in one call,
at levels where something is shared, once for all rows of a picture at one level. N evaluations invert, and N steps
evaluate 1 + k rows for k edited ones, twice that under classifier-free guidance: N + 2N(1 + k). `rows_per_nfe` is that
of k = 1, the most there can be. Without attention control and without s no pivot is evaluated, and the kernel's steps
are its own to the bit.

Guides, masks and roots go around, interventions within. D is the mean of the kernel's own step, with its noise or
without.

Source: Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code (Ju et al., 2024), section 4, and its
ablation of s.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Shared, Spec, Transition, Wrapper, describe, fingerprint, optional
from treesearch.backends.chains.diffusion import NEGATIVE
from treesearch.backends.interventions.alignment import How
from treesearch.backends.interventions.base import CHOSEN, law_of, network_of
from treesearch.backends.interventions.mutual import Mutual
from treesearch.backends.interventions.paired import Control, Pairs
from treesearch.backends.interventions.prompt_to_prompt import PromptToPrompt
from treesearch.backends.roots.rooted import image_of
from treesearch.rewards.numeric import is_number

PIVOT = "pivot_"  # of conditioning: rows of the source prompt
BY_ROW = ("task", CHOSEN)  # what the engine and actions add to it


@final
@dataclass(frozen=True, eq=False)
class Direct(Wrapper):
    """A kernel whose rows see the pivots of their pictures.

    Args:
        kernel: with a `network` where attention is shared.
        path: x*_0..x*_T of n pictures, (T + 1, n, *state), as an inversion finds them.
        source: prompt that describes the picture, or a tuple of one for each; None tells pivots what their rows are
            told.
        control: what rows take from pivots; None is nothing.
        correction: s.

    Raises:
        TypeError: a kernel that names no network where attention is shared, or one that is guided by a reward.
        ValueError: a path of another shape or with entries that are not finite, s out of range, or a control without
            the source prompt that it needs.
    """

    path: Tensor
    source: Any = None
    _: KW_ONLY
    control: Control | None = None
    correction: float = 0.0

    withheld = frozenset({"network"})  # it is called on other rows than those of a step: interventions go within

    def __post_init__(self) -> None:
        spec, path = self._spec, self.path
        got, want = tuple(path.shape), (spec.num_steps + 1, "n", *spec.state_shape)
        if len(got) < 2 or got[1] < 1 or (got[0], *got[2:]) != (want[0], *want[2:]):
            raise ValueError(f"path has shape {got}, expected {want}, x_0..x_T of n pictures: `invert`")
        if not path.isfinite().all():
            raise ValueError("the path has entries that are not finite")
        if not is_number(self.correction, -1e6, 1e6):
            raise ValueError(f"correction is {self.correction!r}, expected a finite number: 0, or 0.4 of the δ")
        if optional(self.kernel, "scores") is not None:
            raise TypeError(
                f"{type(self.kernel).__name__} is guided by a reward: guide around it, tds(direct(...), reward)"
            )
        self._check_control()
        object.__setattr__(self, "path", path.detach().to(spec.device, spec.dtype))

    def _check_control(self) -> None:
        if self.control is None:
            return
        if not isinstance(self.control, Control):
            raise TypeError(f"control is {self.control!r}, expected such as PromptToPrompt('replace')")
        network_of(self.kernel)
        self.control.check(self.kernel)
        if self.control.needs_source and self.source is None:
            raise ValueError("words of the source prompt are compared with those of the target: give source='...'")

    @property
    def base_law(self) -> str | None:
        """Whose law p is; the kernel's own where nothing is taken from pivots."""
        taken = [f"{type(self.control).__name__} of the picture"] if self.control is not None else []
        taken += [f"{self.correction:g} of its corrections"] if self.correction else []
        return f"{law_of(self.kernel)} with {' and '.join(taken)}" if taken else optional(self.kernel, "base_law")

    @property
    def untouched(self) -> Any:
        """The kernel without interventions."""
        return optional(self.kernel, "untouched", self.kernel)

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Twice the kernel's at levels where a pivot is evaluated."""
        return tuple(r * (2 if t and self._pivoted[t] else 1) for t, r in enumerate(self._spec.rows_per_nfe))

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Conditioning of prompts, with that of the source beside it.

        Raises:
            ValueError: another number of source prompts than of prompts, where there are several.
            TypeError: a kernel that takes no prompts, and a source prompt.
        """
        encode, asked = optional(self.kernel, "encode"), list(prompts)
        sources = self._sources(asked)
        both = (encode([*asked, *sources] if self.source is not None else asked) if encode else None) or {}
        if self.source is not None and not both:
            raise TypeError(f"{type(self.kernel).__name__} takes no prompts: leave the source prompt out")
        out: dict[str, Any] = {}
        for name, value in both.items():
            if isinstance(value, Shared):
                out[name] = value
            else:
                out[name], out[PIVOT + name] = (value, value) if self.source is None else value.chunk(2)
        return out | (self.control.rows(self.kernel, out, sources, asked) if self.control is not None else {})

    def _sources(self, prompts: list[Any]) -> list[Any]:
        if self.source is None:
            return prompts
        if not isinstance(self.source, tuple):
            return [self.source] * len(prompts)
        if len(self.source) != len(prompts):
            raise ValueError(f"{len(self.source)} source prompts for {len(prompts)} prompts: one each, or one for all")
        return list(self.source)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The step of the rows, pivots beside them where these are needed.

        Raises:
            ValueError: no conditioning of the source prompt.
            TypeError: a correction of steps that are not Gaussian, or that carry weights.
        """
        levels = t.cpu()
        pivoted = self._pivoted[levels]
        if not pivoted.any():
            return self.kernel.transition(x, t, cond)
        if self.source is not None and not any(name.startswith(PIVOT) for name in cond or {}):
            raise ValueError("there is no conditioning of the source prompt: make it with `encode`, give prompts=[...]")
        pivot, first = _numbered(pivoted, levels, cond)
        m, n = len(first), len(x)
        law = self._evaluated(x, t, cond, Pairs(pivot, m, levels, self._spec.num_steps, cond), first)
        mine = law.take(torch.arange(m, m + n, device=x.device))
        return self._corrected(mine, law, pivot, first.to(t.device), t, cond) if self.correction else mine

    def _evaluated(self, x: Tensor, t: Tensor, cond: Cond, pairs: Pairs, first: Tensor) -> Any:
        """The law of pivots and rows, pivots first."""
        beside = first.to(t.device)
        states = torch.cat([self._pivots(t[beside], beside, cond).to(x), x])
        both = t[torch.cat([beside, torch.arange(len(t), device=t.device)])]
        given = _beside(cond, beside, len(x))
        if self.control is None:
            return self.kernel.transition(states, both, given)
        with self.control.on(network_of(self.kernel), pairs):
            return self.kernel.transition(states, both, given)

    def _pivots(self, t: Tensor, rows: Tensor, cond: Cond) -> Tensor:
        """x*_t of the pictures of rows (m,), at levels t (m,)."""
        image = image_of(cond, self.path.shape[1])
        which = torch.zeros_like(rows) if image is None else image.to(rows.device)[rows]
        return self.path[t.to(self.path.device), which.to(self.path.device)]

    def _corrected(self, mine: Any, law: Any, pivot: Tensor, first: Tensor, t: Tensor, cond: Cond) -> Gaussian:
        if not isinstance(mine, Gaussian) or mine.base_mean is not None:
            raise TypeError("corrections are of Gaussian steps without weights: leave correction out")
        missed = self._pivots(t[first] - 1, first, cond).to(law.mean) - law.mean[: len(first)]
        return replace(mine, mean=mine.mean + self.correction * missed[pivot.to(missed.device)])

    @cached_property
    def _pivoted(self) -> Tensor:
        """Levels (T + 1,) at which pivots are evaluated, bool on the host; [0] is none."""
        steps = self._spec.num_steps - torch.arange(self._spec.num_steps + 1, device="cpu")
        if self.correction:
            return steps < self._spec.num_steps
        none = torch.zeros_like(steps, dtype=torch.bool)
        return (
            none if self.control is None else self.control.acts(steps, self._spec.num_steps) & (steps < len(steps) - 1)
        )

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    def _settings(self) -> str | None:
        return fingerprint.of([self.path, self.source, self.control, self.correction])


def _numbered(pivoted: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """The pivot of each row (n,), -1 for none, and the first row of each pivot (m,).

    Rows of one task at one level, under the same settings of interventions, have one pivot.
    """
    told = [each.tolist() for name in BY_ROW if (each := (cond or {}).get(name)) is not None]
    numbers: dict[Hashable, int] = {}
    first, pivot = [], []
    keys = map(repr, zip(*told, strict=True)) if "task" in (cond or {}) else range(len(t))
    for row, (key, level, needed) in enumerate(zip(keys, t.tolist(), pivoted.tolist(), strict=True)):
        known = (level, key)
        if needed and known not in numbers:
            numbers[known] = len(first)
            first.append(row)
        pivot.append(numbers[known] if needed else -1)
    return torch.tensor(pivot, device="cpu"), torch.tensor(first, device="cpu")


def _beside(cond: Cond, first: Tensor, n: int) -> Cond:
    """Conditioning of pivots and n rows: what is told of the source before what is told of the rows."""
    if cond is None:
        return None
    out = {name: value for name, value in cond.items() if not name.startswith(PIVOT)}
    for name, value in out.items():
        own = name in BY_ROW or (name.startswith(NEGATIVE) and len(value) == n > 1)  # an ∅ is of all rows, or of each
        source = cond.get(PIVOT + name, value if own else None)
        if source is not None:
            out[name] = torch.cat([source[first.to(source.device)], value])
    return out


def direct(
    kernel: Any,
    path: Tensor,
    source: Any = None,
    control: How | Literal["kv"] | None = "either",
    correction: float = 0.0,
    **settings: Any,
) -> Direct:
    """A kernel whose rows see the pivots of their pictures.

    Args:
        kernel: with a `network` where attention is shared.
        path: x*_0..x*_T of n pictures, (T + 1, n, *state), as an inversion finds them.
        source: prompt that describes the picture, or a tuple of one for each.
        control: what rows take from pivots: 'either', 'replace' or 'refine' of `PromptToPrompt`, 'kv' of `Mutual`, None
            is nothing.
        correction: s.
        settings: of the control, such as cross=0.4 or parts='up_blocks'.

    Raises:
        TypeError: a setting that the control does not have, or a kernel that does not fit.
        ValueError: another control, or settings out of range.
    """
    if control is None and settings:
        raise TypeError(f"{', '.join(settings)}: settings are of a control, and there is none")
    if control not in (None, "kv", *get_args(How)):
        raise ValueError(f"control is {control!r}, expected one of {get_args(How)}, 'kv' or None")
    made = None
    if control is not None:
        made = Mutual(**settings) if control == "kv" else PromptToPrompt(control, **settings)
    return Direct(kernel, path, source, control=made, correction=correction)
