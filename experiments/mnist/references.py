"""What draws of a target are compared with: real images of its classes, and π of the chain from a pool of rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import treesearch as ts
from experiments.mnist import judge
from experiments.mnist.targets import DRAWS, PART, TARGETS, Target, kernel_on
from experiments.mnist.train_classifiers import load_split
from experiments.shared.cells import Row, where_it_ran
from experiments.shared.distances import Reference, frechet
from treesearch.rewards.base import Reward

POOL_SEED = 9_000_000
ENOUGH = 500  # accepted draws, below which the pool is resampled


@dataclass(frozen=True)
class Known:
    """What draws of a target are compared with.

    Args:
        real: real images.
        model: π of the chain.
        log_z: of the pool.
    """

    real: Reference
    model: Reference
    log_z: float


def pool_part(work: Path, i: int, batch_size: int, device: str) -> Tensor:
    """Images (500, 1, 28, 28) of part i of the pool, from its file or made."""
    file = work / "pool" / f"part-{i:03d}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        free = Reward(lambda samples, _: torch.zeros(len(samples), dtype=torch.float64), "none")
        method = ts.BestOfN(n=PART, lam=0.0)
        found = ts.search(kernel_on(device), free, method, seed=POOL_SEED + i, batch_size=batch_size)
        temporary = file.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, images=found.samples.cpu().numpy())
        temporary.replace(file)
        print(f"pool, part {i}: {found.cost.seconds:.0f} s", flush=True)
    return torch.from_numpy(np.load(file)["images"])


def model_draws(images: Tensor, reward: Reward) -> tuple[Tensor, Row]:
    """2,000 draws of π, or as many as are accepted, and figures of the pool."""
    r = torch.cat([reward(part) for part in images.split(PART)])
    chance, w = np.random.default_rng(POOL_SEED), r.exp()
    accepted = np.flatnonzero(chance.random(len(r)) < w.numpy())[:DRAWS]
    how, rows = "rejection", accepted
    if len(accepted) < ENOUGH:
        cdf = np.cumsum(w.numpy())
        how, rows = "resampling", np.searchsorted(cdf, (np.arange(DRAWS) + chance.random()) / DRAWS * cdf[-1])
    facts = {
        "how": how,
        "pool": len(r),
        "accepted": len(accepted),
        "distinct": len(count := np.unique(rows, return_counts=True)[1]),
        "repeats": float((count * (count - 1)).sum() / max(1, len(rows) * (len(rows) - 1))),
        "log_z": float(w.mean().log()),
        "log_z_se": float(w.std() / w.mean() / len(r) ** 0.5),
        "ess_fraction": float(w.sum() ** 2 / (w**2).sum() / len(r)),
        "mean_reward": float((w * r).sum() / w.sum()),
        "prior_reward": float(r.mean()),
    }
    return images[torch.from_numpy(rows)], facts


def real_images(data: Path, target: Target) -> Tensor:
    """Images (n, 1, 28, 28) of the classes in [0, 1], at most 2,000 of them."""
    splits = [load_split(data, split) for split in ("train", "test")]
    images, labels = (torch.cat(parts) for parts in zip(*splits, strict=True))
    x = images[torch.isin(labels, torch.tensor(target.digits))].float() / 255
    chance = np.random.default_rng(POOL_SEED)
    if target.also is not None:
        x = x[torch.from_numpy(chance.random(len(x))) < target.also()(x).exp()]
    return x[torch.from_numpy(chance.permutation(len(x))[:DRAWS])]


def references(name: str, images: Tensor, data: Path) -> tuple[Known, Row]:
    """Both references of a target, and what is known of them."""
    target = TARGETS[name]
    draws, facts = model_draws(images, target.reward())
    real = real_images(data, target)
    known = Known(Reference(judge.grade(real)[1]), Reference(judge.grade(draws)[1]), facts["log_z"])
    between = distances(known.model.draws, known.real, "real")
    floors = {f"floor_mmd2_{side}": getattr(known, side).floor().mmd2 for side in ("real", "model")}
    floors["floor_mmd2_model"] += known.model.error(facts["repeats"])
    row = {"kind": "reference", "target": name, "real": len(real)} | facts | floors
    return known, row | {f"model_to_{k}": v for k, v in between.items()} | where_it_ran()


def distances(features: Tensor, to: Reference, side: str) -> Row:
    """FID and unbiased MMD² to a reference."""
    return {f"fid_{side}": frechet(features, to.draws), f"mmd2_{side}": to.mmd2(features)}
