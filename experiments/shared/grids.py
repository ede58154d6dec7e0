"""What the sampling experiments tune: at most six settings a method, the first one as published.

Schedules go by name, so that settings are JSON; "five" are the levels of the tree, where the tree's first one stands
for draws of x_T. The step of DPS is in units of the reward, so each experiment has a grid of its own for it.

Sources of the published settings: Diffusion Tree Sampling (Jain et al., 2025), appendix F, for the levels, for FK and
the trees; the papers in `experiments.shared.baselines` for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

from experiments.shared.baselines import BASELINES, Settings, Setup
from treesearch.rewards.base import Reward

How = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A method and what it is tuned by.

    Args:
        make: what the experiment knows, and settings -> what to search with.
        grid: at most six settings; the first one is as published.
        anytime: a smaller budget is a prefix of a larger one.
        budgets: those that it is run at; None for all.
    """

    make: Callable[..., Any]
    grid: tuple[How, ...] = ({},)
    anytime: bool = False
    budgets: tuple[int, ...] | None = None


def schedules(branch_at: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Schedules by name for a tree that branches at these levels of T, ..., T/5."""
    top, gap = branch_at[0], branch_at[-1]
    return {
        "five": (*branch_at[1:], 0),
        "top": (*branch_at, 0),
        "ten": (*range(top - gap // 2, 0, -(gap // 2)), 0),
        "every": (*range(top, 1, -1), 0),  # the last step has no noise
        "late": (2 * gap, gap, 0),
    }


def baseline(
    kernel: Any,
    reward: Reward,
    named: dict[str, tuple[int, ...]],
    name: str,
    *,
    schedule: str = "five",
    greedy: bool = False,
    lam: float = 1.0,
    **how: Any,
) -> Setup:
    """One of `experiments.shared.baselines`."""
    settings = Settings(lam=inf if greedy else lam, schedule=named[schedule], **how)
    return BASELINES[name](kernel, reward, settings)


_FK: tuple[How, ...] = (
    {"resampling": "multinomial"},
    {},
    {"ess_threshold": 1.0},
    {"schedule": "top"},
    {"schedule": "ten"},
    {"schedule": "late"},
)
TREES: tuple[How, ...] = (
    {"widening_c": 2.0, "widening_alpha": 0.8},
    {"widening_c": 1.0, "widening_alpha": 0.8},
    {"widening_c": 2.0, "widening_alpha": 0.5},
    {"widening_c": 1.0, "widening_alpha": 0.5},
    {"widening_c": 1.0, "widening_alpha": 0.3},
    {"widening_c": 2.0, "widening_alpha": 0.8, "selection": "round_robin"},
)
GRIDS: dict[str, tuple[How, ...]] = {
    "importance": ({},),
    "rejection": ({},),
    **dict.fromkeys(("fk_difference", "fk_max", "fk_sum", "fk_immediate", "fk_rollout"), _FK),
    "tds": (
        {"schedule": "every"},
        {},
        {"max_shift": 1.0},
        {"max_shift": 0.3},
        {"schedule": "every", "max_shift": 1.0},
        {"schedule": "late", "max_shift": 1.0},
    ),
    "das": (
        {"schedule": "every", "resampling": "ssp"},
        {"resampling": "ssp"},
        {"schedule": "every", "resampling": "ssp", "max_shift": 1.0},
        {"resampling": "ssp", "max_shift": 1.0},
        {"schedule": "every", "resampling": "ssp", "gamma": 0.03},
        {"schedule": "every", "resampling": "ssp", "gamma": 0.03, "max_shift": 1.0},
    ),
    "svdd": (
        {"schedule": "every", "greedy": True},
        {"schedule": "every"},
        {"schedule": "every", "candidates": 5},
        {},
        {"candidates": 5},
        {"schedule": "late"},
    ),
}


def entries(
    make: Callable[..., Setup], tree: Callable[..., Setup], own: dict[str, Callable[..., Setup]], dps: tuple[How, ...]
) -> dict[str, Entry]:
    """Every sampling method.

    Args:
        make: name of a baseline, then what an `Entry` takes.
        tree: what an `Entry` takes, of Diffusion Tree Sampling.
        own: the same of methods that have nothing to tune, by name.
        dps: grid of DPS.
    """
    grids = GRIDS | {"dps": dps}
    found = {name: Entry(partial(make, name), grid) for name, grid in grids.items()}
    return found | {"dts": Entry(tree, TREES)} | {name: Entry(setup) for name, setup in own.items()}


def chosen(grid: Sequence[How], scores: Sequence[float | None]) -> How:
    """The settings of the lowest score, None for those that failed, and all scores: fields of a row."""
    return {
        "picked": grid[first_best(scores, min)],
        "published": grid[0],
        "grid": [{"settings": how, "mmd2": score} for how, score in zip(grid, scores, strict=True)],
    }


def first_best(scores: Sequence[Any], best: Callable[[list[Any]], Any]) -> int:
    """Which of the scores is the first that is the best, None for those that failed; the first if all did."""
    known = [score for score in scores if score is not None]
    return scores.index(best(known)) if known else 0


def check_names(what: str, names: Iterable[str], known: dict[str, Any]) -> None:
    """Raises:
    ValueError: one of them is unknown.
    """
    for name in names:
        pick(what, name, known)


def pick(what: str, name: str, known: dict[str, Any]) -> Any:
    """An entry by name.

    Raises:
        ValueError: there is no such entry.
    """
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: choose {', '.join(known)}")
    return known[name]
