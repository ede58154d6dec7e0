"""Several methods at the same budget: what each found, after how many evaluations, and which to take.

    NFE to best-of-N's best    evaluations after which a method's running best first reached what best-of-N ended with
    times fewer                best-of-N's evaluations over those

A running best is known after each wave, so the figure is that of the wave's end: never too small. Methods that have
samples at their end only, such as one population of particles, reach it there or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from treesearch.budget import Cost
from treesearch.errors import TreeSearchError
from treesearch.methods.base import Method
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.claims import Standing
from treesearch.results.result import SearchResult, TaskResult
from treesearch.rewards.base import Reward

BEST, DRAWN = 16, 32  # samples that a reward beside the optimised one is averaged over


class Saving(NamedTuple):
    """How soon a method reached best-of-N's best."""

    nfe: int | None  # spent when its running best first reached it, None where it never did
    times: float | None  # best-of-N's NFE over that


class Choice(NamedTuple):
    """A method to take, None where there is none, and why."""

    name: str | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One method of a comparison. With a single task it has the result's figures; with several, use `result.tasks[i]`.

    Args:
        name: in the comparison.
        method: its configuration.
        result: of its search, None where it could not run.
        refused: why it could not run.
        also: of each task, what a reward that was not optimised says (`beside`).
    """

    name: str
    method: Method
    result: SearchResult | None = None
    refused: str | None = None
    also: tuple[dict[str, Any], ...] = ()

    @property
    def found(self) -> SearchResult:
        """The result.

        Raises:
            TreeSearchError: it could not run.
        """
        if self.result is None:
            raise TreeSearchError(f"{self.name} has no result: {self.refused}")
        return self.result

    @property
    def best(self) -> float | None:
        """Highest reward over all tasks, None before the first finite one."""
        tops = [float(task.rewards.max()) for task in self.found.tasks if len(task.leaves)]
        return max((top for top in tops if np.isfinite(top)), default=None)

    @property
    def log_z(self) -> float | None:
        """Estimate of log E_p[exp(λ r)]; None for greedy methods."""
        return self.found.log_z

    @property
    def log_z_se(self) -> float | None:
        """Its standard error, None where none is known."""
        return self.found.log_z_se

    @property
    def ess(self) -> float:
        """Effective number of samples among the weights."""
        return self.found.diagnostics["ess"]

    @property
    def cost(self) -> Cost:
        """What it spent."""
        return self.found.cost

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record a wave."""
        return self.found.history

    def reached(self, reward: float) -> int | None:
        """NFE spent at the end of the first wave whose best is at least a reward, None where there is none."""
        waves = (w for w in self.history if w["best_reward"] is not None and w["best_reward"] >= reward)
        return next((wave["nfe"] for wave in waves), None)

    @property
    def reliable(self) -> bool:
        """Whether all of its log Z have an interval that can be relied on."""
        return all(task.certificate().log_z.standing == Standing.OK for task in self.found.tasks)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several methods on the same kernel, reward, prompts, seed and budget.

    Args:
        entries: by name, in the order they were asked for; those that could not run say why in `refused`.
        also: name of a reward that was not optimised, None where none was given.
    """

    entries: Mapping[str, Compared]
    also: str | None = None

    def __getitem__(self, name: str) -> Compared:
        return self.entries[name]

    @property
    def ran(self) -> dict[str, Compared]:
        """The entries that have a result."""
        return {name: entry for name, entry in self.entries.items() if entry.result is not None}

    @property
    def refused(self) -> dict[str, str]:
        """Why the others have none."""
        return {name: f"not run: {entry.refused}" for name, entry in self.entries.items() if entry.result is None}

    @property
    def baseline(self) -> Compared | None:
        """The first best-of-N with a finite reward, None without one."""
        plain = (e for e in self.ran.values() if isinstance(e.method, BestOfN) and not e.method.rungs)
        found = (e for e in plain if e.best is not None)
        return next(found, None)

    def savings(self) -> dict[str, Saving]:
        """How soon each method reached best-of-N's best; empty without a best-of-N."""
        base = self.baseline
        if base is None or base.best is None:
            return {}
        found = {name: e.reached(base.best) for name, e in self.ran.items() if e is not base}
        return {name: Saving(nfe, base.cost.nfe / nfe if nfe else None) for name, nfe in found.items()}

    def headline(self) -> list[str]:
        """`savings` in words, a line a method, the soonest first."""
        base = self.baseline
        if base is None or base.best is None:
            return []
        spent = f"{base.name}'s best of {base.cost.nfe:,} NFE"
        lines = [f"{spent} is {base.best:.3f}, which it had after {base.reached(base.best):,}"]
        savings = sorted(self.savings().items(), key=lambda each: each[1].nfe or np.inf)
        for name, (nfe, times) in savings:
            if nfe is None:
                top = self[name].best
                told = f"no finite reward after {self[name].cost.nfe:,} NFE" if top is None else f"its own is {top:.3f}"
                lines.append(f"{name} did not reach it: {told}")
            else:
                lines.append(f"{name} reached it after {nfe:,}: {times:.1f} x fewer")
        return lines

    def advised(self) -> dict[str, Choice]:
        """What to take, by goal: for the best sample the highest reward, the sooner the better; for draws of π the
        largest effective sample among the methods whose log Z can be relied on."""
        savings = self.savings()
        tops = {name: e.best for name, e in self.ran.items() if e.best is not None}
        soon = {name: -(savings[name].nfe or np.inf) if name in savings else -np.inf for name in tops}
        best = max(tops, key=lambda name: (tops[name], soon[name]), default=None)
        sizes = {name: min(t.diagnostics["ess"] for t in e.found.tasks) for name, e in self.ran.items() if e.reliable}
        draws = max(sizes, key=sizes.__getitem__, default=None)
        return {
            "best": Choice(best, "no reward is finite" if best is None else f"highest reward, {tops[best]:.3f}"),
            "draws": Choice(
                draws,
                "no log Z can be relied on at this budget"
                if draws is None
                else f"largest effective sample whose log Z can be relied on, {sizes[draws]:.1f}",
            ),
        }

    def advice(self) -> list[str]:
        """`advised` in words."""
        goals = {"best": "for the best sample", "draws": "for draws of π"}
        return [f"{goals[goal]}: {choice.name or 'none'} ({choice.why})" for goal, choice in self.advised().items()]

    def __str__(self) -> str:
        lines = [_line(entry) for entry in self.ran.values()]
        lines += [f"{name:<16} {why}" for name, why in self.refused.items()]
        return "\n".join([*lines, *self.headline(), *self.advice()])


def _line(entry: Compared) -> str:
    best = "none" if entry.best is None else f"{entry.best:.3f}"
    single = entry.found.tasks[0] if len(entry.found.tasks) == 1 else None
    z = "" if single is None or single.log_z is None else f"  log Z {single.log_z:.3f}"
    ess = "" if single is None else f"  ESS {single.diagnostics['ess']:.1f}"
    return f"{entry.name:<16} best {best}{z}{ess}  {entry.cost.nfe:,} NFE, {entry.cost.reward_calls:,} reward calls"


def beside(task: TaskResult, also: Reward) -> dict[str, Any]:
    """Mean of a reward that was not optimised, over the best sixteen samples and over the read-out's draws, and the
    certificate with its alarm."""
    found: dict[str, Any] = {"also_best": None, "also_draws": None}
    if len(task.leaves):
        found["also_best"] = _mean(task, also, task.best(BEST)[0])
        if np.isfinite(task.readout.log_weights.max()):
            found["also_draws"] = _mean(task, also, task.draw(DRAWN))
    return found | {"certificate": task.certificate(also).asdict()}


def _mean(task: TaskResult, also: Reward, samples: Sequence[Any]) -> float | None:
    values = also(samples, None if task.prompt is None else [task.prompt] * len(samples))
    return float(values.mean()) if values.isfinite().all() else None
