"""At which denoising level is the success of a plan decided, and how early does the predicted endpoint know it?

    python -m experiments.planning.levels --maze medium

For each pair K chains run down from x_T; at each level M continuations are drawn from each chain's state. Printed are,
by level, means over pairs of

    decided     variance of the success between states over all of it (intraclass correlation, one-way layout)
    predicted   correlation of the reward of a state's endpoint prediction with the mean reward below it

Where nothing is decided at x_T, an arm for each x_T of a tree is spent in vain; where endpoints know early, a method
that looks at them (FK, beams) has for nothing what a tree has to sample. Settings of tuning, pairs of another seed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.planning.methods import Task, bed_of
from experiments.planning.pointmaze import held_out_pairs
from treesearch.backends.models.trajectory import TrajectoryKernel
from treesearch.report.tables import markdown_table
from treesearch.rewards.base import Reward

F64 = NDArray[np.float64]
LOWEST = -3.0  # cells; plans that miss by more are all alike


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the script."""

    maze: str = "medium"
    horizon: int | None = 48
    weights: Path | None = None
    """a model that is not shipped"""
    pairs: int = 24
    chains: int = 12
    """K"""
    continuations: int = 8
    """M"""
    num_steps: int = 10
    """T"""
    min_cells: int = 5
    seed: int = 1


@torch.inference_mode()
def below(
    kernel: TrajectoryKernel, reward: Reward, prompt: dict[str, list[float]], chains: int, each: int, floor: float
) -> dict[int, tuple[F64, F64]]:
    """By level: rewards, at least `floor`, of continuations (chains, each) and of endpoint predictions (chains,)."""
    found = {}

    def step(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        encoded = kernel.encode([prompt])
        cond = {name: rows.expand(len(x), *rows.shape[1:]) for name, rows in encoded.items()}
        law = kernel.transition(x, torch.full((len(x),), t), cond)
        return law.sample(torch.randn(x.shape)), law.endpoint

    def rewards(x: Tensor) -> F64:
        values = reward(kernel.decode(x), prompts=[prompt] * len(x))
        return values.clamp(min=floor).numpy()

    x = kernel.clamp(torch.randn(chains, *kernel.state_shape), kernel.encode([prompt]))
    for t in range(kernel.num_steps, 0, -1):
        after, endpoint = step(x, t)
        y = x.repeat_interleave(each, 0)
        for s in range(t, 0, -1):
            y = step(y, s)[0]
        found[t] = rewards(y).reshape(chains, each), rewards(endpoint)
        x = after
    return found


def decided(values: F64) -> float:
    """Intraclass correlation of (pairs, states, continuations): between states of a pair, over all within it."""
    within = values.var(2, ddof=1).mean()
    between = values.mean(2).var(1, ddof=1).mean() - within / values.shape[2]
    return float(between / (within + between)) if within + between > 0 else float("nan")


def predicted(values: F64, endpoints: F64) -> float:
    """Mean over pairs of the correlations over states, both (pairs, states); pairs without a difference drop out."""
    known = [
        np.corrcoef(v, e)[0, 1] for v, e in zip(values, endpoints, strict=True) if v.std() > 1e-9 and e.std() > 1e-9
    ]
    return float(np.mean(known)) if known else float("nan")


def main(args: Args) -> None:
    """Print the table."""
    torch.manual_seed(args.seed)
    bed = bed_of(Task(args.maze, args.horizon, "execution"), args.num_steps, args.weights)
    pairs = held_out_pairs(args.maze, args.pairs, args.seed, min_cells=args.min_cells)
    prompts = [{"start": [*pair.start, 0.0, 0.0], "goal": list(pair.goal)} for pair in pairs]
    runs = [below(bed.kernel, bed.reward, prompt, args.chains, args.continuations, LOWEST) for prompt in prompts]
    body = []
    for t in range(args.num_steps, 0, -1):
        rewards, endpoints = (np.array([run[t][i] for run in runs]) for i in range(2))
        share = decided((rewards == 0).astype(float))
        body.append([str(t), f"{share:.2f}", f"{predicted(rewards.mean(2), endpoints):.2f}"])
    print(markdown_table(body, ("t", "decided", "predicted")))


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, ImportError) as error:
        print(f"planning_levels: {error}", file=sys.stderr)
        sys.exit(1)
