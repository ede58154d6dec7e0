"""Planner: receding-horizon control by searching the trajectories of a diffusion model.

Every decision

    search     plans τ = (s_h, a_h)_{h<H} whose first observation is the current one and whose last is at the goal
    act        return the first k actions of the best plan; after these the caller asks again
    remember   the best plans, shifted by k rows and ended with copies of their last row
    keep       the best of these, scored from where the environment now is, unless the search finds a better one

A warm start (`treesearch.planning.warm_start`) draws x_t, t < T, around what it remembers instead of x_T from the
prior, and costs t instead of T. This is another law than p, which results say.

Sources: Planning with Diffusion for Flexible Behavior Synthesis (Janner et al., 2022), algorithm 1 and section 5.4
(receding horizon, and plans that start from the last one, partly noised). Tree search over such plans: Monte Carlo Tree
Diffusion for System 2 Planning (Yoon et al., 2025).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, final

import torch
from torch import Tensor

from treesearch.api import search
from treesearch.backends.base import Kernel, Shared, Spec, bare, describe, optional
from treesearch.budget import Budget, Cost
from treesearch.core.noise import root_key
from treesearch.engine.asking import without_graph
from treesearch.errors import TreeSearchError
from treesearch.methods.base import Method
from treesearch.methods.settings import check_whole
from treesearch.planning.inputs import check_kernel, histories, numbers, observed_by
from treesearch.planning.warm_start import WarmStart, flagged, lowered, shifted
from treesearch.results.result import SearchResult, TaskResult
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.numeric import is_number, is_whole

Best = tuple[Tensor, Tensor]
PACE = 0.9  # share of the pace of the last decision that a deadline counts on
SEEDS = 3  # population of root keys that seeds of decisions come from


class PlanningEnded(TreeSearchError):
    """There is no environment left to plan for; the message says why."""


class Outlook(StrEnum):
    """Where an environment stands, and what to do next."""

    PLANNING = "planning"
    UNREACHABLE = "unreachable: `patience` plans in a row were not good enough; check the goal, or raise the budget"
    REFUSED = "refused: `check` found that the goal cannot be reached"
    OUT_OF_DECISIONS = "out of decisions: max_decisions are made; call reset() to plan for a new goal"


@dataclass(frozen=True)
class Decision:
    """What one decision found and cost; rows are environments.

    Args:
        actions: (n, k, A), zero where nothing was planned.
        plans: (n, H, C) in data units, zero where nothing was planned.
        rewards: (n,) of the plans, NaN where nothing was planned.
        planned: whether there is a plan, (n,).
        searched: whether one was searched for, (n,).
        warm: whether from plans of the decision before, (n,).
        kept: whether the plan is the one of the decision before, since the search found none better, (n,).
        outlooks: one a row.
        nfe: network evaluations of all rows together.
        seconds: wall clock.
    """

    actions: Tensor
    plans: Tensor
    rewards: Tensor
    planned: tuple[bool, ...]
    searched: tuple[bool, ...]
    warm: tuple[bool, ...]
    kept: tuple[bool, ...]
    outlooks: tuple[Outlook, ...]
    nfe: int
    seconds: float

    @property
    def nfe_each(self) -> float:
        """Network evaluations of one environment."""
        return self.nfe / max(1, sum(self.planned))


@dataclass
class Track:
    """What is remembered of one environment."""

    goal: list[float] | None = None
    plans: Tensor | None = None  # (K, H, C), shifted
    decisions: int = 0
    failures: int = 0  # in a row
    outlook: Outlook = Outlook.PLANNING
    reason: str = ""  # in the words of `check`


@final
class Planner:
    """Plans for environments, many at a time.

    Args:
        kernel: of trajectories, such as `models.trajectory.TrajectoryKernel`: it has `channels` (observation, action)
            and takes prompts {"start": observation, "goal": position}.
        reward: of trajectories (n, H, C); its prompts are the same.
        method: any; greedy ones fit best.
        budget: of one decision. Whole numbers are of one environment, seconds of the decision, however many it is for.
        steps: k, rows of a plan that are executed before the next decision.
        warm_start: go on from the plans of the decision before, where there are any for the same goal, and keep the
            best of them until the search finds a better one; not with rewards that plans state themselves, such as
            `discounted_return`, which a plan that is kept goes on promising.
        level: t of a warm start; None for T/2.
        keep: plans that a warm start draws from.
        enough: least reward of a plan; one below it is a failure, is executed, but not started from.
        done: reward at which nothing is left to look for: a plan that still has it is kept without a search.
        patience: failures in a row after which a goal counts as unreachable.
        max_decisions: of one environment, then it is given up.
        check: called with a prompt before anything is planned for its goal; a ValueError or an answer of False
            gives the goal up.
        seed: of all noise; every decision has noise of its own.
        batch_size: rows of a forward pass.

    Attributes:
        result: of the last decision's search, one task for each environment that was searched for; a plan that was kept
            is not in it, but in `decision`.
        tasks: the same by environment.
        decision, decisions: what was found, last and all.

    Raises:
        ValueError: a setting out of range, or warm_start with a kernel that cannot re-noise.
        TypeError: the kernel is none of trajectories, or the budget no Budget.
    """

    def __init__(
        self,
        kernel: Kernel,
        reward: Reward | Callable[..., Any],
        method: Method,
        *,
        budget: Budget,
        steps: int = 1,
        warm_start: bool = True,
        level: int | None = None,
        keep: int = 4,
        enough: float = -math.inf,
        done: float = math.inf,
        patience: int = 3,
        max_decisions: int = 100,
        check: Callable[[dict[str, list[float]]], object] | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.spec = describe(kernel)
        check_kernel(kernel, warm_start)
        if not isinstance(budget, Budget):
            raise TypeError(f"budget is {budget!r}, expected ts.Budget(nfe=...) or ts.Budget(seconds=...)")
        check_whole(steps=steps, keep=keep, patience=patience, max_decisions=max_decisions)
        rows = self.spec.state_shape[0] - warm_start  # a warm start needs one row that was not executed
        if steps > rows:
            raise ValueError(f"steps is {steps}, expected {rows} or less: a plan has {self.spec.state_shape[0]} rows")
        if not (is_number(enough) and is_number(done)):
            raise ValueError(f"enough and done are {enough!r} and {done!r}, expected rewards of plans")
        self.kernel, self.reward, self.method, self.budget = kernel, as_reward(reward), method, budget
        self.channels: Any = optional(kernel, "channels")
        self.observed = observed_by(kernel)
        self.steps, self.warm_start, self.keep, self.enough, self.done = steps, warm_start, keep, enough, done
        self.level = max(1, self.spec.num_steps // 2) if level is None else level
        if not is_whole(self.level, 1, self.spec.num_steps):
            raise ValueError(f"level is {level!r}, expected 1..T = {self.spec.num_steps} (denoising steps left)")
        self.patience, self.max_decisions, self.check = patience, max_decisions, check
        self.seed, self.batch_size = seed, batch_size
        self.result: SearchResult | None = None
        self.tasks: dict[int, TaskResult] = {}
        self.decisions: list[Decision] = []
        self.tracks: list[Track] = []
        self._pace = 0.0  # NFE a second

    @property
    def decision(self) -> Decision:
        """The last one."""
        if not self.decisions:
            raise ValueError("no decision yet: call act or act_many")
        return self.decisions[-1]

    def reset(self) -> None:
        """Forget all environments; figures of earlier decisions stay."""
        self.tracks = []

    def act(self, observation: Any, goal: Any = None) -> Tensor:
        """The next actions (k, A) in one environment.

        Args:
            observation: numbers (S,), a history (h, S) of them for a policy that is told one, or a mapping with
                `observation` and perhaps `desired_goal`.
            goal: position (P,) to end at, None for none.

        Raises:
            ValueError: numbers that are not finite, or not as many as the kernel's.
            PlanningEnded: the goal was given up as unreachable, or max_decisions are made.
        """
        if isinstance(observation, Mapping):
            goal = observation.get("desired_goal") if goal is None else goal
            observation = observation["observation"]
        goals = None if goal is None else numbers(goal, "goal")[None]
        return self.act_many(numbers(observation, "observation")[None], goals)[0]

    @without_graph()
    def act_many(self, observations: Any, goals: Any = None, active: Sequence[bool] | None = None) -> Tensor:
        """The next actions (n, k, A) in n environments, planned in one search.

        Args:
            observations: (n, S), or histories (n, h, S).
            goals: (n, P), None for none.
            active: rows to plan for, all by default; the others get zeros, as do those that were given up.

        Raises:
            ValueError: numbers that are not finite, or not as many as the kernel's; another n than before.
            PlanningEnded: no row is left to plan for.
        """
        began = time.perf_counter()
        prompts = self._prompts(observations, goals)
        rows = self._to_plan(prompts, active)
        warm = [i for i in rows if self.tracks[i].plans is not None]
        found: dict[int, TaskResult] = {}
        cost, history = Cost(), []
        last = self._last(warm, prompts, cost) if warm and self.budget.reward_calls != 1 else {}
        settled = {i for i, (_, values) in last.items() if values[0] >= self.done}
        for some in ([i for i in warm if i not in settled], [i for i in rows if i not in warm]):
            if some:
                warmly = some[0] in warm
                spent = len(some) if warmly and last else 0
                result = self._search(some, prompts, len(rows), began, spent, warm=warmly)
                found |= dict(zip(some, result.tasks, strict=True))
                cost.add(result.cost)
                history += result.history
        self.result, self.tasks = SearchResult([found[i] for i in rows if i in found], cost, history), found
        self.decisions.append(self._decide(found, last, warm, cost, began))
        return self.decision.actions

    def _prompts(self, observations: Any, goals: Any) -> list[dict[str, list[float]]]:
        """One prompt a row; starts with tracks of their own on the first call."""
        starts = histories(observations, self.observed)
        ends = None if goals is None else numbers(goals, "goals")
        if ends is not None and (ends.ndim != 2 or len(ends) != len(starts)):
            raise ValueError(f"goals have shape {tuple(ends.shape)}, expected ({len(starts)}, positions)")
        if not self.tracks:
            self.tracks = [Track() for _ in starts]
        if len(self.tracks) != len(starts):
            raise ValueError(
                f"got {len(starts)} environments, expected {len(self.tracks)} as before: "
                "call reset() for others, or say which are `active`"
            )
        prompts = [{"start": row.tolist()} for row in starts]
        return prompts if ends is None else [p | {"goal": g.tolist()} for p, g in zip(prompts, ends, strict=True)]

    def _to_plan(self, prompts: list[dict[str, list[float]]], active: Sequence[bool] | None) -> list[int]:
        """Rows that get a plan; a new goal starts afresh."""
        if active is not None and len(active) != len(prompts):
            raise ValueError(f"active has {len(active)} entries, expected {len(prompts)}")
        for i, prompt in enumerate(prompts):
            if self.tracks[i].goal != prompt.get("goal"):
                self.tracks[i] = Track(goal=prompt.get("goal"))
        wanted = [i for i in range(len(prompts)) if active is None or active[i]]
        for i in wanted:
            self._ask(self.tracks[i], prompts[i])
        rows = [i for i in wanted if self.tracks[i].outlook == Outlook.PLANNING]
        if not rows:
            of = (self.tracks[i] for i in wanted)
            reasons = sorted({track.reason or str(track.outlook) for track in of}) or ["no row is active"]
            raise PlanningEnded(f"nothing to plan for: {'; '.join(reasons)}")
        return rows

    def _ask(self, track: Track, prompt: dict[str, list[float]]) -> None:
        """Give a goal up that `check` refuses, before its first decision."""
        if self.check is None or track.decisions or track.outlook != Outlook.PLANNING:
            return
        try:
            if self.check(prompt) is False:
                raise ValueError("the goal was refused")
        except ValueError as error:
            track.outlook, track.reason = Outlook.REFUSED, str(error)
        except KeyError as error:
            raise ValueError(
                f"check asked for {error} of a prompt that has {sorted(prompt)}: pass goal= to act"
            ) from error

    def _search(
        self,
        rows: list[int],
        prompts: list[dict[str, list[float]]],
        total: int,
        began: float,
        spent: int,
        *,
        warm: bool,
    ) -> SearchResult:
        """Plans for some rows, all from the prior or all from earlier plans, for which `spent` rewards are known."""
        kernel: Any = self.kernel
        method = self.method
        if warm:
            plans = torch.stack([p for i in rows if (p := self.tracks[i].plans) is not None])
            states = kernel.encode_samples(plans.flatten(0, 1))
            kernel = WarmStart(self.kernel, states.unflatten(0, plans.shape[:2]), self.level)
            method = lowered(self.method, self.level)
        result = search(
            kernel,
            self.reward,
            method,
            prompts=[prompts[i] for i in rows],
            budget=self._budget(len(rows), total, describe(kernel), began, spent),
            seed=root_key(self.seed, len(self.decisions), SEEDS),
            batch_size=self.batch_size,
            progress=False,
        )
        return flagged(result) if warm else result

    def _budget(self, rows: int, total: int, spec: Spec, began: float, spent: int) -> Budget:
        """A decision's limits for some of its rows; time is turned into NFE at the pace seen so far."""
        each = self.budget
        whole = {name: getattr(each, name) for name in ("nfe", "reward_calls", "iterations")}
        limits: dict[str, Any] = {name: None if v is None else v * rows for name, v in whole.items()}
        if limits["reward_calls"] is not None:
            limits["reward_calls"] -= spent
        if each.seconds is not None:
            left = max(each.seconds - (time.perf_counter() - began), 1e-3) if rows < total else each.seconds
            limits["seconds"] = left
            if self._pace:
                paced = int(PACE * self._pace * left)
                least = self.method.unit(spec).nfe * rows
                limits["nfe"] = max(least, min(paced, limits["nfe"] or paced))
        return Budget(**limits)

    def _last(self, rows: list[int], prompts: list[dict[str, list[float]]], cost: Cost) -> dict[int, Best]:
        """The best plans of the decision before (1, H, C) with what is now known put in, and their rewards (1,)."""
        kernel, reward = self.kernel, self.reward
        before, found = reward.calls() if reward.calls else 0, {}
        for begin in range(0, len(rows), self.batch_size):
            some = rows[begin : begin + self.batch_size]
            asked = [prompts[i] for i in some]
            states = _placed(
                kernel, torch.stack([p[0] for i in some if (p := self.tracks[i].plans) is not None]), asked
            )
            plans = _decoded(kernel, states)
            values = reward(bare(kernel, states) if reward.input == "state" else plans, prompts=asked).double().cpu()
            found |= {i: (plans[j : j + 1], values[j : j + 1]) for j, i in enumerate(some)}
        cost.reward_calls += reward.calls() - before if reward.calls else len(rows)
        return found

    def _decide(
        self, found: dict[int, TaskResult], last: dict[int, Best], warm: list[int], cost: Cost, began: float
    ) -> Decision:
        """Remember the best plans and take their first actions; `last` are those of warm rows before."""
        bests = {i: task.best(self.keep) for i, task in found.items()}
        bests |= {i: (best[0][:0], best[1][:0]) for i, best in last.items() if i not in found}
        like = next(iter(bests.values()))[0]
        plans = torch.zeros(len(self.tracks), *like.shape[1:], dtype=like.dtype, device="cpu")
        rewards = torch.full((len(self.tracks),), math.nan, dtype=torch.float64, device="cpu")
        kept = [False] * len(self.tracks)
        for i, (samples, values) in bests.items():
            if i in last and (not len(values) or last[i][1][0] >= values[0]):
                kept[i] = True
                samples, values = (
                    torch.cat([a.to(b), b])[: self.keep] for a, b in zip(last[i], (samples, values), strict=True)
                )
            plans[i], rewards[i] = samples[0].float().cpu(), values[0]
            self._remember(self.tracks[i], samples, values)
        seconds = time.perf_counter() - began
        self._pace = cost.nfe / seconds if found else self._pace
        return Decision(
            actions=self.channels.actions(plans)[:, : self.steps].clone(),
            plans=plans,
            rewards=rewards,
            planned=tuple(i in bests for i in range(len(self.tracks))),
            searched=tuple(i in found for i in range(len(self.tracks))),
            warm=tuple(i in warm for i in range(len(self.tracks))),
            kept=tuple(kept),
            outlooks=tuple(track.outlook for track in self.tracks),
            nfe=cost.nfe,
            seconds=seconds,
        )

    def _remember(self, track: Track, samples: Tensor, values: Tensor) -> None:
        """Plans to go on from, and whether to go on at all."""
        good = bool(values[0] >= self.enough) and bool(values[0] > -math.inf)
        track.decisions += 1
        track.failures = 0 if good else track.failures + 1
        few = samples[torch.arange(self.keep, device="cpu") % len(samples)]
        track.plans = shifted(few, self.steps) if good and self.warm_start else None
        if track.failures >= self.patience:
            track.outlook = Outlook.UNREACHABLE
        elif track.decisions >= self.max_decisions:
            track.outlook = Outlook.OUT_OF_DECISIONS


def _decoded(kernel: Any, states: Tensor) -> Tensor:
    """Plans (n, H, C) of states, where the kernel has them."""
    plans = kernel.decode(states)
    return plans if isinstance(plans, Tensor) else torch.as_tensor(plans, device="cpu")


def _placed(kernel: Any, plans: Tensor, prompts: list[dict[str, list[float]]]) -> Tensor:
    """States of plans (n, H, C) with what is known by their prompts put in."""
    states = kernel.encode_samples(plans)
    if not hasattr(kernel, "clamp"):
        return states
    encoded = kernel.encode(prompts) or {}
    cond = {name: v.value if isinstance(v, Shared) else v for name, v in encoded.items()}
    return kernel.clamp(states, cond | {"task": torch.arange(len(prompts), device=states.device)})
