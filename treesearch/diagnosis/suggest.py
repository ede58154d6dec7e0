"""From figures to a method: whether to branch, at which levels, and a sentence that says why.

For the best sample, the first that holds:

    rewards do not vary                            best-of-N: nothing tells samples apart
    every step below x_T is deterministic          noise search: only x_T is left
    decided at x_T >= `ALL`                        best-of-N: what is below x_T changes nothing
    undecided at the lowest level <= `NONE_YET`    a tree at that level alone: a draw costs its few steps
    rank >= `KNOWS` where decided <= `OPEN`        a beam on endpoints, at every level where rank >= `HINTS`
    otherwise                                      a tree, at levels that have decided something and not all

and for draws of π: best-of-N where steps are deterministic, where x_T decides, where the ESS fraction is at least
`EVEN` or where no endpoint has rank >= `HINTS`; else tree sampling that scores those which do.

"Decided" is here the mean of the shares of the reward and of its upper half, made to rise as t falls. Levels between
measured ones have interpolated figures. The bounds were set on rewards and seeds that docs/diagnose.md names.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields

import numpy as np

from treesearch.backends.base import Spec
from treesearch.core.weights import F64
from treesearch.diagnosis.diagnosis import Level, Spread, Suggestion
from treesearch.diagnosis.effects import monotone
from treesearch.methods.base import Method
from treesearch.methods.beam import BeamSearch
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.noise_search import NoiseSearch
from treesearch.methods.tree_sampling import TreeSampling
from treesearch.methods.tree_search import TreeSearch

ALL, NONE_YET, OPEN, KNOWS, HINTS, EVEN = 0.9, 0.1, 0.75, 0.6, 0.3, 0.5
SOME = (0.05, 0.97)  # shares between which a tree gains by branching
MOST = 20  # scored levels


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Figures of measured levels as curves over all of them.

    Args:
        t: measured levels, rising.
        share: decided, falling with t.
        rank: of endpoints.
    """

    t: F64
    share: F64
    rank: F64

    @classmethod
    def of(cls, levels: Sequence[Level]) -> Seen:
        """The curves; figures that are missing count as nothing known."""
        both = np.array([[level.decided.value, level.upper.value, level.rank.value] for level in levels])
        share, rank = np.nan_to_num(both[:, :2].mean(1)), np.nan_to_num(both[:, 2])
        share = monotone(share, np.ones(len(share)))
        return cls(t=np.array([float(level.t) for level in levels])[::-1], share=share[::-1], rank=rank[::-1])

    def shares(self, t: Sequence[int]) -> F64:
        """Decided at any levels."""
        return np.interp(t, self.t, self.share)

    def ranks(self, t: Sequence[int]) -> F64:
        """Rank correlation of endpoints at any levels."""
        return np.interp(t, self.t, self.rank)


def _branchable(spec: Spec) -> list[int]:
    return [t for t in range(spec.num_steps, 0, -1) if spec.branchable(t)]


def thinned(levels: Sequence[int]) -> tuple[int, ...]:
    """At most `MOST` of them, evenly, the first and the last among them."""
    if len(levels) <= MOST:
        return tuple(levels)
    at = np.unique(np.round(np.linspace(0, len(levels) - 1, MOST)).astype(int))
    return tuple(levels[i] for i in at.tolist())


def hinting(spec: Spec, seen: Seen) -> tuple[int, ...]:
    """Levels below x_T whose endpoints say something, descending, 0 last."""
    levels = [t for t in _branchable(spec) if t < spec.num_steps]
    return (*thinned([t for t, r in zip(levels, seen.ranks(levels), strict=True) if r >= HINTS]), 0)


def for_best(spec: Spec, seen: Seen, *, varies: bool) -> tuple[Method, bool, str]:
    """Method, whether it branches, and why."""
    if not varies:
        return (
            BestOfN(),
            False,
            "branching cannot help: the rewards of the pilot do not vary, nothing tells samples apart",
        )
    levels = _branchable(spec)
    if not levels:
        return NoiseSearch(), False, "branching cannot help: every step is deterministic, only x_T is left to search"
    top, low = float(seen.shares([spec.num_steps])[0]), levels[-1]
    if top >= ALL:
        return BestOfN(), False, f"branching does not help: x_T decides {top:.0%} of the reward, so take many of them"
    if (last := float(seen.shares([low])[0])) <= NONE_YET:
        at = max(low, int(seen.t[0]))
        why = f"only {last:.0%} of the reward is decided at t = {at}: branch there alone, where a draw costs {at} steps"
        return TreeSearch(branch_at=(at,)), True, f"{why}; or the reward is noise, which no search can find"
    knowing = [t for t in levels if seen.ranks([t])[0] >= KNOWS and seen.shares([t])[0] <= OPEN]
    if knowing:
        t = knowing[0]
        why = (
            f"endpoints rank states well while much is open (rank correlation {seen.ranks([t])[0]:.2f} at t = {t}, "
            f"{seen.shares([t])[0]:.0%} decided): prune by them at every level, which costs no evaluations"
        )
        return BeamSearch(beam_width=8, branching=8, schedule=hinting(spec, seen)), True, why
    open_ = [t for t in levels if SOME[0] <= seen.shares([t])[0] <= SOME[1]]
    why = (
        f"endpoints know too late to prune by (rank correlation below {KNOWS:g} while less than {OPEN:.0%} is decided)"
    )
    return TreeSearch(branch_at=tuple(open_) or None), True, f"{why}: let samples say where it is decided"


def for_draws(spec: Spec, seen: Seen, spread: Spread, *, varies: bool) -> tuple[Method, bool, str]:
    """Method, whether it branches, and why."""
    plain, ess = BestOfN(lam=spread.lam), spread.ess.value
    if not varies:
        return plain, False, "branching cannot help: the rewards of the pilot do not vary, rollouts are draws of π"
    if not _branchable(spec):
        return plain, False, "branching cannot help: every step is deterministic"
    if ess >= EVEN:
        return plain, False, f"branching does not help: weights are even (ESS {ess:.2f} of 1), so weigh plain rollouts"
    if (top := float(seen.shares([spec.num_steps])[0])) >= ALL:
        return plain, False, f"branching does not help: x_T decides {top:.0%} of the reward, so take many of them"
    schedule = hinting(spec, seen)
    if len(schedule) == 1:
        return plain, False, f"branching does not help: no endpoint has a rank correlation of {HINTS:g} with the reward"
    why = (
        f"weights are uneven (ESS {ess:.2f} of 1) and endpoints say from t = {schedule[0]} on where they will be large"
    )
    return TreeSampling(lam=spread.lam, schedule=schedule), True, why


def suggestions(
    spec: Spec, levels: Sequence[Level], spread: Spread, *, varies: bool, kernel: str, reward: str, seed: int
) -> tuple[Suggestion, ...]:
    """One a goal.

    Args:
        kernel, reward: as they are typed.
    """
    seen = Seen.of(levels)
    found = {"best": for_best(spec, seen, varies=varies), "draws": for_draws(spec, seen, spread, varies=varies)}
    return tuple(
        Suggestion(
            goal=goal,
            method=method,
            branch=branch,
            reason=reason,
            command=command(method, kernel, reward, seed),
            python=f"ts.search(kernel, reward, ts.{shown(method)}, budget=ts.Budget(nfe=10_000), seed={seed})",
        )
        for goal, (method, branch, reason) in found.items()
    )


def changed(method: Method) -> dict[str, object]:
    """Settings that are not the defaults."""
    known = {f.name: f.default for f in fields(method)}
    return {k: getattr(method, k) for k, v in known.items() if v is MISSING or getattr(method, k) != v}


def shown(method: Method) -> str:
    """A method as it is written in Python."""
    return f"{type(method).__name__}({', '.join(f'{k}={v!r}' for k, v in changed(method).items())})"


def command(method: Method, kernel: str, reward: str, seed: int) -> str:
    """A method as it is typed."""
    words = ["treesearch", "run", method.name.replace("_", "-")]
    for name, value in changed(method).items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(_number, values)]
    words += ["--kernel", kernel, "--reward", reward, "--nfe", "10k", *(["--seed", str(seed)] if seed else [])]
    return shlex.join(words)


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
