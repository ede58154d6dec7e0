"""Train the frozen policy of the two-route maze on demonstrations, and say how it fares there.

    loss = E_{k, x_0, ε} |f_θ(x_k, k, o) - x_0|²            chunks x_0 normalised, k stratified over a batch

Two minutes of one CPU core. Draws of epoch e depend on (seed, e) only, so a resumed run repeats an uninterrupted one.

    python -m experiments.policies.train_policy

Source: Diffusion Policy: Visuomotor Policy Learning via Action Diffusion (Chi et al., 2023).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.policies.episodes import base_actor, play
from experiments.policies.two_routes import CHUNK, CLOSED, HISTORY, OPEN, demonstrate
from treesearch.backends.models.card import Normalisation
from treesearch.backends.models.mnist import TRAIN_STEPS, cosine_alphas_cumprod
from treesearch.backends.models.policy import PolicyCard, Seen, policy, save_policy
from treesearch.backends.training.loop import Plan, append_row, create, stratified, train


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    out: Path = Path("checkpoints/two_routes")
    """folder for the checkpoint; training goes on from the one found there"""
    weights: Path = Path("checkpoints/two_routes.safetensors")
    """where the EMA weights are exported, in float16, after every epoch"""
    curve: Path = Path("runs/results/policies/two_routes.csv")
    figures: Path = Path("runs/results/policies/two_routes.json")
    """success of the trained policy"""
    walks: int = 1_000
    """demonstrations"""
    epochs: int = 10
    steps: int = 1_000
    batch_size: int = 256
    lr: float = 1e-3
    width: int = 192
    episodes: int = 512
    """to measure success on"""
    grids: tuple[int, ...] = (5, 20)
    """deterministic steps to measure it with"""
    seed: int = 0


def losses(network: nn.Module, told: Tensor, chunks: Tensor, args: Args, epoch: int) -> Iterator[Tensor]:
    """Those of `args.steps` batches of normalised observations (n, O) and chunks (n, H, A)."""
    rng, bar = torch.Generator().manual_seed(1_000_003 * args.seed + epoch), cosine_alphas_cumprod().float()
    for _ in range(args.steps):
        rows = torch.randint(len(told), (args.batch_size,), generator=rng)
        level = stratified(args.batch_size, TRAIN_STEPS, rng)
        a, s = bar[level].sqrt().view(-1, 1, 1), (1 - bar[level]).sqrt().view(-1, 1, 1)
        x0 = chunks[rows]
        x = a * x0 + s * torch.randn(x0.shape, generator=rng)
        yield (network(x, level, told[rows]) - x0).square().mean()


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done, then measure."""
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    data = demonstrate(args.walks, args.seed)
    actions = Normalisation.of(data.chunks.flatten(0, 1))
    chunks = actions.encode(data.chunks)
    card = PolicyCard(
        actions=actions,
        observations=Normalisation.of(data.seen.flatten(0, 1)),
        chunk=CHUNK,
        history=HISTORY,
        width=args.width,
        clip=chunks.abs().max().item(),
        environment="two_routes",
    )
    told = Seen(card.observations, HISTORY)(data.seen.flatten(1))
    plan = Plan(epochs=args.epochs, steps=args.steps, lr=args.lr, warmup=200, cooldown=0.5)
    state = create(card.build, plan, args.seed, args.out)

    def after(loss: float, seconds: float) -> None:
        save_policy(state.ema, card, args.weights)
        append_row(args.curve, {"epoch": state.epoch, "train_loss": loss, "seconds": seconds})

    train(state, plan, partial(losses, state.network, told, chunks, args), args.out, after)
    found = {"walks": args.walks, "pairs": len(chunks), "seed": args.seed, "episodes": args.episodes}
    for name, maze in (("open", OPEN), ("closed", CLOSED)):
        for steps in args.grids:
            actor = base_actor(policy(args.weights, num_steps=steps), seed=args.seed)
            found[f"success_{name}_{steps}_steps"] = play(actor, args.episodes, args.seed, maze).success.mean().item()
    args.figures.parent.mkdir(parents=True, exist_ok=True)
    args.figures.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
