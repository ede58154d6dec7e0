"""The searches of `experiments.text_to_image.drawbench`: batches of prompts, one run a method or one a level."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import treesearch as ts
from experiments.text_to_image.prompts import Prompt
from treesearch.backends.base import Kernel
from treesearch.core.noise import root_key
from treesearch.methods.base import Method
from treesearch.report.progress import Progress
from treesearch.results.result import SearchResult
from treesearch.rewards.base import Reward

ANYTIME = (ts.BestOfN, ts.DiffusionTreeSampling, ts.DiffusionTreeSearch)


@dataclass(frozen=True)
class Job:
    """A search over a batch of prompts that fills one or more levels."""

    label: str
    method: Method
    seed: int
    prompts: tuple[Prompt, ...]
    levels: tuple[int, ...]

    @property
    def keys(self) -> set[tuple[str, int, int, int]]:
        """What identifies its rows."""
        return {(self.label, self.seed, p.index, n) for p, n in product(self.prompts, self.levels)}

    @property
    def folder(self) -> str:
        """Name of its run folder; a change of method, seed or prompts is another one."""
        known = json.dumps([repr(self.method), [p.text for p in self.prompts]])
        digest = hashlib.sha256(known.encode()).hexdigest()[:10]
        return f"{slug(self.label)}-{digest}-seed{self.seed}-prompt{self.prompts[0].index:03d}"


def plan(
    methods: dict[str, Method],
    levels: tuple[int, ...],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    per_batch: int,
    num_steps: int,
) -> Iterator[Job]:
    """Every search, batch by batch, so that what is there after an interruption can be compared.

    Raises:
        ValueError: a level below one rollout.
    """
    if levels[0] < num_steps:
        raise ValueError(f"nfe {levels[0]} is below one rollout of this kernel: the minimum is {num_steps}")
    for first, seed in product(range(0, len(prompts), per_batch), seeds):
        batch = tuple(prompts[first : first + per_batch])
        for label, method in methods.items():
            if anytime(method):
                yield Job(label, method, seed, batch, levels)
            else:
                yield from (Job(label, sized(method, n // num_steps), seed, batch, (n,)) for n in levels)


def anytime(method: Method) -> bool:
    """Whether the first part of a long run is the run of a smaller budget."""
    return isinstance(method, ANYTIME) and method.mode == "wave"


def sized(method: Method, particles: int) -> Method:
    """A method with one population of the given size, unless its own is given."""
    if getattr(method, "num_particles", 0) is None:
        return replace(method, num_particles=particles)  # type: ignore[type-var]
    return method


def search(job: Job, kernel: Kernel, reward: Reward, folder: Path, batch_size: int, live: Progress) -> SearchResult:
    """Run a job, or go on with it."""
    budget = ts.Budget(nfe=job.levels[-1] * len(job.prompts))
    if (folder / "run.json").exists():
        return ts.resume(folder, kernel, reward, budget=budget, batch_size=batch_size, callbacks=[live])
    return ts.search(
        kernel,
        reward,
        job.method,
        prompts=[p.text for p in job.prompts],
        budget=budget,
        seed=root_key(job.seed, job.prompts[0].index),  # tasks are numbered within a batch: batches draw apart
        batch_size=batch_size,
        store=folder,
        callbacks=[live],
    )


def slug(text: str) -> str:
    """A label as part of a file name; labels that differ stay apart."""
    plain = re.sub(r"\W+", "_", text).strip("_")
    return plain if plain == text else f"{plain[:40]}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
