"""Diffusion Tree Sampling (DTS) and Diffusion Tree Search (DTS*), as published.

One iteration:

    x = root
    while |C(x)| >= C·N(x)^α and x is no leaf:  x = select a child          (expansion goes first)
    if x is no leaf:  x' ~ p(·|x), roll out to x_0, add every branching level to the tree, v(x_0) = r(x_0)
    on the way up:  λ v(x) = log-mean-exp over children of (λ v_c + log_w_c),  N(x) += 1

DTS selects a child ~ exp(λ v_c + log_w_c) and reads its samples out the same way; DTS* selects by UCT and reads out
the best. A wave runs several iterations at once: values stay frozen, visits and child counts move while it is
selected. Without waves (mode="async") each iteration is told as soon as its sample arrives. Either way a visit in
flight is unobserved (Liu et al., 2020): it counts in N, hence in the widening rule and in UCT's bonus, and gives no
value; the weights exp(λ v) of Boltzmann selection know nothing of it.

What it converges to: DTS's read-out tends to π as iterations grow, slowly: at practical budgets its root value is
biased low, E[exp(λ v_root)] < Z, because lucky children are visited again and unlucky ones never corrected.
With selection="round_robin" E[exp(λ v_root)] = Z at every budget. DTS* is greedy.

Source: Diffusion Tree Sampling: Scalable Inference-time Alignment of Diffusion Models (Jain et al., 2025), algorithms
1 and 2, appendix F.1. Deviations: terminal nodes count visits too; waves; log p/q on the edges. Visits in flight: Watch
the Unobserved: A Simple Approach to Parallelizing Monte Carlo Tree Search (Liu et al., 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from treesearch.backends.base import Spec
from treesearch.budget import Share
from treesearch.citations import Paper
from treesearch.core import backup, selection
from treesearch.core.tree import ROOT, Tree
from treesearch.core.weights import F64, scaled
from treesearch.engine.segments import Segments
from treesearch.errors import choose
from treesearch.methods.base import NO_NODES, NOT_OF_PI, Ids, Method, Problem, Readout, Search, Spent, Status, Unit
from treesearch.methods.claims import GREEDY_TREE, SELF_NORMALISED, SHARED, SOFT_VALUE, Claims
from treesearch.methods.settings import as_levels, check_lam, check_positive, check_whole, node_levels, number
from treesearch.rewards.numeric import is_number, is_whole

JAIN = Paper(
    "inproceedings",
    "jain2025diffusion",
    "Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models",
    "Jain, Vineet and Sareen, Kusha and Pedramfar, Mohammad and Ravanbakhsh, Siamak",
    "Advances in Neural Information Processing Systems",
    2025,
)

MODES = ("wave", "async")
FREE_LIMIT = 200_000
HARDLY = 0.05  # share of nodes with a second child, below which most rollouts share nothing


@dataclass(frozen=True, kw_only=True)
class DiffusionTreeSampling(Method):
    """DTS: draws from π by descending with soft values.

    Args:
        lam: λ of the target, math.inf for max backups, or "auto".
        widening_c, widening_alpha: a node expands while |C| < C·N^α; at (2, .8) the first 36 iterations are best-of-N.
        branch_at: levels t that become nodes; None for five equally spaced, the prior (T) included.
        selection: boltzmann, uct or round_robin.
        wave: iterations selected at once (asynchronous: in flight); the result depends on it.
        lag: 1 selects wave w after wave w - 2 is told, which leaves no bubble between waves.
        mode: "wave", or "async": no barrier, each iteration is told when its sample arrives and another one selected
            in its place. No worker waits; the result depends on the order of arrival. More in flight is a worse
            search at equal NFE, as larger waves are: docs/workers.md has figures.
    """

    name = "dts"
    papers = (JAIN,)

    lam: float | str = 1.0
    widening_c: float = 2.0
    widening_alpha: float = 0.8
    branch_at: tuple[int, ...] | None = None
    selection: str = "boltzmann"
    wave: int = 16
    lag: int = 0
    mode: str = "wave"

    def __post_init__(self) -> None:
        _check(self)
        choose("selection", self.selection, selection.RULES)

    @property
    def claims(self) -> Claims:
        if self.lam == math.inf:
            return GREEDY_TREE
        if self.selection == "round_robin":
            return Claims(flags=(SELF_NORMALISED, SHARED), no_interval="one tree shows no standard error")
        return Claims(flags=(SOFT_VALUE, SELF_NORMALISED, SHARED), no_interval="soft value: a bias of unknown size")

    def unit(self, spec: Spec) -> Unit:
        node_levels(self.branch_at, spec)
        return Unit.rollout(spec)

    def start(self, problem: Problem) -> DiffusionTree:
        rules = Rules(self.selection, "soft", c_uct=1.0, greedy=False)
        return DiffusionTree(self, rules, problem)


@dataclass(frozen=True, kw_only=True)
class DiffusionTreeSearch(Method):
    """DTS*: searches for the best sample.

    Args:
        lam: λ of the soft backup, or "auto".
        c_uct: weight of the exploration bonus, in units of the reward; the paper gives no value.
        widening_c, widening_alpha, branch_at, wave, lag, mode: as in `DiffusionTreeSampling`.
        backup: soft, max, mean or visits (`treesearch.core.backup`).
    """

    name = "dts_star"
    papers = (JAIN,)

    lam: float | str = 1.0
    c_uct: float = 1.0
    widening_c: float = 2.0
    widening_alpha: float = 0.8
    branch_at: tuple[int, ...] | None = None
    wave: int = 16
    lag: int = 0
    mode: str = "wave"
    backup: str = "soft"

    def __post_init__(self) -> None:
        _check(self)
        choose("backup", self.backup, backup.RULES)
        if not is_number(self.c_uct, 0):
            raise ValueError(f"c_uct is {self.c_uct!r}, expected a number >= 0")

    @property
    def claims(self) -> Claims:
        return replace(GREEDY_TREE, weighs=True)

    def unit(self, spec: Spec) -> Unit:
        node_levels(self.branch_at, spec)
        return Unit.rollout(spec)

    def start(self, problem: Problem) -> DiffusionTree:
        return DiffusionTree(self, Rules("uct", self.backup, self.c_uct, greedy=True), problem)


@dataclass(frozen=True)
class Rules:
    """What tells the two apart."""

    selection: str
    backup: str
    c_uct: float
    greedy: bool


class DiffusionTree(Search):
    """One tree: select a wave, have it run, back it up."""

    def __init__(self, method: DiffusionTreeSampling | DiffusionTreeSearch, rules: Rules, problem: Problem) -> None:
        super().__init__(problem)
        self.method, self.rules, self.lam = method, rules, number(method.lam)
        self.rule = backup.rule_of(rules.backup, self.lam)
        self.iterations = self.nfe = self.rollouts = self.free = 0
        self.pending = 0  # rollouts selected and not told: visits in flight, counted in N, without a value
        levels = node_levels(method.branch_at, problem.spec)
        self.policy = selection.Policy(
            rule=int(selection.RULES[rules.selection]),
            lam=self.lam,
            widening_c=float(method.widening_c),
            widening_alpha=float(method.widening_alpha),
            c_uct=float(rules.c_uct),
            root_key=np.uint64(problem.key),
            levels=np.array([problem.num_steps + 1, *levels, 0]),
        )

    @property
    def spent(self) -> Spent:
        return Spent(self.nfe, self.rollouts, self.iterations)

    @property
    def full(self) -> bool:
        """Asynchronous: whether as many iterations are in flight as may be."""
        return self.method.mode == "async" and self.pending >= self.method.wave

    def ask(self, capacity: int) -> Segments:
        del capacity  # the result depends on the wave, never on the batch size
        left = self.left
        source, first, last = (NO_NODES,) * 3
        hits: list[Ids] = []
        room = self.method.wave - (self.pending if self.method.mode == "async" else 0)
        while not len(source) and self.status == Status.RUNNING:
            source, first, last, ended = self._select(
                max(0, min(room, left.iterations, left.in_time(self.problem.num_steps, 1))), left
            )
            hits.append(ended)
            left = self.left
        self.hits = np.concatenate(hits) if hits else NO_NODES
        backup.revisit(self.tree, self.hits, self.rule, self.lam)
        self.pending += len(source)
        return Segments(source, first, last)

    def _select(self, wave: int, left: Share) -> tuple[Ids, ...]:
        tree = self.tree
        tree.reserve(wave * len(self.policy.levels))
        out = selection.Selected(*(np.empty(wave, np.int64) for _ in range(3)))
        size, kids, done, stopped = selection.select_wave(
            tree.columns(), len(tree), self.policy, wave, self.iterations, left.nfe, left.reward_calls, out
        )
        tree.grown(size, kids)
        source, first, ends = (column[:done] for column in out)
        new = first >= 0
        self.iterations += done
        self.rollouts += int(new.sum())
        self.nfe += int(np.minimum(tree.t[source[new]], self.problem.num_steps).sum())
        self.free = 0 if new.any() else self.free + done
        if stopped or done == 0:
            self.status = Status.BUDGET
        elif self.free >= self._patience and not self.pending:
            self.status = Status.EXHAUSTED
        return source[new], first[new], ends[new], ends[~new]

    @property
    def _patience(self) -> int:
        """Consecutive iterations without an expansion after which a tree counts as exhausted.

        With α = 0 a node's children are numbered, and a tree that is full stays so; selection by value may take long to
        come by its last open nodes.
        """
        return FREE_LIMIT if self.method.widening_alpha > 0 else min(FREE_LIMIT, 1_000 + 100 * self.rollouts)

    def tell(self, segments: Segments) -> None:
        self.pending -= len(segments.last)
        backup.backup(self.tree, segments.last, self.rule, self.lam)

    def state(self) -> dict[str, Any]:
        return {"iterations": self.iterations, "nfe": self.nfe, "rollouts": self.rollouts, "free": self.free}

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        self.tree.check_levels(self.policy.levels)
        for name, value in state.items():
            setattr(self, name, value)
        self.pending = int(np.isnan(self.tree.reward[self.tree.t == 0]).sum())
        backup.recount(self.tree, ends)
        backup.recompute(self.tree, self.rule, self.lam)

    def readout(self) -> Readout:
        tree, leaves = self.tree, self.told
        warnings = [NOT_OF_PI] if self.rules.greedy else []
        extra = {"iterations": self.iterations, "rollouts": self.rollouts, "unobserved": self.pending}
        if not len(leaves):
            return Readout(leaves, np.empty(0), warnings=warnings, extra=extra)
        warnings += _hardly_branched(tree)
        log_w = self._log_weights(leaves)
        log_z = None
        if not self.rules.greedy and not math.isinf(self.lam):
            log_z = float(self.lam * tree.value[ROOT]) if self.lam > 0 else 0.0
            if self.rules.selection != "round_robin":
                warnings.append("soft value: biased low")
        return Readout(leaves, log_w, log_z, None, warnings, extra)

    def _log_weights(self, leaves: Ids) -> F64:
        """Log-weights whose softmax is the read-out by soft values, and whose log-mean-exp is λ v_root.

        P(leaf) = Π exp(λ v_c + log_w_c) / Σ_siblings(...), and each sum is |C| exp(λ v_parent), so the values of inner
        nodes cancel: log P = λ r + Σ log_w - Σ log |C| - λ v_root. At λ = ∞ the best leaf takes all.
        """
        tree = self.tree
        if math.isinf(self.lam):
            reward = np.where(tree.edge_weights(leaves) > -math.inf, tree.reward[leaves], -math.inf)
            return np.where(reward == reward.max(), 0.0, -math.inf)
        share = backup.log_shares(tree)[leaves] + math.log(len(leaves))
        return share + scaled(self.lam, tree.reward[leaves])


def _hardly_branched(tree: Tree) -> list[str]:
    """A warning where next to no node below the root has a second child."""
    inner = tree.children[1:][tree.children[1:] > 0]
    branched = int((inner > 1).sum())
    if branched >= HARDLY * len(inner):
        return []
    return [
        f"hardly branched: {branched} of {len(inner)} nodes below the root have a second child, which is little more "
        "than best-of-N: set widening_c and widening_alpha to less, such as 1 and 0.5, or give more NFE"
    ]


def _check(method: DiffusionTreeSampling | DiffusionTreeSearch) -> None:
    check_lam(method.lam, finite=False)
    check_positive(widening_c=method.widening_c)
    check_whole(wave=method.wave)
    if not is_number(method.widening_alpha, 0, 1):
        raise ValueError(f"widening_alpha is {method.widening_alpha!r}, expected 0..1")
    if not is_whole(method.lag, 0, 1):
        raise ValueError(f"lag is {method.lag!r}, expected 0 or 1")
    choose("mode", method.mode, MODES)
    if method.mode == "async" and method.lag:
        raise ValueError("lag=1 is for waves: mode='async' has no barrier to hide")
    object.__setattr__(method, "branch_at", as_levels("branch_at", method.branch_at))
