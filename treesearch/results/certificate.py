"""The certificate of a result: what its numbers may claim, with an interval where an honest one exists.

    log Z        estimate, 95 % interval log Ẑ ± t·se, and whether to rely on it
    base law p   whose law log Z is of: the model's own, or that of a changed network
    sample size  ESS, distinct lineages and leaves among the samples that carry weight
    KL(π̂‖p)      E_π̂[λ r] - log Ẑ: how far from the model the weighted samples are
    flags        biases with reasons: those a method declares, those of kernel, budget and end of the search
    alarm        whether a held-out reward falls while the optimised one rises (`treesearch.results.overoptimisation`)
    hash         equal for equal searches, resumed or not

Nothing is corrected: a biased estimate keeps its value and its flag.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from treesearch.budget import Cost
from treesearch.core.tree import Tree
from treesearch.core.weights import F64
from treesearch.methods.base import Readout
from treesearch.methods.claims import Bias, Claims, Flag
from treesearch.results import overoptimisation
from treesearch.results.intervals import LogZ, log_z
from treesearch.results.overoptimisation import Alarm
from treesearch.results.text import lines
from treesearch.rewards.base import Reward
from treesearch.runs.identity import digest, settings_hash, tree_hash

UNDECLARED = Claims(
    flags=(Flag(Bias.UNDECLARED, "the method does not say what its samples are: nothing is claimed for them"),)
)


@dataclass(frozen=True, kw_only=True)
class Context:
    """The search that a task belongs to.

    Args:
        method: its configuration.
        config: what run.json holds.
        task: number of the task.
        over: it came to its end, not to a halt.
        out_of_time: the clock ended it.
        cost: of the whole search.
    """

    method: Any
    config: Mapping[str, Any]
    task: int
    over: bool
    out_of_time: bool
    cost: Cost = field(default_factory=Cost)

    @property
    def claims(self) -> Claims:
        """What the method declares; `UNDECLARED` where it does not."""
        return getattr(self.method, "claims", UNDECLARED)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What one task's numbers may claim.

    Args:
        log_z: estimate and interval.
        base_law: whose law p is.
        samples: scored samples.
        ess: effective number among their weights.
        lineages: distinct draws of x_T among the samples that carry weight.
        distinct_leaves: samples that carry weight.
        kl: estimate of KL(π̂‖p), None without a log Z.
        kl_source: how, and what it misses.
        flags: biases.
        alarm: over-optimisation.
        hash: of settings and tree together.
        settings_hash: of everything that decides the result.
        tree_hash: of the tree: its shape, noise keys, rewards, weights and visits, bit for bit.
        caveats: what the settings hash cannot see.
    """

    log_z: LogZ
    base_law: str
    samples: int
    ess: float
    lineages: int
    distinct_leaves: int
    kl: float | None
    kl_source: str
    flags: tuple[Flag, ...]
    alarm: Alarm
    hash: str
    settings_hash: str
    tree_hash: str
    caveats: tuple[str, ...]

    def asdict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become None."""
        found = dataclasses.asdict(self)
        found["flags"] = [{"name": str(flag.name), "reason": flag.reason} for flag in self.flags]
        return _plain(found)

    def __str__(self) -> str:
        return "\n".join(lines(self.asdict()))


class Certified(Protocol):
    """What a certificate reads of a task's result."""

    @property
    def prompt(self) -> Any: ...
    @property
    def tree(self) -> Tree: ...
    @property
    def readout(self) -> Readout: ...
    @property
    def context(self) -> Context: ...
    @cached_property
    def rewards(self) -> Tensor: ...
    @cached_property
    def diagnostics(self) -> dict[str, Any]: ...
    def pick(self, rows: NDArray[np.int64]) -> Any: ...


def certify(task: Certified, also: Reward | None = None) -> Certificate:
    """The certificate of a task; `also` is a held-out reward, of which up to 512 samples are scored."""
    context, readout, found = task.context, task.readout, task.diagnostics
    settings, tree = settings_hash(context.config, context.task), tree_hash(task.tree)
    flags = _flags(context, task.tree)
    return Certificate(
        log_z=log_z(readout, context.claims),
        base_law=f"new, {law}: log Z is of it" if (law := context.config.get("base_law")) else "the model's own",
        samples=len(readout.leaves),
        ess=found["ess"],
        lineages=found["surviving_roots"],
        distinct_leaves=int(np.count_nonzero(readout.log_weights > -math.inf)),
        kl=found["kl"],
        kl_source=_kl_source(found["kl"], flags, context.claims, len(readout.leaves)),
        flags=flags,
        alarm=overoptimisation.UNKNOWN if also is None else _alarm(task, also),
        hash=digest([settings.encode(), tree.encode()]),
        settings_hash=settings,
        tree_hash=tree,
        caveats=_caveats(context),
    )


def _flags(context: Context, tree: Tree) -> tuple[Flag, ...]:
    """Biases that the method declares, then those of kernel, budget and end of the search."""
    config, claims, flags = context.config, context.claims, list(context.claims.flags)
    if not claims.weighs and (tree.log_w != 0).any():
        reason = "a guide moved the samples and the method ignores log p/q: they are of the guided chain"
        flags.append(Flag(Bias.UNWEIGHTED_GUIDE, reason))
    if reason := config.get("departs"):
        flags.append(Flag(Bias.DEPARTS, reason))
    if reason := _deterministic(config.get("deterministic", ()), config["num_steps"]):
        flags.append(Flag(Bias.DETERMINISTIC_STEPS, reason))
    previews = config.get("previews", False) and not config.get("valued", False)
    if previews and not np.isnan(tree.reward[tree.t > 0]).all():
        flags.append(Flag(Bias.PREVIEWED, "rewards above t = 0 are of approximate previews: they steer, not score"))
    if getattr(context.method, "mode", "wave") == "async":
        reason = "the order in which workers finish decides the tree: quick samples count earlier"
        flags.append(Flag(Bias.ASYNCHRONOUS, reason))
    if context.out_of_time:
        reason = "the clock decided how many samples there are: biased where slow samples differ from quick ones"
        flags.append(Flag(Bias.OUT_OF_TIME, reason))
    if not context.over:
        reason = "stopped before its budget was spent: biased if what it showed decided when"
        flags.append(Flag(Bias.UNFINISHED, reason))
    return tuple(flags)


def _deterministic(steps: Sequence[int], num_steps: int) -> str:
    """What steps without noise mean; a last step without noise is usual and means nothing."""
    quiet = [t for t in steps if t > 1]
    if not quiet:
        return ""
    if set(range(1, num_steps + 1)) <= set(steps):
        return "no step adds noise (η = 0): x_T decides x_0, and nothing can branch below it"
    return f"{len(quiet)} of {num_steps} steps add no noise: siblings born there stay copies until a step that does"


def _kl_source(kl: float | None, flags: Sequence[Flag], claims: Claims, n: int) -> str:
    if kl is None:
        return "none: no log Z"
    how = "E_π̂[λ r] - log Ẑ"
    if any(flag.name == Bias.SOFT_VALUE for flag in flags):
        return f"{how} with the soft value for log Ẑ, which is biased low: this is biased high"
    if claims.iid:
        return f"{how}, without a guide Σ W log(N W): it cannot exceed log N = {math.log(n):.2f}"
    return how


def _alarm(task: Certified, also: Reward) -> Alarm:
    """The alarm's test on a task's samples."""

    def held_out(rows: NDArray[np.int64]) -> F64:
        prompts = None if task.prompt is None else [task.prompt] * len(rows)
        return also(task.pick(rows), prompts).numpy()

    return overoptimisation.alarm(task.rewards.numpy(), held_out, also.name)


def _caveats(context: Context) -> tuple[str, ...]:
    config, found = context.config, []
    if config["fingerprint"] is None:
        found.append("the kernel has no fingerprint: it is known by its class alone")
    if not config["reward_settings"]:
        found.append("the reward has no settings: it is known by its name alone")
    if config["budget"]["seconds"] is not None:
        cost = context.cost
        found.append(
            f"a budget in seconds: another run gets another number of samples (of this one's {cost.seconds:.1f} s the "
            f"kernel took {cost.model_seconds:.1f} and the reward {cost.reward_seconds:.1f}, all processes together)"
        )
    if getattr(context.method, "mode", "wave") == "async":
        found.append("asynchronous: another run grows another tree")
    return tuple(found)


def _plain(value: Any) -> Any:
    """Data as JSON has it."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
