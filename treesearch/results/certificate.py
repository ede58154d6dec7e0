"""The certificate of a result: what its numbers may claim, with an interval where an honest one exists.

    log Z        estimate, 95 % interval log Ẑ ± t·se, and whether to rely on it
    sample size  ESS, distinct lineages and leaves among the samples that carry weight
    KL(π̂‖p)      E_π̂[λ r] - log Ẑ: how far from the model the weighted samples are
    flags        biases with reasons: those a method declares, those of kernel, budget and end of the search
    alarm        whether a held-out reward falls while the optimised one rises (`treesearch.results.overoptimisation`)
    hash         equal for equal searches, resumed or not

Intervals come from what is independent in a search, the draws of x_T and all that descends from each
(`treesearch.methods.genealogy`): a standard error, degrees of freedom of its own, and an upper bound that allows for a
tail that was hardly met. "ok" asks for ten effective lineages, totals with a mean, and steering whose promises came
true; docs/certificate.md has what that is worth on beds with a known log Z. Other methods state an `Interval`; without
one there is none, and the reason is given. Nothing is corrected: a biased estimate keeps its value and its flag.

Source: Monte Carlo theory, methods and examples (Owen, 2013), chapter 9, for self-normalised estimates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treesearch.core.tree import Tree
from treesearch.core.weights import F64
from treesearch.methods import genealogy
from treesearch.methods.base import Readout
from treesearch.methods.claims import Bias, Claims, Flag, Interval, Standing, t95
from treesearch.results import overoptimisation
from treesearch.results.overoptimisation import Alarm
from treesearch.rewards.base import Reward

if TYPE_CHECKING:
    from treesearch.results.result import TaskResult

SKEWED = 0.3  # relative standard error of Ẑ above which an interval of log Z that knows no more is no good
DECIDES = (
    "method",
    "seed",
    "prompts",
    "num_steps",
    "state_shape",
    "dtype",
    "kernel",
    "fingerprint",
    "reward",
    "reward_settings",
    "budget",
)
COLUMNS = ("parent", "t", "key", "log_w", "reward", "visits")
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
    """

    method: Any
    config: Mapping[str, Any]
    task: int
    over: bool
    out_of_time: bool

    @property
    def claims(self) -> Claims:
        """What the method declares; `UNDECLARED` where it does not."""
        return getattr(self.method, "claims", UNDECLARED)


@dataclass(frozen=True)
class LogZ:
    """log E_p[exp(λ r)]: estimate and 95 % interval.

    Args:
        value: log Ẑ, None where there is none.
        se: relative standard error of Ẑ.
        low, high: of the interval, None without one; low may be -inf.
        standing: how far to rely on the interval.
        source: where the interval comes from.
        reason: of every standing but ok.
        k_hat: Pareto k̂ of the totals of lineages.
    """

    value: float | None = None
    se: float | None = None
    low: float | None = None
    high: float | None = None
    standing: Standing = Standing.NONE
    source: str = ""
    reason: str = ""
    k_hat: float | None = None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What one task's numbers may claim.

    Args:
        log_z: estimate and interval.
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


def certify(task: TaskResult, also: Reward | None = None) -> Certificate:
    """The certificate of a task; `also` is a held-out reward, of which up to 512 samples are scored."""
    context, readout, found = task.context, task.readout, task.diagnostics
    settings, tree = settings_hash(context.config, context.task), tree_hash(task.tree)
    flags = _flags(context, task.tree)
    return Certificate(
        log_z=log_z(readout, context.claims),
        samples=len(readout.leaves),
        ess=found["ess"],
        lineages=found["surviving_roots"],
        distinct_leaves=int(np.count_nonzero(readout.log_weights > -math.inf)),
        kl=found["kl"],
        kl_source=_kl_source(found["kl"], flags, context.claims, len(readout.leaves)),
        flags=flags,
        alarm=overoptimisation.UNKNOWN if also is None else _alarm(task, also),
        hash=_digest([settings.encode(), tree.encode()]),
        settings_hash=settings,
        tree_hash=tree,
        caveats=_caveats(context),
    )


def log_z(readout: Readout, claims: Claims) -> LogZ:
    """Estimate and interval of log Z from a read-out."""
    value = readout.log_z
    if readout.interval is not None:
        return _stated(value, readout.interval)
    if value is None:
        return LogZ(reason=claims.no_interval if len(readout.leaves) else "no samples yet")
    if value == -math.inf:
        return LogZ(value=value, reason="all weights are zero: no sample says anything about Z")
    if claims.iid:
        return _stated(value, genealogy.interval([genealogy.independent(readout.log_weights)]))
    if readout.log_z_se is not None:
        return _stated(value, Interval(source="standard error of the method", se=readout.log_z_se))
    return LogZ(value=value, reason=claims.no_interval)


def _stated(value: float | None, known: Interval) -> LogZ:
    """The interval of a search that knows its own."""
    low, high, standing, reason = known.low, known.high, known.standing, known.reason
    if known.se is not None and value is not None and low is None and high is None:
        half = t95(known.dof) * known.se
        low, high = value - half, value + half
        if standing == Standing.OK and known.se > SKEWED:
            standing, reason = Standing.UNRELIABLE, _skewed(known.se)
    return LogZ(value, known.se, low, high, standing, known.source, reason, known.k_hat)


def _skewed(se: float) -> str:
    return f"relative standard error {se:.2f} > {SKEWED:g}: the law of log Ẑ is skewed and its error likely larger"


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
    if config.get("previews", False) and not np.isnan(tree.reward[tree.t > 0]).all():
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


def _alarm(task: TaskResult, also: Reward) -> Alarm:
    """The alarm's test on a task's samples."""

    def held_out(rows: NDArray[np.int64]) -> F64:
        prompts = None if task.prompt is None else [task.prompt] * len(rows)
        return also(task.pick(rows), prompts).numpy()

    return overoptimisation.alarm(task.rewards.numpy(), held_out, also.name)


def settings_hash(config: Mapping[str, Any], task: int) -> str:
    """Digest of everything that decides a task's result, as run.json has it."""
    chosen = {key: config[key] for key in DECIDES} | {
        "task": task,
        "batches": {key: config["options"][key] for key in ("batch_size", "batch_invariant")},
        "version": config["versions"]["treesearch"],
    }
    return _digest([json.dumps(chosen, sort_keys=True, default=lambda o: type(o).__name__).encode()])


def tree_hash(tree: Tree) -> str:
    """Digest of a tree's shape, noise keys, rewards, weights and visits."""
    return _digest([np.ascontiguousarray(getattr(tree, name)).tobytes() for name in COLUMNS])


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _caveats(context: Context) -> tuple[str, ...]:
    config, found = context.config, []
    if config["fingerprint"] is None:
        found.append("the kernel has no fingerprint: it is known by its class alone")
    if not config["reward_settings"]:
        found.append("the reward has no settings: it is known by its name alone")
    if config["budget"]["seconds"] is not None:
        found.append("a budget in seconds: another run gets another number of samples")
    if getattr(context.method, "mode", "wave") == "async":
        found.append("asynchronous: another run grows another tree")
    return tuple(found)


def lines(found: Mapping[str, Any]) -> list[str]:
    """A certificate, from `asdict`, for people."""
    weight = f"{found['distinct_leaves']} of {found['samples']} samples carry weight; lineages: {found['lineages']}"
    kl = "-" if found["kl"] is None else f"{found['kl']:.3f}"
    return [
        f"log Z: {_log_z_line(found['log_z'])}",
        f"sample size: ESS {found['ess']:.1f}; {weight}",
        f"KL(π̂‖p): {kl} ({found['kl_source']})",
        *(f"bias, {flag['name']}: {flag['reason']}" for flag in found["flags"]),
        *([] if found["flags"] else ["bias: none known"]),
        f"over-optimisation: {alarm_line(found['alarm'])}",
        f"hash: {found['hash']} (settings {found['settings_hash']}, tree {found['tree_hash']})",
        *(f"hash, caveat: {caveat}" for caveat in found["caveats"]),
    ]


def _log_z_line(found: Mapping[str, Any]) -> str:
    value = "-" if found["value"] is None else f"{found['value']:.3f}"
    if found["high"] is None:
        return f"{value}, no interval: {found['reason']}"
    low = "-∞" if found["low"] is None else f"{found['low']:.3f}"
    doubt = "" if found["standing"] == Standing.OK else f"; {found['standing']}: {found['reason']}"
    return f"{value}, 95 % interval {low} .. {found['high']:.3f} ({found['source']}){doubt}"


def alarm_line(found: Mapping[str, Any]) -> str:
    """The over-optimisation alarm, from `asdict`, for people."""
    return f"ALARM, {found['reason']}" if found["fires"] else found["reason"]


def _plain(value: Any) -> Any:
    """Data as JSON has it."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
