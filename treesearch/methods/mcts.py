"""Monte Carlo tree search (UCT): the tree search of planning papers, with mean values.

One iteration:

    x = root
    while |C(x)| >= C·N(x)^α and x is no leaf:  x = argmax over children of  Q_c + c_uct √(log N(x) / N_c)
    if x is no leaf:  x' ~ p(·|x), roll out to x_0, add every branching level to the tree
    on the way up:    N(x) += 1,  Q(x) = mean of the rewards of all iterations that passed through x

It is DTS* with another value: Q(x) estimates E[r(x_0) | x] under the search's own choices, where DTS* has the soft
value (1/λ) log E[exp(λ r)]. A mean is cautious: a state that rarely leads to an excellent sample looks like a mediocre
one. Iterations that end at a known x_0 count again, as in every MCTS: Q weights children by visits. As N → ∞ at fixed
child counts Q of a node tends to that of its best child; under widening new children keep it below. Greedy: its samples
are not draws of π, and no Z is estimated; `best` is the answer, the tree holds every sample. Cost: t NFE and one reward
call for an iteration that expands a node at level t, T from the root. Log p/q of proposals are not looked at. A reward
of -∞ makes every mean above it -∞: give forbidden samples a low number instead.

Source: Bandit based Monte-Carlo Planning (Kocsis & Szepesvári, 2006), c_uct = √2 for rewards in 0..1; progressive
widening for continuous states: Continuous Upper Confidence Trees (Couëtoux et al., 2011). On diffusion models: Monte
Carlo Tree Diffusion for System 2 Planning (Yoon et al., 2025), whose children differ in their guidance, and Test-Time
Scaling of Diffusion Models via Noise Trajectory Search (Ramesh & Mardani, 2025), whose children differ in their noise,
as here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.methods.base import Greedy, Problem, Unit
from treesearch.methods.diffusion_tree import DiffusionTree, DiffusionTreeSearch

KOCSIS = Paper(
    "inproceedings",
    "kocsis2006bandit",
    "Bandit based Monte-Carlo Planning",
    "Kocsis, Levente and Szepesv{\\'a}ri, Csaba",
    "European Conference on Machine Learning",
    2006,
)
COUETOUX = Paper(
    "inproceedings",
    "couetoux2011continuous",
    "Continuous Upper Confidence Trees",
    'Cou{\\"e}toux, Adrien and Hoock, Jean-Baptiste and Sokolovska, Nataliya and Teytaud, Olivier and Bonnard, Nicolas',
    "Learning and Intelligent Optimization",
    2011,
)
YOON = Paper(
    "inproceedings",
    "yoon2025monte",
    "Monte Carlo Tree Diffusion for System 2 Planning",
    "Yoon, Jaesik and Cho, Hyeonseo and Baek, Doojin and Bengio, Yoshua and Ahn, Sungjin",
    "International Conference on Machine Learning",
    2025,
)
RAMESH = Paper(
    "article",
    "ramesh2025test",
    "Test-Time Scaling of Diffusion Models via Noise Trajectory Search",
    "Ramesh, Vignav and Mardani, Morteza",
    "arXiv preprint arXiv:2506.03164",
    2025,
)


@dataclass(frozen=True, kw_only=True)
class MCTS(Greedy):
    """Monte Carlo tree search with UCT selection and mean values.

    Args:
        c_uct: weight of the exploration bonus, in units of the reward.
        widening_c, widening_alpha: a node expands while |C| < C·N^α.
        branch_at: levels t that become nodes; None for five equally spaced, the prior (T) included.
        wave: iterations selected at once; the result depends on it.
    """

    name = "mcts"
    papers = (KOCSIS, COUETOUX, YOON, RAMESH)

    c_uct: float = math.sqrt(2)
    widening_c: float = 2.0
    widening_alpha: float = 0.8
    branch_at: tuple[int, ...] | None = None
    wave: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "branch_at", self._like().branch_at)

    def unit(self, spec: Spec) -> Unit:
        return self._like().unit(spec)

    def start(self, problem: Problem) -> DiffusionTree:
        return self._like().start(problem)

    def _like(self) -> DiffusionTreeSearch:
        """The tree search of the same shape."""
        return DiffusionTreeSearch(
            lam=0.0,
            c_uct=self.c_uct,
            widening_c=self.widening_c,
            widening_alpha=self.widening_alpha,
            branch_at=self.branch_at,
            wave=self.wave,
            backup="visits",
        )
