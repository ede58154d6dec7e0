"""`plan`: a diffusion policy searched at every decision of an environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tyro.conf import OmitArgPrefixes

from treesearch import api as loop
from treesearch.backends.base import describe, fingerprint
from treesearch.backends.guidance.noise_law import NoiseLaw
from treesearch.budget import Budget
from treesearch.cli import planned, probe, steering
from treesearch.cli.acting import Acting, Opened, check_seed
from treesearch.cli.arguments import Limits, rows
from treesearch.cli.run import new_folder, print_estimate
from treesearch.errors import UsageError
from treesearch.methods import BestOfN
from treesearch.methods.base import Method
from treesearch.planning.planner import Planner
from treesearch.policies.dsrl import DSRL
from treesearch.policies.episodes import Episode, play
from treesearch.policies.rehearsal import Rehearsed, rehearsal
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.report import tables as report
from treesearch.report.terminal import say
from treesearch.rewards.base import Reward, as_reward
from treesearch.session.interfaces import Options

ROLLOUTS = 16  # of a decision, where no limit is named
ETA = 0.5  # below a learnt x_T
ENV = "env"  # as a reward: what a chunk earns in a second environment


@dataclass(frozen=True, kw_only=True)
class Plan(Acting):
    """Act in an environment with a diffusion policy that is searched at every decision: its chunks of actions are the
    samples, what they are worth is the reward, and the first actions of the best chunk are made. Limits are of one
    decision. Leaves a folder with a line an episode; the same command goes on with what is missing."""

    reward: str | None = None
    """of chunks (n, k, A) and their prompts {"start": observations}, as for run; env is what a chunk earns in a second
    environment that stands where the first stands: the default, but with --steering, whose critic is"""
    steering: str | None = None
    """folder that `steer` learnt into: x_T is drawn as was learnt there"""
    method: str = "tree-search"
    """name(settings) of a method; best-of-n(n=1) is the policy alone"""
    eta: float | None = None
    """noise of the steps, 1 by default, .5 with --steering: 0 makes a chunk a function of x_T, which no tree branches,
    1 forgets x_T"""
    episodes: int = 5
    """how many, with the seeds seed, seed + 1, ..."""
    max_actions: int = 1000
    """of an episode, where the environment sets no end"""
    seed: int = 0
    """of the first episode and all noise"""
    batch_size: int = 64
    """rows of a forward pass"""
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)
    store: str | None = None
    """folder; a new one under runs/ by default"""
    dry_run: bool = False
    """predict what a decision and the episodes cost, from two decisions, and stop; leaves no folder"""
    json: bool = False
    """print the figures as JSON"""

    def run(self) -> int:
        for name in ("episodes", "max_actions"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more")
        check_seed(self.seed)
        if self.dry_run:
            return print_estimate(self._estimate(), as_json=self.json)
        folder = Path(self.store or new_folder("plan"))
        done = planned.begun(folder, self._told())
        played = [line for line in done if line["seed"] in range(self.seed, self.seed + self.episodes)]
        for seed in range(self.seed, self.seed + self.episodes):
            if seed not in {line["seed"] for line in played}:
                played.append(line := self._played(seed))
                planned.kept(folder, self._told(), line)
                if not self.json:
                    say(planned.sentence(line))
        return self._report(played, folder)

    # what is planned with

    @cached_property
    def _opened(self) -> Opened:
        return self.opened(self._eta, self.num_steps if self._kept is None else steering.steps_of(self._kept, self))

    @property
    def _eta(self) -> float:
        by_default = 1.0 if self.steering is None else ETA
        return by_default if self.eta is None else self.eta

    @cached_property
    def _kept(self) -> dict[str, Any] | None:
        """What the folder of a learner says of it."""
        return None if self.steering is None else steering.read(Path(self.steering))

    @cached_property
    def _env(self) -> Rehearsed:
        return Rehearsed(self._opened.make)

    @cached_property
    def _made(self) -> int:
        """Actions that are made before the next decision."""
        learnt = None if self._kept is None else self._kept["execute"]
        return self._opened.executed(learnt if self.steps is None else self.steps)

    @cached_property
    def _learnt(self) -> DSRL | None:
        if self.steering is None or self._kept is None:
            return None
        return steering.learnt(Path(self.steering), self._kept, self._opened, self._env.env)

    @cached_property
    def _kernel(self) -> Any:
        """What is searched."""
        kernel = self._opened.kernel
        return kernel if self._learnt is None else NoiseLaw(kernel, self._learnt)

    @cached_property
    def _reward(self) -> Reward:
        if self.reward is None and self._learnt is not None:
            return steering.critic(self._learnt)
        return rehearsal(self._env) if self.reward in (None, ENV) else as_reward(specs.reward(self.reward))

    @cached_property
    def _search(self) -> tuple[Method, Budget]:
        """The method and the budget of a decision."""
        spec, budget, method = (
            describe(self._kernel, identify=False),
            self.limits.budget(),
            specs.method(self.method),
        )
        if not any(spec.stochastic[1:]) and self.method == Plan.method:
            method = BestOfN()
            say(f"--eta 0: no step has noise, {self.method} cannot branch, BestOfN draws x_T")
        return method, Budget(nfe=ROLLOUTS * spec.num_steps) if budget.empty else budget

    def _planner(self, seed: int) -> Planner:
        method, budget = self._search
        return Planner(
            self._kernel, self._reward, method, budget=budget, steps=self._made, warm_start=False, seed=seed,
            batch_size=rows(self.batch_size), max_decisions=self.max_actions,
        )  # fmt: skip

    # what is done with it

    def _played(self, seed: int) -> dict[str, Any]:
        """One episode, as a line of the folder."""
        opened, planner = self._opened, self._planner(seed)
        act: Callable[[Tensor], Tensor] = planner.act
        found: Episode = play(self._env, act, opened.read, history=opened.history, seed=seed, limit=self.max_actions)
        decisions = planner.decisions
        return asdict(found) | {
            "decisions": len(decisions),
            "nfe": sum(decision.nfe for decision in decisions),
            "reward": sum(float(decision.rewards[0]) for decision in decisions) / len(decisions),
            "seconds": round(sum(decision.seconds for decision in decisions), 3),
        }

    def _estimate(self) -> dict[str, Any]:
        """What a decision costs, and all episodes at most."""
        opened, env = self._opened, self._env
        observation, _ = env.reset(seed=self.seed)
        method, budget = self._search
        prompts = [{"start": opened.read(observation).repeat(opened.history).tolist()}]
        options = Options(rows(self.batch_size))
        session = loop.make_session(self._kernel, self._reward, method, prompts, budget, self.seed, options, None)
        one, spec = probe.estimate(session), env.spec
        length = min(self.max_actions, (spec.max_episode_steps if spec else None) or self.max_actions)
        decisions = -(-length // self._made)
        every, planner = decisions * self.episodes, self._planner(self.seed)
        for _ in range(2):  # the first one loads what a search needs
            planner.act(opened.read(observation).repeat(opened.history, 1))
        seconds = planner.decisions[-1].seconds
        return {
            **{f"decision_{name}": one[name] for name in ("nfe", "full_rollouts")},
            "decision_seconds": round(seconds, 4),
            **{name: one[name] for name in ("ms_per_nfe", "ms_per_reward")},
            "decisions_at_most": every,
            "nfe_at_most": every * one["nfe"],
            "seconds_at_most": round(every * seconds, 1),
        }

    def _report(self, played: list[dict[str, Any]], folder: Path) -> int:
        played = sorted(played, key=lambda line: line["seed"])
        found = planned.summary(played, folder)
        planned.write(folder, self._told(), played, found)
        if self.json:
            say(json.dumps(found | {"each": played}, indent=2))
            return 0
        report.print_table(planned.rows(played), planned.COLUMNS)
        say(f"{planned.outcome(found)}; {folder / 'README.md'}")
        return 0

    def _told(self) -> dict[str, Any]:
        """What tells these episodes from others; more of them are the same plan."""
        apart = {"debug", "limits", "store", "dry_run", "json", "episodes", "seed", "batch_size"}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        for name in ("reward", "env"):
            own[name] = expressions.public(own[name]) if ":" in (own[name] or "") else own[name]
        return own | self._content | {"eta": self._eta, "limits": asdict(self._search[1])}

    @cached_property
    def _content(self) -> dict[str, str | None]:
        """What lies behind the names, which may be other weights and other code at another time."""
        from treesearch.policies.noise_env import content_of

        reward = None if self.reward in (None, ENV) else self._reward
        return {
            "policy_digest": describe(self._opened.kernel).fingerprint,
            "env_digest": content_of(self._env.env),
            "steering_digest": self._learnt and self._learnt.fingerprint,
            "reward_digest": reward and (reward.source or fingerprint.of([reward.fn, reward.name, reward.settings])),
        }
