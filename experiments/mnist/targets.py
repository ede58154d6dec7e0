"""What is sampled and searched on MNIST: targets, rewards, methods, all on the shipped model's chain with T = 50."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import treesearch as ts
from experiments.shared.baselines import Setup
from experiments.shared.grids import Entry, How, baseline, entries, schedules
from treesearch.backends.guidance import TrustRegion
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.rewards.base import Reward
from treesearch.rewards.images import classifier, image

T = 50
LEVELS = (50, 40, 30, 20, 10)
DRAWS = 2_000
PART = 500  # rollouts of a file of the pool
SCHEDULES = schedules(LEVELS)


@cache
def kernel_on(device: str) -> Any:
    """The model, read once."""
    return mnist_kernel(num_steps=T, eta=1.0, device=device)


# targets


@dataclass(frozen=True)
class Target:
    """A reward, the classes that it asks for, and what else it asks of images of them."""

    reward: Callable[[], Reward]
    digits: tuple[int, ...]
    also: Callable[[], Reward] | None = None


def heavy() -> Reward:
    """-200 |mean pixel - .2|."""
    return 200.0 * image.brightness(target=0.2)


def conjunction() -> Reward:
    """log p(8 | x) - 200 |mean pixel - .2|."""
    return classifier.digit(8) + heavy()


TARGETS = {
    "digit": Target(partial(classifier.digit, 8), (8,)),
    "even": Target(classifier.even, (0, 2, 4, 6, 8)),
    "conjunction": Target(conjunction, (8,), heavy),
}
SEARCHED: dict[str, Callable[[], Reward]] = {
    "conjunction": conjunction,
    "compressibility": image.compressibility,
    "composite": lambda: classifier.digit(8) + 10.0 * image.brightness(),
}


# methods


def sampler(name: str, kernel: Any, reward: Reward, **how: Any) -> Setup:
    """One of `experiments.shared.baselines`."""
    return baseline(kernel, reward, SCHEDULES, name, **how)


def searcher(method: Callable[..., Any], kernel: Any, reward: Reward, **how: Any) -> Setup:
    """A method of treesearch itself."""
    return Setup(kernel, method(**how))


def guided(kernel: Any, reward: Reward) -> Setup:
    """TreeSampling on a kernel that leans towards the reward's gradient."""
    return Setup(TrustRegion(kernel, reward), ts.TreeSampling())


_DPS: tuple[How, ...] = (
    {"normalise": "residual"},
    {"scale": 1.0},
    {"scale": 0.1},
    {"normalise": "gradient", "scale": 0.03},
    {"normalise": "gradient", "scale": 0.1},
    {"normalise": "gradient", "scale": 0.3},
)
_dts = partial(searcher, partial(ts.DiffusionTreeSampling, branch_at=LEVELS))
_own = {"tree_sampling": partial(searcher, ts.TreeSampling), "tree_sampling_guided": guided}
_FLOORS: tuple[How, ...] = (
    {"draft": 5, "floor": 0.1},
    {"draft": 5, "floor": 0.03},
    {"draft": 10, "floor": 0.1},
    {"draft": 10, "floor": 0.03},
)
METHODS = entries(sampler, _dts, _own, _DPS) | {
    "best_of_n_draft": Entry(partial(searcher, ts.BestOfN), _FLOORS),
    "tree_sampling_draft": Entry(partial(searcher, ts.TreeSampling), ({"draft": 5},)),
}
CORE = ("importance", "tree_sampling", "fk_difference", "dts", "dps", "das", "tds", "tree_sampling_guided")
_STAR = partial(ts.DiffusionTreeSearch, branch_at=LEVELS)
SEARCHERS: dict[str, Entry] = {
    "best_of_n": Entry(partial(searcher, ts.BestOfN), anytime=True),
    "dts_star": Entry(partial(searcher, _STAR), ({"widening_c": 2.0, "widening_alpha": 0.8},), anytime=True),
    "dts_star_narrow": Entry(partial(searcher, _STAR), ({"widening_c": 1.0, "widening_alpha": 0.5},), anytime=True),
    "tree_search": Entry(partial(searcher, ts.TreeSearch), anytime=True),
    "tree_search_drafts": Entry(partial(searcher, partial(ts.TreeSearch, draft=10)), anytime=True),
    "tree_search_looks": Entry(partial(searcher, partial(ts.TreeSearch, looks="endpoints")), anytime=True),
    "mcts": Entry(partial(searcher, partial(ts.MCTS, branch_at=LEVELS)), anytime=True),
    "fk_max": Entry(partial(sampler, "fk_max"), ({"lam": 10.0, "resampling": "multinomial"},)),
    "beam": Entry(partial(searcher, ts.BeamSearch)),
    "rollover": Entry(partial(searcher, ts.RolloverBudget)),
}
