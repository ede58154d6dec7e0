"""One training loop: AdamW with warm-up, a flat stretch and a cosine cool-down to zero, EMA, checkpoints, a curve.

    state = create(build, plan, seed, out)
    train(state, plan, losses, out, after)

An experiment gives the losses: an iterator that computes the next one from the weights as the step before left them.
Draws of epoch e should depend on (seed, e) only: then a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import copy
import csv
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How weights move.

    Args:
        epochs: how many.
        steps: optimiser steps an epoch.
        lr: the highest.
        warmup: steps over which it rises.
        cooldown: last fraction of the run over which it falls to zero.
        weight_decay, betas: of AdamW.
        ema: the decay that the average of the weights ends with; None for no average.
        clip: most that the norm of a gradient is; None for any.
    """

    epochs: int
    steps: int
    lr: float
    warmup: int
    cooldown: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float | None = 0.999
    clip: float | None = 1.0

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, flat, then a half cosine to zero over the last `cooldown` of the run."""
        total = self.epochs * self.steps
        start = total * (1 - self.cooldown)
        fall = min(max((step - start) / max(total - start, 1), 0.0), 1.0)
        return self.lr * (min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * fall)))


class Stateful(Protocol):
    """What a checkpoint can hold: a module, an optimiser."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass
class State:
    """Everything that a checkpoint holds; without an average `ema` is the network itself."""

    network: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0
    others: Mapping[str, Stateful] = field(default_factory=dict)  # what a loss trains beside it

    def parts(self) -> dict[str, Stateful]:
        """What has a state, by the name that it is kept under."""
        return {"network": self.network, "ema": self.ema, "optimizer": self.optimizer, **self.others}


def begin(network: nn.Module, plan: Plan) -> State:
    """A state before its first step."""
    ema = network if plan.ema is None else copy.deepcopy(network).requires_grad_(False)
    how = {"lr": plan.lr, "betas": plan.betas, "weight_decay": plan.weight_decay}
    return State(network, ema, torch.optim.AdamW(network.parameters(), **how))


def create(
    build: Callable[[], nn.Module],
    plan: Plan,
    seed: int,
    out: Path | None,
    device: str = "cpu",
    others: Mapping[str, Stateful] | None = None,
) -> State:
    """The state saved in a folder, or a fresh one; `others` are what a loss trains beside the network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = begin(build().to(device), plan)
    state.others = others or {}
    if out is not None and (path := out / "last.pt").exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        for name, part in state.parts().items():
            part.load_state_dict(saved[name])
        state.epoch, state.step = saved["epoch"], saved["step"]
    return state


def save(state: State, out: Path) -> None:
    """Write the checkpoint so that a crash leaves the old or the new one, never a part."""
    path = out / "last.pt"
    saved = {name: part.state_dict() for name, part in state.parts().items()}
    torch.save(saved | {"epoch": state.epoch, "step": state.step}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def update(state: State, loss: Tensor, plan: Plan) -> None:
    """One optimiser step."""
    for group in state.optimizer.param_groups:
        group["lr"] = plan.learning_rate(state.step)
    state.optimizer.zero_grad()
    loss.backward()
    if plan.clip is not None:
        nn.utils.clip_grad_norm_(state.network.parameters(), plan.clip)
    state.optimizer.step()
    if plan.ema is not None:
        update_ema(state.ema, state.network, state.step, plan.ema)
    state.step += 1


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, step: int, limit: float) -> None:
    """ema <- d ema + (1 - d) network, d = min(limit, (1 + step) / (10 + step))."""
    decay = min(limit, (1 + step) / (10 + step))
    means: list[Tensor] = list(ema.parameters())
    weights: list[Tensor] = list(network.parameters())
    torch._foreach_lerp_(means, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def run_epoch(state: State, losses: Iterable[Tensor], plan: Plan) -> float:
    """A step for each loss; returns their mean."""
    seen = []
    for loss in losses:
        update(state, loss, plan)
        seen.append(loss.detach())
    state.epoch += 1
    return float(torch.stack(seen).double().mean())


def train(
    state: State,
    plan: Plan,
    losses: Callable[[int], Iterable[Tensor]],
    out: Path | None,
    after: Callable[[float, float], None],
) -> None:
    """Train until `plan.epochs` epochs are done.

    Args:
        state: fresh, or one to go on with.
        plan: how weights move.
        losses: epoch -> its losses, computed one after another.
        out: folder of the checkpoint that each epoch ends with; None for none.
        after: called then with the mean loss and the seconds of the epoch.
    """
    while state.epoch < plan.epochs:
        began = time.monotonic()
        loss = run_epoch(state, losses(state.epoch), plan)
        seconds = time.monotonic() - began
        if out is not None:
            save(state, out)
        after(loss, seconds)


def stratified(n: int, steps: int, rng: torch.Generator) -> Tensor:
    """Timesteps (n,) in 0..steps - 1, one from each n-th part of them."""
    u = (torch.arange(n, device=rng.device) + torch.rand(n, generator=rng, device=rng.device, dtype=torch.float32)) / n
    return (u * steps).long().clamp_(max=steps - 1)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one epoch to a curve, and the header when the file is new; prints it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    print(row, flush=True)
