"""`plan`: a diffusion policy searched at every decision of an environment."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import OmitArgPrefixes, arg

from treesearch import api as loop
from treesearch.backends import lerobot
from treesearch.backends.base import describe, fingerprint
from treesearch.backends.models.policy import policy
from treesearch.budget import Budget
from treesearch.cli import planned, probe
from treesearch.cli.arguments import Limits, rows
from treesearch.cli.base import Command
from treesearch.cli.run import new_folder, print_estimate
from treesearch.errors import UsageError
from treesearch.methods import BestOfN
from treesearch.methods.base import Method
from treesearch.planning.planner import Planner
from treesearch.policies.environments import environment, told
from treesearch.policies.episodes import Episode, Read, flat, play
from treesearch.policies.rehearsal import Rehearsed, rehearsal
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.report import tables as report
from treesearch.report.terminal import say
from treesearch.rewards.base import Reward, as_reward
from treesearch.session.interfaces import Options

ROLLOUTS = 16  # of a decision, where no limit is named


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Act in an environment with a diffusion policy that is searched at every decision: its chunks of actions are the
    samples, what they are worth is the reward, and the first actions of the best chunk are made. Limits are of one
    decision. Leaves a folder with a line an episode; the same command goes on with what is missing."""

    policy: str
    """weights of a policy of this library (.safetensors), a folder of LeRobot's, or the id of a hub"""
    env: str
    """an environment of gymnasium (PushT-v0, package:Name-v0), package.module:attr or ./file.py:attr"""
    env_settings: Annotated[str, arg(metavar="JSON")] = "{}"
    """what the environment is made with, such as '{"obs_type": "pixels_agent_pos"}'"""
    reward: str | None = None
    """of chunks (n, k, A) and their prompts {"start": observations}, as for run; by default what a chunk earns in a
    second environment that stands where the first stands"""
    method: str = "tree-search"
    """name(settings) of a method; best-of-n(n=1) is the policy alone"""
    num_steps: int | None = None
    """denoising steps; the policy's own by default, 5 for one of this library"""
    eta: float = 1.0
    """noise of the steps: 0 makes a chunk a function of x_T, which no tree branches"""
    steps: int | None = None
    """actions that are made before the next decision; all of a chunk by default"""
    episodes: int = 5
    """how many, with the seeds seed, seed + 1, ..."""
    max_actions: int = 1000
    """of an episode, where the environment sets no end"""
    seed: int = 0
    """of the first episode and all noise"""
    batch_size: int = 64
    """rows of a forward pass"""
    device: str = "cpu"
    """of the policy"""
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)
    store: str | None = None
    """folder; a new one under runs/ by default"""
    dry_run: bool = False
    """predict what a decision and the episodes cost, from one probe batch, and stop; leaves no folder"""
    json: bool = False
    """print the figures as JSON"""

    def run(self) -> int:
        for name in ("episodes", "max_actions"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more")
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
    def _opened(self) -> tuple[Any, Read, int, Any]:
        """Kernel, reader of observations, observations that it is told, environment."""
        settings = _settings(self.env_settings)
        if self.policy.endswith(".safetensors"):
            kernel = policy(self.policy, 5 if self.num_steps is None else self.num_steps, self.eta, self.device)
            read: Read = flat
        else:
            kernel, read = lerobot.from_pretrained(self.policy, self.num_steps, self.eta, self.device)
            settings = told(self.env, read.shapes) | settings
        env = Rehearsed(lambda: self._environment(settings))
        shape = getattr(env.action_space, "shape", None)
        if not hasattr(env.action_space, "high") or shape != (kernel.channels.action,):
            raise ValueError(
                f"{self.env} takes actions {env.action_space}, the policy's have {kernel.channels.action} numbers"
            )
        told_of: Any = kernel.told
        return kernel, read, told_of.history, env

    def _environment(self, settings: dict[str, Any]) -> Any:
        _, colon, attribute = self.env.rpartition(":")
        if not colon or not attribute.partition("(")[0].isidentifier():
            return environment(self.env, settings)
        return expressions.load(self.env)(**settings) if settings else expressions.build(self.env, "environment", {})

    @cached_property
    def _reward(self) -> Reward:
        return rehearsal(self._opened[3]) if self.reward is None else as_reward(specs.reward(self.reward))

    @cached_property
    def _search(self) -> tuple[Method, Budget]:
        """The method and the budget of a decision."""
        spec, budget, method = (
            describe(self._opened[0], identify=False),
            self.limits.budget(),
            specs.method(self.method),
        )
        if not any(spec.stochastic[1:]) and self.method == Plan.method:
            method = BestOfN()
            say(f"--eta 0: no step has noise, {self.method} cannot branch, BestOfN draws x_T")
        return method, Budget(nfe=ROLLOUTS * spec.num_steps) if budget.empty else budget

    def _planner(self, seed: int) -> Planner:
        kernel, _, _, _ = self._opened
        method, budget = self._search
        return Planner(
            kernel, self._reward, method, budget=budget, steps=self._made, warm_start=False, seed=seed,
            batch_size=rows(self.batch_size), max_decisions=self.max_actions,
        )  # fmt: skip

    @property
    def _made(self) -> int:
        """Actions that are made before the next decision."""
        kernel = self._opened[0]
        length = kernel.decode(torch.zeros(1, *kernel.state_shape, device=kernel.device)).shape[1]
        if self.steps is not None and not 1 <= self.steps <= length:
            raise UsageError(f"--steps {self.steps}: expected 1..{length}, the actions of a chunk")
        return length if self.steps is None else self.steps

    # what is done with it

    def _played(self, seed: int) -> dict[str, Any]:
        """One episode, as a line of the folder."""
        _, read, history, env = self._opened
        planner = self._planner(seed)
        act: Callable[[Tensor], Tensor] = planner.act
        found: Episode = play(env, act, _checked(read, planner.observed // history), history=history, seed=seed,
                              limit=self.max_actions)  # fmt: skip
        decisions = planner.decisions
        return asdict(found) | {
            "decisions": len(decisions),
            "nfe": sum(decision.nfe for decision in decisions),
            "reward": sum(float(decision.rewards[0]) for decision in decisions) / len(decisions),
            "seconds": round(sum(decision.seconds for decision in decisions), 3),
        }

    def _estimate(self) -> dict[str, Any]:
        """What a decision costs, and all episodes at most."""
        kernel, read, history, env = self._opened
        observation, _ = env.reset(seed=self.seed)
        method, budget = self._search
        frame = _checked(read, self._planner(self.seed).observed // history)(observation)
        prompts = [{"start": frame.repeat(history).tolist()}]
        options = Options(rows(self.batch_size))
        session = loop.make_session(kernel, self._reward, method, prompts, budget, self.seed, options, None)
        one, spec = probe.estimate(session), env.spec
        length = min(self.max_actions, (spec.max_episode_steps if spec else None) or self.max_actions)
        decisions = -(-length // self._made)
        every, calls = decisions * self.episodes, one.get("reward_calls", one.get("reward_calls_at_most", 0))
        seconds = (one["nfe"] * one["ms_per_nfe"] + calls * one["ms_per_reward"]) / 1e3
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
        return own | self._content | {"limits": asdict(self._search[1])}

    @cached_property
    def _content(self) -> dict[str, str | None]:
        """What lies behind the names, which may be other weights and other code at another time."""
        from treesearch.policies.noise_env import content_of

        kernel, _, _, env = self._opened
        reward = None if self.reward is None else self._reward
        return {
            "policy_digest": describe(kernel).fingerprint,
            "env_digest": content_of(env.env),
            "reward_digest": reward and (reward.source or fingerprint.of([reward.fn, reward.name, reward.settings])),
        }


def _settings(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--env-settings {text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f'--env-settings {text!r}: expected an object, such as \'{{"obs_type": "state"}}\'')
    return found


def _checked(read: Read, size: int) -> Read:
    """A reader whose observations have as many numbers as the policy is told."""

    def numbers(observation: Any) -> Tensor:
        found = read(observation)
        if found.shape != (size,) or not found.isfinite().all():
            raise ValueError(f"the environment shows {found.numel()} numbers, the policy is told {size} finite ones")
        return found

    return numbers
