"""LINA-style strengths: how much of a prompt's causes is spelt out, pushed into the picture, and given steps early on.

    prompt      c' = c + γ_1 (c_stated - c)            c_stated of an expanded prompt that states what the prompt causes
    latent      x̂_0 <- x̂_0 + γ_2 M (x̂_0(c') - x̂_0(c_without))         c_without of a negative prompt, M a box
    schedule    q N of the N steps in the first τ of the time           `early`
    predictor   (γ_1, γ_2, q) = f(embedding of c), ridge regression      `Ridge`

A pair (γ_1, γ_2) is a setting: under `actions` a tree chooses it, node by node, within `levels`, the early ones, which
set what is where. Means of steps are linear in x̂_0 with the noise that goes with it, so that the push is one of means,
as in `Away`. Kernels with a push evaluate twice within their levels.

Of the paper only the abstract is public. It names the three places where the interventions act, that their strengths
are predicted prompt by prompt, and that structure is set early; the formulas here are ours, and so is everything else.

Source: LINA: Learning INterventions Adaptively for Physical Alignment and Generalization in Diffusion Models (2025),
abstract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Shared, Transition, describe, expand, fingerprint, optional
from treesearch.backends.chains.schedules import Prediction, Schedule
from treesearch.backends.interventions.base import Intervened, Intervention, Rows
from treesearch.rewards.numeric import is_number, is_whole

STATED, WITHOUT = "lina_stated_", "lina_without_"  # of conditioning: rows of expanded and of negative prompts
Pair = tuple[float, float]


@final
@dataclass(frozen=True)
class Lina(Intervention):
    """Pairs of strengths.

    Args:
        pairs: (γ_1, γ_2), each a setting.

    Raises:
        ValueError: none, a number that is not finite, or γ_2 < 0.
    """

    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple(map(tuple, self.pairs)))
        for pair in self.pairs or ((),):
            if len(pair) != 2 or not is_number(pair[0], -1e6, 1e6) or not is_number(pair[1], 0, 1e6):
                raise ValueError(f"strengths are {pair!r}, expected (prompt, latent), finite, latent >= 0")

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(f"prompt {prompt:g}, latent {latent:g}" for prompt, latent in self.pairs)

    def on(self, network: Any, rows: Rows) -> AbstractContextManager[None]:
        return nullcontext()

    def conditioned(self, cond: Cond, rows: Rows) -> Cond:
        """c' of the rows; a mask of tokens covers those of both prompts."""
        strength, moved = self.strengths(0, rows.setting), dict(cond or {})
        for name in _rows_of(moved, STATED):
            c, stated = moved[name], moved[STATED + name]
            by_row = expand(strength, c)
            mixed = torch.lerp(c, stated, by_row.to(c)) if c.is_floating_point() else torch.maximum(c, stated)
            moved[name] = torch.where(by_row == 0, c, mixed)
        return moved

    def strengths(self, which: int, setting: Tensor) -> Tensor:
        """γ_1 or γ_2 (n,) of settings (n,)."""
        table = torch.tensor([0.0, *(pair[which] for pair in self.pairs)], device=setting.device)
        return table[setting]


@final
@dataclass(frozen=True)
class Expanded(Intervened):
    """A kernel whose prompts have expansions.

    Args:
        kernel: of prompts.
        intervention: `Lina`.
        levels: (low, high), t at which it acts, both included; None are all.
        expanded: prompt -> the prompt that states its causes.
        negative: what the push leads away from: one prompt for all, or by prompt.
        box: (top, left, bottom, right) of the push, as fractions of the last two axes of a state; None is all of it.

    Raises:
        TypeError: prompts that are none.
        ValueError: a box that is none, or for states without height and width.
    """

    intervention: Lina
    _: KW_ONLY
    expanded: Mapping[str, str]
    negative: str | Mapping[str, str] = ""
    box: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in (self.expanded, {"": self.negative} if isinstance(self.negative, str) else self.negative):
            if not isinstance(each, Mapping) or not all(
                isinstance(text, str) for pair in each.items() for text in pair
            ):
                raise TypeError(f"prompts are {each!r}, expected such as {{'a cat': 'a cat and its shadow'}}")
        if self.box is not None:
            object.__setattr__(self, "box", tuple(self.box))
            self._check_box(self.box)

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Twice the kernel's where there is a push."""
        rows = describe(self.kernel, identify=False).rows_per_nfe
        low, high = self.levels or (1, len(rows))
        pushed = any(latent for _, latent in self.intervention.pairs)
        return tuple(r * (2 if pushed and low <= t <= high else 1) for t, r in enumerate(rows))

    def encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Conditioning of prompts, with that of their expansions and of what they are led away from.

        Raises:
            TypeError: a kernel that takes no prompts.
            ValueError: a prompt without one.
        """
        asked = list(prompts)
        stated = [_found(self.expanded, prompt, "expanded") for prompt in asked]
        without = [self.negative if isinstance(self.negative, str) else _found(self.negative, prompt, "negative")
                   for prompt in asked]  # fmt: skip
        encode = optional(self.kernel, "encode")
        every = encode([*asked, *stated, *without]) if encode else None
        if not every:
            raise TypeError(f"{type(self.kernel).__name__} takes no prompts: there is nothing to expand")
        out: dict[str, Any] = {}
        for name, value in every.items():
            if isinstance(value, Shared):
                out[name] = value
            else:
                out[name], out[STATED + name], out[WITHOUT + name] = value.chunk(3)
        return out

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The step under c', pushed.

        Raises:
            TypeError: a push of steps that are not Gaussian, or that carry weights.
            ValueError: several settings, and no action that says which; no conditioning of expanded prompts.
        """
        if not any(name.startswith(STATED) for name in cond or {}):
            raise ValueError("there is no conditioning of expanded prompts: make it with `encode`, give prompts=[...]")
        law = super().transition(x, t, cond)
        scale = self.intervention.strengths(1, self.setting(t, cond)).to(x)
        return self._pushed(law, x, t, cond, scale) if scale.any() else law

    def _pushed(self, law: Any, x: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Gaussian:
        without = dict(cond or {})
        without |= {name: without[WITHOUT + name] for name in _rows_of(without, WITHOUT)}
        weak = self.kernel.transition(x, t, without)
        for each in (law, weak):
            if not isinstance(each, Gaussian) or each.base_mean is not None:
                raise TypeError("a push is of Gaussian steps without weights: guide outside of it, not within")
        by = expand(scale, x) * self._mask(x)
        mean, endpoint = (
            torch.where(by > 0, ours + by * (ours - theirs), ours)
            for ours, theirs in ((law.mean, weak.mean), (law.endpoint, weak.endpoint))
        )
        return replace(law, mean=mean, endpoint=endpoint)

    def _mask(self, x: Tensor) -> Tensor:
        """M, 1 within the box (1, ..., height, width)."""
        if self.box is None:
            return x.new_ones(())
        mask = x.new_zeros(x.shape[-2:])
        mask[_entries(self.box, x.shape)] = 1
        return mask

    def _check_box(self, box: tuple[float, ...]) -> None:
        fractions = len(box) == 4 and all(is_number(edge, 0, 1) for edge in box)
        if not fractions or box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"box is {box!r}, expected (top, left, bottom, right): 0 <= top < bottom <= 1, likewise "
                             "left and right")  # fmt: skip
        if len(self.kernel.state_shape) < 3:
            raise ValueError(f"states are {tuple(self.kernel.state_shape)}, without height and width: leave box out")
        if any(side.start == side.stop for side in _entries(box, self.kernel.state_shape)):
            height, width = self.kernel.state_shape[-2:]
            raise ValueError(f"box {box!r} holds no entry of states of {height} by {width}: make it wider")

    def _settings(self) -> str | None:
        negative = self.negative if isinstance(self.negative, str) else sorted(self.negative.items())
        return fingerprint.of([super()._settings(), sorted(self.expanded.items()), negative, self.box])


def lina(
    kernel: Any,
    expanded: Mapping[str, str],
    strengths: Pair | Sequence[Pair] = (1.0, 0.0),
    negative: str | Mapping[str, str] = "",
    box: tuple[float, float, float, float] | None = None,
    levels: tuple[int, int] | None = None,
) -> Expanded:
    """A kernel with LINA-style strengths.

    Args:
        kernel: of prompts.
        expanded: prompt -> the prompt that states its causes, such as {'a cat': 'a cat and its shadow on the floor'}.
        strengths: (γ_1, γ_2), one pair or several, each a setting of `actions`.
        negative: what the push leads away from: one prompt for all, or by prompt.
        box: (top, left, bottom, right) of the push, as fractions of height and width; None is all of it.
        levels: (low, high), t at which it acts, both included; None are all.

    Raises:
        TypeError: a kernel that names no network, or prompts that are none.
        ValueError: strengths, a box or levels out of range.
    """
    pairs = (strengths,) if len(strengths) == 2 and all(map(is_number, strengths)) else strengths
    return Expanded(kernel, Lina(tuple(pairs)), levels=levels, expanded=expanded, negative=negative, box=box)  # pyright: ignore[reportArgumentType]


def early(
    alphas_cumprod: Tensor, num_steps: int, *, tau: float, share: float, prediction: Prediction = "epsilon"
) -> Schedule:
    """A grid with its share q of steps in the first τ of the time; q = τ is the even one, of trailing spacing.

    Args:
        alphas_cumprod: ᾱ of the N training steps, (N,).
        num_steps: T.
        tau: in (0, 1).
        share: q in (0, 1); at least one step is on either side.
        prediction: what the network returns.

    Raises:
        ValueError: numbers out of range, or more steps than levels in a part of the time.
    """
    bars = alphas_cumprod.double().cpu()
    if not is_whole(num_steps, 2, len(bars)) or not all(is_number(v, 0, 1) and 0 < v < 1 for v in (tau, share)):
        raise ValueError(f"num_steps is {num_steps!r}, tau {tau!r}, share {share!r}: expected 2 or more, and numbers "
                         "between 0 and 1")  # fmt: skip
    first = early_steps(num_steps, share)
    starts = [1 - tau * i / first for i in range(first)]
    starts += [(1 - tau) * (1 - i / (num_steps - first)) for i in range(num_steps - first)]
    steps = (torch.tensor(starts[::-1], dtype=torch.float64, device="cpu") * len(bars)).round().long() - 1
    if (steps.diff() < 1).any() or steps[0] < 0:
        raise ValueError(f"{num_steps} steps, {first} of them in the first {tau:g} of the time, are more than levels")
    bar = torch.cat([bars.new_ones(1), bars[steps]])
    return Schedule(steps, bar.sqrt(), (1 - bar).sqrt(), prediction)


def early_steps(num_steps: int, share: float) -> int:
    """How many steps `early` puts first: the levels T, T - 1, ... of the window."""
    return min(max(round(share * num_steps), 1), num_steps - 1)


@final
@dataclass(frozen=True)
class Ridge:
    """The predictor: strengths that are linear in a condition.

    Args:
        weights: (D, S).
        offset: (S,).
    """

    weights: Tensor
    offset: Tensor

    @staticmethod
    def fit(conditions: Tensor, targets: Tensor, penalty: float = 1.0) -> Ridge:
        """argmin_W Σ |y - b - (c - c̄) W|² + penalty |W|², of conditions (n, D) and strengths (n, S).

        Raises:
            ValueError: rows that do not go together or are not finite, or a penalty that is not positive.
        """
        if conditions.ndim != 2 or targets.ndim != 2 or len(conditions) != len(targets) or not len(targets):
            got = f"{tuple(conditions.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"conditions and strengths are {got}, expected (n, D) and (n, S)")
        if not is_number(penalty, 0) or penalty == 0:
            raise ValueError(f"penalty is {penalty!r}, expected a positive number")
        if not conditions.isfinite().all() or not targets.isfinite().all():
            raise ValueError("conditions or strengths have entries that are not finite")
        c, y = conditions.double(), targets.double()
        centred = c - c.mean(0)
        gram = centred.T @ centred + penalty * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
        weights = torch.linalg.solve(gram, centred.T @ (y - y.mean(0)))
        return Ridge(weights, y.mean(0) - c.mean(0) @ weights)

    def predict(self, conditions: Tensor) -> Tensor:
        """Strengths (n, S)."""
        return conditions.to(self.weights) @ self.weights + self.offset


def _entries(box: Sequence[float], shape: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of a state that a box holds."""
    (top, left, bottom, right), (height, width) = box, shape[-2:]
    return (slice(round(top * height), round(bottom * height)), slice(round(left * width), round(right * width)))


def _rows_of(cond: dict[str, Any], prefix: str) -> list[str]:
    """Names of conditioning that has rows under a prefix."""
    return [name for name in cond if prefix + name in cond]


def _found(table: Mapping[str, str], prompt: str, what: str) -> str:
    if prompt not in table:
        raise ValueError(f"there is no {what} prompt of {prompt!r}: give {what}={{{prompt!r}: '...'}}")
    return table[prompt]
