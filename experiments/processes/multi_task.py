"""Figures of the model of digits and labels: python -m experiments.processes.multi_task --data mnist.npz

    head        accuracy of p(y | z_t) on test images in five bands of noise, beside a network of the same size that was
                trained on the labels alone (`train_multi_task --task label`), the same draws; and what the plane of
                the state tells by itself
    joint       free samples: does the judge read the generated label off the generated image?
    label       label given, 20 of each: does the judge read it? Once as the kernel does it, once with the label in Ê
                alone, where the network is not told
    image       image given: is the generated label the true one?
    fk          FK with K particles for log p(8 | x), levels scored by the reward of x̂_0 or by the label head, equal NFE

The judge is `experiments/mnist/judge.py`, which no search can see; the reward is another classifier.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import treesearch as ts
from experiments.mnist.judge import grade
from experiments.mnist.train_classifiers import load_split
from experiments.processes.spd import save
from experiments.processes.train_multi_task import states
from treesearch.backends.base import expand
from treesearch.backends.guidance import Valued
from treesearch.backends.models.mnist import TRAIN_STEPS
from treesearch.backends.models.multi_task import LabelHead, MultiTaskKernel, MultiTaskNetwork
from treesearch.backends.models.shipped import load_weights
from treesearch.rewards.images import classifier

BANDS = 5
CHECKED = 1000
STEPS = 25
EACH = 20  # samples a label
FK_SEEDS, PARTICLES, DIGIT = 10, 16, 8


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments."""

    data: Path
    """npz file with test_x, test_y: uint8 images (n, 28, 28) and labels."""
    weights: str = "mt.safetensors"
    """A shipped file or a path."""
    alone: Path = Path("checkpoints/processes/mt-label-0/weights.safetensors")
    """Weights of the label head trained alone; left out where they are not there."""
    seed: int = 0
    threads: int = 1
    out: Path = Path("runs/results/processes/multi_task.json")


class Untold(nn.Module):
    """The network, which is not told what is known."""

    def __init__(self, network: MultiTaskNetwork) -> None:
        super().__init__()
        self.network, self.plane, self.labels = network, network.plane, network.labels

    def forward(self, z: Tensor, timestep: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self.network(z, timestep)


@torch.inference_mode()
def accuracies(network: MultiTaskNetwork, data: tuple[Tensor, Tensor], seed: int, plane: bool = False) -> list[float]:
    """Share of labels that p(y | z_t) puts first, by band of training steps from little noise to much.

    With `plane` it is what the plane alone tells, which is exact and in either network.
    """
    rng, found = torch.Generator().manual_seed(seed), []
    for band in range(BANDS):
        right = 0
        for images, labels in zip(data[0].split(500), data[1].split(500), strict=True):
            e = states(network, images, labels)
            width = TRAIN_STEPS // BANDS
            index = band * width + torch.randint(width, (len(e),), generator=rng)
            alpha, sigma = expand(network.alpha[index], e), expand(network.sigma[index], e)
            z = alpha * e + sigma * torch.randn(e.shape, generator=rng)
            _, seen, evidence = network(z, index)
            told = evidence if plane else seen + evidence
            right += int((told.argmax(1) == labels).sum())
        found.append(right / len(data[0]))
    return found


@torch.inference_mode()
def rollouts(kernel: MultiTaskKernel, prompts: list[Any], seed: int, batch: int = 100) -> tuple[Tensor, Tensor]:
    """Images and labels of one rollout a prompt."""
    rng, images, labels = torch.Generator().manual_seed(seed), [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        cond = kernel.encode(part)
        x = kernel.prior(torch.randn(len(part), *kernel.state_shape, generator=rng))
        for t in range(kernel.num_steps, 0, -1):
            law = kernel.transition(x, torch.full((len(part),), t), cond)
            x = law.sample(torch.randn(x.shape, generator=rng))
        images.append(kernel.decode(x))
        labels.append(kernel.labels(x))
    return torch.cat(images), torch.cat(labels)


def read(images: Tensor) -> Tensor:
    """What the judge reads, (n,)."""
    return grade(images)[0].argmax(1)


def agreement(one: Tensor, other: Tensor) -> float:
    """Share of equal entries."""
    return float((one == other).double().mean())


def directions(network: MultiTaskNetwork, data: tuple[Tensor, Tensor], seed: int) -> dict[str, Any]:
    """Both at once, and either given the other."""
    kernel, untold = (MultiTaskKernel(n, num_steps=STEPS) for n in (network, Untold(network)))
    asked = torch.arange(10).repeat(EACH)
    images, labels = rollouts(kernel, [None] * len(asked), seed)
    told = [{"label": int(y)} for y in asked]
    shown = [{"image": x.float() / 255} for x in data[0][: len(asked)]]
    return {
        "n": len(asked),
        "joint": agreement(read(images), labels),
        "joint_judge_sure": float((grade(images)[0].amax(1) > 0.9).double().mean()),
        "joint_shares": (torch.bincount(labels, minlength=10) / len(labels)).tolist(),
        "label": agreement(read(rollouts(kernel, told, seed)[0]), asked),
        "label_untold": agreement(read(rollouts(untold, told, seed)[0]), asked),
        "image": agreement(rollouts(kernel, shown, seed)[1], data[1][: len(asked)]),
    }


def steering(network: MultiTaskNetwork) -> dict[str, Any]:
    """FK by what scores its levels: log Ẑ, effective sizes and the judge's share of eights, over seeds."""
    reward = classifier.digit(DIGIT)
    plain = MultiTaskKernel(network, num_steps=STEPS)
    found = {}
    for name, kernel in {"endpoint": plain, "label head": Valued(plain, reward, LabelHead(DIGIT))}.items():
        runs = [
            ts.search(kernel, reward, ts.FeynmanKac(num_particles=PARTICLES), seed=seed, progress=False)
            for seed in range(FK_SEEDS)
        ]
        tasks = [run.tasks[0] for run in runs]
        log_z = np.array([task.log_z for task in tasks], dtype=float)
        found[name] = {
            "nfe": [int(run.cost.nfe) for run in runs],
            "reward_calls": float(np.mean([run.cost.reward_calls for run in runs])),
            "log_z": [round(z, 4) for z in log_z.tolist()],
            "log_z_mean": float(log_z.mean()),
            "log_z_std": float(log_z.std(ddof=1)),
            "ess": float(np.mean([task.diagnostics["ess"] for task in tasks])),
            "judge_reads_it": float(np.mean([agreement(read(task.draw(50)), torch.tensor(DIGIT)) for task in tasks])),
            "mean_reward": float(np.mean([float(task.rewards.mean()) for task in tasks])),
        }
        print(name, found[name], flush=True)
    return found


def main(args: Args) -> None:
    """Compute the figures and write the file."""
    torch.set_num_threads(args.threads)
    images, labels = load_split(args.data, "test")
    data = images[:CHECKED], labels[:CHECKED]
    network = load_weights(MultiTaskNetwork, args.weights)
    head = {"joint": accuracies(network, data, args.seed), "plane": accuracies(network, data, args.seed, plane=True)}
    if args.alone.exists():
        head["alone"] = accuracies(load_weights(MultiTaskNetwork, args.alone), data, args.seed)
    print(json.dumps(head), flush=True)
    both = directions(network, data, args.seed)
    print(json.dumps(both), flush=True)
    settings = {"steps": STEPS, "eta": 1.0, "seed": args.seed, "particles": PARTICLES, "fk_seeds": FK_SEEDS}
    save(args.out, {"settings": settings, "head": head, "agreement": both, "fk": steering(network)})


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
