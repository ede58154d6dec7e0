"""How far draws are from the true conditional: cyclic one-way diffusion, published rules, and search.

The bed is the Gaussian process: eight pixels in its middle are the seed, the background is the rest. W2 is between
Gaussians, √(|m - m'|² + tr(C + C' - 2 (C C')^1/2)), of the background's moments over 1,000 draws to the true ones given
the seed exactly, under the chain's own law. Floors: as many draws of the true law itself, and of the posterior with
the tolerance that searches have.

    COW          from the inverted seed on grey, `Cycle` around `Clamp`: the seed held on its inverted path, or noised
                 afresh at each level; unlike the published runs it is held to the end, with η = 1 throughout
    clamped      the same from noise: all levels, not those of the cycles alone
    published    projection (Steered Diffusion) and FlowChef on the chain without noise: no weights
    search       Feynman-Kac populations and TreeSampling over `Steered` with a tolerance of .03

Chains of the first group are affine in their noise: their W2 without any draws is in the rows too, as `exact`.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import treesearch as ts
from experiments.observations.beds import KNOWN, STEPS, Bed, Seen, bed, process
from experiments.observations.evidence import EVERY, steered
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.sweep import Sweep, command_line
from treesearch.backends.base import Cond, Wrapper, describe
from treesearch.backends.chains.inversion import invert
from treesearch.backends.exact.gaussian_states import carried
from treesearch.backends.guidance import FlowChef, Steered
from treesearch.backends.wrappers.cycle import Cycle
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards.observation import masked, measurement

KEY = ("arm", "seed")
F64 = torch.float64
DRAWS = 1_000
PARTICLES = 16_384
TOLERANCE = 0.03
LOW, HIGH = 20, 28  # of 40 levels, as published: half and seven tenths
CYCLES = (0, 1, 3, 10)


def w2(mean: Tensor, cov: Tensor, other: Tensor, other_cov: Tensor) -> float:
    """Between N(mean, cov) and another Gaussian."""
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_cov @ root).clamp_min(0).sqrt().sum()
    square = (mean - other).square().sum() + cov.trace() + other_cov.trace() - 2 * cross
    return float(square.clamp_min(0).sqrt())


@dataclass(frozen=True)
class Truth:
    """The background given the seed.

    Args:
        seen: the seed, with some tolerance.
        mean, cov: of the background (B,), (B, B), given the seed exactly.
        loose: the same given the seed up to the tolerance.
    """

    seen: Seen
    mean: Tensor
    cov: Tensor
    loose: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, of: Bed, seed: int) -> Truth:
        """The seed of a draw of the chain's law."""
        seen = of.seen(TOLERANCE, seed)
        y, back = seen.x0[KNOWN], ~KNOWN
        exact, loose = (of.kernel.given(of.rows, y, v) for v in (0.0, TOLERANCE))
        reward = measurement(masked(KNOWN), y, tolerance=TOLERANCE)
        known = ((given.mean[back], given.cov[back][:, back]) for given in (exact, loose))
        return cls(Seen(reward, seen.x0, loose), *next(known), next(known))

    def apart(self, mean: Tensor, cov: Tensor) -> float:
        """W2 of the background of N(mean, cov) over all pixels."""
        back = ~KNOWN
        return w2(mean[back], cov[back][:, back], self.mean, self.cov)

    def missed(self, x: Tensor) -> float:
        """Mean square of what draws (n, D) miss of the seed."""
        return float((x - self.seen.x0)[:, KNOWN].square().mean())


@dataclass(frozen=True, eq=False)
class Pasted(Wrapper):
    """A chain that begins at level `start` with a state of level `low`, noised up to there.

    Args:
        kernel: the whole chain.
        state: x_low (*state).
        low, start: levels, low <= start.
    """

    state: Tensor
    low: int
    start: int

    departs = "begins at a given state"
    rows_per_nfe, backward_per_nfe, rewards_per_nfe = 1, 0, 0

    @property
    def num_steps(self) -> int:
        return self.start

    @property
    def stochastic(self) -> tuple[bool, ...]:
        return (True, *describe(self.kernel, identify=False).stochastic[1 : self.start + 1])

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        low, start = (torch.full((len(noise),), level) for level in (self.low, self.start))
        return self.kernel.chain.renoise(self.state.expand(noise.shape), low, start, noise)


def path_of(truth: Truth) -> Tensor:
    """x_0..x_T (T + 1, D) of the seed on grey, inverted."""
    kernel = process()
    return invert(kernel, torch.where(KNOWN, truth.seen.x0, kernel.mean)[None])[:, 0]


def cow(inverted: bool, times: int) -> Callable[[Truth], Any]:
    """Cyclic one-way diffusion; the first climb is the start, and without one it goes down from the inverted seed."""

    def make(truth: Truth) -> Any:
        path, start = path_of(truth), HIGH if times else LOW
        begun = Pasted(process(), path[LOW], LOW, start)
        held = Clamp(begun, KNOWN, path[: start + 1] if inverted else path[0])
        return Cycle(held, low=LOW, high=HIGH, times=times - 1) if times > 1 else held

    return make


def clamped(inverted: bool, times: int) -> Callable[[Truth], Any]:
    """The seed held at every level from noise on, and cycles."""

    def make(truth: Truth) -> Any:
        path = path_of(truth)
        return Cycle(Clamp(process(), KNOWN, path if inverted else path[0]), low=LOW, high=HIGH, times=times)

    return make


def flowchef(scale: float) -> Callable[[Truth], Any]:
    """As published, on the chain without noise; scale of half the squared miss."""
    return lambda truth: FlowChef(process(eta=0.0), truth.seen.reward, scale=scale * TOLERANCE**2)


AFFINE: dict[str, Callable[[Truth], Any]] = {
    "nothing seen": lambda truth: process(),
    **{f"COW, inverted, {n} cycles": cow(True, n) for n in CYCLES},
    **{f"COW, fresh noise, {n} cycles": cow(False, n) for n in CYCLES},
    **{f"clamped, inverted, {n} cycles": clamped(True, n) for n in (0, 10)},
    **{f"clamped, fresh noise, {n} cycles": clamped(False, n) for n in (0, 10)},
    "projection, published": lambda truth: Steered(process(), truth.seen.reward, rule="paper"),
    "FlowChef, s = .1": flowchef(0.1),
    "FlowChef, s = .5": flowchef(0.5),
}
SEARCHED: dict[str, tuple[ts.methods.base.Method, int]] = {  # and how many rollouts
    "Steered, FK": (ts.FeynmanKac(schedule=EVERY, num_particles=PARTICLES), PARTICLES),
    "Steered, TreeSampling": (ts.TreeSampling(), PARTICLES),
    "Steered, FK, four times the particles": (
        ts.FeynmanKac(schedule=EVERY, num_particles=4 * PARTICLES),
        4 * PARTICLES,
    ),
}
FLOORS = ("floor", "floor, with tolerance")
ARMS = (*AFFINE, *SEARCHED, *FLOORS)


def chance(arm: str, seed: int) -> torch.Generator:
    """Noise of its own for each cell."""
    return torch.Generator().manual_seed(zlib.crc32(repr((arm, seed)).encode()))


def draws(kernel: Any, n: int, draw: torch.Generator) -> Tensor:
    """x_0 (n, D) of the bare chain."""

    def noise() -> Tensor:
        return torch.randn(n, *kernel.state_shape, dtype=F64, generator=draw)

    x = kernel.prior(noise())
    for t in range(kernel.num_steps, 0, -1):
        x = kernel.transition(x, torch.full((n,), t)).sample(noise())
    return x.flatten(1)


def searched(arm: str, truth: Truth, seed: int) -> tuple[Tensor, Row]:
    """Draws of a weighted population, and what it was like."""
    method, rollouts = SEARCHED[arm]
    budget = ts.Budget(nfe=rollouts * STEPS)
    how = {"budget": budget, "batch_size": 8192, "keep_states": "frontier", "progress": False}
    kernel: Any = steered(bed("process", "mask"), truth.seen)
    result = ts.search(kernel, truth.seen.reward, method, seed=seed, **how)
    weights = torch.softmax(torch.as_tensor(result.log_weights, dtype=F64), 0)
    picked = torch.multinomial(weights, DRAWS, replacement=True, generator=chance(arm, seed))
    return result.samples[picked].double(), {"ess": float(1 / weights.square().sum())}


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    arm: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    arms: tuple[str, ...] = ARMS
    """which arms"""
    seeds: tuple[int, ...] = tuple(range(10))
    """which seeds: of the seed pixels, and of all noise"""
    out: Path = Path("runs/results/posteriors.jsonl")
    """one row a cell"""

    def run(self) -> int:
        def run(job: Job) -> Row:
            return job.row | cell(job)

        jobs = (Job(arm, seed) for arm in self.arms for seed in self.seeds)
        Sweep(Cells(self.out, KEY), run, lambda row: f"W2 {row['w2']:.4f}").fill(jobs)
        return 0


def cell(job: Job) -> Row:
    """Distances of an arm's draws."""
    began, truth = time.process_time(), Truth.of(bed("process", "mask"), job.seed)
    draw, more = chance(job.arm, job.seed), {}
    if job.arm in FLOORS:
        mean, cov = truth.loose if "tolerance" in job.arm else (truth.mean, truth.cov)
        root, x = torch.linalg.cholesky(cov), truth.seen.x0.repeat(DRAWS, 1)
        x[:, ~KNOWN] = mean + torch.randn(DRAWS, len(mean), dtype=F64, generator=draw) @ root.T
    elif job.arm in SEARCHED:
        x, more = searched(job.arm, truth, job.seed)
    else:
        kernel = AFFINE[job.arm](truth)
        x, more = draws(kernel, DRAWS, draw), {"exact": truth.apart(*carried(kernel))}
    return {
        "w2": truth.apart(x.mean(0), torch.cov(x.T)),
        "missed": truth.missed(x),
        "seconds": time.process_time() - began,
    } | more | where_it_ran()  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("posteriors", {"run": Run}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
