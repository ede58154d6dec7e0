"""Success at equal NFE a decision in the two-route maze: DSRL alone, search alone, search with DSRL's critics.

    python -m experiments.policies.compare run
    python -m experiments.policies.compare report

Learners are those of `experiments.policies.learning` at few steps (NA, its seeds, kept in `work`), and episodes begin
up to half a cell to either side of the usual start: from the left of it the policy hardly ever turns right, so that
neither few noises nor one learnt noise does for all. Every decision costs n·T NFE, T = 5; DSRL alone can spend one
rollout.

    base            the first draw                       best_of_n   the best of n by Q^A
    fk, tree_search, dts_star                            search for Q^A, x_T from the prior
    dsrl            a = π(s, π^W(s))
    best_of_law     best of n by Q^A, x_T ~ π^W(s)
    screened        x_T: the n best by Q^W of 64 n draws of the prior, then the best by Q^A
    fk_law, tree_search_law, dts_star_law                the same searches, x_T ~ π^W(s)
    fk_weighed      FK with x_T proposed by π^W and weighed back to the prior

Trees and particles have η = .5: of what a chunk does at the start, x_T decides all at η = 0, half at .5 and nothing at
1, where there would be nothing to begin well; the rest is drawn below x_T, where trees branch. The others have η = 0.
Intervals are over learners, of success over `episodes` episodes each.

Source: Steering Your Diffusion Policy with Latent Space Reinforcement Learning (Wagenmaker et al., 2025).
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import treesearch as ts
from experiments.policies.episodes import Actor, base_actor, play
from experiments.policies.learning import EPISODES_SEED, SETTINGS, learner
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, locked, where_it_ran
from experiments.shared.grids import check_names
from experiments.shared.stats import bootstrap
from experiments.shared.sweep import FAILURES, Sweep, command_line, reporting
from experiments.shared.tables import table
from treesearch.backends.guidance.noise import NoiseProposal
from treesearch.backends.guidance.noise_law import NoiseLaw
from treesearch.backends.models.policy import PolicyKernel, policy
from treesearch.policies.critic import action_value
from treesearch.policies.dsrl import DSRL
from treesearch.rewards.base import Reward

T = 5
ETA = 0.5  # of trees and particles
SPREAD = (0.5, 0.1)  # of the starts
MANY = 64  # draws of the prior that Q^W looks at, for each that is denoised
KEY = ("method", "rollouts", "steps", "seed")
Maker = Callable[[DSRL, int, int], Actor]
"""(learner, rollouts, seed) -> what acts."""
LAM = 20.0  # of FK, for values between 0 and 1
NARROW = {"widening_c": 1.0, "widening_alpha": 0.5, "wave": 1}


def searching(kernel: Any, reward: Reward, method: Any, rollouts: int, seed: int) -> Actor:
    """A search for Q^A at every decision."""
    planner = ts.Planner(
        kernel, reward, method, budget=ts.Budget(nfe=rollouts * T), steps=8, warm_start=False, seed=seed,
        batch_size=1024,
    )  # fmt: skip
    return lambda seen, active: planner.act_many(seen, active=active)


def root(kernel: PolicyKernel, dsrl: DSRL) -> Any:
    """x_T from the prior."""
    del dsrl
    return kernel


def rooted(method: Callable[[], Any], eta: float, roots: Callable[[PolicyKernel, DSRL], Any] = root) -> Maker:
    """A search for Q^A at every decision, with x_T from some roots."""

    def make(dsrl: DSRL, rollouts: int, seed: int) -> Actor:
        kernel = roots(policy(num_steps=T, eta=eta), dsrl)
        return searching(kernel, action_value(dsrl), method(), rollouts, seed)

    return make


def alone(dsrl: DSRL, rollouts: int, seed: int) -> Actor:
    """The learnt noise."""
    del rollouts, seed
    return lambda seen, active: dsrl.actions(seen)


def screened(dsrl: DSRL, rollouts: int, seed: int) -> Actor:
    """Denoise the noises of largest Q^W only."""
    rng, size = torch.Generator().manual_seed(seed), dsrl.frozen.size

    def act(seen: Tensor, active: list[bool]) -> Tensor:
        del active
        n = len(seen)
        noise = torch.randn(n, MANY * rollouts, size, generator=rng)
        worth = dsrl.q_noise(seen.repeat_interleave(MANY * rollouts, 0), noise.flatten(0, 1)).unflatten(0, (n, -1))
        picked = noise.gather(1, worth.topk(rollouts).indices[..., None].expand(-1, -1, size))
        rows = seen.repeat_interleave(rollouts, 0)
        states = dsrl.frozen.states(rows, picked.flatten(0, 1))
        best = dsrl.q_action(rows, states).unflatten(0, (n, -1)).argmax(1)
        return dsrl.frozen.kernel.decode(states.unflatten(0, (n, -1))[torch.arange(n), best])

    return act


TREES: dict[str, Callable[[], Any]] = {
    "fk": lambda: ts.FeynmanKac(lam=LAM),
    "tree_search": lambda: ts.TreeSearch(wave=4),
    "dts_star": lambda: ts.DiffusionTreeSearch(**NARROW),
}
METHODS: dict[str, Maker] = {
    "base": lambda dsrl, rollouts, seed: base_actor(policy(num_steps=T), seed),
    "dsrl": alone,
    "best_of_n": rooted(ts.BestOfN, 0.0),
    **{name: rooted(method, ETA) for name, method in TREES.items()},
    "best_of_law": rooted(ts.BestOfN, 0.0, NoiseLaw),
    "screened": screened,
    **{f"{name}_law": rooted(method, ETA, NoiseLaw) for name, method in TREES.items()},
    "fk_weighed": rooted(TREES["fk"], ETA, NoiseProposal),
}
ONCE = ("base", "dsrl")  # methods that spend one rollout
WITHOUT = {"best_of_law": "best_of_n", "screened": "best_of_n", "fk_weighed": "fk"} | {f"{n}_law": n for n in TREES}


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    method: str
    rollouts: int
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    methods: tuple[str, ...] = tuple(METHODS)
    """which methods"""
    rollouts: tuple[int, ...] = (4, 16)
    """budgets of a decision, n·T NFE"""
    seeds: tuple[int, ...] = tuple(range(14))
    """of learners"""
    steps: tuple[int, ...] = (400, 700, 1000)
    """that learners make; those of more go on from those of less"""
    episodes: int = 48
    """of a cell"""
    work: Path = Path("runs/policies/few")
    """where these learners are kept"""
    out: Path = Path("runs/results/policies/compare.jsonl")
    """row file"""

    def run(self) -> int:
        """Run the cells; the exit code."""
        check_names("method", self.methods, METHODS)
        with locked(self.out.parent / f".{self.out.stem}"):
            cells = Cells(self.out, KEY, {"episodes": self.episodes, "settings": SETTINGS})
            every: Sweep[Job] = Sweep(cells, self._played, lambda row: f"{row['success']:.2f}")
            every.fill(
                Job(method, n, steps, seed)
                for seed, steps, method in product(self.seeds, sorted(self.steps), self.methods)
                for n in ((1,) if method in ONCE else self.rollouts)
            )
        return 0

    def _played(self, job: Job) -> Row:
        began = time.perf_counter()
        try:
            dsrl = learner("na", job.seed, spread=SPREAD).learn(job.steps, store=self._store(job))
            actor = METHODS[job.method](dsrl, job.rollouts, job.seed)
            done = play(actor, self.episodes, EPISODES_SEED + job.seed, spread=SPREAD)
        except FAILURES as error:
            return job.row | {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
        return job.row | {
            "success": done.success.mean().item(),
            "returns": done.returns.mean().item(),
            "nfe": T * job.rollouts,
            "seconds": time.perf_counter() - began,
            **where_it_ran(),
        }

    def _store(self, job: Job) -> Path:
        """Of a learner of so many steps, which goes on from the one of fewer."""
        folders = {steps: self.work / f"na_{job.seed}_{steps}" for steps in sorted(self.steps)}
        before = [folder for steps, folder in folders.items() if steps < job.steps and folder.exists()]
        if before and not folders[job.steps].exists():
            shutil.copytree(before[-1], folders[job.steps])
        return folders[job.steps]


def page(rows: Sequence[Row]) -> str:
    """A section for each number of steps that learners made."""
    done = [row for row in rows if "error" not in row]
    words = (
        f"Learners of NA, {SETTINGS['warmup']} of their steps warm-up, T = {T}; NFE of a decision. 95 % bootstrap "
        "intervals over learners; differences are of the same learners."
    )
    every = sorted({row["steps"] for row in done})
    parts = ["# Search with DSRL's critics", words]
    return "\n\n".join([*parts, *(section([row for row in done if row["steps"] == n]) for n in every), ""])


def section(rows: Sequence[Row]) -> str:
    """Success and return by method and budget, and what searches with DSRL gain on each alone."""
    columns = [f"{T * n} NFE" for n in sorted({row["rollouts"] for row in rows})]
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]

    def of(field: str, scale: float) -> str:
        def cell(method: str, column: str) -> str | None:
            found = [row[field] for row in rows if (row["method"], f"{row['nfe']} NFE") == (method, column)]
            return bootstrap(np.array([found])).text(scale) if found else None

        return table(methods, columns, cell)

    title = f"## Learners of {rows[0]['steps']} steps: {len({row['seed'] for row in rows})}"
    parts = [title, "Success, %:", of("success", 100.0), "Success less that of each alone, points:", gains(rows)]
    return "\n\n".join([*parts, "Return, %:", of("returns", 100.0)])


def gains(rows: Sequence[Row]) -> str:
    """Of searches that begin with DSRL: paired differences from DSRL alone, and from the same search alone."""
    success = {(row["method"], row["nfe"], row["seed"]): row["success"] for row in rows}
    budgets = sorted({row["nfe"] for row in rows if row["method"] not in ONCE})
    against = {f"{nfe} NFE, less {other}": (nfe, other) for nfe in budgets for other in ("DSRL", "search alone")}

    def cell(method: str, column: str) -> str | None:
        nfe, other = against[column]
        alone = ("dsrl", T) if other == "DSRL" else (WITHOUT[method], nfe)
        seeds = [s for name, spent, s in success if (name, spent) == (method, nfe) and (*alone, s) in success]
        gaps = [success[method, nfe, s] - success[*alone, s] for s in seeds]
        return bootstrap(np.array([gaps])).text(100.0) if gaps else None

    return table([name for name in WITHOUT if any(row["method"] == name for row in rows)], list(against), cell)


Report = reporting("policies/compare", KEY, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("compare", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
