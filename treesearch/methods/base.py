"""What a method is: a frozen configuration that starts an ask/tell search for each task."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.budget import Share
from treesearch.core.tree import Tree
from treesearch.core.weights import F64, WeightOverflow
from treesearch.engine.segments import Segments
from treesearch.methods.claims import Claims, Interval
from treesearch.rewards.numeric import is_number, is_whole

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


NO_NODES: NDArray[np.int64] = np.empty(0, np.int64)


class Unit(NamedTuple):
    """The smallest piece of work of a method, for the budget's lower limit."""

    name: str
    nfe: int
    reward_calls: int


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

    leaves: NDArray[np.int64]
    log_weights: F64
    log_z: float | None = None
    log_z_se: float | None = None
    warnings: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    interval: Interval | None = None

    def __post_init__(self) -> None:
        most = float(np.max(self.log_weights, initial=-math.inf))  # NaN where one is
        if not most < math.inf or not (self.log_z is None or self.log_z < math.inf):
            raise WeightOverflow


class Search(Protocol):
    """The state of one task: it decides, the engine computes. Methods never call the model."""

    tree: Tree
    status: Status
    lam: float
    hits: NDArray[np.int64]  # existing leaves at which iterations of the last wave ended

    @property
    def busy(self) -> bool:
        """Whether work has begun that has no samples until it is finished."""
        ...

    @property
    def full(self) -> bool:
        """Asynchronous mode: whether it has as much in flight as it wants."""
        ...

    def frontier(self) -> NDArray[np.int64] | None:
        """Nodes above t = 0 that later segments can start from; None where that is every one of them."""
        ...

    def ask(self, capacity: int) -> Segments:
        """The next wave of work, its nodes already in the tree; empty and with `status` set when there is none."""
        ...

    def tell(self, segments: Segments) -> None:
        """The rewards of a wave (asynchronous: of some of its segments) are in the tree."""
        ...

    def extend(self, share: Share) -> None:
        """Replace the limits, to go on with a larger budget."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain numbers that, with the tree, `restore` needs; taken right after `ask`."""
        ...

    def restore(self, state: dict[str, Any], ends: NDArray[np.int64]) -> None:
        """Rebuild everything from a tree read back: `ends` lists the node each iteration ended at."""
        ...

    def readout(self) -> Readout:
        """The estimate so far."""
        ...


class Method(Protocol):
    """A frozen, validated dataclass; `dataclasses.replace(method, lam=...)` must work."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def lam(self) -> float | str: ...

    @property
    def lag(self) -> int: ...

    @property
    def mode(self) -> str:
        """ "wave": a wave is told once all of it is scored; "async": each sample when it arrives."""
        ...

    @property
    def independent(self) -> bool:
        """Whether what it asks does not depend on what it is told, so that waves can run ahead."""
        ...

    @property
    def claims(self) -> Claims:
        """What its numbers may claim, by its settings."""
        ...

    def unit(self, spec: Spec) -> Unit:
        """The least that one task costs."""
        ...

    def start(self, problem: Problem) -> Search: ...


def check_lam(lam: float | str, *, finite: bool = True) -> None:
    """Raises:
    ValueError: λ is neither "auto" nor a number >= 0.
    """
    if isinstance(lam, str) and lam == AUTO:
        return
    if is_number(lam, 0.0) and not (finite and math.isinf(lam)):
        return
    raise ValueError(f"lam is {lam!r}, expected 'auto' or a {'finite ' if finite else ''}number >= 0")


def check_positive(**values: float | None) -> None:
    """Raises:
    ValueError: a value that is given and not positive.
    """
    for name, value in values.items():
        if value is not None and not (is_number(value) and value > 0):
            raise ValueError(f"{name} is {value!r}, expected a positive number")


def check_whole(**values: int | None) -> None:
    """Raises:
    ValueError: a value that is given and not a whole number >= 1.
    """
    for name, value in values.items():
        if value is not None and not is_whole(value):
            raise ValueError(f"{name} is {value!r}, expected a positive whole number")


def as_levels(what: str, levels: Sequence[int]) -> tuple[int, ...]:
    """Levels as a tuple of whole numbers.

    Raises:
        ValueError: something else.
    """
    try:
        if isinstance(levels, (str, bytes, Mapping, Set)):
            raise TypeError
        return tuple(operator.index(t) for t in levels)
    except TypeError as error:
        raise ValueError(f"{what} is {levels!r}, expected levels such as (20, 10, 0)") from error


def number(lam: float | str) -> float:
    """λ once it is a number.

    Raises:
        ValueError: it is still "auto".
    """
    if isinstance(lam, str):
        raise ValueError("lam='auto' is resolved by search(); give a number to start a method by hand")
    return float(lam)


def spaced_levels(num_steps: int, count: int, *, top: bool) -> tuple[int, ...]:
    """Equally spaced levels: T included and 0 not (top), or the other way round; all of them where T is below count."""
    shift = 0 if top else 1
    if num_steps < count:
        return tuple(range(num_steps - shift, -shift, -1))
    return tuple(round(num_steps * k / count) for k in range(count - shift, -shift, -1))


def branch_levels(given: Sequence[int] | None, spec: Spec, *, top: bool, what: str, count: int = 5) -> tuple[int, ...]:
    """The levels at which a method may branch, descending, `count` equally spaced ones by default.

    0 is kept where `given` or the default has it.

    Raises:
        ValueError: a level out of range, or one below which every step is deterministic.
    """
    levels = spaced_levels(spec.num_steps, count, top=top) if given is None else tuple(sorted(set(given), reverse=True))
    if any(not 0 <= level <= spec.num_steps for level in levels):
        raise ValueError(f"{what} {list(levels)} has levels outside 0..T = {spec.num_steps} (denoising steps left)")
    dead = [level for level in levels if level > 0 and not spec.branchable(level)]
    alive = tuple(level for level in levels if level not in dead)
    if dead and (given is not None or not any(alive)):
        raise ValueError(
            f"{what}: the kernel is deterministic below level{'s' if len(dead) > 1 else ''} "
            f"{', '.join(map(str, dead))} (no stochastic step follows), so branching there makes identical copies: "
            "use BestOfN, a kernel with eta > 0, or levels above its stochastic steps"
        )
    return alive
