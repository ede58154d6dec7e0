"""What a search returns: weighted samples, the tree, what it cost, and what to know before trusting it."""

from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.budget import Cost
from treesearch.core.noise import Stream, root_key, uniforms
from treesearch.core.tree import Tree
from treesearch.core.weights import ess, normalise, scaled
from treesearch.errors import StoreError, TreeSearchError
from treesearch.methods.base import Readout, Status
from treesearch.methods.claims import Standing
from treesearch.results.certificate import Certificate, Context, certify
from treesearch.results.columns import columns
from treesearch.results.intervals import log_z
from treesearch.results.notebook import page, picture
from treesearch.results.saving import save
from treesearch.rewards.base import Reward, as_reward

ALL_ZERO = "all weights are zero: log Z is -inf and there is nothing to draw"
LATE = 1.5  # times the seconds that were asked for, and one more, from which on it is said


@dataclass(frozen=True)
class Absent:
    """Stands for the decoder of a result that has none.

    Args:
        why: there is none, and what to do.
    """

    why: str

    def __call__(self, nodes: NDArray[np.int64]) -> Any:
        raise StoreError(f"{len(nodes)} nodes cannot be decoded: {self.why}")


@dataclass(eq=False)
class TaskResult:
    """One prompt's samples, in order of creation.

    Args:
        prompt: the prompt, None for an unconditional search.
        tree: all nodes.
        readout: the method's estimate.
        lam: λ in force.
        status: why the search stopped.
        fetch: node numbers -> decoded samples.
        context: the search it belongs to, for its certificate.
    """

    prompt: Any
    tree: Tree
    readout: Readout
    lam: float
    status: Status
    fetch: Callable[[NDArray[np.int64]], Any] = field(repr=False)
    context: Context = field(repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """As data that can travel: samples decoded, on the CPU, in place of what decodes them."""
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        if not isinstance(self.fetch, Absent):
            state["samples"] = _own(self.samples)
            state["fetch"] = Absent("the states of inner nodes stayed where the search ran")
        return state

    @property
    def leaves(self) -> NDArray[np.int64]:
        """Nodes of the samples."""
        return self.readout.leaves

    @cached_property
    def samples(self) -> Any:
        """Decoded samples, a tensor (n, ...) or a list: the objects that were scored."""
        return self.fetch(self.leaves)

    @cached_property
    def rewards(self) -> Tensor:
        """r of each sample, float64 (n,)."""
        return torch.from_numpy(self.tree.reward[self.leaves].copy())

    @cached_property
    def log_weights(self) -> Tensor:
        """Float64 (n,): their softmax is the estimate of π that `draw` draws from."""
        return torch.from_numpy(self.readout.log_weights)

    @property
    def log_z(self) -> float | None:
        """Estimate of log E_p[exp(λ r)]; None for greedy methods."""
        return self.readout.log_z

    @property
    def log_z_se(self) -> float | None:
        """Standard error of `log_z` (delta method: relative standard error of Ẑ), None where none is known."""
        return self.readout.log_z_se

    def draw(self, n: int, seed: int = 0) -> Any:
        """n samples of the method's estimate of π, with replacement.

        Raises:
            ZeroWeights: no leaf carries weight.
        """
        return self.pick(self.draw_rows(n, seed))

    def draw_rows(self, n: int, seed: int = 0) -> NDArray[np.int64]:
        """Positions in `samples` that `draw` picks, (n,)."""
        n, seed = _whole("draw", n, 0), _whole("draw, seed", seed, 0)
        cdf = np.cumsum(normalise(self.readout.log_weights))
        key = root_key(seed, 0) ^ int(self.tree.key[0])  # tasks draw apart
        points = uniforms(key, n, 0, Stream.READOUT) * cdf[-1]
        return np.minimum(np.searchsorted(cdf, points, side="right"), len(cdf) - 1)

    def best(self, k: int = 1) -> tuple[Any, Tensor]:
        """The k samples of highest reward and their rewards, best first."""
        k = _whole("best", k, 1)
        order = np.argsort(-self.rewards.numpy(), kind="stable")[:k]
        return self.pick(order), self.rewards[torch.from_numpy(order)]

    def _few(self) -> str:
        """Why one sample has all the weight; of a posterior λ is no temperature to choose."""
        if "measurement(" in self.context.config["reward"]:
            return "the posterior rests on one sample: take more particles, a wider tolerance or steered(...)"
        return f"lam = {self.lam:g} is too large for this budget"

    @cached_property
    def diagnostics(self) -> dict[str, Any]:
        """ESS, surviving roots, λ, KL(π‖p), warnings, and what the method adds."""
        log_w, rewards = self.readout.log_weights, self.tree.reward[self.leaves]
        effective = ess(log_w)
        warnings = list(self.readout.warnings)
        if len(log_w) and effective == 0:
            warnings.append(ALL_ZERO)
        elif len(log_w) > 2 and effective < 2 and self.log_z is not None:
            warnings.append(f"ESS {effective:.2f} < 2: {self._few()}")
        interval = log_z(self.readout, self.context.claims)
        if interval.standing == Standing.UNRELIABLE:
            warnings.append(f"the interval of log Z is unreliable: {interval.reason}")
        warnings += _overrun(self.context)
        kl = None
        if self.log_z is not None and effective > 0 and math.isfinite(self.log_z) and math.isfinite(self.lam):
            w = normalise(log_w)
            kl = float(np.sum(w[w > 0] * scaled(self.lam, rewards)[w > 0]) - self.log_z)
        alive = self.leaves[log_w > -math.inf]
        return {
            "ess": effective,
            "surviving_roots": len(np.unique(self.tree.roots(alive))) if len(alive) else 0,
            "lam": self.lam,
            "kl": kl,
            "status": self.status.name.lower(),
            "warnings": warnings,
        } | self.readout.extra

    def certificate(self, also: Reward | Callable[..., Any] | None = None) -> Certificate:
        """What these numbers may claim: interval of log Z, sample size, biases, over-optimisation, hash.

        Args:
            also: a reward that was not optimised; up to 512 of the better samples are scored for the alarm.
        """
        return certify(self, None if also is None else as_reward(also))

    def pick(self, rows: NDArray[np.int64]) -> Any:
        """Decoded samples at positions (n,) of `samples`; only those are decoded."""
        if "samples" in self.__dict__:  # decoded already
            have = self.samples
            return have[torch.from_numpy(rows)] if isinstance(have, Tensor) else [have[i] for i in rows]
        unique, inverse = np.unique(rows, return_inverse=True)
        found = self.fetch(self.leaves[unique])
        return found[torch.from_numpy(inverse)] if isinstance(found, Tensor) else [found[i] for i in inverse]


def _overrun(context: Context) -> list[str]:
    """That a search took far longer than it was given: a wave is not broken off."""
    asked, took = (context.config.get("budget") or {}).get("seconds"), context.cost.seconds
    if asked is None or took <= LATE * asked + 1.0:
        return []
    return [
        f"took {took:.1f} s of {asked:g} s: what is under way is not broken off, and a first search compiles and loads"
    ]


def _of_one_task(name: str, doc: str | None = None) -> Any:
    """An attribute that a result has where it has a single task."""

    def get(result: SearchResult) -> Any:
        if len(result.tasks) != 1:
            raise AmbiguousTask(f"result.{name}: this result has {len(result.tasks)} tasks, use result.tasks[i].{name}")
        return getattr(result.tasks[0], name)

    return property(get, doc=doc or _told(name, getattr(TaskResult, name)))


def _told(name: str, of_task: Any) -> str:
    """What `help` says of an attribute; of a method with its arguments."""
    if not inspect.isfunction(of_task):
        return of_task.__doc__
    arguments = ", ".join(map(str, list(inspect.signature(of_task).parameters.values())[1:]))
    return f"{name}({arguments}): {of_task.__doc__}"


@dataclass(eq=False)
class SearchResult:
    """A search's outcome. With a single task it has the task's attributes itself, from `samples` to `status`; with
    several, use `tasks[i]`.

    Args:
        tasks: one a prompt.
        cost: what ran, over all tasks.
        history: one record a wave.
        store: the run folder, None if none was kept.
    """

    tasks: Sequence[TaskResult]
    cost: Cost
    history: list[dict[str, Any]]
    store: str | None = None

    samples = _of_one_task("samples")
    rewards = _of_one_task("rewards")
    log_weights = _of_one_task("log_weights")
    log_z = _of_one_task("log_z")
    log_z_se = _of_one_task("log_z_se")
    draw = _of_one_task("draw")
    best = _of_one_task("best")
    tree = _of_one_task("tree", "All nodes, a `treesearch.Tree`.")
    diagnostics = _of_one_task("diagnostics")
    certificate = _of_one_task("certificate")
    leaves = _of_one_task("leaves")
    status = _of_one_task("status", "Why the search stopped, and what to do next.")

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write all samples of all tasks into a folder, with their rewards and weights as a table, and the figures.

        Samples are decoded and written some at a time, so that memory stays that of a few, whatever their number and
        size (`treesearch.results.saving` names the files). What people look at, the card and pictures, is written by
        `search(outputs=True)`.

        Returns:
            The folder.

        Raises:
            StoreError: it cannot be written, or this result cannot decode its samples.
        """
        return save(self, folder)

    def to_table(self) -> dict[str, Any]:
        """Columns with a row a sample of all tasks, as `pandas.DataFrame` and other libraries of tables take it.

        prompt, task, node, reward, log_weight, weight (those of a task sum to one) and noise key; nothing is decoded.
        """
        return columns(self.tasks)

    def _repr_html_(self) -> str:
        """What a notebook shows; it decodes the best samples."""
        return page(self)

    def _repr_png_(self) -> bytes | None:
        """A PNG of the best samples, None where they cannot be seen."""
        return picture(self.tasks)

    def __repr__(self) -> str:
        lines = []
        for i, task in enumerate(self.tasks):
            name = f"task {i}, " if len(self.tasks) > 1 else ""
            top = f"best {float(task.rewards.max()):.4g}, " if len(task.leaves) else ""
            z = "" if task.log_z is None else f"log Z {task.log_z:.4g}, "
            ess = "" if task.context.claims.greedy else f", ESS {task.diagnostics['ess']:.1f}"
            lines.append(f"{name}{len(task.leaves)} samples, {top}{z}".removesuffix(", ") + ess)
        return f"SearchResult({'; '.join(lines)}; {self.cost.nfe} NFE, {self.cost.reward_calls} reward calls)"


def _own(samples: Any) -> Any:
    """Samples on the CPU in memory of their own: a view travels with all that it is a view of."""
    if isinstance(samples, Tensor):
        return samples.detach().cpu().clone()
    if isinstance(samples, np.ndarray):
        return samples.copy()
    return [_own(item) if isinstance(item, (Tensor, np.ndarray)) else item for item in samples]


class AmbiguousTask(TreeSearchError, AttributeError):
    """An attribute of one task was asked of a result with several."""


def _whole(what: str, value: Any, low: int) -> int:
    """A whole number of any library.

    Raises:
        ValueError: something else, or one below `low`.
    """
    try:
        number = low - 1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = low - 1
    if number < low:
        raise ValueError(f"{what}: got {value!r}, expected a whole number, at least {low}")
    return number
