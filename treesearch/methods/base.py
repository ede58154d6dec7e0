"""What a method is: a frozen configuration that starts an ask/tell search for each task."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.budget import Share
from treesearch.citations import Paper
from treesearch.core.tree import Tree
from treesearch.core.weights import F64, WeightOverflow
from treesearch.engine.segments import Segments
from treesearch.methods.claims import GREEDY_TREE, Claims, Interval

AUTO = "auto"
NOT_OF_PI = "greedy: not a sample of π"
MEMORY = 2**31  # bytes that the populations of a search may take, unless the machine allows less


class Status(StrEnum):
    """Why a search stopped, and what to do next."""

    RUNNING = "running"
    BUDGET = "the budget is spent: resume with a larger one to go on"
    FINISHED = "finished: every sample that was asked for is there"
    EXHAUSTED = "exhausted: no selection leads to an expansion; raise widening_c or widening_alpha"
    STOPPED = "stopped by request: resume to go on"


class Problem(NamedTuple):
    """One task of a search."""

    task: int
    spec: Spec
    key: int  # noise key of the root
    share: Share  # what this task may spend in all
    memory: int = MEMORY  # bytes that its population may take

    @property
    def num_steps(self) -> int:
        return self.spec.num_steps


Ids = NDArray[np.int64]
NO_NODES: Ids = np.empty(0, np.int64)


class Spent(NamedTuple):
    """What one task has begun: of each, what counts for its share of the budget."""

    nfe: int
    reward_calls: int
    iterations: int


class Unit(NamedTuple):
    """The smallest piece of work of a method, for the budget's lower limit."""

    name: str
    nfe: int
    reward_calls: int

    @classmethod
    def rollout(cls, spec: Spec, reward_calls: int = 1) -> Unit:
        """One sample."""
        return cls("one rollout", spec.num_steps, reward_calls)


@dataclass
class Readout:
    """A method's estimate of π(x_0) ∝ p(x_0) exp(λ r(x_0)).

    Args:
        leaves: scored samples, in order of creation.
        log_weights: (n,); softmax gives the method's estimate of π; where `log_z` exists and is not flagged as
            biased, their log-mean-exp is `log_z`.
        log_z: estimate of log E_p[exp(λ r)], None for greedy methods.
        log_z_se: its standard error, None where none is known.
        warnings: what a reader of the numbers must know.
        extra: method-specific figures for `result.diagnostics`.
        interval: what the search knows about the error of `log_z`, for the certificate.

    Raises:
        WeightOverflow: a weight or log Z that is NaN or +inf.
    """

    leaves: Ids
    log_weights: F64
    log_z: float | None = None
    log_z_se: float | None = None
    warnings: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    interval: Interval | None = None

    @classmethod
    def greedy(cls, leaves: Ids, **extra: Any) -> Readout:
        """Samples of a search for high rewards: all alike, no draws of π, no Z."""
        return cls(leaves, np.zeros(len(leaves)), warnings=[NOT_OF_PI], extra=extra)

    def __post_init__(self) -> None:
        most = float(np.max(self.log_weights, initial=-math.inf))  # NaN where one is
        if not most < math.inf or not (self.log_z is None or self.log_z < math.inf):
            raise WeightOverflow


class Search(ABC):
    """The state of one task: it decides, the engine computes. Methods never call the model.

    Args:
        problem: the task.
        angle: of the tree's neighbours at the prior, see `Tree`.
    """

    lam: float = 0.0  # λ of the target; 0 where there is none
    hits: Ids = NO_NODES  # existing leaves at which iterations of the last wave ended

    def __init__(self, problem: Problem, *, angle: float = 0.0) -> None:
        self.problem, self.share = problem, problem.share
        self.tree = Tree(problem.num_steps, problem.key, angle=angle)
        self.status = Status.RUNNING

    @abstractmethod
    def ask(self, capacity: int) -> Segments:
        """The next wave of work, its nodes already in the tree; empty and with `status` set when there is none."""

    @abstractmethod
    def tell(self, segments: Segments) -> None:
        """The rewards of a wave (asynchronous: of some of its segments) are in the tree."""

    @abstractmethod
    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        """Rebuild everything from a tree read back: `ends` lists the node each iteration ended at."""

    @abstractmethod
    def readout(self) -> Readout:
        """The estimate so far."""

    @property
    def spent(self) -> Spent | None:
        """What it has asked for so far; None where it does not say, and a clock cannot cut its waves to fit."""
        return None

    @property
    def left(self) -> Share:
        """What it may still ask for."""
        spent = self.spent
        assert spent is not None
        return self.share.less(*spent)

    def state(self) -> dict[str, Any]:
        """Plain numbers that, with the tree, `restore` needs; taken right after `ask`."""
        return {}

    def extend(self, share: Share) -> None:
        """Replace the limits, to go on with a larger budget."""
        self.share, self.status = share, Status.RUNNING

    def frontier(self) -> Ids | None:
        """Nodes above t = 0 that later segments can start from; None where that is every one of them."""
        return None

    @property
    def busy(self) -> bool:
        """Whether work has begun that has no samples until it is finished."""
        return False

    @property
    def committed(self) -> int:
        """NFE of its tree once what has begun is finished, where going on means that."""
        return 0

    @property
    def full(self) -> bool:
        """Asynchronous mode: whether it has as much in flight as it wants."""
        return False

    @property
    def told(self) -> Ids:
        """Samples that it was told of, in order of creation: those of later waves may be scored already."""
        leaves = self.tree.leaves
        return leaves[~np.isnan(self.tree.value[leaves])]


class Method(ABC):
    """What starts a search for each task: a frozen, validated, keyword-only dataclass.

    `dataclasses.replace(method, lam=...)` must work. The defaults are those of a method that searches in waves and has
    no λ.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]  # on the command line
    papers: ClassVar[tuple[Paper, ...]] = ()  # that it comes from

    lam: float | str = 0.0  # λ of the target, or "auto"
    lag: int = 0  # waves that are selected before the one before them is told
    mode: str = "wave"  # a wave is told once all of it is scored; "async": each sample when it arrives
    independent: bool = False  # what it asks does not depend on what it is told, so that waves can run ahead

    @property
    @abstractmethod
    def claims(self) -> Claims:
        """What its numbers may claim, by its settings."""

    @abstractmethod
    def unit(self, spec: Spec) -> Unit:
        """The least that one task costs.

        Raises:
            ValueError: settings that do not fit the kernel.
        """

    @abstractmethod
    def start(self, problem: Problem) -> Search:
        """The search of one task."""


def loaded() -> dict[str, type[Method]]:
    """Every method whose class is there, one of your own as well, by name; of two of a name the later one."""
    found, todo = {}, [Method]
    while todo:
        todo += (made := todo.pop(0).__subclasses__())
        found |= {cls.__name__: cls for cls in made}
    return found


class Greedy(Method):
    """A method that looks for high rewards: its samples are no draws of π, and it estimates no Z."""

    @property
    def claims(self) -> Claims:
        return GREEDY_TREE
