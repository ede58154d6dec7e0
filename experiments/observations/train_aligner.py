"""Train an aligner (`backends/models/aligner.py`) of the MNIST model, without data: on the model's own rollouts.

    loss = E ||A(F(x_t), t) - c(x_0)||²,   x_T, ..., x_0 a rollout of the chain, t uniform

F is captured in the calls that make the rollouts. The error's covariance by level is then measured on rollouts that
took no part in training: one basis for all levels (of the errors, each level scaled to mean square 1), and variances
along it.

    python -m experiments.observations.train_aligner --out checkpoints/observations/edges
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from treesearch.backends.base.capture import captured
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.models.aligner import Aligner, Plan, save_aligner, time_of
from treesearch.backends.models.mnist import mnist_kernel, to_images
from treesearch.backends.training.loop import append_row
from treesearch.rewards.outlines import OUTLINES

PARTS = {"unet.mid_block": 96, "unet.up_blocks.0": 96, "unet.up_blocks.1": 64, "unet.up_blocks.2": 48}
STEPS = 25  # of a rollout
ROWS = 100  # of a call
LEAST = 1e-8  # variance in a direction that the rollouts do not span


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    out: Path
    """Folder for the curve and the weights."""
    condition: str = "edges"
    """edges or silhouette"""
    size: int = 2
    """Pixels of a square of the condition; 1 or 2."""
    rollouts: int = 800
    """Rollouts to train on."""
    levels: int = 8
    """Levels of each that are kept."""
    held: int = 200
    """Rollouts to measure the error on."""
    steps: int = 2_500
    batch_size: int = 48
    lr: float = 2e-3
    seed: int = 0
    threads: int = 1


class Walks(NamedTuple):
    """Rows that were seen along rollouts."""

    x0: Tensor  # (n, *state)
    features: list[Tensor]  # (rows, c, h, w) float16 each
    t: Tensor  # (rows,)
    of: Tensor  # (rows,), which rollout


def plan_of(args: Args) -> Plan:
    """What is trained."""
    side = 28 // args.size
    return Plan(
        condition=OUTLINES[args.condition](args.size).name,
        shape=(1, side, side),
        parts=tuple(PARTS),
        channels=tuple(PARTS.values()),
        margin=2 // args.size,  # the model pads its pictures by two pixels
    )


@torch.no_grad()
def walks(kernel: DiffusionKernel, n: int, levels: int, seed: int) -> Walks:
    """n rollouts, and what was seen at so many random levels of each."""
    assert kernel.network is not None
    rng, ends, rows = torch.Generator().manual_seed(seed), [], []
    for first in range(0, n, ROWS):
        m = min(ROWS, n - first)
        kept = torch.rand(m, kernel.num_steps, generator=rng).argsort(1) < levels  # (m, T)
        x = kernel.prior(torch.randn(m, *kernel.state_shape, generator=rng))
        for t in range(kernel.num_steps, 0, -1):
            with captured(kernel.network, tuple(PARTS)) as seen:
                law = kernel.transition(x, torch.full((m,), t))
            x, which = law.sample(torch.randn(x.shape, generator=rng)), kept[:, t - 1].nonzero().flatten()
            rows.append(([seen[name][which].half() for name in PARTS], torch.full((len(which),), t), first + which))
        ends.append(x)
    features = [torch.cat([row[0][i] for row in rows]) for i in range(len(PARTS))]
    return Walks(torch.cat(ends), features, torch.cat([row[1] for row in rows]), torch.cat([row[2] for row in rows]))


def main(args: Args) -> None:
    """Train, measure the error and write the file."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began, kernel, condition = time.perf_counter(), mnist_kernel(num_steps=STEPS), OUTLINES[args.condition](args.size)
    assert isinstance(kernel, DiffusionKernel)
    u = time_of(kernel.chain.schedule.alpha, kernel.chain.schedule.sigma).float()
    aligner = Aligner(plan_of(args))
    fit(aligner, walks(kernel, args.rollouts, args.levels, args.seed + 1), u, condition, args, began)
    fit_spread(aligner, walks(kernel, args.held, STEPS, args.seed + 2), u, condition)
    save_aligner(args.out / "weights.safetensors", aligner.eval())
    print(f"{time.perf_counter() - began:.0f} s")


def fit(
    aligner: Aligner, seen: Walks, u: Tensor, condition: Callable[[Tensor], Tensor], args: Args, began: float
) -> None:
    """Train in place."""
    c, rng = condition(to_images(seen.x0)), torch.Generator().manual_seed(args.seed)
    sample = torch.randint(len(seen.t), (256,), generator=rng)
    inside = aligner.gathered([f[sample] for f in seen.features])
    aligner.scale.copy_(inside.transpose(0, 1).flatten(1).std(1))
    optimiser = torch.optim.AdamW(aligner.parameters(), lr=args.lr, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, total_steps=args.steps, pct_start=0.05)
    total, every = 0.0, max(1, args.steps // 20)
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(seen.t), (args.batch_size,), generator=rng)
        predicted = aligner([f[rows] for f in seen.features], u[seen.t[rows]])
        loss = (predicted - c[seen.of[rows]]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        total += float(loss.detach())
        if step % every == 0:
            seconds = time.perf_counter() - began
            append_row(args.out / "curve.csv", {"step": step, "loss": total / every, "seconds": seconds})
            total = 0.0


@torch.no_grad()
def fit_spread(aligner: Aligner, seen: Walks, u: Tensor, condition: Callable[[Tensor], Tensor]) -> None:
    """Basis and variances of the error, in place."""
    c, gaps = condition(to_images(seen.x0)), []
    for rows in torch.arange(len(seen.t)).split(ROWS):
        predicted = aligner([f[rows] for f in seen.features], u[seen.t[rows]])
        gaps.append((c[seen.of[rows]] - predicted).flatten(1).double())
    gap, levels = torch.cat(gaps), range(1, len(u))
    level = torch.stack([gap[seen.t == t].square().mean().sqrt() for t in levels])
    scaled = gap / level[seen.t - 1, None]
    basis = torch.linalg.eigh(scaled.T @ scaled / len(scaled)).eigenvectors
    variances = torch.stack([(gap[seen.t == t] @ basis).square().mean(0) for t in levels]).clamp_min(LEAST)
    knots = torch.linspace(0, 1, aligner.plan.knots, dtype=torch.float64)
    aligner.basis.copy_(basis)
    aligner.variances.copy_(_interpolated(knots, u[1:].double(), variances.log()).exp())


def _interpolated(at: Tensor, u: Tensor, values: Tensor) -> Tensor:
    """Values (T, M) known at u (T,) ascending, at other places; constant beyond the ends."""
    high = torch.searchsorted(u, at).clamp(1, len(u) - 1)
    share = ((at - u[high - 1]) / (u[high] - u[high - 1])).clamp(0, 1)[:, None]
    return values[high - 1] * (1 - share) + values[high] * share


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
