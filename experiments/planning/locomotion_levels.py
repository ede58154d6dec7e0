"""At which denoising level is the return of a plan decided, and how early does the predicted endpoint know it?

    python -m experiments.planning.locomotion_levels --weights runs/locomotion/halfcheetah.safetensors

`experiments.planning.levels` for locomotion: the reward is the return that the model predicts. First states are those
that the base sampler comes to, at `states` times of an episode in each of `episodes` environments; intervals are of
the percentile bootstrap over them. `spread` is the standard deviation of the expected return between states of a level:
what there is to choose from at it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from experiments.planning.levels import F64, below, decided, predicted
from experiments.planning.locomotion import Runners, make
from experiments.planning.locomotion_planning import FIRST_STATES, METHODS, control, kernel_of
from experiments.shared.stats import Interval, bootstrap
from treesearch.report.tables import markdown_table
from treesearch.rewards.trajectories.trajectory import discounted_return


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the script."""

    weights: Path = Path("runs/locomotion/halfcheetah.safetensors")
    environment: str = "HalfCheetah-v5"
    episodes: int = 4
    states: int = 4
    """of an episode, `apart` steps from each other"""
    apart: int = 20
    chains: int = 12
    """K"""
    continuations: int = 8
    """M"""
    num_steps: int = 10
    """T"""
    seed: int = 1
    out: Path | None = None
    """JSON file of the table"""


def visited(args: Args) -> list[list[float]]:
    """Observations that the base sampler comes to."""
    kernel, found = kernel_of(args.weights, args.num_steps, None, "cpu"), []
    seeds = [FIRST_STATES + 1_000 * (args.seed + 200) + i for i in range(args.episodes)]
    runners = Runners(partial(make, args.environment), seeds)
    setup = METHODS["base"].make(kernel)
    for part in range(args.states):
        control(setup, runners, rollouts=1, steps=2, length=args.apart, seed=args.seed + part)
        found += runners.observations.tolist()
    return found


def spread(values: F64) -> F64:
    """Standard deviation of the return between states of a level, by first state, of (first states, states, M)."""
    within = values.var(2, ddof=1).mean(1) / values.shape[2]
    return np.sqrt(np.maximum(values.mean(2).var(1, ddof=1) - within, 0))


def _text(found: Interval) -> str:
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


def main(args: Args) -> None:
    """Print the table."""
    torch.manual_seed(args.seed)
    kernel = kernel_of(args.weights, args.num_steps, None, "cpu")
    reward, body = discounted_return(kernel.channels, 1.0), []
    prompts = [{"start": seen} for seen in visited(args)]
    runs = [below(kernel, reward, prompt, args.chains, args.continuations, -np.inf) for prompt in prompts]
    for t in range(args.num_steps, 0, -1):
        returns, endpoints = (np.array([run[t][i] for run in runs]) for i in range(2))
        shares = [decided(each[None]) for each in returns]
        known = [predicted(each.mean(1)[None], end[None]) for each, end in zip(returns, endpoints, strict=True)]
        columns = (np.array(shares), np.array(known), spread(returns))
        body.append([str(t), *(_text(bootstrap(column[None])) for column in columns)])
    print(markdown_table(body, ("t", "decided", "predicted", "spread")))
    if args.out is not None:
        args.out.write_text(json.dumps({"settings": {**vars(args), "weights": None, "out": None}, "rows": body}) + "\n")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, ImportError) as error:
        print(f"locomotion_levels: {error}", file=sys.stderr)
        sys.exit(1)
