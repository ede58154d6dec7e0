"""What the shipped restoration models do: quality by steps and order, and search with rewards that have no gradient.

    quality   test digits 1000 to 1099 of MNIST, one restoration each, the same prior draws for every sampler;
              PSNR = mean over digits of -10 log10 MSE, its standard error over digits
    search    FK and best-of-N over SDE-2 at 8 NFE a rollout and equal NFE, on four of the digits that go with the
              model; best reward of a search, mean over tasks; intervals over seeds, Student's t, paired by seed

Rewards: size of the image as a JPEG, and how many of three probabilities the reward's classifier gives the right digit
at least (.5, .9, .99): steps, so that their gradient is 0. The judge has seen neither.

    python -m experiments.processes.restoration --data mnist.npz
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import treesearch as ts
from experiments.mnist import judge
from experiments.processes.train_restoration import DEGRADATION, EXAMPLES, degrade
from experiments.shared.cells import where_it_ran
from experiments.shared.evidence_duels import interval
from experiments.shared.stats import mean_se
from treesearch.backends import restoration
from treesearch.backends.base import describe
from treesearch.backends.models.restoration_file import load_model
from treesearch.backends.models.shipped import shipped_file
from treesearch.methods.base import Method
from treesearch.offline.arrays import read_npz
from treesearch.report.tables import markdown_table
from treesearch.rewards import Reward, compressibility
from treesearch.rewards.images.classifier import load_classifier

DIGITS = range(1000, 1100)
SAMPLERS = {  # name: settings of `restoration`
    f"{kind}-{order}, {steps} steps": {"order": order, "eta": float(kind == "SDE"), "num_steps": steps}
    for kind, several in (("ODE", (8, 10, 100)), ("SDE", (8, 100)))
    for order in (1, 2)
    for steps in several
}
TASKS = ("0", "1", "2", "3")  # an 8, a 3, a 5 and a 9
PASSED = (0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the script."""

    data: Path
    """npz file with test_x: uint8 images (n, 28, 28)."""
    out: Path = Path("runs/results/processes/restoration.json")
    weights: str = "blur.safetensors"
    rollouts: int = 32
    """What a search of one task may cost, in rollouts of 8 NFE."""
    seeds: int = 20
    digits: int = len(DIGITS)
    """Use only so many of the test digits (smoke runs)."""
    threads: int = 1


def recognised(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How many of `PASSED` the classifier's probability of the task's digit reaches."""
    labels = torch.tensor([EXAMPLES[int(prompt)] for prompt in prompts])
    given = load_classifier()(images).softmax(1).gather(1, labels[:, None])
    return (given >= torch.tensor(PASSED)).double().sum(1)


REWARDS = {  # name: the reward and λ, about 3 over the spread of rewards under the model
    "compressibility": (compressibility(), 300.0),
    "recognised": (Reward(recognised, "recognised"), 3.0),
}


def restored(kernel: Any, degraded: Tensor, seed: int = 0) -> Tensor:
    """One restoration of each image, (n, 1, 28, 28) in [0, 1]."""
    rng, shape = torch.Generator().manual_seed(seed), (len(degraded), *describe(kernel).noise_shape)
    cond = kernel.encode(list(degraded))
    with torch.no_grad():
        x = kernel.prior(torch.randn(shape, generator=rng), cond)
        for t in range(kernel.num_steps, 0, -1):
            law = kernel.transition(x, torch.full((len(x),), t), cond)
            x = law.sample(torch.randn(shape, generator=rng))
    return kernel.decode(x)


def grade(images: Tensor, clean: Tensor) -> dict[str, float]:
    """MSE and PSNR of images, means over them."""
    mse = ((images - clean) ** 2).flatten(1).mean(1).double()
    psnr = mean_se((-10 * mse.log10()).numpy())
    return {"mse": float(mse.mean()), "mse_se": mean_se(mse.numpy()).se, "psnr": psnr.mean, "psnr_se": psnr.se}


def quality(args: Args) -> dict[str, dict[str, float]]:
    """Every sampler on the same degraded digits."""
    rows = np.arange(DIGITS.start, DIGITS.start + args.digits)
    clean = torch.from_numpy(read_npz(args.data, ["test_x"])["test_x"][rows]).unsqueeze(1).float() / 255
    degraded = degrade(clean, torch.Generator().manual_seed(1))
    found = {"degraded": grade(degraded, clean)}
    for name, settings in SAMPLERS.items():
        found[f"MRS {name}"] = grade(restored(restoration(args.weights, **settings), degraded), clean)
    for eta, steps in ((0.0, 5), (1.0, 5), (0.0, 10), (1.0, 10)):
        kernel = restoration(args.weights, "residual", num_steps=steps, eta=eta)
        found[f"RDDM η = {eta:g}, {steps} steps"] = grade(restored(kernel, degraded), clean)
    return found


def searched(args: Args, name: str, method: Method, seed: int) -> dict[str, float]:
    """One search over four tasks: what its best samples are worth, means over tasks."""
    reward, kernel = REWARDS[name][0], restoration(args.weights, order=2, num_steps=8)
    budget = ts.Budget(nfe=8 * args.rollouts * len(TASKS))
    result = ts.search(kernel, reward, method, prompts=TASKS, budget=budget, seed=seed, batch_size=128)
    clean, labels = truth(args.weights), torch.tensor([EXAMPLES[int(task)] for task in TASKS])
    best = [task.best(1) for task in result.tasks]
    images = torch.stack([torch.as_tensor(samples[0]) for samples, _ in best])
    probabilities, _ = judge.grade(images)
    return {
        "nfe": result.cost.nfe,
        "best": float(np.mean([float(rewards[0]) for _, rewards in best])),
        "mean": float(np.mean([float(task.rewards.mean()) for task in result.tasks])),
        "psnr": grade(images, clean)["psnr"],
        "judge": float((probabilities.argmax(1) == labels).double().mean()),
    }


def truth(weights: str) -> Tensor:
    """The clean images of the tasks."""
    with shipped_file(weights) as path:
        return load_model(path).clean[[int(task) for task in TASKS]]


def duels(args: Args) -> dict[str, Any]:
    """FK and best-of-N by reward and seed, and what lies between them."""
    found: dict[str, Any] = {}
    for name, (_, lam) in REWARDS.items():
        methods = {"fk": ts.FeynmanKac(num_particles=args.rollouts, lam=lam), "best_of_n": ts.BestOfN()}
        rows = {key: [searched(args, name, m, seed) for seed in range(args.seeds)] for key, m in methods.items()}
        gaps = {
            column: interval([a[column] - b[column] for a, b in zip(rows["fk"], rows["best_of_n"], strict=True)])
            for column in ("best", "mean", "psnr", "judge")
        }
        means = {
            key: {column: mean_se([row[column] for row in each])._asdict() for column in each[0]}
            for key, each in rows.items()
        }
        found[name] = {
            "lam": lam,
            "means": means,
            "fk_minus_best_of_n": {key: gap and gap._asdict() for key, gap in gaps.items()},
            "rows": rows,
        }
    return found


def table(found: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    lines = [[name, f"{row['mse']:.4f}", f"{row['psnr']:.2f} ± {row['psnr_se']:.2f}"]
             for name, row in found["quality"].items()]  # fmt: skip
    text = markdown_table(lines, ["", "MSE", "PSNR, dB"])
    lines = [[f"{reward}: {column}", *(f"{duel['means'][key][column]['mean']:.4g}" for key in ("fk", "best_of_n")),
              f"{gap['mean']:.3g} ({gap['low']:.3g} to {gap['high']:.3g})"]
             for reward, duel in found["search"].items() for column, gap in duel["fk_minus_best_of_n"].items()
             if gap]  # fmt: skip
    return text + "\n\n" + markdown_table(lines, ["", "FK", "best-of-N", "difference"])


def main(args: Args) -> None:
    """Measure, write and print."""
    torch.set_num_threads(args.threads)
    settings = {"rollouts": args.rollouts, "seeds": args.seeds, "digits": args.digits, "degradation": DEGRADATION}
    found = {"settings": settings, "quality": quality(args), "search": duels(args), **where_it_ran()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
