"""Figures of shortest paths, in closed form and trained: python -m experiments.processes.spd --data mnist.npz

    length      of paths through N(0, Σ_t), Σ_0 a power law on 16 x 16 (`power_law`)
    exact       KL of the law of x_0 to the data by the chain with E[x_0 | x_t], T = 20
    trained     the same network and budget on the shortest and on the cosine path, N = 10 and 50 steps, η = 1

Of each trained model 400 samples beside the 10,000 test images: Fréchet distance of pixels; root mean square over the
cosine entries of log(variance of samples / of images), the spectral error; share of samples that the judge is sure of
(top probability > .9). The floor is that of 400 training images. Of the 50-step rollouts of the first seed also the
correlation of r(x̂_0) by level with r(x_0), for log p(8 | x) and for the mean pixel.

Models come from `experiments.processes.train_spd --path shortest|cosine --seed s --out CHECKPOINTS/spd-PATH-s`; those
that are not there are left out, and what is already in the result is kept.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.mnist.judge import grade
from experiments.mnist.train_mnist import load_images
from experiments.processes.train_spd import PATHS
from experiments.shared.distances import frechet
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.chains.shortest_path import fisher_length, power_law, shortest_path
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.backends.models.shipped import load_weights
from treesearch.backends.models.shortest_path import SpectralNetwork
from treesearch.rewards.cosines import cosine_transform
from treesearch.rewards.images import classifier, image

STEPS = (10, 50)
SAMPLES, BATCH = 400, 100
CURVE_LEVELS = (45, 40, 35, 30, 25, 20, 15, 10, 5)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments."""

    data: Path
    """npz file with train_x, test_x: uint8 images (n, 28, 28)."""
    checkpoints: Path = Path("checkpoints/processes")
    seeds: tuple[int, ...] = (0, 1, 2)
    seed: int = 0
    """of all samples"""
    threads: int = 1
    out: Path = Path("runs/results/processes/spd.json")


# closed forms


def variances(schedule: Schedule, spectrum: Tensor) -> Tensor:
    """Of x_0..x_T, (T + 1, *state)."""
    alpha, sigma = (v if v.ndim > 1 else v.reshape(-1, 1, 1) for v in (schedule.alpha, schedule.sigma))
    return alpha**2 * spectrum + sigma**2


def final_variance(schedule: Schedule, spectrum: Tensor, eta: float) -> Tensor:
    """Of x_0 under the chain with the exact denoiser of N(0, Σ_0), from N(0, I)."""
    chain, of = Chain(schedule, eta=eta), variances(schedule, spectrum)
    variance = torch.ones_like(spectrum)[None]
    for t in range(schedule.num_steps, 0, -1):
        level = torch.tensor([t])
        law = chain.law(torch.ones_like(variance), level, chain.at("alpha", level, variance) * spectrum / of[t])
        variance = law.mean**2 * variance + law.std**2
    return variance[0]


def divergence(variance: Tensor, spectrum: Tensor) -> float:
    """KL(N(0, variance) || N(0, Σ_0))."""
    ratio = variance / spectrum
    return 0.5 * float((ratio - 1 - ratio.log()).sum())


def closed_forms() -> dict[str, Any]:
    """Lengths of paths, and how near exact denoisers come in 20 steps."""
    spectrum, k = power_law((16, 16)), torch.arange(1001, dtype=torch.float64)
    angle = ((k / 1000 + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    bars = {
        "cosine": angle / angle[0],
        "linear": torch.cat([torch.ones(1), torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)]).double(),
    }
    own = fisher_length(variances(shortest_path(spectrum, 1000), spectrum))
    lengths = {
        name: fisher_length(bar[:, None, None] * spectrum + 1 - bar[:, None, None]) for name, bar in bars.items()
    }
    chains = {
        "shortest": shortest_path(spectrum, 20, "sample"),
        "cosine": Schedule.variance_preserving(cosine_alphas_cumprod(), 20, prediction="sample"),
    }
    return {
        "length": {"shortest": own, "closed form": math.sqrt(0.5 * float(spectrum.log().square().sum()))},
        "longer": {name: length / own for name, length in lengths.items()},
        "kl_20_steps": {
            f"{name}, eta = {eta:g}": divergence(final_variance(schedule, spectrum, eta), spectrum)
            for name, schedule in chains.items()
            for eta in (0.0, 1.0)
        },
    }


# trained models


def schedule_of(network: SpectralNetwork, path: str, steps: int) -> Schedule:
    """T equal steps of τ on either path."""
    tau = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    kept, lost = PATHS[path](network.spectrum, tau)
    kept = kept.clamp_min(0) * (tau < 1).reshape(-1, 1, 1, 1)  # cos²(π/2) is not 0 in floating point
    return Schedule((1000 * tau[1:]).float(), kept.sqrt(), lost.sqrt(), "v")


@torch.inference_mode()
def sample(network: SpectralNetwork, path: str, steps: int, seed: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Images (n, 1, 28, 28) of unguided rollouts, and images of x̂_0 at some levels."""
    chain, rng = Chain(schedule_of(network, path, steps)), torch.Generator().manual_seed(seed)
    images, seen = [], {level: [] for level in CURVE_LEVELS if level < steps}
    for _ in range(SAMPLES // BATCH):
        x = torch.randn(BATCH, 1, 28, 28, generator=rng)
        for t in range(steps, 0, -1):
            level = torch.full((BATCH,), t)
            law = chain.law(x, level, network(x, chain.timestep[level]))
            x = law.sample(torch.randn(x.shape, generator=rng))
            if t in seen:
                seen[t].append(network.decode(law.endpoint))
        images.append(network.decode(x))
    return torch.cat(images), {level: torch.cat(parts) for level, parts in seen.items()}


def spectral_error(images: Tensor, spectrum: Tensor) -> float:
    """Root mean square of log(variance / spectrum) over cosine entries, of images in [0, 1]."""
    matrix = cosine_transform(28)
    own = (matrix @ images.double() @ matrix.T).var(0)
    return float((own / spectrum).log().square().mean().sqrt())


def quality(images: Tensor, test: Tensor) -> dict[str, float]:
    """Figures of images beside the test images, all in [0, 1]."""
    matrix = cosine_transform(28)
    spectrum = (matrix @ test.double() @ matrix.T).var(0)
    return {
        "pixel_frechet": frechet(images.flatten(1), test.flatten(1)),
        "spectral_error": spectral_error(images, spectrum),
        "judge_sure": float((grade(images)[0].amax(1) > 0.9).float().mean()),
    }


def correlations(images: Tensor, seen: dict[int, Tensor]) -> dict[str, dict[int, float]]:
    """Of r(x̂_0) by level with r(x_0)."""
    rewards = {"digit(8)": classifier.digit(8), "brightness": image.brightness()}
    found = {}
    for name, reward in rewards.items():
        last = torch.as_tensor(reward(images)).double()
        each = {level: torch.as_tensor(reward(early)).double() for level, early in seen.items()}
        found[name] = {level: float(torch.corrcoef(torch.stack([r, last]))[0, 1]) for level, r in each.items()}
    return found


def trained(args: Args, known: dict[str, Any]) -> dict[str, Any]:
    """Figures of each trained model that is there."""
    test = load_images(args.data, "test").float() / 255
    for seed in args.seeds:
        for path in PATHS:
            name, file = f"{path}-{seed}", args.checkpoints / f"spd-{path}-{seed}" / "weights.safetensors"
            if name in known or not file.exists():
                continue
            network = load_weights(lambda path=path: SpectralNetwork(PATHS[path]), file)
            known[name] = {}
            for steps in STEPS:
                images, seen = sample(network, path, steps, args.seed)
                known[name][str(steps)] = quality(images, test)
                if seen and seed == args.seeds[0]:
                    known[name]["correlation"] = correlations(images, seen)
            print(name, known[name], flush=True)
            save(args.out, {"trained": known})
    return known


def save(path: Path, found: dict[str, Any]) -> None:
    """Figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(args: Args) -> None:
    """Compute what is not known and write the file."""
    torch.set_num_threads(args.threads)
    before = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    models = trained(args, before.get("trained", {}))
    train, test = (load_images(args.data, split).float() / 255 for split in ("train", "test"))
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))[:SAMPLES]
    settings = {"samples": SAMPLES, "seed": args.seed, "eta": 1.0}
    save(
        args.out,
        {"settings": settings, "closed": closed_forms(), "floor": quality(train[rows], test), "trained": models},
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
