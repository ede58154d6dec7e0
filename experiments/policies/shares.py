"""How much of a chunk x_T decides, by η: what a learnt noise can lead, and what is left for trees below it.

    python -m experiments.policies.shares

Of the mean push sideways at the start, Var E[push | x_T] / Var push, from `noises` x_T with `draws` chains each; and
how often it is to the right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.policies.two_routes import HISTORY, START
from treesearch.backends.models.policy import policy
from treesearch.runs.files import write_json

ETAS = (0.0, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the measurement."""

    num_steps: int = 5
    noises: int = 256
    draws: int = 64
    seed: int = 0
    out: Path = Path("runs/results/policies/shares.json")
    """the figures"""


def pushes(eta: float, args: Args) -> Tensor:
    """Mean push sideways (noises, draws)."""
    kernel, rng = policy(num_steps=args.num_steps, eta=eta), torch.Generator().manual_seed(args.seed)
    n = args.noises * args.draws
    seen = torch.tensor([*START, 0.0, 0.0] * HISTORY).expand(n, -1)
    cond = kernel.seen(seen) | {"task": torch.zeros(n, dtype=torch.long)}
    w = torch.randn(args.noises, *kernel.state_shape, generator=rng).repeat_interleave(args.draws, 0)
    with torch.no_grad():
        x = kernel.prior(w, cond)
        for t in range(args.num_steps, 0, -1):
            x = kernel.transition(x, torch.full((n,), t), cond).sample(torch.randn(x.shape, generator=rng))
    return kernel.decode(x)[..., 0].mean(1).reshape(args.noises, args.draws)


def share(values: Tensor) -> float:
    """Var E[v | group] / Var v of values (groups, draws), without the error of the groups' means."""
    within = values.var(1).mean()
    return float((values.mean(1).var() - within / values.shape[1]) / values.var())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    import tyro

    args = tyro.cli(Args, args=argv, description=__doc__)
    torch.set_num_threads(1)
    found = {}
    for eta in ETAS:
        values = pushes(eta, args)
        found[str(eta)] = {"decided": round(share(values), 3), "right": round(float((values > 0).float().mean()), 3)}
        print(
            f"eta {eta}: x_T decides {found[str(eta)]['decided']:.2f}, {found[str(eta)]['right']:.2f} go right",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
