"""What a diagnosis says: figures by level, the spread of weights, a suggestion, and all of it as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from treesearch.diagnosis.effects import Estimate
from treesearch.methods.base import Method

NONE = Estimate(math.nan, math.nan)
HEADS = ("t", "decided", "upper", "rank", "slope", "known", "one step", "asymmetry")
MEANING = (
    "decided: share of the reward's variance that x_t has settled; upper: of its better half, by ranks",
    "rank, slope: of the reward of the predicted x_0 with the final one; known: with the mean reward below x_t",
    "one step: what a jump from x_t misses, 0 to 1; asymmetry: of the Jacobian of the predicted x_0, 0 if exact",
)


@dataclass(frozen=True, kw_only=True)
class Level:
    """Figures of the states x_t, each an `Estimate`; see `treesearch.diagnosis.effects`.

    Args:
        t: steps left.
        decided, upper, rank, slope, known: of the reward.
        one_step: `gap_t` of `backends.diagnostics.straightness`.
        asymmetry: of the Jacobian of x̂_0, `backends.diagnostics.conservative`.
    """

    t: int
    decided: Estimate
    upper: Estimate
    rank: Estimate
    slope: Estimate
    known: Estimate
    one_step: Estimate = NONE
    asymmetry: Estimate = NONE

    def cells(self) -> list[str]:
        """A row of the table."""
        figures = (self.decided, self.upper, self.rank, self.slope, self.known, self.one_step, self.asymmetry)
        return [str(self.t), *map(str, figures)]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of the weights exp(λ r) p/q; see `treesearch.diagnosis.spread`.

    Args:
        lam: λ.
        ess, variance, kl: fraction, of log w, KL(π‖p).
        lam_tenth: λ at which the fraction is a tenth; None where there is none.
    """

    lam: float
    ess: Estimate
    variance: Estimate
    kl: Estimate
    lam_tenth: float | None

    @property
    def rollouts(self) -> float:
        """What importance sampling needs by its KL."""
        return math.exp(min(self.kl.value, 700.0))


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What to run for a goal, and why.

    Args:
        goal: best or draws.
        method: with its settings.
        branch: whether it branches below x_T.
        reason: a sentence.
        command, python: how to type it.
    """

    goal: str
    method: Method
    branch: bool
    reason: str
    command: str
    python: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A pilot's figures, and what they suggest.

    Args:
        kernel, reward: what they call themselves.
        num_steps, chains, tasks, seed: T; chains of each task; tasks; of all noise.
        levels: descending in t.
        spread: of the weights.
        rewards: lowest, mean, standard deviation, highest of the leaves, and the share that is -inf.
        suggestions: one a goal.
        skipped: what was not measured, and why.
        notes: what to know of the figures.
        cost: what ran: network evaluations, backward passes, reward calls, seconds.
    """

    kernel: str
    reward: str
    num_steps: int
    chains: int
    tasks: int
    seed: int
    levels: tuple[Level, ...]
    spread: Spread
    rewards: Mapping[str, float]
    suggestions: tuple[Suggestion, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]
    cost: Mapping[str, Any]

    def suggestion(self, goal: str) -> Suggestion:
        """That of a goal: "best" or "draws"."""
        return next(each for each in self.suggestions if each.goal == goal)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; None where there is no figure."""
        told = {name: plain(value) for name, value in vars(self).items()}
        told["levels"] = [{k: plain(v) for k, v in vars(level).items()} for level in self.levels]
        told["spread"] = {k: plain(v) for k, v in vars(self.spread).items()} | {"rollouts": plain(self.spread.rollouts)}
        told["suggestions"] = [vars(each) | {"method": _settings(each.method)} for each in self.suggestions]
        return told

    def __str__(self) -> str:
        return "\n".join(
            [*self._head(), "", *aligned([HEADS, *(level.cells() for level in self.levels)]), *self._foot()]
        )

    def _head(self) -> list[str]:
        r, cost = self.rewards, self.cost
        tasks = f"{self.tasks} tasks of " if self.tasks > 1 else ""
        return [
            f"{self.kernel}, reward {self.reward}, T = {self.num_steps}: {tasks}{self.chains} chains and their "
            f"continuations, {cost['nfe']:,} NFE, {cost['backward_nfe']:,} backward passes, "
            f"{cost['reward_calls']:,} reward calls, {cost['seconds']:.1f} s",
            f"rewards {r['lowest']:.4g} to {r['highest']:.4g}, mean {r['mean']:.4g}, standard deviation {r['sd']:.4g}"
            + (f", {r['forbidden']:.0%} are -inf" if r["forbidden"] else ""),
        ]

    def _foot(self) -> list[str]:
        s = self.spread
        tenth = "no lam brings the ESS to a tenth" if s.lam_tenth is None else f"a tenth at lam = {s.lam_tenth:.3g}"
        lines = ["", *MEANING, "", f"weights at lam = {s.lam:g}: ESS {s.ess} of 1 ({tenth}), variance of log w "
                 f"{s.variance}, KL {s.kl}: importance sampling needs some {s.rollouts:.3g} rollouts"]  # fmt: skip
        lines += [f"not measured: {what}, {why}" for what, why in self.skipped.items()]
        lines += [f"note: {note}" for note in self.notes]
        for each in self.suggestions:
            lines += ["", f"for {each.goal}: {each.reason}", f"  {each.command}", f"  {each.python}"]
        return lines


def plain(value: Any) -> Any:
    """JSON's own kinds: None for numbers that are not finite, dictionaries and lists throughout."""
    if isinstance(value, Estimate):
        return {"value": plain(value.value), "se": plain(value.se)}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(method: Method) -> dict[str, Any]:
    return {"name": type(method).__name__} | plain(asdict(method))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, columns to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
