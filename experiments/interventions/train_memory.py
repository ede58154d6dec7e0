"""Train a tiny video transformer on two dynamics, and then an encoder of memory for it, the transformer frozen.

    x_σ = (1 - σ) x_0 + σ z,     loss = E ‖v(x_σ, σ, memory) - (z - x_0)‖²,     σ uniform

First the transformer without memory, on both dynamics. Then the encoder alone: the memory is that of k other clips of
the dynamics of x_0, in any order. Clips are drawn anew for each step, from the seed and the epoch; both stages go on
where they were stopped.

    python -m experiments.interventions.train_memory --out checkpoints/interventions/memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.interventions.clips import DYNAMICS, clips_of
from experiments.interventions.video_model import VideoNetwork, build_encoder
from treesearch.backends.interventions import Rows
from treesearch.backends.interventions.memory import Memory
from treesearch.backends.training.loop import Plan, State, append_row, create, stratified, train

K = 2  # clips of a memory
LEVELS = 1000  # of σ


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    out: Path
    """Folder: base/ for the transformer, memory-SEED/ for the encoder."""
    epochs: int = 30
    """Of the transformer, of 100 steps."""
    memory_epochs: int = 20
    """Of the encoder."""
    batch_size: int = 48
    lr: float = 2e-3
    memory_lr: float = 2e-3
    seed: int = 0
    """Of the encoder; that of the transformer is 0."""
    threads: int = 1


def plan_of(epochs: int, lr: float, ema: float | None) -> Plan:
    """How weights move."""
    return Plan(epochs=epochs, steps=100, lr=lr, warmup=100, cooldown=0.4, ema=ema)


def noised(x0: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x_σ, σ, z - x_0) for clips (n, *SHAPE)."""
    sigma = (stratified(len(x0), LEVELS, rng) + 1) / LEVELS
    z = torch.randn(x0.shape, generator=rng)
    at = sigma.view(-1, 1, 1, 1, 1)
    return (1 - at) * x0 + at * z, sigma, z - x0


def references(labels: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Sets of clips (n, k, *SHAPE), of dynamics (n,)."""
    return clips_of(labels.repeat_interleave(k), rng).unflatten(0, (-1, k))


def remembering(network: nn.Module, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
    """What the network puts out for rows of which each has its own memory (n, M, D)."""
    n = len(x)
    rows = Rows(sigma, torch.arange(1, n + 1), torch.ones(n, dtype=torch.bool))
    with Memory(tuple(map(str, range(n))), tokens).on(network, rows):
        return network(x, LEVELS * sigma)


Predict = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""(x_σ, σ, labels, rng) -> v"""


def losses(args: Args, seed: int, predict: Predict) -> Callable[[int], Iterator[Tensor]]:
    """Epoch -> its losses."""

    def of(epoch: int) -> Iterator[Tensor]:
        rng = torch.Generator().manual_seed(100_003 * seed + epoch)
        torch.manual_seed(100_003 * seed + epoch)  # of dropout
        for _ in range(100):
            labels = torch.randint(len(DYNAMICS), (args.batch_size,), generator=rng)
            x, sigma, target = noised(clips_of(labels, rng), rng)
            yield (predict(x, sigma, labels, rng) - target).square().mean()

    return of


def base(args: Args) -> State:
    """The transformer, trained or gone on with."""
    plan, out = plan_of(args.epochs, args.lr, 0.999), args.out / "base"
    out.mkdir(parents=True, exist_ok=True)
    state = create(VideoNetwork, plan, 0, out)
    free = losses(args, 0, lambda x, sigma, labels, rng: state.network(x, LEVELS * sigma))
    train(state, plan, free, out, _logged(state, out))
    return state


def memory(args: Args, network: nn.Module) -> State:
    """The encoder for a frozen transformer, trained or gone on with."""
    plan, out = plan_of(args.memory_epochs, args.memory_lr, None), args.out / f"memory-{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    network.eval().requires_grad_(False)
    state = create(build_encoder, plan, args.seed, out)

    def predict(x: Tensor, sigma: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        return remembering(network, x, sigma, state.network(references(labels, K, rng)))

    train(state, plan, losses(args, 1 + args.seed, predict), out, _logged(state, out))
    state.network.eval()
    return state


def _logged(state: State, out: Path) -> Callable[[float, float], None]:
    def after(loss: float, seconds: float) -> None:
        append_row(out / "curve.csv", {"epoch": state.epoch, "loss": loss, "seconds": seconds})

    return after


def main(args: Args) -> None:
    """Both stages."""
    torch.set_num_threads(args.threads)
    memory(args, base(args).ema)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
