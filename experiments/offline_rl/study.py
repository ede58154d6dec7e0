"""The cells: a learner is warmed up on real data, then goes on for as many steps on real, synthetic or mixed ones.

    warm-up     W steps on real data: one for each learner and seed; its policy π is what synthetic data are made for
    cell        S more steps on   real        what it began with
                                  synthetic   n trajectories of one kind of `synthetic.DATA`
                                  mixed       those and as many steps of real ones
    figure      return of π's mean action over `episodes` episodes, normalised as D4RL's

All cells of a seed go on from the same weights with draws of the same seed, so they are compared in pairs. Published
guidance has a coefficient and no λ: it gets that of the highest return on synthetic data, on a seed of its own. So does
λ of the kinds that are called chosen; that of the others is the protocol's, and where that is the chosen one its cells
are not run twice.

Deviations from the paper: data are made once, for π after the warm-up, not every hundredth of the steps; a Gaussian
about the mean stands for IQL's policy too; T, n, networks and steps are a hundredth of its sizes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.offline_rl import synthetic
from experiments.offline_rl.beds import FIRST_STATES, Modelling, behaviour_model, episodes_of, task_of
from experiments.offline_rl.learners import LEARNERS, Diverged, Learner, Settings, Transitions, transitions_of
from experiments.offline_rl.synthetic import Drawn
from experiments.offline_rl.tasks import returns_of
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, locked, where_it_ran
from experiments.shared.grids import check_names
from experiments.shared.sweep import FAILURES, Sweep, check_seeds
from treesearch.backends.models.trajectory import TrajectoryKernel, trajectory_kernel
from treesearch.errors import TreeSearchError
from treesearch.offline.data import Array, DataError, OfflineData, windows

KEY = ("env", "learner", "data", "mix", "seed", "protocol")
MIXES = ("synthetic", "mixed")
LOWEST = {"starts": 0, "warmup": 0, "steps": 0}  # sizes of a protocol that may be none
GROUPS = {"searched": synthetic.SEARCHED, "chosen": tuple(synthetic.CHOSEN), "all": synthetic.DATA}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Sizes that every cell shares."""

    num_steps: int = 10
    """T of the behaviour model's chain"""
    starts: int = 64
    """observations of the data that a synthetic data set begins at, each with a target of its own; 0 for one target of
    trajectories from anywhere"""
    n: int = 1_000
    """trajectories of a synthetic data set, at most: as many from each start"""
    lam: float = 1.0
    """λ of the target"""
    warmup: int = 1_000
    """W, gradient steps on real data"""
    steps: int = 1_000
    """S, gradient steps of a cell"""
    episodes: int = 10
    """of an evaluation"""
    length: int = 1_000
    """steps of an episode, at most: those of the task where it has fewer"""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "lam" and value < (low := LOWEST.get(name, 1)):
                raise ValueError(f"{name} is {value}, expected {low} or more")
        if not self.each:
            raise ValueError(
                f"n is {self.n}, expected a trajectory of each of {self.starts} starts: raise n, or lower starts"
            )

    @property
    def size(self) -> int:
        """Trajectories of a synthetic data set."""
        return self.each * max(self.starts, 1)

    @property
    def each(self) -> int:
        """Those of a start."""
        return self.n // max(self.starts, 1)


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    env: str
    learner: str
    data: str
    mix: str
    seed: int
    protocol: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    env: str = "halfcheetah-medium"
    """a maze, or a task and the grade of its data: maze-umaze, hopper-medium-replay"""
    learner: tuple[str, ...] = LEARNERS
    """which learners"""
    data: tuple[str, ...] = ("all",)
    """kinds of data: real, unguided, guided, fk, tree_sampling, fk_chosen, tree_sampling_chosen; searched, chosen for
    two each, all for all"""
    mix: tuple[str, ...] = MIXES
    """whether synthetic data come alone, or mixed with real ones"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of learners and of synthetic data; data and behaviour model are one for all"""
    tuning_seed: int = 100
    """of the choice of strengths"""
    protocol: Protocol = field(default_factory=Protocol)
    """sizes"""
    settings: Settings = field(default_factory=Settings)
    """of learners"""
    modelling: Modelling = field(default_factory=Modelling)
    """of data and behaviour model"""
    agents: Path = Path("runs/agents")
    """folder of the actors that data are made with"""
    dataset: Path | None = None
    """episodes of your own instead: a D4RL file, a Minari folder, an npz"""
    weights: Path | None = None
    """a trajectory model of your own of these episodes, with a reward channel"""
    work: Path = Path("runs/offline_rl")
    """data, models, learners on their way"""
    out: Path = Path("runs/results/offline_rl.jsonl")
    """row file"""

    def run(self) -> int:
        """Run the cells; the exit code."""
        task_of(self.env)
        check_names("learner", self.learner, dict.fromkeys(LEARNERS))
        check_names("mix", self.mix, dict.fromkeys(MIXES))
        self.kinds()
        check_seeds(self.seeds, (self.tuning_seed,))
        with locked(self.out.parent / f".{self.out.stem}"):
            cells = Cells(self.out, KEY)
            study = Study(self, cells).prepared()
            every: Sweep[Job] = Sweep(cells, study.cell, lambda row: f"{row['score']:.1f}")
            every.fill(job for job in self._jobs(study.name) if not study.repeats(job))
        return 0

    def kinds(self) -> list[str]:
        """Kinds of data, in order.

        Raises:
            ValueError: an unknown one.
        """
        check_names("data", self.data, dict.fromkeys([*synthetic.DATA, *GROUPS]))
        asked = {kind for name in self.data for kind in GROUPS.get(name, (name,))}
        return [kind for kind in synthetic.DATA if kind in asked]

    def _jobs(self, protocol: str) -> Iterator[Job]:
        for seed, learner, kind in product(self.seeds, self.learner, self.kinds()):
            for mix in ("real",) if kind == "real" else self.mix:
                yield Job(self.env, learner, kind, mix, seed, protocol)


class Study:
    """What the cells of a run share: data, behaviour model, warm learners, synthetic sets.

    Args:
        run: what is asked.
        cells: rows, for the choice of strengths.
    """

    def __init__(self, run: Run, cells: Cells) -> None:
        self.run, self.cells, self.task = run, cells, task_of(run.env)
        given = [run.dataset and run.dataset.name, run.weights and run.weights.name]
        model = _short([asdict(run.modelling), given])
        self.name = _short([asdict(run.protocol), asdict(run.settings), model])
        self.home = run.work / f"{run.env}_{model}"
        self.folder = self.home / self.name
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepared(self) -> Study:
        """With its data and its model made or read, so that what is wrong with them is no cell's error.

        Raises:
            DataError, TreeSearchError, OSError: no such data, those of another environment, or a model of others.
        """
        self._check_sizes()
        _ = self.real, self.kernel
        return self

    def _check_sizes(self) -> None:
        env, channels = self.task.make(), self.episodes.channels
        found = (channels.observation, channels.action)
        wanted = (*env.observation_space.shape, *env.action_space.shape)
        if found != wanted:
            raise DataError(
                f"{self.episodes.source}: observations of {found[0]} numbers and actions of {found[1]}, but "
                f"{self.task.environment} has {wanted[0]} and {wanted[1]}: name the --env that the data are of"
            )

    @cached_property
    def episodes(self) -> OfflineData:
        run = self.run
        return episodes_of(run.env, run.modelling, run.agents, self.home, run.dataset)

    @cached_property
    def real(self) -> Transitions:
        return transitions_of(self.episodes)

    @cached_property
    def scale(self) -> float:
        """Of rewards: IQL's, 1000 over the spread of returns."""
        returns = self.episodes.returns
        return 1000 / max(float(returns.max() - returns.min()), 1e-6)

    @cached_property
    def kernel(self) -> TrajectoryKernel:
        run = self.run
        weights = run.weights or behaviour_model(
            run.env, run.modelling, self.home, run.dataset or self.home / "data.npz"
        )
        kernel = trajectory_kernel(weights, run.protocol.num_steps)
        if kernel.channels != self.episodes.channels:
            raise TreeSearchError(f"{weights.name} is of {kernel.channels}, the data are of {self.episodes.channels}")
        return kernel

    def warm(self, learner: str, seed: int) -> Learner:
        """After its warm-up.

        Raises:
            Diverged: in it.
        """
        found = Learner(learner, self.real, self.run.settings, seed, self.scale)
        return found.learn(self.real, self.run.protocol.warmup, self.folder / "warm" / f"{learner}_{seed}.pt")

    def strength(self, learner: str, kind: str) -> float | None:
        """The chosen one, of the kinds that have one."""
        if kind not in synthetic.TUNED:
            return None
        every: Sweep[Job] = Sweep(self.cells, self.cell, lambda row: "")
        where = {"env": self.run.env, "learner": learner, "data": kind, "protocol": self.name}
        return every.choice(where, lambda: self._chosen(learner, kind))["strength"]

    def repeats(self, job: Job) -> bool:
        """Whether its cell is that of the kind with the protocol's own λ; a choice that fails is the cell's error."""
        if job.data not in synthetic.CHOSEN:
            return False
        try:
            return self.strength(job.learner, job.data) == self.run.protocol.lam
        except FAILURES:
            return False

    def _chosen(self, learner: str, kind: str) -> Row:
        job = Job(self.run.env, learner, kind, "synthetic", self.run.tuning_seed, self.name)
        policy, found = self.warm(learner, job.seed).policy(), {}
        for strength in synthetic.STRENGTHS:
            learnt, _ = self._learnt(job, self._draw(policy, kind, strength, job.seed).samples, f"_{strength:g}")
            found[strength] = self.task.normalised(float(self._returns(learnt, job.seed).mean()))
        return {"strength": max(found, key=lambda s: found[s]), "scores": {str(s): v for s, v in found.items()}}

    def _draw(self, policy: Any, kind: str, strength: float, seed: int) -> Drawn:
        p, rng = self.run.protocol, torch.Generator().manual_seed(seed)
        starts = self.real.observations[torch.randint(len(self.real), (p.starts,), generator=rng)]
        how = {"lam": p.lam, "strength": strength, "seed": seed}
        return synthetic.trajectories(self.kernel, policy, kind, p.each, starts, **how)

    def drawn(self, learner: str, kind: str, seed: int) -> Drawn:
        """Trajectories of a kind, kept, and made anew where the file is damaged; windows of the data themselves, at no
        cost, for "real"."""
        if kind == "real":
            every = windows(self.episodes, self.kernel.horizon)
            rows = np.random.default_rng(seed).integers(len(every), size=self.run.protocol.size)
            return Drawn(every[torch.from_numpy(rows)], 0)
        file = self.folder / "drawn" / f"{kind if kind == 'unguided' else f'{learner}_{kind}'}_{seed}.pt"
        if (found := _read(file)) is None:
            policy = self.warm(learner, seed).policy()
            file.parent.mkdir(exist_ok=True)
            found = self._draw(policy, kind, self.strength(learner, kind) or 0.0, seed)
            torch.save(found._asdict(), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        return found

    def cell(self, job: Job) -> Row:
        """A cell; one that fails says why."""
        began = time.perf_counter()
        try:
            found = self._figures(job)
        except FAILURES as error:
            return job.row | {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
        return job.row | found | {"seconds": time.perf_counter() - began, **where_it_ran()}

    def _figures(self, job: Job) -> Row:
        p, task = self.run.protocol, self.task
        samples, nfe = self.drawn(job.learner, job.data, job.seed)
        learner, said = self._learnt(job, samples)
        returns = self._returns(learner, job.seed)
        warm = self.warm(job.learner, job.seed).policy()
        return {
            "score": task.normalised(float(returns.mean())),
            "returns": returns.tolist(),
            "step": learner.step,
            "diverged": said,
            "strength": self.strength(job.learner, job.data),
            "nfe": nfe,
            "sizes": asdict(p)
            | {"length": min(p.length, task.limit)}
            | {"width": self.run.settings.width, "batch_size": self.run.settings.batch_size},
            "figures": synthetic.figures(samples, self.kernel.channels, warm, task, self.real),
            "fingerprint": self.kernel.fingerprint,
        }

    def _returns(self, learner: Learner, seed: int) -> Array:
        p = self.run.protocol
        seeds = [FIRST_STATES + 1_000 * seed + i for i in range(p.episodes)]
        return returns_of(self.task, learner.policy(), seeds, p.length)

    def _learnt(self, job: Job, samples: Tensor, tag: str = "") -> tuple[Learner, str | None]:
        """The learner after its steps, and what it said if it diverged."""
        p, name = self.run.protocol, f"{job.learner}_{job.data}{tag}_{job.mix}_{job.seed}.pt"
        file = self.folder / "cells" / name
        learner = self.warm(job.learner, job.seed)
        try:
            return learner.learn(self._data(job, samples), p.warmup + p.steps, file), None
        except Diverged as error:
            return learner, str(error)

    def _data(self, job: Job, samples: Tensor) -> Transitions:
        if job.data == "real":
            return self.real
        made = synthetic.transitions_of(samples, self.kernel.channels, self.task.ended)
        if job.mix == "synthetic":
            return made
        rows = np.random.default_rng(job.seed).integers(len(self.real), size=len(made))
        return made.joined(self.real.take(torch.from_numpy(rows)))


def _read(file: Path) -> Drawn | None:
    """What is kept there; None for nothing, or what a cut-off file leaves."""
    try:
        return Drawn(**torch.load(file, weights_only=True))
    except (FileNotFoundError, EOFError, UnpicklingError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def _short(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def kept(rows: Sequence[Row]) -> list[Row]:
    """The cells that have figures."""
    return [row for row in rows if "score" in row]
