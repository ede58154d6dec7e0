"""The distiller: a student learns, from a teacher's own steps and samples, to leave out most of the steps.

    draw (ε, x̂_0 = the end of the teacher's deterministic path from ε)        `Pairs`
    loss = target(teacher, student, average, draws)                           one file a target
    AdamW, an average of the weights, checkpoints                             `training.loop`

    target              what the student's x̂_0 is brought to                                       file
    Rectified           the teacher's sample from the same noise                                   rectified.py
    Phased              the teacher's state some steps on                                          rectified.py
    Consistency         its own x̂_0 one step of the teacher on                                     consistency.py
    SubPath             the same, from between the two levels                                      sub_path.py
    FlowMap             its own state at another time, by way of a step of the teacher             flow_map.py
    ScoreDifference     samples on which a score taught on them agrees with the teacher's          score_difference.py

A student is any network called as network(x_t, timestep), or network(x_t, timestep, condition), that returns what the
schedule of the teacher says (ε, v, x_0 or a flow) or has it as `.sample`. The teacher is any kernel on a
`backends.chains.diffusion.Chain`; its steps are those at η = 0, whatever η it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Kernel, Shared, describe, expand, optional
from treesearch.backends.chains.diffusion import CONDITION, Chain, to_endpoint
from treesearch.backends.chains.inversion import walk
from treesearch.backends.training.loop import Plan, Stateful, create, stratified, train
from treesearch.rewards.numeric import is_whole


@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """Noises x_T and what the teacher's deterministic path makes of each.

    Args:
        noise, x0: (N, *state).
        cond: conditioning of the rows, as the teacher's `encode` gives it; None without. `told` is what kernels get.

    Raises:
        ValueError: other shapes, or numbers that are not finite.
    """

    noise: Tensor
    x0: Tensor
    cond: Cond = None

    def __post_init__(self) -> None:
        if self.noise.shape != self.x0.shape or len(self.noise) == 0:
            shapes = tuple(self.noise.shape), tuple(self.x0.shape)
            raise ValueError(f"noise and x0 have shapes {shapes}, expected rows of the same states, one or more")
        if not (self.noise.isfinite().all() and self.x0.isfinite().all()):
            raise ValueError("noise or x0 has numbers that are not finite")

    @staticmethod
    def of(
        teacher: Kernel, n: int, *, seed: int = 0, prompts: Sequence[Any] | None = None, batch_size: int = 256
    ) -> Pairs:
        """n of them, T evaluations each.

        Args:
            teacher: as for `distil`.
            n: how many.
            seed: of their noise.
            prompts: told to the teacher, over and over, where it is told something.
            batch_size: rows of an evaluation.
        """
        chain_of(teacher)
        if not is_whole(n):
            raise ValueError(f"n is {n!r}, expected 1 or more pairs")
        spec = describe(teacher, identify=False)
        rng = torch.Generator().manual_seed(seed)
        rows = torch.arange(n, device="cpu")
        cond = None if prompts is None else teacher.encode([prompts[i % len(prompts)] for i in range(n)])
        noises, ends = [], []
        for part in rows.split(batch_size):
            z = torch.randn(len(part), *spec.noise_shape, generator=rng, device="cpu", dtype=torch.float32)
            told = told_of(rows_of(cond, part))
            noises.append(teacher.prior(z, told))
            ends.append(walk(teacher, noises[-1], spec.num_steps, cond=told))
        return Pairs(torch.cat(noises), torch.cat(ends), cond)

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, rows: Tensor) -> Pairs:
        rows = rows.to(self.x0.device)
        return Pairs(self.noise[rows], self.x0[rows], rows_of(self.cond, rows))

    @property
    def told(self) -> Cond:
        """Conditioning as kernels and networks get it."""
        return told_of(self.cond)

    def draw(self, n: int, rng: torch.Generator) -> Pairs:
        """n of them at random."""
        return self[torch.randint(len(self), (n,), generator=rng, device=rng.device)]


def rows_of(cond: Cond, rows: Tensor) -> Cond:
    """Conditioning of some rows."""
    return cond and {name: each if isinstance(each, Shared) else each[rows] for name, each in cond.items()}


def told_of(cond: Cond) -> Cond:
    """Conditioning without the marks of what has no row axis."""
    return cond and {name: each.value if isinstance(each, Shared) else each for name, each in cond.items()}


@final
@dataclass(frozen=True, eq=False)
class Student:
    """A network on the levels of a teacher's chain.

    Args:
        network: as above.
        chain: of the teacher.
    """

    network: nn.Module
    chain: Chain

    def called(self, x: Tensor, timestep: Tensor, cond: Cond, *more: Tensor) -> Tensor:
        """What the network returns (n, *state)."""
        told = () if cond is None or CONDITION not in cond else (cond[CONDITION],)
        output = self.network(x, timestep, *more, *told)
        return getattr(output, "sample", output)

    def predicted(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """x̂_0 and ε̂ (n, *state) of states x at levels t >= 1 (n,)."""
        output = self.called(x, self.chain.timestep[t], cond)
        return to_endpoint(self.chain.schedule.prediction, output, x, *levels(self.chain, t, x))

    def endpoint(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """x̂_0 (n, *state); of states at level 0 they themselves."""
        x0, _ = self.predicted(x, t, cond)
        return torch.where(expand(t == 0, x), x, x0)


class Target(Protocol):
    """What a student is brought to."""

    def loss(self, teacher: Kernel, student: Student, average: Student, rows: Pairs, rng: torch.Generator) -> Tensor:
        """The loss of some rows; only the student may get gradients of it.

        Args:
            teacher: the kernel.
            student: trained.
            average: the mean of its weights.
            rows: drawn for this step.
            rng: of whatever else it draws.
        """
        ...


def distil(
    teacher: Kernel,
    network: nn.Module,
    target: Target,
    pairs: Pairs,
    plan: Plan,
    *,
    batch_size: int = 64,
    seed: int = 0,
    out: Path | None = None,
    after: Callable[[int, nn.Module, float, float], None] | None = None,
) -> nn.Module:
    """Train a student; returns the mean of its weights, in evaluation mode.

    Draws of epoch e depend on (seed, e) only, so that a run that was stopped repeats one that was not.

    Args:
        teacher: a kernel on a `Chain`; its levels are those the student learns.
        network: the student as it begins, as a rule a copy of the teacher's own; trained in place.
        target: the loss. One that has things of its own to be kept names them in `kept`.
        pairs: draws of the teacher.
        plan: how weights move.
        batch_size: rows of a step.
        seed: of the draws.
        out: folder of the checkpoint; a run found there goes on. None for none.
        after: called as each epoch ends with its number, the mean of the weights, the mean loss and its seconds.

    Raises:
        TypeError: a teacher that is no kernel on such a chain.
        ValueError: pairs of other states, or a batch size below 1.
    """
    chain, spec = chain_of(teacher), describe(teacher, identify=False)
    if tuple(pairs.x0.shape[1:]) != spec.state_shape:
        raise ValueError(f"pairs have states {tuple(pairs.x0.shape[1:])}, the teacher's are {spec.state_shape}")
    if not is_whole(batch_size):
        raise ValueError(f"batch_size is {batch_size!r}, expected 1 or more rows")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Stateful] = getattr(target, "kept", {})
    state = create(lambda: network.train(), plan, seed, out, str(spec.device), kept)
    student, average = Student(state.network, chain), Student(state.ema, chain)

    def losses(epoch: int) -> Iterator[Tensor]:
        rng = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        for _ in range(plan.steps):
            yield target.loss(teacher, student, average, pairs.draw(batch_size, rng), rng)

    def told(loss: float, seconds: float) -> None:
        if after is not None:
            after(state.epoch, state.ema, loss, seconds)

    train(state, plan, losses, out, told)
    return state.ema.eval()


def chain_of(teacher: Kernel) -> Chain:
    """The chain of a kernel that can teach.

    Raises:
        TypeError: a kernel without such a chain, around an offset, with levels by entry, or whose states hold more
            than x_t.
    """
    spec, name, chain = describe(teacher, identify=False), type(teacher).__name__, optional(teacher, "chain")
    if not isinstance(chain, Chain) or optional(teacher, "offset") is not None or chain.schedule.alpha.ndim > 1:
        raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain around 0 with one α_t and σ_t: "
                        "it has no steps to distil")  # fmt: skip
    if spec.noise_shape != spec.state_shape:
        raise TypeError(f"states of {name} hold more than x_t: distil the kernel inside")
    return chain


def levels(chain: Chain, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """α_t and σ_t of levels t in 0..T (n,), broadcastable to x."""
    tables = (chain.schedule.alpha, chain.schedule.sigma)
    alpha, sigma = (expand(table.to(t.device)[t].to(x.dtype), x) for table in tables)
    return alpha, sigma


def noised(chain: Chain, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """α_t x_0 + σ_t ε."""
    alpha, sigma = levels(chain, t, x0)
    return alpha * x0 + sigma * noise


def any_level(chain: Chain, like: Tensor, rng: torch.Generator) -> Tensor:
    """Levels 1..T (n,), one from each n-th part of them, in random order."""
    t = 1 + stratified(len(like), chain.schedule.num_steps, rng)
    return t[torch.randperm(len(t), generator=rng, device=rng.device)].to(like.device)


def normal(like: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normals shaped like a tensor."""
    return torch.randn(like.shape, generator=rng, device=rng.device, dtype=torch.float32).to(like)


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """mean √((x - y)² + c²) - c: a squared error below c, an absolute one above."""
    return ((x - y).square() + c * c).sqrt().mean() - c
