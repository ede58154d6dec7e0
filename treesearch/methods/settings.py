"""What settings of methods may be, and the levels that they mean for a kernel."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence, Set

from treesearch.backends.base import Spec
from treesearch.methods.base import AUTO
from treesearch.rewards.numeric import is_number, is_whole


def check_lam(lam: float | str, *, finite: bool = True) -> None:
    """Raises:
    ValueError: λ is neither "auto" nor a number >= 0.
    """
    if isinstance(lam, str) and lam == AUTO:
        return
    if is_number(lam, 0.0) and not (finite and math.isinf(lam)):
        return
    raise ValueError(f"lam is {lam!r}, expected 'auto' or a {'finite ' if finite else ''}number >= 0")


def number(lam: float | str) -> float:
    """λ once it is a number.

    Raises:
        ValueError: it is still "auto".
    """
    if isinstance(lam, str):
        raise ValueError("lam='auto' is resolved by search(); give a number to start a method by hand")
    return float(lam)


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


def check_draft(draft: int | None) -> None:
    """Raises:
    ValueError: evaluations of a draft that are no whole number >= 2.
    """
    if draft is not None and not (is_whole(draft) and draft > 1):
        raise ValueError(f"draft is {draft!r}, expected one number, the evaluations of a draft: whole and >= 2")


def check_drafts(given: int | tuple[int, ...] | None) -> None:
    """Raises:
    ValueError: evaluations of drafts that are no increasing whole numbers >= 2, or none at all.
    """
    if given is None:
        return
    several = given if isinstance(given, tuple) else (given,)
    whole = all(is_whole(m) and m > 1 for m in several)
    if not several or not whole or list(several) != sorted(set(several)):
        raise ValueError(
            f"draft is {given!r}, expected evaluations of a draft, a whole number >= 2, or several that rise"
        )


def as_levels(what: str, levels: Sequence[int] | None) -> tuple[int, ...] | None:
    """Levels as a tuple of whole numbers, where any are given.

    Raises:
        ValueError: something else.
    """
    if levels is None:
        return None
    try:
        if isinstance(levels, (str, bytes, Mapping, Set)):
            raise TypeError
        return tuple(operator.index(t) for t in levels)
    except TypeError as error:
        raise ValueError(f"{what} is {levels!r}, expected levels such as (20, 10, 0)") from error


def as_schedule(levels: Sequence[int] | None, why: str) -> tuple[int, ...] | None:
    """Scored levels as a tuple, where any are given; x_0 is among them.

    Args:
        levels: as given.
        why: what x_0 is needed for.

    Raises:
        ValueError: something else, or no 0.
    """
    schedule = as_levels("schedule", levels)
    if schedule is not None and 0 not in schedule:
        raise ValueError(f"schedule {list(schedule)} lacks 0: {why}")
    return schedule


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


def scored_levels(schedule: Sequence[int] | None, spec: Spec, count: int = 5) -> tuple[int, ...]:
    """The levels of a schedule for a kernel, descending, 0 last; `count` equally spaced ones where none are given.

    Raises:
        ValueError: see `branch_levels`.
    """
    return branch_levels(schedule, spec, top=False, what="schedule", count=count)


def node_levels(branch_at: Sequence[int] | None, spec: Spec) -> tuple[int, ...]:
    """The levels above 0 that become nodes, descending; five equally spaced ones where none are given.

    Raises:
        ValueError: see `branch_levels`.
    """
    return tuple(t for t in branch_levels(branch_at, spec, top=True, what="branch_at") if t > 0)
