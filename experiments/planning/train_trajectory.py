"""Train a trajectory model (`backends/models/trajectory.py`) on logged data and export its weights.

    loss = E_{k, x_0, ε, M} Σ_{free entries} w_k (f_θ(x_k, k, M) - x_0)² / number of them,   w_k = min(max(SNR_k, 1), 5)

Windows of H rows lie inside one episode; H is drawn for each batch, and for each window what is known: start and goal,
the start, or nothing. AdamW with warm-up, a flat stretch and a cosine cool-down, EMA. Every epoch (a number of
optimiser steps) ends with an atomic checkpoint, one line of the curve and an export of the EMA weights. Draws of epoch
e depend on (seed, e) only, so a resumed run repeats an uninterrupted one.

    python -m experiments.planning.train_trajectory --data runs/pointmaze/medium.npz --out checkpoints/medium

The weight is that of Progressive Distillation (Salimans and Ho, 2022), section 4, with a ceiling as in
Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from treesearch.backends.models.card import Card, Normalisation, save_model
from treesearch.backends.models.mnist import TRAIN_STEPS, cosine_alphas_cumprod
from treesearch.backends.models.unet1d import WIDTHS, TrajectoryNetwork
from treesearch.backends.training.loop import Plan, append_row, create, stratified, train
from treesearch.offline.data import Array, DataError, OfflineData, absorbing, joined
from treesearch.offline.readers import read
from treesearch.rewards.trajectories.maze import MAZES

FIELDS = ["epoch", "step", "lr", "train_loss", "test_loss_ema", "windows_per_s", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    data: tuple[Path, ...]
    """Episodes, of one file or several: .npz or .hdf5 with D4RL's arrays, or the folder of a Minari dataset."""
    out: Path
    """Folder for the checkpoint; training goes on from the one found there."""
    weights: Path = Path("checkpoints/maze_medium.safetensors")
    """Where the EMA weights are exported, in float16, after every epoch."""
    curve: Path = Path("runs/results/trajectory/medium.csv")
    horizons: tuple[int, ...] = (48, 56, 64)
    stride: int = 4
    """Environment steps a row."""
    goal: int = 2
    """Leading entries of the last observation that a goal fixes; 0 trains without goals."""
    environment: str = "PointMaze_Medium-v3"
    """gymnasium id, for the model's card."""
    maze: str = "medium"
    """Whose map the card gets; "" for none."""
    reward: bool = False
    """Whether rows end in their reward."""
    unknown: float = 0.1
    """Share of windows of which nothing is known; of the others the start is, and the goal of 0.7 of all."""
    absorbing: int = 0
    """Rows that follow an episode which the task ended, at the observation where it did."""
    widths: tuple[int, ...] = WIDTHS
    epochs: int = 40
    steps: int = 500
    """Optimiser steps an epoch."""
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 300
    cooldown: float = 0.5
    """Last fraction of the run over which lr falls to zero."""
    weight_decay: float = 0.01
    ema: float = 0.999
    threads: int = 1
    device: str = "cpu"
    """Draws are made there: another device, another run."""
    seed: int = 0


@dataclass(frozen=True)
class Windows:
    """Every step as the row that would begin there, and where windows may start.

    Args:
        rows: (steps, C): s, and the mean action and summed reward of the next `stride` steps.
        begins, ends: first step of the episodes, and the one after their last.
        stride: steps a row.
    """

    rows: Tensor
    begins: Array
    ends: Array
    stride: int

    def starts(self, horizon: int) -> Array:
        """Steps at which a window of `horizon` rows stays in its episode.

        Raises:
            DataError: every episode is shorter.
        """
        room = self.ends - self.begins + 1 - horizon * self.stride
        if not (room > 0).any():
            raise DataError(
                f"every episode is shorter than {horizon} rows of {self.stride} steps: the longest has "
                f"{(self.ends - self.begins).max()}: lower the horizons or the stride"
            )
        return np.concatenate([np.arange(b, b + r) for b, r in zip(self.begins, room, strict=True) if r > 0])

    def split(self, share: float) -> tuple[Windows, Windows]:
        """The episodes in two, the last `share` of them apart; a single episode is in both."""
        if len(self.ends) == 1:
            return self, self
        cut = len(self.ends) - max(1, round(share * len(self.ends)))
        first = replace(self, begins=self.begins[:cut], ends=self.ends[:cut])
        return first, replace(self, begins=self.begins[cut:], ends=self.ends[cut:])

    def take(self, starts: Array, horizon: int) -> Tensor:
        """Windows (n, horizon, C), where the rows are."""
        steps = torch.from_numpy(starts)[:, None] + self.stride * torch.arange(horizon)
        return self.rows[steps.to(self.rows.device)]


def windows_of(data: OfflineData, stride: int, reward: bool) -> Windows:
    """Rows of `stride` steps, in data units."""
    columns = [data.observations, _rolling(data.actions, stride) / stride]
    columns += [_rolling(data.rewards[:, None], stride)] if reward else []
    rows = torch.from_numpy(np.concatenate(columns, 1).astype(np.float32))
    return Windows(rows, data.ends - data.lengths, data.ends, stride)


def _rolling(values: Array, stride: int) -> Array:
    """Sum of each step and the stride - 1 after it (n, k); at the end of the data, of those that there are."""
    total = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(0, dtype=np.float64)])
    after = np.minimum(np.arange(len(values)) + stride, len(values))
    return total[after] - total[:-1]


def draw_mask(shape: torch.Size, observation: int, goal: int, rng: torch.Generator, unknown: float = 0.1) -> Tensor:
    """What is known of each window (n, H, C): start and goal of .7, nothing of `unknown`, the start of the others."""
    mask = torch.zeros(shape, dtype=torch.bool, device=rng.device)
    u = torch.rand(shape[0], generator=rng, device=rng.device)
    mask[u < 1 - unknown, 0, :observation] = True
    mask[u < min(0.7, 1 - unknown), -1, :goal] = True
    return mask


def loss_of(network: nn.Module, x0: Tensor, mask: Tensor, rng: torch.Generator) -> Tensor:
    """The mean loss of normalised windows x0 (n, H, C), timesteps stratified over the batch."""
    n, bar, at = len(x0), cosine_alphas_cumprod().to(x0.device), x0.device
    index = stratified(n, TRAIN_STEPS, rng)[torch.randperm(n, generator=rng, device=at)]
    a, s = (v.float().view(-1, 1, 1) for v in (bar[index].sqrt(), (1 - bar[index]).sqrt()))
    noise = torch.randn(x0.shape, generator=rng, device=at)
    x = torch.where(mask, x0, a * x0 + s * noise)
    squares = torch.where(mask, 0.0, (network(x, index, mask) - x0) ** 2).sum((1, 2)) / (~mask).sum((1, 2))
    return (squares * ((a / s) ** 2).clamp(1, 5).flatten()).mean()


@dataclass(frozen=True)
class Task:
    """Data and model card of a run."""

    train: Windows
    test: Windows
    card: Card


def task_of(args: Args) -> Task:
    """Read and check the data.

    Raises:
        DataError: data of another format, or that are damaged, see `treesearch.offline`.
    """
    data = absorbing(joined([read(path) for path in args.data]), args.absorbing)
    windows = windows_of(data, args.stride, args.reward)
    card = Card(
        channels=replace(data.channels, reward=int(args.reward)),
        normalisation=Normalisation.of(windows.rows),
        horizon=max(args.horizons),
        stride=args.stride,
        widths=args.widths,
        environment=args.environment,
        maze_map=MAZES.get(args.maze, ()),
    )
    rows = card.normalisation.encode(windows.rows).to(args.device)
    return Task(*replace(windows, rows=rows).split(0.02), card)


def losses(network: nn.Module, task: Task, args: Args, epoch: int) -> Iterator[Tensor]:
    """Those of `args.steps` batches."""
    seed = 1_000_003 * args.seed + epoch
    rng, choice = torch.Generator(args.device).manual_seed(seed), np.random.default_rng(seed)
    starts = {h: task.train.starts(h) for h in args.horizons}
    for _ in range(args.steps):
        horizon = args.horizons[choice.integers(len(args.horizons))]
        x0 = task.train.take(choice.choice(starts[horizon], args.batch_size), horizon)
        mask = draw_mask(x0.shape, task.card.channels.observation, args.goal, rng, args.unknown)
        yield loss_of(network, x0, mask, rng)


def plan_of(args: Args) -> Plan:
    """How weights move."""
    names = ("epochs", "steps", "lr", "warmup", "cooldown", "weight_decay", "ema")
    return Plan(**{name: getattr(args, name) for name in names})


@torch.no_grad()
def held_out_loss(ema: nn.Module, task: Task, args: Args, batches: int = 8) -> float:
    """Loss of the EMA weights on episodes held out, the same draws every time."""
    rng = torch.Generator(args.device).manual_seed(args.seed + 1)
    choice = np.random.default_rng(args.seed + 1)
    starts, losses = task.test.starts(task.card.horizon), []
    for _ in range(batches):
        x0 = task.test.take(choice.choice(starts, 128), task.card.horizon)
        mask = draw_mask(x0.shape, task.card.channels.observation, args.goal, rng, args.unknown)
        losses.append(loss_of(ema, x0, mask, rng).item())
    return sum(losses) / len(losses)


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    task, plan = task_of(args), plan_of(args)
    build = partial(TrajectoryNetwork, task.card.channels.size, args.widths)
    state = create(build, plan, args.seed, args.out, args.device)

    def after(loss: float, seconds: float) -> None:
        save_model(state.ema, task.card, args.weights)
        lr, rate = plan.learning_rate(state.step - 1), args.steps * args.batch_size / seconds
        values = (state.epoch, state.step, lr, loss, held_out_loss(state.ema, task, args), rate, seconds)
        append_row(args.curve, dict(zip(FIELDS, values, strict=True)))

    train(state, plan, partial(losses, state.network, task, args), args.out, after)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
