"""How Gaussian the shipped MNIST model is at each level, and what a teleported start costs its samples.

explained = 1 - E|s_θ - s_G|² / E|s_θ|²      of the score, at x_t of test images; of x̂_0 about the mean likewise
frechet   of the judge's features, samples to test images; the same noise with and without teleportation, and as many
          training images beside them: finite sets are apart by that much, which takes ratios towards 1

python -m experiments.processes.painters --data mnist.npz
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.mnist.judge import grade
from experiments.mnist.train_classifiers import load_split
from experiments.shared.distances import frechet
from treesearch.backends.chains.convert import convert
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.moments import Moments
from treesearch.backends.exact.teleport import Teleport
from treesearch.backends.models.mnist import cosine_alphas_cumprod, mnist_kernel, to_images

MOMENTS = Path(__file__).parents[2] / "backends" / "weights" / "mnist_moments.safetensors"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the script."""

    data: Path
    """npz file with train_x, train_y, test_x, test_y: uint8 images (n, 28, 28) and labels."""
    out: Path = Path("runs/results/processes/painters.json")
    num_steps: int = 25
    samples: int = 1000
    images: int = 256
    """Test images that scores are compared at."""
    grids: tuple[str, ...] = ("trailing", "karras")
    skips: tuple[float, ...] = (0.04, 0.08, 0.2, 0.3)
    etas: tuple[float, ...] = (0.0, 1.0)
    seeds: tuple[int, ...] = (0, 1)
    threads: int = 1


def explained(images: Tensor, num_steps: int, seed: int) -> list[dict[str, float]]:
    """Shares of the learnt score and x̂_0 that the Gaussian's explain, by level from the noisiest."""
    kernel, moments, rows = mnist_kernel(num_steps), Moments.load(MOMENTS), []
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    for t in range(num_steps, 0, -1):
        alpha, sigma = (v[t].float() for v in (kernel.chain.schedule.alpha, kernel.chain.schedule.sigma))
        x = alpha * images + sigma * noise
        with torch.no_grad():
            v = kernel.model(x, kernel.chain.timestep[torch.full((len(x),), t)])
        learnt, ours = convert(v, "v", "sample", x, alpha, sigma), moments.endpoint(x, alpha, sigma)
        scores = [convert(x0, "sample", "score", x, alpha, sigma) for x0 in (learnt, ours)]
        rows.append({
            "t": t,
            "sigma_over_alpha": float(sigma / alpha),
            "score": _share(*scores),
            "endpoint": _share(learnt - moments.mean, ours - moments.mean),
        })  # fmt: skip
    return rows


def _share(one: Tensor, other: Tensor) -> float:
    return 1 - float((one - other).square().sum() / one.square().sum())


def sample(kernel: Any, n: int, seed: int, batch_size: int = 100) -> Tensor:
    """n images of the bare chain; the noise of the root and of each level is the same however many levels there are."""
    images = []
    for start in range(0, n, batch_size):
        shape = (min(batch_size, n - start), *kernel.state_shape)
        draw = {t: torch.Generator().manual_seed(1_000_000 * seed + 1000 * start + t) for t in range(1000)}
        x = kernel.prior(torch.randn(shape, generator=draw[0]))
        for t in range(kernel.num_steps, 0, -1):
            x = kernel.transition(x, torch.full(shape[:1], t)).sample(torch.randn(shape, generator=draw[t]))
        images.append(kernel.decode(x))
    return torch.cat(images)


def on_grid(grid: str, num_steps: int, eta: float) -> Any:
    """The shipped model with its levels on one of the grids."""
    kernel = mnist_kernel(num_steps, eta)
    if grid == "trailing":
        return kernel
    schedule = Schedule.karras(cosine_alphas_cumprod(), num_steps, prediction="v")
    return DiffusionKernel(kernel.model, state_shape=kernel.state_shape, schedule=schedule, eta=eta, clip_sample=1.0,
                           decode=to_images)  # fmt: skip


def quality(args: Args) -> list[dict[str, Any]]:
    """Fréchet distance of the judge's features to all test images, by grid, η, seed and share that is skipped."""
    real = grade(load_split(args.data, "test")[0].float() / 255)[1]
    train = grade(load_split(args.data, "train", args.samples)[0].float() / 255)[1]
    rows: list[dict[str, Any]] = [{"training images": len(train), "frechet": frechet(train, real)}]
    for grid, eta, seed in itertools.product(args.grids, args.etas, args.seeds):
        kernel = on_grid(grid, args.num_steps, eta)
        where = {"grid": grid, "eta": eta, "seed": seed}
        whole = frechet(grade(sample(kernel, args.samples, seed))[1], real)
        rows.append(where | {"skip": 0.0, "levels": args.num_steps, "frechet": whole})
        for skip in args.skips:
            short = Teleport(kernel, skip, Moments.load(MOMENTS))
            found = frechet(grade(sample(short, args.samples, seed))[1], real)
            rows.append(where | {"skip": skip, "levels": short.num_steps, "frechet": found, "ratio": found / whole})
        print(*rows[-1 - len(args.skips) :], sep="\n", flush=True)
    return rows


def main(args: Args) -> None:
    """Measure, write and print."""
    torch.set_num_threads(args.threads)
    images = 2 * load_split(args.data, "test")[0][: args.images].float() / 255 - 1
    levels = explained(images, args.num_steps, args.seeds[0])
    for row in levels:
        print({name: round(value, 4) for name, value in row.items()}, flush=True)
    figures = {"samples": args.samples, "images": len(images), "explained": levels, "quality": quality(args)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
